"""The memory of one step, with everything that is live: measured while it runs, or predicted without running it."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad.core.boundary import with_main
from localgrad.core.checks import check_example_targets
from localgrad.core.copies import without_values
from localgrad.core.engine import block_steps, local_backward
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel, localized
from localgrad.core.sharded import storages
from localgrad.core.task import Task
from localgrad.core.trace import input_dtype
from localgrad.scale.fakes import RealSizes

KINDS: tuple[str, ...] = ("parameters", "gradients", "optimizer", "activations", "auxiliaries")
PICKS = ("aten::index", "aten::index_select", "aten::gather")  # They read a few entries of their first input.
Optimizers = Sequence[torch.optim.Optimizer]
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class PeakBytes:
    """The most bytes that were live at once.

    Attributes:
        total: The peak in bytes.
        reserved: On CUDA, the bytes that the allocator held. None on the CPU.
        timeline: On the CPU, (label, live bytes) each time that a storage came or went. `MemoryMeter.mark` sets labels.
        split: On the CPU, the peak by `KINDS`. "parameters" include buffers, "auxiliaries" are their parameters and
            averages, and "activations" are all that is in no other kind.
    """

    total: int
    reserved: int | None = None
    timeline: list[tuple[str, int]] = field(default_factory=list, repr=False)
    split: dict[str, int] = field(default_factory=dict)


class MemoryMeter(TorchDispatchMode):
    """Follows every tensor storage that an operation reads or makes, on the CPU or another eager device.

    A storage that is first seen as an input was live before, so it counts from the start. Scratch memory inside a
    kernel is not seen. Each operation gets slower, so measure one step and not a run.

    Args:
        model: The model whose tensors get a kind of their own in the split. Default: none.
        optimizers: The optimizers whose state gets a kind of its own. Default: none.
    """

    def __init__(self, model: nn.Module | None = None, optimizers: Optimizers = ()) -> None:
        super().__init__()
        self.label = self._first_label = ""
        self._paused = False
        self._known: dict[int, weakref.finalize] = {}
        self._serial: dict[int, int] = {}  # The serial number of the storage that has this address now.
        self._sizes: list[int] = []  # The bytes of each storage by serial number.
        self._kinds: dict[int, str] = {}
        self._before: list[int] = []  # Serial numbers of storages that were live before.
        self._parts: dict[int, set[tuple[int, int]]] = {}  # Of such data: offset and size of what is read.
        self._receives = False  # Whether what is read now is what a message of gloo has brought.
        self._refilled: set[int] = set()  # Storages that `fully_shard` empties and fills again without an operation.
        self._changes: list[tuple[str, int, int]] = []  # Label, serial number, and 1 (new) or -1 (gone).
        self._named = {s._cdata: kind for t, kind in _named(model, optimizers) for s in storages(t)}
        self._parameters = [] if model is None else [p for p in model.parameters() if p.requires_grad]
        self._hooks: list[Any] = []

    def mark(self, label: str) -> None:
        """Sets the label under which the timeline lists what follows."""
        self.label = label

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside, such as reading the next batch from a set that lies in memory."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __enter__(self) -> MemoryMeter:
        self._first_label = self.label
        self._hooks = [p.register_post_accumulate_grad_hook(self._gradient) for p in self._parameters]
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        for finalizer in self._known.values():
            finalizer.detach()
        for hook in self._hooks:
            hook.remove()
        self._known.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        self._see_refilled(kwargs.get("out", ()) if func.namespace == "fsdp" else ())
        name = func._schema.name
        self._receives = self._receives and name in ("aten::split", "aten::copy_")
        picks = func.is_view or func.namespace == "prim" or name in PICKS
        self._see((args, kwargs), made=self._receives, picks=picks)
        self._receives |= func.namespace == "c10d"
        out = func(*args, **kwargs)
        if not func.is_view:  # A view has the storage of an input.
            self._see(out, made=True)
        return out

    def result(self) -> PeakBytes:
        """The peak so far."""
        live = sum(self._sizes[serial] for serial in self._before)
        timeline = [(self._first_label, live)]
        for label, serial, sign in self._changes:
            live += sign * self._sizes[serial]
            timeline.append((label, live))
        peak = max(range(len(timeline)), key=lambda i: timeline[i][1])
        split: dict[str, int] = dict.fromkeys(KINDS, 0)
        for serial, sign in [(s, 1) for s in self._before] + [(s, sign) for _, s, sign in self._changes[:peak]]:
            split[self._kinds.get(serial, "activations")] += sign * self._sizes[serial]
        return PeakBytes(timeline[peak][1], timeline=timeline, split=split)

    def _see(self, tree: Any, *, made: bool, picks: bool = False) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    data = not (made or storage._cdata in self._named or isinstance(leaf, nn.Parameter))
                    # A set of data is not part of the step. What is picked from it counts when it is read.
                    if not (data and picks and storage._cdata not in self._known):
                        self._follow(storage, made)
                        if data and not picks:
                            self._read(storage, leaf)

    def _see_refilled(self, filled: Any) -> None:
        """Counts storages anew whose size has changed, and the whole parameters that are `filled` now."""
        for storage in (s for leaf in tree_leaves(filled) for s in storages(leaf)):
            self._follow(storage, made=True)
            self._refilled.add(storage._cdata)
        for key in self._refilled & self._known.keys():
            storage = cast(Any, self._known[key].peek())[0]
            if storage.nbytes() != self._sizes[self._serial[key]]:
                cast(Any, self._known[key].detach())[1](key, self._serial[key])
                self._follow(storage, made=True)
            self._kinds[self._serial[key]] = "parameters"

    def _read(self, storage: torch.UntypedStorage, leaf: Tensor) -> None:
        """Notes which part of some data an operation reads: no other part counts."""
        serial = self._serial[storage._cdata]
        if serial in self._parts and not leaf.is_sparse:
            self._parts[serial].add((int(leaf.storage_offset()), leaf.numel() * leaf.element_size()))
            self._sizes[serial] = min(storage.nbytes(), sum(size for _, size in self._parts[serial]))

    def _follow(self, storage: torch.UntypedStorage, made: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        serial = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._serial[key] = serial
        if made:
            self._changes.append((self.label, serial, 1))
        else:
            self._before.append(serial)
            if key in self._named:
                self._kinds[serial] = self._named[key]
            else:
                self._parts[serial] = set()
        self._known[key] = weakref.finalize(storage, self._gone, key, serial)

    def _gone(self, key: int, serial: int) -> None:
        del self._known[key]
        self._changes.append((self.label, serial, -1))

    def _gradient(self, parameter: Tensor) -> None:
        for storage in () if parameter.grad is None else storages(parameter.grad):
            serial = self._serial.get(storage._cdata)
            if serial is not None:
                self._kinds[serial] = "gradients"


def measure_peak(
    step: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    model: nn.Module | None = None,
    optimizers: Optimizers = (),
) -> PeakBytes:
    """Runs a step once and measures the most bytes that were live during it.

    On the CPU a `MemoryMeter` measures them, on CUDA the allocator does.

    Args:
        step: Runs forward and backward passes and the optimizer's step. Run it once before, because the first step
            makes the optimizer's state.
        device: The device of the tensors. Default: the CPU.
        model: As in `MemoryMeter`. Default: none.
        optimizers: As in `MemoryMeter`. Default: none.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return PeakBytes(allocated, reserved)
    meter = MemoryMeter(model, optimizers)
    with meter:
        step()
    return meter.result()


