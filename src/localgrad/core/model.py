"""Makes a model of a backbone, its blocks and their auxiliaries (`localize`)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from localgrad.core.auxiliary import Auxiliary, Method, Site, cast_head
from localgrad.core.blocks import Block, Traced, Unit, split, trace_units
from localgrad.core.boundary import Boundary
from localgrad.core.checks import StepChecks, check_example_targets, check_making, no_local_model
from localgrad.core.copies import computed
from localgrad.core.couplings import MAN
from localgrad.core.errors import UserError
from localgrad.core.inputs import Inputs, main_input, targets_of
from localgrad.core.language_model import LanguageModel
from localgrad.core.rebuild import TensorReference
from localgrad.core.table import table
from localgrad.core.task import AnyLoss, Classification, Segmentation, Task
from localgrad.core.trace import Trace
from localgrad.core.unreached import passengers_with_heads, warn_of_unread
from localgrad.core.watch import Watch


class LocalModel(nn.Module):
    """A backbone, the K blocks that reference its modules, and the auxiliaries of the first K - 1.

    Calling the model calls its backbone, and `print(model)` shows a table.

    Attributes:
        backbone: The user's own network, untouched.
        blocks: The K blocks.
        auxiliaries: The K - 1 auxiliaries. Number k gives block k its loss. That of a wholly frozen block is empty.
        method: The method that has built the auxiliaries.
        task: The task of the network.
        image: The shape of one input, without the batch. Of several inputs, that of the main one.
        inputs: How a batch enters the first block.
        checks: What earlier steps have shown about the model.
        watch: Finds changes of the backbone since it was cut.
        evaluates: Whether the blocks compute in evaluation mode what the backbone computes there.
        sharded: Where the network has its parameters, if `shard` has given each rank a part of them. Else None.
        peers: The ranks that train the same blocks, if the model is that of a `Stage`. Else None.
        accepts_loss_kwargs: Tells the Trainer of transformers that losses are means over a batch, which it divides by
            the number of batches whose gradients it adds up.
    """

    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(
        self,
        backbone: nn.Module,
        blocks: Sequence[Block],
        auxiliaries: Sequence[Auxiliary],
        method: Method,
        task: Task,
        image: tuple[int, ...],
        watch: Watch,
        inputs: Inputs,
        evaluates: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliaries = nn.ModuleList(auxiliaries)
        self.blocks = tuple(blocks)  # In a tuple, because the backbone has registered their modules already.
        self.method = method
        self.task = task
        self.image, self.inputs, self.evaluates = image, inputs, evaluates
        self.accumulate: Any = 1  # into how many micro-batches `local_backward` splits a batch
        self.checks = StepChecks()
        self.checks.copies.note(self)
        self.watch = watch
        self.sharded: Any = None
        self.peers: Any = None

    def __deepcopy__(self, memo: dict) -> LocalModel:
        if self.sharded is not None:
            raise UserError("a sharded model, of which each rank has a part, cannot be copied: do so before lg.shard")
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo.update(computed(self, memo))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone(*args, **kwargs)

    def train(self, mode: bool = True) -> LocalModel:
        super().train(mode)
        own = set(self.backbone.modules())  # Their mode is set already, maybe by a `train` of their own.
        for module in (m for block in self.blocks for m in block.modules() if m not in own):
            module.training = mode
        return self

    @property
    def isolated(self) -> list[tuple[Block, Auxiliary]]:
        """Each block but the last, with its auxiliary."""
        return list(zip(self.blocks[:-1], self.auxiliaries, strict=True))  # pyright: ignore[reportReturnType]

    def members(self, k: int) -> list[nn.Parameter]:
        """The trainable parameters of block k and of its auxiliary."""
        return [p for module in self.parts(k) for p in module.parameters() if p.requires_grad]

    def statistics(self, k: int) -> list[Tensor]:
        """The buffers that a forward pass of block k in training mode may change.

        They are those of block k and its auxiliary, and those elsewhere in the backbone that these read.
        """
        found = {id(b): b for module in self.parts(k) for b in module.buffers()}
        buffers = {id(b) for b in self.backbone.buffers()}
        for read in (m() for module in self.parts(k) for m in module.modules() if isinstance(m, TensorReference)):
            if id(read) in buffers:
                found[id(read)] = read
        return list(found.values())

    def needs_images(self, blocks: Sequence[int]) -> bool:
        """Whether one of these blocks reconstructs images."""
        return any(cast(Auxiliary, self.auxiliaries[k]).needs_images for k in blocks if k < len(self.auxiliaries))

    def move_averages(self, k: int | None = None, *, stepped: bool = False) -> None:
        """Moves the averages of the couplings once, and counts a step of shared readouts, which follow every n steps.

        Call it once before each optimizer step, and with `stepped=True` after it if a coupling has form="pull".
        `local_backward` makes these calls itself.

        Args:
            k: The number of a block, whose coupling alone is moved. Default: all.
            stepped: Whether the optimizer has stepped already. True moves only averages of form="pull", and False only
                the others. Default: False.
        """
        for auxiliary in self.auxiliaries if k is None else self.auxiliaries[k : k + 1]:
            cast(Auxiliary, auxiliary).move(stepped=stepped)

    def refresh(self) -> None:
        """Starts all averages and copies anew from the present weights of the backbone, as `localize` starts them.

        Call it after weights have been loaded into the backbone, if that is after `localize`. It sets values in place,
        so an optimizer stays valid. Heads keep their weights.
        """
        localized(self, "refresh")
        for auxiliary in self.auxiliaries:
            cast(Auxiliary, auxiliary).refresh()

    def ema_distances(self) -> list[float | None]:
        """The relative distance of each auxiliary's averages from their sources, or None where it has no averages."""
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
    example: Any,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    targets: Any = None,
    task: Task | None = None,
) -> LocalModel:
    """Cuts a network into gradient-isolated blocks and builds their auxiliaries, on the network's device and dtype.

    Load a checkpoint before, because the copies in a coupling start from the backbone's weights, or call
    `model.refresh()` after loading it. Make the optimizer afterwards, from `param_groups(model)`, or it does not train
    the auxiliaries.

    Freeze parameters before, too: `requires_grad` is read as it is. A block whose parameters are all frozen gets no
    auxiliary. Frozen parameters are frozen in copies too, with their values.

    The backbone is put into training mode. If it is in that mode already, those of its modules that are in evaluation
    mode, such as frozen batch norms, stay in it.

    Args:
        backbone: The network to cut. Its modules are referenced, not copied or changed.
        blocks: The number of blocks, or the name of the last unit of each (`units(backbone, example)` lists them).
            Default: 4, and 1 for `bp()`.
        method: What gives each block its own loss, such as `dgl()`.
        coupling: `MAN()`, `MANPlusPlus()`, `DeepMAN()` or None. Default: None.
        example: A normalised input batch, [B, C, H, W]. Where the network's forward takes several tensors, a tuple of
            them, or a dictionary by name. Its `labels` are targets. Only shapes and dtypes count.
        criterion: The loss, called as `criterion(output, targets)`, which returns a scalar. The output is that of the
            network, or that of a head, which has the same shape: [B, n], or [B] if the network gives one number a
            sample. Default: cross-entropy with as many classes as the backbone has logits.
        targets: The targets of the example, for which the criterion is tried now. Default: it is tried at the first
            step, before anything has changed.
        task: A task of your own instead of a criterion, for a network that returns several tensors. See `Task`.

    Returns:
        The model to train. Its `backbone` is the network itself.

    Raises:
        UserError: An argument is wrong, the network cannot be cut there, or its output does not fit the task.
    """
    model = localize_traced(
        backbone, None, blocks=blocks, method=method, coupling=coupling, example=example, criterion=criterion,
        targets=targets, task=task,
    )  # fmt: skip
    if type(task) is Segmentation:
        warn_of_unread(model.blocks[-1], "out")
    return model


