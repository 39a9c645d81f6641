"""A backbone, its blocks and what trains them: how they are made (`localize`), shown, and put into optimizers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from localgrad.core.auxiliary import Auxiliary, Method, Site, cast_head
from localgrad.core.blocks import Block, Traced, split, trace_units
from localgrad.core.checks import StepChecks, check_making, no_local_model
from localgrad.core.copies import computed
from localgrad.core.couplings import MAN
from localgrad.core.errors import UserError
from localgrad.core.rebuild import TensorReference
from localgrad.core.task import Classification, Task
from localgrad.core.watch import Watch


class LocalModel(nn.Module):
    """A backbone, the K blocks that reference its modules, and the auxiliaries of the first K - 1.

    backbone: the user's own network, untouched; calling the model calls it. blocks[k]: runs block k.
    auxiliaries[k]: what trains it. image: shape of one input. watch: tells whether the backbone is still what was cut.
    `print(model)` shows a table.
    """

    def __init__(
        self,
        backbone: nn.Module,
        blocks: Sequence[Block],
        auxiliaries: Sequence[Auxiliary],
        method: Method,
        task: Task,
        image: tuple[int, ...],
        watch: Watch,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliaries = nn.ModuleList(auxiliaries)
        self.blocks = tuple(blocks)  # a tuple, so that the backbone's modules are not registered a second time
        self.method = method
        self.task = task
        self.image = image
        self.accumulate: Any = 1  # into how many micro-batches `local_backward` splits a batch
        self.checks = StepChecks()
        self.watch = watch

    def __deepcopy__(self, memo: dict) -> LocalModel:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo.update(computed(self, memo))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def forward(self, x: Tensor) -> Any:
        return self.backbone(x)

    def train(self, mode: bool = True) -> LocalModel:
        super().train(mode)
        own = set(self.backbone.modules())  # which have their mode, maybe one that their own `train` has given them
        for module in (m for block in self.blocks for m in block.modules() if m not in own):
            module.training = mode
        return self

    @property
    def isolated(self) -> list[tuple[Block, Auxiliary]]:
        """The blocks that have an auxiliary, with it: all but the last."""
        return list(zip(self.blocks[:-1], self.auxiliaries, strict=True))  # pyright: ignore[reportReturnType]

    def members(self, k: int) -> list[nn.Parameter]:
        """The trainable parameters of block k and of its auxiliary."""
        return [p for module in self.parts(k) for p in module.parameters() if p.requires_grad]

    def statistics(self, k: int) -> list[Tensor]:
        """The buffers of block k and of its auxiliary, and those of the network that it reads: what a forward pass in
        training mode may change."""
        found = {id(b): b for module in self.parts(k) for b in module.buffers()}
        beside = {id(b) for b in self.backbone.buffers()}
        for read in (m() for module in self.parts(k) for m in module.modules() if isinstance(m, TensorReference)):
            if id(read) in beside:
                found[id(read)] = read
        return list(found.values())

    def needs_images(self, blocks: Sequence[int]) -> bool:
        """Whether one of these blocks reconstructs images."""
        return any(cast(Auxiliary, self.auxiliaries[k]).needs_images for k in blocks if k < len(self.auxiliaries))

    def move_averages(self, k: int | None = None, *, stepped: bool = False) -> None:
        """Moves the averages of block k's coupling, or of all couplings, once. `local_backward` does so itself.

        Call it once per optimizer step, just before the step. Couplings whose averages move after the step
        (form="pull") move with `stepped=True`, and the others do nothing then.
        """
        for auxiliary in self.auxiliaries if k is None else self.auxiliaries[k : k + 1]:
            cast(Auxiliary, auxiliary).move(stepped=stepped)

    def ema_distances(self) -> list[float | None]:
        """How far each auxiliary's averages are from their sources, relative to those; None where there are none."""
        return [auxiliary.coupling and auxiliary.coupling.distance() for _, auxiliary in self.isolated]

    def parts(self, k: int) -> list[nn.Module]:
        """Block k, and its auxiliary where it has one."""
        return [self.blocks[k], *self.auxiliaries[k : k + 1]]

    def __repr__(self) -> str:
        return table(self)


