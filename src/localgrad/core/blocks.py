"""Divides a backbone into units and groups them into K blocks, by the names of the backbone's own modules.

Units and blocks reference the modules that they run. They never copy or rename them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from localgrad.core.boundary import MAIN, Boundary, main_of, with_main
from localgrad.core.checks import check_network
from localgrad.core.copies import copy_values, draw_anew, duplicate
from localgrad.core.errors import UserError, unknown
from localgrad.core.hooks import FORWARD
from localgrad.core.inputs import main_input
from localgrad.core.layouts import boundary_behind, reads_row
from localgrad.core.rebuild import FrozenReference
from localgrad.core.recomputation import Recomputed
from localgrad.core.segments import Segment, Segments, segments
from localgrad.core.trace import Trace


class Clone(nn.Module):
    """Copies its input, because the unit behind it begins with an operation in place."""

    def forward(self, h: Any) -> Any:
        return with_main(h, Tensor.clone)


class Fed(nn.Module):
    """Runs a copy of a unit elsewhere in the network, where other passengers cross.

    It gives the unit what the unit reads, and hands on all tensors that entered or were made.
    """

    def __init__(self, module: nn.Module, reads: Boundary) -> None:
        super().__init__()
        self.module, self.several = module, bool(reads.passengers)

    def forward(self, h: Any) -> Any:
        entered = h if isinstance(h, dict) else {MAIN: h}
        out = self.module(entered if self.several else entered[MAIN])
        made = out if isinstance(out, dict) else {MAIN: out}
        left = {**entered, **{name: tensor for name, tensor in made.items() if tensor is not None}}
        return left if len(left) > 1 else left[MAIN]


class Main(nn.Module):
    """The main one of the tensors that enter."""

    def forward(self, h: Any) -> Tensor:
        return main_of(h)


class RequiresGrad(nn.Module):
    """Gives its output `requires_grad` and drops the gradient that arrives.

    The input of a block requires no gradient. Behind such an input a reentrant checkpoint gives its parameters none.
    """

    def forward(self, h: Any) -> Any:
        if main_of(h).requires_grad or not torch.is_grad_enabled():
            return h
        return with_main(h, lambda main: cast(Tensor, _Drop.apply(main, torch.empty(0, requires_grad=True))))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, with_gradient: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True, eq=False)
class Unit:
    """The smallest piece of a network, which a cut may not split.

    Attributes:
        name: The name of the backbone's module at its end.
        module: What runs it, [B, *input.shape] -> [B, *output.shape], or dictionaries where there are passengers. It
            references the backbone's own modules.
        input: The boundary before it.
        output: The boundary behind it.
        checkpoint: The number of the checkpoint in which the backbone itself runs it, or None.
        needs: The names of the passengers that it reads.
        fed: Whether passengers cross somewhere in the network, so that copies of the unit are `Fed`.
    """

    name: str
    module: nn.Module
    input: Boundary
    output: Boundary
    checkpoint: int | None = None
    needs: frozenset[str] = frozenset()
    fed: bool = False

    @property
    def changes_shape(self) -> bool:
        return self.input.shape != self.output.shape

    def copy(self, *, fresh: bool) -> nn.Module:
        """Copies the module. The copy's attribute `origin` is its `Origin`.

        Parameters that are frozen are frozen in the copy, too.

        Args:
            fresh: Whether to draw the parameters anew. If some are frozen, all keep their values, because those that
                are trained, such as adapters, were made for the frozen ones.
        """
        origin = Origin(self, fresh and all(p.requires_grad for p in self.module.parameters()))
        module = duplicate(self.module)
        vars(module)["origin"] = origin
        origin.start(module)
        return Fed(module, self.input) if self.fed else module


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a copy of a unit comes from.

    Attributes:
        unit: The unit.
        fresh: Whether the copy starts with newly drawn parameters, and not with those of the unit.
    """

    unit: Unit
    fresh: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the unit, in the order of the copy's."""
        return self.unit.module.parameters()

    def start(self, module: nn.Module) -> None:
        """Gives the copy the values that it starts with."""
        copy_values(module, self.unit.module)
        if self.fresh:
            draw_anew(module)


Call = Callable[[nn.Module, Tensor], Tensor]
Range = tuple[int, int]  # the first and the last of some modules in a row, by number


def plain_call(module: nn.Module, h: Tensor) -> Tensor:
    """Runs `module` and keeps what its backward pass needs. `recomputed` is the other way to run it."""
    return module(h)


