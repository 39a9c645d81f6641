"""Backbone -> units -> K blocks and the boundaries between them, by the names of the backbone's own modules.

A unit or block references the modules that it runs, never copies or renames them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from localgrad.core.boundary import Boundary
from localgrad.core.checks import check_network
from localgrad.core.copies import draw_anew, duplicate
from localgrad.core.errors import UserError, unknown
from localgrad.core.hooks import FORWARD
from localgrad.core.layouts import boundary_behind, reads_row
from localgrad.core.recomputation import Recomputed
from localgrad.core.segments import Segment, Segments, segments


class Clone(nn.Module):
    """Keeps its input from a unit that begins in place."""

    def forward(self, h: Tensor) -> Tensor:
        return h.clone()


class RequiresGrad(nn.Module):
    """Has its output ask for a gradient, which is dropped: behind an input that asks for none, as that of a block, a
    reentrant checkpoint would give its parameters none."""

    def forward(self, h: Tensor) -> Tensor:
        if h.requires_grad or not torch.is_grad_enabled():
            return h
        return cast(Tensor, _Drop.apply(h, torch.empty(0, requires_grad=True)))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, asking: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True, eq=False)
class Unit:
    """The smallest piece that a cut may not split. `module` runs it and references the backbone's own modules.
    checkpoint: which of the backbone's own checkpoints it runs in, by number.
    """

    name: str
    module: nn.Module
    input: Boundary
    output: Boundary
    checkpoint: int | None = None

    @property
    def changes_shape(self) -> bool:
        return self.input.shape != self.output.shape

    def copy(self, *, fresh: bool) -> nn.Module:
        """A copy with parameters of its own; `fresh` draws them anew (`draw_anew`). Its `gives` is the dtype that
        it hands on."""
        module = duplicate(self.module)
        if fresh:
            draw_anew(module)
        vars(module)["gives"] = self.output.dtype
        return module


Call = Callable[[nn.Module, Tensor], Tensor]
Range = tuple[int, int]  # the first and the last of some modules in a row, by number


def plain_call(module: nn.Module, h: Tensor) -> Tensor:
    """Runs `module` and keeps what its backward pass needs. `recomputed` is the other way to run it."""
    return module(h)


class Block(nn.Sequential):
    """Consecutive units that share one loss; the last block also runs the network's own head.

    Attributes:
        names: those of its units.
        entering: what it reads.
        boundary: what it hands on.
        ranges: which of its modules are recomputed together in the backward pass, nested ranges included. At first they
            are those that the backbone itself runs in an activation checkpoint.
    """

    ranges: tuple[Range, ...]

    def __init__(self, units: Sequence[Unit], head: nn.Module | None = None, checkpoint: int | None = None) -> None:
        """checkpoint: the number of the backbone's own activation checkpoint that the head runs in, if any."""
        super().__init__(*[u.module for u in units], *([] if head is None else [head]))
        self.names = tuple(u.name for u in units)
        self.entering, self.boundary = units[0].input, units[-1].output
        numbers = [*[u.checkpoint for u in units], *([] if head is None else [checkpoint])]
        runs = [list(run) for _, run in groupby(range(len(numbers)), numbers.__getitem__)]
        self.recompute([(run[0], run[-1]) for run in runs if numbers[run[0]] is not None])

    def recompute(self, ranges: Iterable[Range]) -> None:
        """Sets which modules are recomputed together. Ranges lie apart or within each other."""
        self.ranges = tuple(sorted(set(ranges), key=lambda r: (r[0], -r[1])))
        # A tuple, so that the modules are not registered a second time.
        self._steps = tuple(_with_ranges(list(self), self.ranges))

    def forward(self, h: Tensor) -> Tensor:
        for step in self._steps:
            h = step(h)
        return h

    def check(self, h: Tensor) -> None:
        """Raises UserError where its hooks make it hand on another shape than the one for which the auxiliary is."""
        if h.shape[1:] != self.boundary.shape and any(getattr(m, kind) for m in self.modules() for kind in FORWARD):
            raise UserError(
                f"'{self.names[-1]}' hands on {tuple(h.shape[1:])} and not {self.boundary.shape}, as it did when the "
                "network was cut: hooks that change a shape belong into the forward of a module, before localize"
            )


