"""What each unit and each possible auxiliary costs: bytes kept, arithmetic, traced once on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from localgrad.core.auxiliary import Auxiliary
from localgrad.core.boundary import full_precision, main_of
from localgrad.core.engine import autocasting
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel
from localgrad.core.trace import input_dtype
from localgrad.scale.memory import MemoryMeter, on_fake_tensors
from localgrad.scale.recompute import recompute


@dataclass(frozen=True)
class Work:
    """What a device does.

    Attributes:
        flops: floating-point operations.
        moved: bytes read and written.
        calls: how many of PyTorch's operations it takes.
    """

    flops: float = 0.0
    moved: float = 0.0
    calls: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)


@dataclass(frozen=True)
class Cost:
    """What one unit, or one auxiliary with its loss, takes for one batch. Sizes are in bytes.

    Attributes:
        output: what it hands on, without the passengers that entered.
        beside: the passengers that enter it and that the unit before it has not made.
        kept: what the forward pass leaves for the backward pass, output included; 0 if there is no backward pass,
            because nothing up to here is trained.
        forward_peak: the most in the forward pass, above what lived before that.
        backward_peak: the most in the backward pass, above what lived before the forward pass.
        gradients: the gradients of its parameters.
        state: what it adds to the model, which is parameters and buffers.
        forward: the work of the forward pass.
        backward: the work of the backward pass.
        casts: weights in another precision that autocast keeps until the block's forward pass is over, although no
            backward pass needs them.
        seconds: the time of the forward and of the backward pass, once a `Speed` has filled it in.
    """

    output: int
    kept: int
    forward_peak: int
    backward_peak: int
    gradients: int
    state: int
    forward: Work
    backward: Work
    casts: int = 0
    beside: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)


class WorkMeter(TorchDispatchMode):
    """Adds up what operations compute and move. Views, questions and empty memory cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and not func._schema.name.startswith("aten::empty"):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count is not None else 0
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.work += Work(flops, sum(t.numel() * t.element_size() for t in tensors), 1)
        return out


@dataclass(frozen=True)
class Costs:
    """The costs of a network that is cut after each unit.

    Attributes:
        names: those of its units.
        units: what each unit costs, as it is ([0]) and recomputed ([1]). The last one has the network's own head and
            the criterion with it.
        auxiliaries: what the auxiliary costs that a cut after each unit but the last would add, as it is and with its
            coupling recomputed.
        batch: bytes of a batch, its targets included.
        images: bytes of the images that decoders compare with, 0 without decoders.
        trained: whether each unit has parameters that are trained; empty if all have.
    """

    names: tuple[str, ...]
    units: tuple[list[Cost], list[Cost]]
    auxiliaries: tuple[list[Cost], list[Cost]]
    batch: int
    images: int = 0
    trained: tuple[bool, ...] = ()

    def entering(self, first: int) -> int:
        """The bytes that cross before a unit, 0 for the first one: its batch counts apart."""
        return self.units[0][first - 1].output + self.units[0][first].beside if first else 0

    def end(self, first: int, last: int, *, coupling_recomputed: bool = False) -> Cost | None:
        """What the auxiliary of a block of these units costs, or None if it has none: the last and frozen ones."""
        if last == len(self.names) - 1 or self.is_frozen(first, last):
            return None
        return self.auxiliaries[coupling_recomputed][last]

    def is_frozen(self, first: int, last: int) -> bool:
        """Whether a block of these units is wholly frozen and not the last: it runs forward alone."""
        return self.begin(first, last) > last

    def begin(self, first: int, last: int) -> int:
        """The first unit of a block that a backward pass reaches. Those before it are frozen and run forward alone."""
        stop = last + (last < len(self.names) - 1)  # The network's loss is part of its last unit.
        return next((u for u in range(first, stop) if not self.trained or self.trained[u]), stop)

    def of_block(self, first: int, last: int) -> Costs:
        """These costs where the units are a block, through whose frozen beginning no gradient passes."""
        begin = self.begin(first, last)
        if begin == first:
            return self
        kept, remade = self.units
        alone = [
            replace(remade[u], kept=0, backward_peak=0, backward=Work(), seconds=(kept[u].seconds[0], 0.0))
            for u in range(first, begin)
        ]
        return replace(self, units=tuple([*own[:first], *alone, *own[begin:]] for own in self.units))


def trace_costs(model: LocalModel, batch_size: int, autocast: torch.dtype | None = None, targets: Any = None) -> Costs:
    """Costs of `model`, which has a block for each unit. Pieces that look alike are traced once; nothing is run."""
    model.checks.check_size(model, batch_size)
    if any(auxiliary.needs("features") for _, auxiliary in model.isolated):
        raise UserError(
            f"{model.method.name} rebuilds what enters a block, so its cost depends on where the block begins, and no "
            "plan can be made: choose the cuts by lg.localize(blocks=...), and lg.predict_peak tells their bytes"
        )
    plain, again = (_trace(model, batch_size, autocast, targets, again=again) for again in (False, True))
    names = tuple(block.names[0] for block in model.blocks)
    dtype = input_dtype(model.backbone, model.blocks[0].entering.dtype)
    entering = model.blocks[0].entering.random(batch_size, torch.device("meta"), dtype)
    inputs = _bytes(tree_leaves(entering))
    images = _bytes([main_of(entering)]) if any(auxiliary.needs_images for _, auxiliary in model.isolated) else 0
    trained = tuple(any(p.requires_grad for p in block.parameters()) for block in model.blocks)
    return Costs(names, (plain[0], again[0]), (plain[1], again[1]), inputs + plain[2], images, trained)