def localize(
    backbone: nn.Module,
    *,
    blocks: int | Sequence[str] | None = None,
    method: Method,
    coupling: MAN | None = None,
    example: Tensor,
    task: Task | None = None,
) -> LocalModel:
    """Cuts `backbone` into gradient-isolated blocks and builds their auxiliaries, on the backbone's device and dtype.

    blocks: how many, or the last unit of each (`units(backbone, example)` lists the names); by default 4, or `bp`'s 1.
    coupling: `MAN()`, `MANPlusPlus()`, `DeepMAN()` or None. example: a normalised input batch [B, C, H, W]; only its
    shape counts. task: by default classification into as many classes as the backbone gives logits. Copies of the
    coupling start from the backbone's weights as they are now: load a checkpoint first. Make the optimizer afterwards,
    of `param_groups(model)`, or auxiliaries would not be trained. The backbone is put into training mode, as
    `backbone.train()` does; but where it is in that mode already, those of its modules that are in evaluation mode, as
    frozen batch norms are, stay there. Raises UserError for cuts that cannot be.
    """
    check_making(backbone, example, task)
    for name, value, kind in (("method", method, Method), ("coupling", coupling, MAN | None)):
        if not isinstance(value, kind):
            raise UserError(f"{name} takes what its function gives, such as lg.dgl() or lg.MAN(), not {value!r}")
    if method.terms is None:
        if blocks not in (None, 1):
            warnings.warn(f"{method.name} trains end to end: blocks={blocks} has no effect, there is 1", stacklevel=2)
        blocks = 1
    traced = trace_units(backbone, example)
    all_units, head = traced.units, traced.head
    groups = split(traced, 4 if blocks is None else blocks)
    if coupling is not None and len(groups) == 1:
        warnings.warn("a coupling has no effect on a single block", stacklevel=2)
    task = task or Classification(_outputs(traced))
    built = [*map(Block, groups[:-1]), Block(groups[-1], head, traced.checkpoint)]
    if traced.cut.packed:
        warnings.warn(
            f"the network has hooks on saved tensors, such as save_on_cpu, around '{traced.cut.packed[0]}': its blocks "
            "are trained without them, and lg.recompute(model) saves memory in their place",
            stacklevel=2,
        )
    image = all_units[0].input
    auxiliaries = []
    for index, group in enumerate(groups[:-1]):
        site = Site(
            boundary=group[-1].output,
            downstream=tuple(u for later in groups[index + 1 :] for u in later),
            index=index,
            count=len(groups) - 1,
            image=(image.channels, *image.size),
            width=all_units[-1].output.channels,
            task=task,
            head=method.head,
        )
        auxiliaries.append(_auxiliary(site, method, coupling))
    device = next(backbone.parameters()).device
    for auxiliary in auxiliaries:
        auxiliary.to(device).train()
    _to_training(backbone)
    watch = traced.cut.watch
    for source in (s for auxiliary in auxiliaries if auxiliary.coupling for s in auxiliary.coupling.sources):
        watch.copies(source.name, source.module)
    if silent := watch.silent():
        told = f"local_backward does not call the hooks of {', '.join(silent)}"
        warnings.warn(f"{told}: it calls the units within, so hook those", stacklevel=2)
    return LocalModel(backbone, built, auxiliaries, method, task, tuple(example.shape[1:]), watch)


def _to_training(backbone: nn.Module) -> None:
    """Puts a network into training mode. If it is in that mode already, frozen parts of it stay in evaluation mode."""
    frozen = [m for m in backbone.modules() if backbone.training and not m.training]
    backbone.train()
    for module in frozen:
        module.training = False


def localized(model: Any, what: str) -> LocalModel:
    """`model`, or the one that torch.compile has wrapped. Raises UserError for anything else that `what` was given."""
    plain = model if isinstance(model, LocalModel) else getattr(model, "_orig_mod", None)
    if not isinstance(plain, LocalModel):
        raise no_local_model(model, what, LocalModel)
    return plain


def param_groups(
    model: LocalModel,
    *,
    weight_decay: float | None = None,
    no_decay: bool = False,
    lr: float | Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups, one or two per block, each marked with `block`.

    weight_decay: for every trainable parameter; with `no_decay`, none for norms, biases and scales (parameters of
    fewer than two dimensions). lr: one for all blocks or one for each. Of both, the optimizer's own by default. EMA
    copies and frozen parameters never enter; a block that is wholly frozen has an empty group.
    """
    model = localized(model, "param_groups")
    count = len(model.blocks)
    if isinstance(lr, Sequence) and len(lr) != count:
        raise UserError(f"lr lists {len(lr)} learning rates for {count} blocks")
    groups = []
    for k in range(count):
        rate = lr[k] if isinstance(lr, Sequence) else lr
        plain = [p for p in model.members(k) if no_decay and p.ndim < 2]
        decayed = [p for p in model.members(k) if not (no_decay and p.ndim < 2)]
        for parameters, decay in ((decayed, weight_decay), (plain, 0.0)):
            own = {"lr": rate, "weight_decay": decay}
            if parameters or (parameters is decayed and not plain):
                groups.append({"params": parameters, "block": k, **{n: v for n, v in own.items() if v is not None}})
    return groups


def table(model: LocalModel) -> str:
    """Block, units, boundary shape, auxiliary, parameters of both and their MiB, as aligned text."""
    rows = [("block", "units", "hands on", "auxiliary", "parameters", "auxiliary's", "MiB")]
    for k, (block, auxiliary) in enumerate(zip(model.blocks, [*model.auxiliaries, None], strict=True)):
        own, extra = (list(m.parameters()) if m is not None else [] for m in (block, auxiliary))
        mib = sum(p.numel() * p.element_size() for p in own + extra) / 2**20
        first, last, count = block.names[0], block.names[-1], len(block.names)
        recomputed = sum(any(a <= i <= b for a, b in block.ranges) for i in range(len(block)))
        rows.append(
            (
                str(k),
                (first if count == 1 else f"{first} .. {last} ({count})")
                + (f", {recomputed} recomputed" if recomputed else ""),
                "logits" if auxiliary is None else "x".join(map(str, block.boundary.shape)),
                "-" if auxiliary is None else str(auxiliary),
                f"{sum(p.numel() for p in own):,}",
                f"{sum(p.numel() for p in extra):,}",
                f"{mib:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(w) if i >= 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([f"{type(model.backbone).__name__}, {model.method.name}, {len(model.blocks)} blocks", *aligned])


def _auxiliary(site: Site, method: Method, coupling: MAN | None) -> Auxiliary:
    momentum = None
    if coupling is not None:
        momentum = coupling.build(site.downstream)
        end = momentum.sources[-1]
        beyond = site.downstream[site.downstream.index(end) + 1 :]
        site = replace(site, boundary=end.output, downstream=beyond, head=site.head or coupling.head)
    assert method.terms is not None
    auxiliary = Auxiliary(momentum, method.terms(site))
    for head in auxiliary.heads.values():
        cast_head(head, site.boundary.dtype)
    return auxiliary


def _outputs(traced: Traced) -> int:
    """How many logits the backbone gives."""
    match traced.cut.gives:
        case (int() as classes,):
            return classes
    raise UserError(
        f"the backbone gives {traced.cut.gives}, not one vector of logits a sample: pass a task of your own"
    )