def units(backbone: nn.Module, example: Tensor) -> list[str]:
    """Names of the units of `backbone`, in order: `blocks=[...]` cuts after those that it lists.

    example: an input batch [B, ...], of which the shape counts. Raises UserError for a network that cannot be cut.
    """
    return [u.name for u in trace_units(backbone, example).units]


@dataclass(frozen=True, eq=False)
class Traced:
    """A backbone's units, its own head (None where the last unit already gives the output), and where it was cut.
    checkpoint: which of the backbone's own the head runs in, by number."""

    units: list[Unit]
    head: nn.Module | None
    cut: Segments
    checkpoint: int | None


def trace_units(backbone: nn.Module, example: Tensor) -> Traced:
    """Cuts `backbone` into its units. Raises UserError for a network that cannot be cut."""
    check_network(backbone, example)
    cut = segments(backbone, example)
    found: list[Unit] = []
    stage = 0
    rest = [*cut.units[1:], cut.head]
    entering = tuple(example.shape[1:])
    image = (entering[-2], entering[-1]) if len(entering) == 3 else (1, 1)
    kinds = {2: reads_row(entering, cut.units[0]) or "NLC", 3: "NCHW"}
    before = Boundary(entering, kinds.get(len(entering), "NC"), stage, dtype=cut.units[0].entered)
    for segment, following in zip(cut.units, rest, strict=True):
        stage += segment.enters != segment.leaves and bool(found)
        after = replace(boundary_behind(segment, before, following, stage, image), dtype=segment.left)
        found.append(Unit(segment.name, _runnable(segment, segment.in_place), before, after, segment.checkpoint))
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
    """Groups units into blocks: evenly for a number (early blocks, whose maps are large, take the smaller share), or
    after each named unit (the last unit closes the last block, named or not). Raises UserError for an impossible cut.
    """
    names = [u.name for u in traced.units]
    if isinstance(blocks, str):
        blocks = [blocks]
    if isinstance(blocks, Integral) and not isinstance(blocks, bool):
        blocks = int(blocks)  # one of numpy's, say
    elif not (
        isinstance(blocks, Iterable)
        and getattr(blocks, "ndim", 1)  # torch.tensor(2) cannot be iterated over
        and all(isinstance(b, str) for b in blocks)
    ):
        raise UserError(f"blocks takes a whole number or names of units, not {blocks}")
    if isinstance(blocks, int):
        if not 1 <= blocks <= len(names):
            raise UserError(
                f"blocks={blocks} is out of range: this network has {len(names)} unit{'s' * (len(names) > 1)}, so 1 to "
                f"{len(names)}{_why(traced.cut)}"
            )
        ends = [i * len(names) // blocks for i in range(1, blocks + 1)]
    else:
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
        if ends[-1] != len(names):
            ends.append(len(names))
    return [traced.units[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _nearest(cut: Segments, name: str) -> str:
    """The legal cut nearest to the refused place."""
    at = cut.places.index(name)
    legal = [i for i, place in enumerate(cut.places[:-1]) if place not in cut.refused]
    return f"behind '{cut.places[min(legal, key=lambda i: abs(i - at))]}'" if legal else "nowhere: it is one unit"


def _why(cut: Segments) -> str:
    """What keeps a network from being cut more finely."""
    for name, reason in cut.closed.items():
        return f" ('{name}' cannot be followed: {reason}; give its parts by hand, as nn.Sequential(part, part, ...))"
    for name, reason in cut.refused.items():
        return f" (behind '{name}', {reason})"
    return ""


def select_path(downstream: Sequence[Unit], depth: int) -> list[Unit]:
    """`depth` units of `downstream`, in order: those that change the shape come first, or the rest would not chain;
    what is left of `depth` is spread evenly over the others. With fewer than `depth` units, all of them.
    """
    changing = [i for i, u in enumerate(downstream) if u.changes_shape][:depth]
    others = [i for i, u in enumerate(downstream) if not u.changes_shape]
    extra = max(0, min(depth - len(changing), len(others)))
    spread = [others[i * len(others) // extra] for i in range(extra)]
    return [downstream[i] for i in sorted(changing + spread)]


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