def predict_peak(
    model: LocalModel,
    batch_size: int,
    optimizers: Callable[[LocalModel], Optimizers | torch.optim.Optimizer],
    *,
    targets: Any = None,
    step_as_you_go: bool = False,
    autocast: torch.dtype | None = None,
) -> PeakBytes:
    """Predicts what `measure_peak` would find for a training step, without running the step or taking its memory.

    A copy of the model takes two steps on fake tensors, which have shapes and no values. For a network of ImageNet's
    size this takes seconds.

    Args:
        model: The result of `localize`.
        batch_size: The number of images in a batch.
        optimizers: Makes the optimizer of the copy, or with `step_as_you_go` a list of one for each block.
        targets: An example of the targets, with any number of samples. Default: an int64 class a sample.
        step_as_you_go: Whether each block's optimizer steps before the next block runs. Default: False.
        autocast: The dtype of each block's forward pass. Default: the model's own.

    Raises:
        UserError: The memory depends on values, so it must be measured, the criterion does not take the targets, or
            there are not as many optimizers.
    """
    model = localized(model, "predict_peak")
    model.checks.check_size(model, batch_size)
    check_targets(model, targets, next(model.backbone.parameters()).device)
    return predicted(model, batch_size, optimizers, targets, step_as_you_go=step_as_you_go, autocast=autocast)


def predicted(
    model: LocalModel,
    batch_size: int,
    optimizers: Callable[[LocalModel], Optimizers | torch.optim.Optimizer],
    targets: Any,
    *,
    step_as_you_go: bool,
    autocast: torch.dtype | None,
) -> PeakBytes:
    """What `predict_peak` returns, for arguments that were checked."""
    with on_fake_tensors(model, batch_size, targets) as (copied, x, y):
        made, count = optimizers(copied), len(copied.blocks) if step_as_you_go else 1
        own = [made] if isinstance(made, torch.optim.Optimizer) else made
        if len(own) != count:
            raise UserError(f"optimizers makes {len(own)}, not {count}: one, or with step_as_you_go one for each block")

        def step() -> None:
            training_step(copied, own, copied.inputs.batch(x), y, step_as_you_go=step_as_you_go, autocast=autocast)

        step()  # makes the optimizers' state
        return measure_peak(step, model=copied, optimizers=own)