class Block(nn.Sequential):
    """Consecutive units that share one loss. The last block also runs the network's own head.

    Attributes:
        names: The names of its units.
        entering: The boundary before it.
        boundary: The boundary behind it.
        ranges: The modules that are recomputed together in the backward pass, by number. A range may lie within another
            one. At first they are those that the backbone itself runs in an activation checkpoint.
    """

    ranges: tuple[Range, ...]

    def __init__(self, units: Sequence[Unit], head: nn.Module | None = None, checkpoint: int | None = None) -> None:
        """checkpoint: the number of the backbone's own activation checkpoint that the head runs in, if any."""
        super().__init__(*[u.module for u in units], *([] if head is None else [head]))
        self.names = tuple(u.name for u in units)
        self.entering, self.boundary = units[0].input, units[-1].output
        own = set(self.parameters())
        for part in self.modules():
            if isinstance(part, FrozenReference):
                part.whole = own.issuperset(map(part.reference[0].get_parameter, part.frozen))
        numbers = [*[u.checkpoint for u in units], *([] if head is None else [checkpoint])]
        runs = [list(run) for _, run in groupby(range(len(numbers)), numbers.__getitem__)]
        self.recompute([(run[0], run[-1]) for run in runs if numbers[run[0]] is not None])

    def recompute(self, ranges: Iterable[Range]) -> None:
        """Sets which modules are recomputed together. Ranges lie apart or within each other."""
        self.ranges = tuple(sorted(set(ranges), key=lambda r: (r[0], -r[1])))
        # A tuple, so that the modules are not registered a second time.
        self._steps = tuple(_with_ranges(list(self), self.ranges))

    def forward(self, h: Any) -> Any:
        for step in self._steps:
            h = step(h)
        return h

    def check(self, h: Any) -> None:
        """Raises UserError if the block's hooks give its output h a shape for which the auxiliary is not built."""
        main = main_of(h)
        if main.shape[1:] != self.boundary.shape and any(getattr(m, kind) for m in self.modules() for kind in FORWARD):
            raise UserError(
                f"'{self.names[-1]}' hands on {tuple(main.shape[1:])} and not {self.boundary.shape}, as it did when "
                "the network was cut: hooks that change a shape belong into the forward of a module, before localize"
            )


def units(backbone: nn.Module, example: Any) -> list[str]:
    """Lists the names of a network's units in order. `localize(blocks=[...])` cuts after those that it is given.

    Args:
        backbone: The network.
        example: An input batch: a tensor [B, ...], or a tuple or dictionary of the tensors that the network's forward
            takes. Only shapes and dtypes count.

    Raises:
        UserError: The network cannot be cut.
    """
    return [u.name for u in trace_units(backbone, example).units]


@dataclass(frozen=True, eq=False)
class Traced:
    """The parts of a backbone.

    Attributes:
        units: The units in order.
        head: The network's own head, or None if the last unit returns the output.
        cut: The result of the trace.
        checkpoint: The number of the checkpoint in which the backbone itself runs its head, or None.
    """

    units: list[Unit]
    head: nn.Module | None
    cut: Segments
    checkpoint: int | None


def trace_units(
    backbone: nn.Module, example: Any, blocks: int | Sequence[str] | None = None, trace: Trace | None = None
) -> Traced:
    """Cuts a network into its units.

    Args:
        backbone: The network.
        example: An input batch.
        blocks: The blocks that are wanted. If they need it, the network is cut where several tensors cross, too.
        trace: The trace of this network or of a copy of it, if it is there.

    Raises:
        UserError: It cannot be cut.
    """
    check_network(backbone, example)
    cut = segments(backbone, example, blocks, trace)
    found: list[Unit] = []
    stage = 0
    rest = [*cut.units[1:], cut.head]
    entering = tuple(main_input(example).shape[1:])
    image = (entering[-2], entering[-1]) if len(entering) in (3, 4) else None
    kinds = {2: reads_row(entering, cut.units[0]) or "NLC", 3: "NCHW", 4: "NCDHW"}
    before = Boundary(
        entering, kinds.get(len(entering), "NC"), stage, dtype=cut.units[0].entered, passengers=cut.inputs
    )
    for segment, following in zip(cut.units, rest, strict=True):
        stage += segment.enters != segment.leaves and bool(found)
        after = boundary_behind(segment, before, following, stage, image)
        after = replace(after, dtype=segment.left, passengers=segment.passengers)
        module = _runnable(segment, segment.in_place)
        fed = bool(cut.inputs) or any(s.passengers for s in cut.units)
        found.append(Unit(segment.name, module, before, after, segment.checkpoint, segment.needs, fed))
        before = after
    tail, checkpoint = (_runnable(cut.head, False), cut.head.checkpoint) if cut.head else (None, None)
    # A last unit that turns maps into a vector is the network's own head, whatever its module is called.
    if tail is None and len(found) > 1 and len(found[-1].output.shape) < len(found[-1].input.shape):
        last = found.pop()
        tail, checkpoint = last.module, last.checkpoint
    return Traced(found, tail, cut, checkpoint)