def localize_traced(
    backbone: nn.Module,
    trace: Trace | None,
    *,
    blocks: int | Sequence[str] | None = None,
    method: Method,
    coupling: MAN | None = None,
    example: Any,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    targets: Any = None,
    task: Task | None = None,
    of_units: bool = False,
) -> LocalModel:
    """Does what `localize` does, for the planner: with a trace that is there, and by units.

    Args:
        backbone: The network to cut.
        trace: The trace of this network or of a copy of it. Default: it is traced.
        of_units: Whether each unit is a block, with an auxiliary behind each but the last, whether it is frozen or not.
            The planner takes from it what each of them costs.

    The other arguments are those of `localize`.
    """
    check_making(backbone, example, task, criterion)
    for name, value, kind in (("method", method, Method), ("coupling", coupling, MAN | None)):
        if not isinstance(value, kind):
            raise UserError(f"{name} takes what its function gives, such as lg.dgl() or lg.MAN(), not {value!r}")
    wanted = 4 if blocks is None and method.terms is not None and not of_units else blocks
    traced = trace_units(backbone, example, wanted, trace)
    if method.terms is None:
        if blocks not in (None, 1) and blocks != (traced.units[-1].name,):  # A plan of one block names its last unit.
            warnings.warn(f"{method.name} trains end to end: blocks={blocks} has no effect, there is 1", stacklevel=3)
        blocks = 1
    groups = [[u] for u in traced.units] if of_units else split(traced, 4 if blocks is None else blocks)
    if coupling is not None and len(groups) == 1:
        warnings.warn("a coupling has no effect on a single block", stacklevel=3)
    task = _task(traced, task) if criterion is None else AnyLoss(criterion, traced.cut.gives)
    built = [*map(Block, groups[:-1]), Block(groups[-1], traced.head, traced.checkpoint)]
    # A last unit that returns several tensors or a dictionary is not copied, because a head could not read the copy.
    copied = traced.units if traced.head is not None or traced.cut.gives_one else traced.units[:-1]
    if coupling is not None and len(groups) > 1 and groups[-1][0] not in copied and not of_units:
        warnings.warn(
            f"a coupling has no effect before '{groups[-1][0].name}', which returns several tensors or a dictionary",
            stacklevel=3,
        )
    auxiliaries = _auxiliaries(groups, copied, method, coupling, task, everywhere=of_units)
    device = next(backbone.parameters()).device
    for auxiliary in auxiliaries:
        auxiliary.to(device).train()
    watch, entering = traced.cut.watch, built[0].entering
    inputs = Inputs.of(example, entering.passengers)
    for source in (s for auxiliary in auxiliaries if auxiliary.coupling for s in auxiliary.coupling.sources):
        watch.copies(source.name, source.module)
    model = LocalModel(backbone, built, auxiliaries, method, task, entering.shape, watch, inputs, traced.cut.evaluates)
    if (targets := targets_of(example, targets)) is not None:
        check_example_targets(model, targets, len(main_input(example)), device)
    to_training(backbone)
    _warn_of_hooks(traced)
    return model