def check_targets(model: LocalModel, targets: Any, device: torch.device) -> None:
    """Raises UserError unless a model can be trained on an example of the targets.

    Args:
        model: The model.
        targets: The example, or None if no one has given any. Then a class a sample is tried.
        device: Where the network is.
    """
    if targets is not None:
        sizes = [len(leaf) for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.ndim]
        return check_example_targets(model, targets, max(sizes, default=0), device)
    try:
        return model.checks.trial.check(model, torch.zeros(2, dtype=torch.int64), torch.device("cpu"))
    except UserError as error:
        raise UserError(f"{error}; give an example of the targets, as targets=y") from error


@contextlib.contextmanager
def on_fake_tensors(
    model: LocalModel, batch_size: int, targets: Any = None
) -> Iterator[tuple[LocalModel, Tensor, Any]]:
    """Copies a model to fake tensors, and makes inputs and targets for it, the latter like the example `targets`.

    Fake tensors have shapes, devices and memory formats, but no values. Those of the meta device count as if they were
    on the CPU. Raises UserError if an operation depends on values.
    """
    task = copy.deepcopy(model.task)  # The copy of a criterion that holds tensors keeps their values.
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), RealSizes():
            yield _faked(model, task, batch_size, targets)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise UserError(
            f"the memory of a step cannot be predicted where it depends on values, as that of {error} does: measure it "
            "with lg.measure_peak"
        ) from error


def _faked(model: LocalModel, task: Task, batch_size: int, targets: Any) -> tuple[LocalModel, Tensor, Any]:
    copied = without_values(model, copies={id(model.task): task})
    copied.task = cast(Task, SimpleNamespace(criterion=task.criterion, check_targets=lambda targets: None))
    weight = next((p for p in copied.parameters() if p.ndim == 4), next(copied.parameters()))
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last and len(model.image) == 3 else torch.contiguous_format
    dtype = input_dtype(copied.backbone, model.blocks[0].entering.dtype)
    drawn = model.blocks[0].entering.random(batch_size, weight.device, dtype)
    x = with_main(drawn, lambda t: t.contiguous(memory_format=layout))
    like = torch.zeros(1, dtype=torch.int64) if targets is None else targets

    def faked(t: Tensor) -> Tensor:
        shape = (batch_size, *t.shape[1:]) if t.ndim else ()
        return torch.zeros(shape, dtype=t.dtype, device=weight.device)

    return copied, x, tree_map_only(Tensor, faked, like)


def training_step(
    model: LocalModel,
    optimizers: Optimizers,
    x: Any,
    y: Any,
    *,
    step_as_you_go: bool = False,
    autocast: torch.dtype | None = None,
) -> None:
    """Takes a step as `localgrad train` does: optimizers[0] steps at the end, or optimizers[k] steps after block k."""
    if not step_as_you_go:
        local_backward(model, x, y, autocast=autocast)
        optimizers[0].step()
        optimizers[0].zero_grad()
        return
    model.move_averages(stepped=True)
    for done in block_steps(model, x, y, autocast=autocast):
        model.move_averages(done.block)
        optimizers[done.block].step()
        optimizers[done.block].zero_grad()


def optimizers_for(
    groups: Sequence[dict[str, Any]], make: MakeOptimizer, *, as_you_go: bool
) -> list[torch.optim.Optimizer]:
    """Makes the optimizers for `training_step`: one for all of `param_groups`, or one for each block."""
    if not as_you_go:
        return [make(list(groups))]
    return [make([g for g in groups if g["block"] == k]) for k in sorted({g["block"] for g in groups})]


def optimizer_slots(optimizer: MakeOptimizer) -> tuple[float, float]:
    """What the optimizer takes for each byte of a parameter: bytes of its state, and bytes for a moment as it steps.

    Raises UserError if it cannot step by gradients alone.
    """
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros(4096)
    made = optimizer([{"params": [parameter]}])
    try:
        made.step()
    except TypeError as error:
        raise UserError(f"{type(made).__name__} cannot step by gradients alone, take another: {error}") from error
    state = [t for own in made.state.values() for t in own.values() if isinstance(t, Tensor) and t.numel() > 1]
    found = measure_peak(made.step)
    size = 4 * 4096
    return sum(t.numel() * t.element_size() for t in state) / size, (found.total - found.timeline[0][1]) / size


def _named(model: nn.Module | None, optimizers: Optimizers) -> Iterator[tuple[Tensor, str]]:
    """Tensors with their kind. The last kind of a tensor counts."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from ((value, "optimizer") for value in state.values() if isinstance(value, Tensor))
    if model is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            yield tensor, "parameters"
    if isinstance(model, LocalModel):
        for tensor in (*model.auxiliaries.parameters(), *model.auxiliaries.buffers()):
            yield tensor, "auxiliaries"