def _runnable(segment: Segment, in_place: bool) -> nn.Module:
    first = [RequiresGrad()] * segment.reentrant + [Clone()] * in_place
    return nn.Sequential(*first, segment.module) if first else segment.module


def split(traced: Traced, blocks: int | Sequence[str]) -> list[list[Unit]]:
    """Groups units into blocks.

    Args:
        traced: The parts of the backbone.
        blocks: A number, for blocks of about as many units each (the early ones, whose maps are large, get fewer), or
            the names of the units that end a block. The last unit ends the last block, whether it is named or not.

    Raises:
        UserError: The network cannot be cut there.
    """
    if isinstance(blocks, str):
        blocks = [blocks]
    if isinstance(blocks, Integral) and not isinstance(blocks, bool):
        ends = _even_ends(traced, int(blocks))  # It may be an integer of numpy.
    elif (
        isinstance(blocks, Iterable)
        and getattr(blocks, "ndim", 1)  # torch.tensor(2) is an Iterable and still cannot be iterated over.
        and all(isinstance(b, str) for b in blocks)
    ):
        ends = _named_ends(traced, blocks)
    else:
        raise UserError(f"blocks takes a whole number or names of units, not {blocks}")
    return [traced.units[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _even_ends(traced: Traced, blocks: int) -> list[int]:
    """The number of units up to the end of each block, for blocks of about the same number of units.

    An end with fewer passengers is preferred to one that is nearer, within a quarter of a block.
    """
    count = len(traced.units)
    if not 1 <= blocks <= count:
        raise UserError(
            f"blocks={blocks} is out of range: this network has {count} unit{'s' * (count > 1)}, so 1 to "
            f"{count}{_why(traced.cut)}"
        )
    carried = [len(unit.output.passengers) for unit in traced.units]
    around = count // (4 * blocks)

    def end(even: int) -> int:
        near = range(max(1, even - around), min(count - 1, even + around) + 1)
        return min(near, key=lambda i: (carried[i - 1], abs(i - even)))

    return [*(end(i * count // blocks) for i in range(1, blocks)), count]


def _named_ends(traced: Traced, blocks: Iterable[str]) -> list[int]:
    """The number of units up to the end of each block, for blocks that end with the named units."""
    names = [u.name for u in traced.units]
    for name in blocks:
        if name in traced.cut.refused and name not in names:
            raise UserError(
                f"no cut behind '{name}': {traced.cut.refused[name]}; the nearest is {_nearest(traced.cut, name)}"
            )
        if name not in names:
            raise unknown("unit", name, names)
    ends = [names.index(name) + 1 for name in blocks]
    if sorted(set(ends)) != ends or not ends:
        raise UserError(f"blocks must list units in their order, each once: got {', '.join(blocks) or 'none'}")
    return ends if ends[-1] == len(names) else [*ends, len(names)]


def _nearest(cut: Segments, name: str) -> str:
    """The legal cut that is nearest to a refused one."""
    at = cut.places.index(name)
    legal = [i for i, place in enumerate(cut.places[:-1]) if place not in cut.refused]
    return f"behind '{cut.places[min(legal, key=lambda i: abs(i - at))]}'" if legal else "nowhere: it is one unit"


def _why(cut: Segments) -> str:
    """The reason why a network has no more units, for the end of a sentence."""
    for name, reason in cut.closed.items():
        return f" ('{name}' cannot be followed: {reason}; give its parts by hand, as nn.Sequential(part, part, ...))"
    for name, reason in cut.refused.items():
        return f" (behind '{name}', {reason})"
    return ""


def _with_ranges(modules: Sequence[nn.Module], ranges: Sequence[Range]) -> list[nn.Module]:
    """`modules` with each outermost range of them as one `Recomputed` module, and the inner ranges within it."""
    steps: list[nn.Module] = []
    end = 0
    for first, last in ranges:
        if first < end:  # It lies within the range before.
            continue
        inner = [(a - first, b - first) for a, b in ranges if first <= a and b <= last and (a, b) != (first, last)]
        parts = _with_ranges(modules[first : last + 1], inner)
        steps += [*modules[end:first], Recomputed(parts[0] if len(parts) == 1 else nn.Sequential(*parts))]
        end = last + 1
    return [*steps, *modules[end:]]