def _task(traced: Traced, task: Task | None) -> Task:
    """The task of a network. Raises UserError if the output of the network does not fit."""
    gives = traced.cut.gives
    if task is None:
        task = Classification(gives[0] if isinstance(gives, tuple) and len(gives) == 1 else 2)
    known = (Classification, Segmentation, LanguageModel)
    if isinstance(task, known) and type(task) in known:
        task.check_output(gives)  # A subclass may read something else.
    return task


def _auxiliaries(
    groups: list[list[Unit]],
    copied: Sequence[Unit],
    method: Method,
    coupling: MAN | None,
    task: Task,
    *,
    everywhere: bool,
) -> list[Auxiliary]:
    """Builds the auxiliary of each block but the last. That of a wholly frozen block is empty unless `everywhere`.

    copied: the units that copies may be made of.
    """
    image, width = groups[0][0].input, groups[-1][-1].output.channels
    auxiliaries = []
    for index, group in enumerate(groups[:-1]):
        if not (everywhere or any(p.requires_grad for unit in group for p in unit.module.parameters())):
            auxiliaries.append(Auxiliary(None, {}))
            continue
        site = Site(
            boundary=group[-1].output,
            downstream=tuple(u for later in groups[index + 1 :] for u in later if u in copied),
            index=index,
            count=len(groups) - 1,
            image=(image.channels, *image.size),
            width=width,
            task=task,
            entering=groups[index - 1][-1].output if index else group[0].output,
            head=method.head,
        )
        auxiliaries.append(_auxiliary(site, method, coupling, passengers_with_heads(group)))
    return auxiliaries