def without_gradients(costs: Costs) -> Costs:
    """`costs` for a step that finds all gradients there: it makes none that stay."""

    def without(own: Sequence[Cost]) -> list[Cost]:
        return [replace(cost, gradients=0) for cost in own]

    (kept, remade), (plain, other) = costs.units, costs.auxiliaries
    units, auxiliaries = (without(kept), without(remade)), (without(plain), without(other))
    return replace(costs, units=units, auxiliaries=auxiliaries)


def _trace(
    model: LocalModel, batch_size: int, autocast: torch.dtype | None, targets: Any, *, again: bool
) -> tuple[list[Cost], list[Cost], int]:
    """What the units and the auxiliaries cost, and the bytes of the targets."""
    seen: dict[str, Cost] = {}

    def once(what: nn.Module, run: Callable[[Any], Any], h: Any) -> Cost:
        crossing = [(tuple(t.shape), t.dtype, t.requires_grad) for t in tree_leaves(h)]
        key = f"{looks(what)} {crossing}"
        if key not in seen:
            seen[key] = _traced(what, run, h, autocast)
        return seen[key]

    with on_fake_tensors(model, batch_size, targets) as (copied, x, y):
        recompute(copied, units=again, couplings=again)
        images = copied.method.images(x) if any(a.needs_images for _, a in copied.isolated) else None
        units, auxiliaries, h, trained, batch = [], [], x, False, _storages(x)
        for block, auxiliary in copied.isolated:
            units.append(replace(once(block, block, h), beside=_beside(h, units, batch)))
            with torch.no_grad(), autocasting(h, autocast):
                h = block(h)
            trained = trained or any(p.requires_grad for p in block.parameters())
            for tensor in tree_leaves(h):
                tensor.requires_grad_(trained and tensor.is_floating_point())

            def local_loss(h: Any, auxiliary: Auxiliary = auxiliary) -> Tensor:
                return auxiliary.total(auxiliary.losses(auxiliary(h), y, images))

            auxiliaries.append(once(auxiliary, local_loss, h))
        last = copied.blocks[-1]

        def loss(h: Any) -> Tensor:
            return copied.task.criterion(tree_map_only(Tensor, full_precision, last(h)), y)

        units.append(replace(once(last, loss, h), beside=_beside(h, units, batch)))
        return units, auxiliaries, _bytes([leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)])


def looks(module: nn.Module) -> str:
    """What tells a module from others that cost another amount: layers, sizes, what is frozen, modes, steps."""
    sizes = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    modes = "".join(str(int(m.training)) for m in module.modules())
    steps = [m.code for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    return f"{nn.Module.__repr__(module)} {sizes} {modes} {steps}"


class _End(torch.autograd.Function):
    """A scalar that keeps nothing of what it is made of; its backward pass makes gradients as the next unit would."""

    @staticmethod
    def forward(ctx: Any, *out: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in out]
        return out[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        made = [like and torch.empty(like[0], dtype=like[1], device=like[2]) for like in ctx.like]
        return tuple(made)


def _traced(what: nn.Module, run: Callable[[Any], Any], h: Any, autocast: torch.dtype | None) -> Cost:
    forward, backward, meter = WorkMeter(), WorkMeter(), MemoryMeter()
    h = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), h)
    entering = _storages(h)
    with meter:
        meter.mark("forward")
        with forward, autocasting(h, autocast):
            out = run(h)
            meter.mark("end of autocast")
        output = sum(nbytes for key, nbytes in _storages(out).items() if key not in entering)
        meter.mark("backward")
        end = _End.apply(*(t for t in tree_leaves(out) if t.is_floating_point()))
        del out  # only what its own backward pass has kept of it lives on
        with backward:
            if end.requires_grad:  # where all is frozen from the first unit on, there is nothing to compute
                end.backward()
    timeline = meter.result().timeline
    base = timeline[0][1]
    labels = ("forward", "end of autocast", "backward")
    during = {label: [live - base for mark, live in timeline if mark == label] for label in labels}
    left = (during["end of autocast"] or during["forward"])[-1]
    trained = [p for p in what.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    return Cost(
        output=output,
        kept=left if end.requires_grad else 0,
        forward_peak=max(during["forward"]),
        backward_peak=max(during["backward"]),
        gradients=_bytes(trained),
        state=_bytes([*what.parameters(), *what.buffers()]),
        forward=forward.work,
        backward=backward.work,
        casts=during["forward"][-1] - left,
    )


def _storages(crossing: Any) -> dict[int, int]:
    """The bytes of each storage of what crosses, by its number."""
    storages = (t.untyped_storage() for t in tree_leaves(crossing))
    return {storage._cdata: storage.nbytes() for storage in storages}


def _beside(crossing: Any, units: Sequence[Cost], batch: Collection[int]) -> int:
    """The bytes of what enters behind these units, without what the last of them has made, and without the tensors of
    the batch, by the numbers of their storages."""
    if not units or not isinstance(crossing, dict):
        return 0
    return sum(size for key, size in _storages(crossing).items() if key not in batch) - units[-1].output


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
