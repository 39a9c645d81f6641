"""The step: K isolated backward passes, each freed before the next block runs. See `local_backward`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from localgrad.core.auxiliary import Auxiliary, Method, Site, full_precision
from localgrad.core.blocks import Block, Traced, split, trace_units
from localgrad.core.couplings import MAN
from localgrad.core.errors import UserError
from localgrad.core.rebuild import Reads
from localgrad.core.task import Classification, Task
from localgrad.core.watch import Watch


@dataclass(frozen=True)
class StepResult:
    """One step: `losses[k]` of each block (weighted, scalar), `parts[k]` its objectives by name (unweighted; empty
    for the last block), and the network's logits [B, classes]. All detached. Of a step through some blocks only,
    `losses` and `parts` are theirs; without the last one there are no logits, but what they hand on."""

    losses: list[Tensor]
    parts: list[dict[str, Tensor]]
    logits: Tensor
    handed: Tensor | None = None


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
        self.watch = watch

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
        for read in (m() for module in self.parts(k) for m in module.modules() if isinstance(m, Reads)):
            if id(read) in beside:
                found[id(read)] = read
        return list(found.values())

    def needs_images(self, blocks: Sequence[int]) -> bool:
        """Whether one of these blocks reconstructs images."""
        return any(cast(Auxiliary, self.auxiliaries[k]).needs_images for k in blocks if k < len(self.auxiliaries))

    def move_averages(self, k: int, *, pull: bool = False) -> None:
        """Moves block k's averages once, before its optimizer steps; those of form="pull" once it has stepped."""
        for auxiliary in self.auxiliaries[k : k + 1]:
            auxiliary.move(pull=pull)  # pyright: ignore[reportCallIssue]

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
    coupling start from the backbone's weights as they are now: load a checkpoint first. Raises UserError for cuts that
    cannot be.
    """
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
    built = [Block(g, head if g is groups[-1] else None) for g in groups]
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
    parameter = next(backbone.parameters())
    for auxiliary in auxiliaries:
        auxiliary.to(parameter.device, parameter.dtype)
    watch = traced.cut.watch
    for source in (s for auxiliary in auxiliaries if auxiliary.coupling for s in auxiliary.coupling.sources):
        watch.copies(source.name, source.module)
    if silent := watch.silent():
        told = f"local_backward does not call the hooks of {', '.join(silent)}"
        warnings.warn(f"{told}: it calls the units within, so hook those", stacklevel=2)
    return LocalModel(backbone, built, auxiliaries, method, task, tuple(example.shape[1:]), watch).train()


def local_backward(
    model: LocalModel,
    x: Tensor,
    y: Tensor,
    *,
    images: Tensor | None = None,
    scale: float | Tensor = 1.0,
    autocast: torch.dtype | None = None,
    check: Callable[[int, Tensor], None] | None = None,
    after_block: Callable[[int], None] | None = None,
    micro_batch: tuple[int, int] | None = (0, 1),
    blocks: Sequence[int] | None = None,
) -> StepResult:
    """K isolated backward passes: gradients of every block and auxiliary are added to `.grad`, none crosses.

        h = x
        for k in 0 .. K-2:
            h = block[k](h)                                # graph of this block only
            loss_k = sum_i weight[k][i] * objective_i(auxiliary[k](h), targets, images)
            backward(loss_k)                               # this block + its auxiliary; its graph is freed here
            h = h.detach()
            coupling k: ema <- momentum * ema + (1 - momentum) * source, for each unit it copies
        loss = criterion(block[K-1](h), targets); backward(loss)

    x: normalised inputs [B, C, H, W]. y: targets [B]. images: [B, C, H, W] in [0, 1] for reconstruction, by default x
    un-normalised with the method's mean and std. scale: every loss is multiplied by it before its backward pass (for
    accumulation and gradient scalers). autocast: a dtype to compute each block's forward pass in. check(k, loss): is
    called when block k has its gradients, before its coupling moves; what it raises ends the step there.
    after_block(k): is called when the coupling has moved; a step of the block's optimizer belongs there. micro_batch:
    (which, of how many) when gradients are accumulated: averages move once per optimizer step, and with `form="pull"`
    as the next step begins, when the copy has taken its gradient step. None leaves them to `model.move_averages`, for
    a caller who may yet drop the step. blocks: neighbours that shall be trained, instead of all; x is then what the
    block before them hands on, and images have no default.
    """
    model.watch.check(model.backbone)
    blocks = blocks or range(len(model.blocks))
    shape = tuple(model.blocks[blocks[0] - 1].boundary.shape) if blocks[0] else model.image
    model.task.check_targets(y)
    if tuple(x.shape[1:]) != shape or len(x) != len(y):
        expected = " x ".join(map(str, ("batch", *shape)))
        raise UserError(
            f"inputs of shape {tuple(x.shape)} for {len(y)} targets: this model was localized for {expected}"
        )
    if images is None and not blocks[0] and model.needs_images(blocks):
        images = model.method.images(x)
    first, last = (False, False) if micro_batch is None else (micro_batch[0] == 0, micro_batch[0] == micro_batch[1] - 1)
    losses, parts = [], []
    h, logits = x, x
    for k in blocks:
        if first:
            model.move_averages(k, pull=True)
        h, loss, part, logits = block_backward(model, k, h, y, images=images, scale=scale, autocast=autocast)
        losses.append(loss)
        parts.append(part)
        if check is not None:
            check(k, loss)
        if last:
            model.move_averages(k)
        if after_block is not None:
            after_block(k)
    return StepResult(losses, parts, logits, h if logits is None else None)


def block_backward(
    model: LocalModel,
    k: int,
    h: Tensor,
    y: Tensor,
    *,
    images: Tensor | None = None,
    scale: float | Tensor = 1.0,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Any]:
    """Block k's part of `local_backward`: its gradients, from what the block before hands on.

    h: [B, *shape] without a graph. What the block hands on, its loss and its objectives' values, and on the last block
    the network's logits (else None). All detached; the graph is freed.
    """
    block = model.blocks[k]
    if k == len(model.blocks) - 1:
        with autocasting(h, autocast):
            logits = block(h)
        loss = model.task.criterion(tree_map_only(Tensor, full_precision, logits), y)
        if loss.requires_grad or k == 0:  # a frozen last block has nothing to learn
            _backward(loss, scale)
        return h, loss.detach(), {}, tree_map_only(Tensor, Tensor.detach, logits)
    auxiliary = cast(Auxiliary, model.auxiliaries[k])
    with autocasting(h, autocast):
        h = block(h)
        block.check(h)
        outputs = auxiliary(h)
    part = auxiliary.losses(outputs, y, images)
    del outputs  # or they would live on through the backward pass
    loss = auxiliary.total(part)
    _backward(loss, scale)
    return h.detach(), loss.detach(), {name: value.detach() for name, value in part.items()}, None


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
        rows.append(
            (
                str(k),
                first if count == 1 else f"{first} .. {last} ({count})",
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
    return Auxiliary(momentum, method.terms(site))


def _backward(loss: Tensor, scale: float | Tensor) -> None:
    (loss if isinstance(scale, float) and scale == 1.0 else loss * scale).backward()


def autocasting(h: Tensor, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Opened around one block's forward only: around the whole step, its cache of cast weights would outlive them."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(h.device.type, dtype)


def _outputs(traced: Traced) -> int:
    """How many logits the backbone gives."""
    match traced.cut.gives:
        case (int() as classes,):
            return classes
    raise UserError(
        f"the backbone gives {traced.cut.gives}, not one vector of logits a sample: pass a task of your own"
    )