def _auxiliary(site: Site, method: Method, coupling: MAN | None, passengers: Sequence[Boundary]) -> Auxiliary:
    """passengers: those that get heads of their own, which a coupling does not change."""
    assert method.terms is not None
    beside = {
        f"{name}_of_{passenger.passengers[0].name}": replace(term, reads=passenger.passengers[0].name)
        for passenger in passengers
        for name, term in method.terms(replace(site, boundary=passenger, downstream=())).items()
    }
    momentum = None
    if coupling is not None and site.downstream:
        momentum = coupling.build(site.downstream)
        end = momentum.sources[-1]
        beyond = site.downstream[site.downstream.index(end) + 1 :]
        site = replace(site, boundary=end.output, downstream=beyond, head=site.head or coupling.head)
    auxiliary = Auxiliary(momentum, method.terms(site) | beside)
    dtypes = {passenger.passengers[0].name: passenger.dtype for passenger in passengers}
    for name, term in auxiliary.terms.items():
        cast_head(auxiliary.heads[name], dtypes.get(term.reads or "", site.boundary.dtype))
    return auxiliary


def _warn_of_hooks(traced: Traced) -> None:
    """Warns of hooks in the network that its blocks do not run."""
    if traced.cut.packed:
        warnings.warn(
            f"the network has hooks on saved tensors, such as save_on_cpu, around '{traced.cut.packed[0]}': its blocks "
            "are trained without them, and lg.recompute(model) saves memory in their place",
            stacklevel=4,
        )
    if silent := traced.cut.watch.silent():
        names = ", ".join(silent)
        warnings.warn(
            f"local_backward does not call the hooks of {names}: it calls the units within, so hook those", stacklevel=4
        )


def to_training(backbone: nn.Module) -> None:
    """Puts a network into training mode. If it is in that mode already, frozen parts of it stay in evaluation mode."""
    frozen = [m for m in backbone.modules() if backbone.training and not m.training]
    backbone.train()
    for module in frozen:
        module.training = False


def localized(model: Any, what: str, *, sharded: bool = False, whole: bool = False) -> LocalModel:
    """Unwraps a model from torch.compile.

    Args:
        model: What a user gave.
        what: The function that it was given to.
        sharded: Whether the function takes a sharded model. Default: False.
        whole: Whether it takes no model of a `Stage`, which has the weights of some blocks. Default: False.

    Raises:
        UserError: It is no LocalModel, is sharded, or is that of a stage.
    """
    unwrapped = model if isinstance(model, LocalModel) else getattr(model, "_orig_mod", None)
    if not isinstance(unwrapped, LocalModel):
        raise no_local_model(model, what, LocalModel)
    if unwrapped.sharded is not None and not sharded:
        raise UserError(f"{what} takes no sharded model, of which each rank has only a part: leave lg.shard out")
    if whole and unwrapped.peers is not None:
        raise UserError(
            f"{what} trains all blocks, and the model of a stage has the weights of its own: take stage.block_steps"
        )
    return unwrapped
