"""A traced network -> its units, each a module that maps what enters to what leaves.

The steps between two cuts are a unit, and `core/flow.py` says where a cut can be. A unit begins at a module that is
worth it (`is_unit`), such as a residual unit, or at each layer with weights where the network has no such modules.

The network is cut where one tensor crosses. If that gives too few units, it is cut where several cross, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_leaves, tree_map

from localgrad.core.boundary import MAIN, Named, Passenger
from localgrad.core.errors import UserError
from localgrad.core.flow import Crossing, Flow, has_parameters
from localgrad.core.opened import is_unit, weighted_layers
from localgrad.core.rebuild import name_of
from localgrad.core.recomputation import Recomputed
from localgrad.core.steps import BORN, CHECKPOINT, NO_GRAD, PACKED, REENTRANT, VALUE, has_tensor
from localgrad.core.trace import Trace, trace
from localgrad.core.watch import Watch

MOST = 0.5  # A unit that has so many of a network's layers counts as nearly the whole network.
FEW = 4  # A network that has fewer units where one tensor crosses is cut where several cross, too.


@dataclass(frozen=True)
class Segment:
    """The steps of one unit, or of the network's own head.

    Attributes:
        name: Its name: that of the module that it runs, or "stem" or "head".
        module: Runs the steps.
        enters: The shape of one sample of the main tensor that enters.
        leaves: The shape of one sample of the main tensor that leaves.
        reads: The first module with parameters that it calls, and the shape of one sample of what that module gets.
        in_place: Whether it overwrites the main tensor that enters.
        checkpoint: The number of the network's own activation checkpoint that it runs in, or None.
        packed: Whether the network runs it with other hooks on saved tensors.
        reentrant: Whether its modules enter reentrant checkpoints.
        entered: The dtype of the main tensor that enters.
        left: The dtype of the main tensor that leaves.
        passengers: The tensors that leave beside the main one.
        needs: The names of the passengers that it reads itself, and does not only hand on.
    """

    name: str
    module: nn.Module
    enters: tuple[int, ...]
    leaves: tuple[int, ...]
    reads: tuple[nn.Module, tuple[int, ...]] | None
    in_place: bool
    checkpoint: int | None
    packed: bool
    reentrant: bool
    entered: torch.dtype
    left: torch.dtype
    passengers: tuple[Passenger, ...]
    needs: frozenset[str]


@dataclass(frozen=True)
class Segments:
    """The units of a network.

    Attributes:
        units: The units in order, without the head.
        head: The network's own head, or None where the last unit ends the network.
        refused: The units behind which the network cannot be cut, with the reason.
        places: All units behind which a cut was tried, in order, those of `refused` among them.
        closed: Modules whose forward cannot be followed, with the reason. Each lies within one unit.
        gives: The shapes of one sample of what the network returns, in the structure in which it returns them.
        packed: The names of the units and the head that the network runs with other hooks on saved tensors.
        watch: Tells whether the network is still the one that was cut.
        inputs: The input tensors beside the main one.
        evaluates: Whether the network takes the same steps in evaluation mode, so that its units can evaluate it.
    """

    units: list[Segment]
    head: Segment | None
    refused: dict[str, str]
    places: list[str]
    closed: dict[str, str]
    gives: Any
    packed: list[str]
    watch: Watch
    inputs: tuple[Passenger, ...]
    evaluates: bool

    @property
    def gives_one(self) -> bool:
        """Whether the network returns one tensor, and not several or a dictionary."""
        return isinstance(self.gives, tuple) and all(isinstance(size, int) for size in self.gives)


def segments(
    backbone: nn.Module, example: Any, blocks: int | Sequence[str] | None = None, traced: Trace | None = None
) -> Segments:
    """Finds the units of a network.

    Args:
        backbone: The network.
        example: An input batch, of which the shapes and dtypes count.
        blocks: The number of blocks that are wanted, or the names of the units that end them. Default: not known.
        traced: The trace of this network or of a copy of it, if it is there.

    Raises:
        UserError: The network cannot be followed, returns no tensor, or has no module with weights.
    """
    traced = traced or trace(backbone, example)
    *nodes, output = traced.graph.nodes
    if not has_tensor(map_arg(output.args[0], lambda n: n.meta[VALUE][0])):
        raise UserError(f"{type(backbone).__name__} gives no tensor")
    found = _Cutter(Flow(backbone, nodes, output, several=False)).segments(traced)
    if _are_enough(found, blocks):
        return found
    more = _Cutter(Flow(backbone, nodes, output, several=True)).segments(traced)
    return more if len(more.units) > len(found.units) else found


def _are_enough(found: Segments, blocks: int | Sequence[str] | None) -> bool:
    """Whether the units that were found without passengers can be grouped into these blocks, of which none is nearly
    the whole network."""
    if isinstance(blocks, Integral) and int(blocks) > 1:
        return int(blocks) <= len(found.units) and not _is_one_piece(found)
    # What is neither a number nor names is refused later.
    named = {name for name in blocks if isinstance(name, str)} if isinstance(blocks, list | tuple) else set()
    return len(found.units) >= FEW and not _is_one_piece(found) and named <= {unit.name for unit in found.units}


def _is_one_piece(found: Segments) -> bool:
    """Whether most layers with weights are in one of the units."""
    pieces = [weighted_layers(unit.module) for unit in found.units]
    return max(pieces) > MOST * sum(pieces)


def split_recomputed(traced: nn.Module, key: str) -> nn.Module:
    """Divides a module of traced steps where the value of `meta[key]` changes from one step to the next.

    Args:
        traced: The module. A step without this key belongs to the step before it.
        key: A key of the steps' `meta`.

    Returns:
        The divided module. A part whose value is not None is a `Recomputed`.
    """
    assert isinstance(traced, fx.GraphModule)
    values: list[Any] = []
    part_of: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        value = node.meta.get(key, values[-1] if values else None)
        if not values or values[-1] != value:
            values.append(value)
        part_of[node] = len(values) - 1
    divided = split_module(traced, traced, part_of.__getitem__, keep_original_order=True)
    for number, value in enumerate(values):
        name = f"submod_{number}"
        if value is not None and hasattr(divided, name):
            setattr(divided, name, Recomputed(divided.get_submodule(name)))
    return divided


class _Cutter:
    """Cuts the steps of a network into segments.

    Attributes:
        flow: The steps.
        worthy: Whether the network has modules that are worth being units.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.index, self.module = flow.index, flow.module
        self.worthy = sum(m is not None and is_unit(m) for m in map(flow.module, flow.steps)) > 1

    def segments(self, traced: Trace) -> Segments:
        flow = self.flow
        ends, refused = self._ends()
        bounds = list(zip([0, *(end + 1 for end in ends)], [*ends, len(flow.nodes) - 1], strict=True))
        own = [n for n in flow.steps if n.op != "placeholder"]
        runs = [[n for n in own if a <= self.index[n] <= b] for a, b in bounds]
        names = self._names(runs)
        found: list[Segment] = []
        entering = flow.entering
        for name, run, (_, end) in zip(names, runs, bounds, strict=True):
            if run is runs[-1]:
                found.append(self._segment(name, entering, run, flow.output.args[0], ()))
                break
            leaving = flow.leaving(end)
            assert leaving is not None
            found.append(self._segment(name, entering, run, leaving, flow.passengers(leaving)))
            entering = leaving
        gives: Any = map_arg(flow.output.args[0], lambda n: tree_map(_shape, n.meta[VALUE][0]))
        packed = [segment.name for segment in found if segment.packed]
        if traced.kind is not None:
            found[-1] = replace(found[-1], module=nn.Sequential(found[-1].module, Named(traced.kind)))
            gives = traced.kind(**dict(gives))
        head = None
        if len(found) > 1 and not self._begins_with_unit(runs[-1]):
            head = found.pop()
        starts = {self.index[n]: name_of(n) for n in flow.steps if self._is_start(n)}
        legal = {end: segment.name for (_, end), segment in zip(bounds, found, strict=False)}
        order = {**{p: n for p, n in starts.items() if n in refused}, **legal}
        taken = filter(None, map(flow.rebuild.taken, flow.nodes))
        watch = Watch(flow.backbone, taken, traced.written, traced.runs)
        places, inputs = [order[p] for p in sorted(order)], flow.passengers(flow.entering)
        return Segments(found, head, refused, places, traced.closed, gives, packed, watch, inputs, traced.evaluates)

    def _is_start(self, node: fx.Node) -> bool:
        """Whether a unit begins at a step: at a module that is worth it, or at each layer with weights if none is."""
        module = self.module(node)
        if module is None:
            return False
        return is_unit(module) if self.worthy else weighted_layers(module) > 0

    def _begins_with_unit(self, run: Sequence[fx.Node]) -> bool:
        return self.worthy and any(map(self._is_start, run))

    def _ends(self) -> tuple[list[int], dict[str, str]]:
        """The last step of each unit but the last one, and the units behind which no cut can be, with the reason."""
        starts = [self.index[n] for n in self.flow.steps if self._is_start(n)]
        if not starts:
            raise UserError(
                f"{type(self.flow.backbone).__name__} cannot be cut into units: it has no module with weights"
            )
        ends: list[int] = []
        refused: dict[str, str] = {}
        # Steps without weights behind a unit, such as pooling, belong to it. A layer with weights between two units
        # belongs to the next one if it can: where units run beside a shortcut, the cut is behind where the two meet.
        for start, following in zip(starts, [*starts[1:], len(self.flow.nodes)], strict=True):
            between = [n for n in self.flow.steps if start < self.index[n] < following]
            weighted = [n for n in between if has_parameters(self.module(n))]
            if following == len(self.flow.nodes):  # Behind the last unit comes the network's own head.
                reading = [self.index[n] for n in between if n in weighted or self.flow.rebuild.parameters_read(n)]
                places = [*range(start, reading[-1])] if self.worthy and reading else []
            else:
                first = (self.index[weighted[0]] if weighted else following) - 1
                places = [*range(first, following), *range(start, first)]
            cut = self._best(places)
            if cut is not None:
                ends.append(cut)
            elif places:
                refused[name_of(self.flow.nodes[start])] = self.flow.reason(start)
        first = starts[0]
        before = [self.module(n) for n in self.flow.steps if self.index[n] < first]
        if any(map(has_parameters, before)) and self._can_end(first - 1):
            ends.insert(0, first - 1)
        return ends, refused

    def _best(self, places: Sequence[int]) -> int | None:
        """The first of these steps behind which the fewest tensors cross, or None if no cut can be there. A cut within
        one of the network's own checkpoints is the last choice."""
        legal = [place for place in places if self._can_end(place)]
        return min(
            legal, key=lambda place: (self._parts_checkpoint(place), len(self.flow.crossing(place))), default=None
        )

    def _parts_checkpoint(self, after: int) -> bool:
        here, following = (node.meta.get(CHECKPOINT) for node in self.flow.nodes[after : after + 2])
        return here is not None and here == following

    def _can_end(self, after: int) -> bool:
        return self.flow.leaving(after) is not None

    def _names(self, runs: Sequence[Sequence[fx.Node]]) -> list[str]:
        """The name of each run: that of the module that it runs, or "stem" for the steps before the first unit."""
        calls = [[name_of(n) for n in run if n.op == "call_module"] for run in runs]
        every = [name for names in calls for name in names]
        found = []
        for i, run in enumerate(runs):
            starts = [name_of(n) for n in run if self._is_start(n)]
            if not starts:
                found.append("stem" if i == 0 else "head")
                continue
            name, inside = starts[-1], set(calls[i])
            while len(starts) > 1 and "." in name:  # A run of several modules has the name of the one that holds them.
                outer = name.rpartition(".")[0]
                if any(other.startswith(f"{outer}.") and other not in inside for other in every):
                    break
                name = outer
            found.append(name)
        return found

    def _segment(
        self, name: str, entering: Crossing, run: Sequence[fx.Node], leaving: Any, passengers: tuple[Passenger, ...]
    ) -> Segment:
        flow = self.flow
        main = entering if isinstance(entering, fx.Node) else entering[MAIN]
        before = main.meta[VALUE][0]
        leaves = tree_leaves(map_arg(leaving, lambda n: n.meta[VALUE][0]))
        after = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        reads = None
        for node in run:
            module = self.module(node)
            if module is not None and has_parameters(module):
                given = next((n.meta[VALUE][0] for n in node.all_input_nodes if n in flow.depends), before)
                reads = (module, tuple(given.shape[1:]))
                break
        only = [leaving] == list(run) and leaving.args == (entering,) and not leaving.kwargs
        plain = only and not leaving.meta[NO_GRAD] and not flow.rebuild.tied_elsewhere(name, leaving)
        alone = self.module(leaving) if plain else None
        built = flow.rebuild.build(name, entering, run, leaving) if alone is None else alone
        overwritten = before._version != main.meta[BORN]
        checkpoint, *others = self._checkpoints(run) or [None]
        if others:
            checkpoint, built = None, split_recomputed(built, CHECKPOINT)
        packed, reentrant = (any(node.meta[key] for node in run) for key in (PACKED, REENTRANT))
        shapes, dtypes = (tuple(before.shape[1:]), tuple(after.shape[1:])), (before.dtype, after.dtype)
        read = {n for node in run for n in node.all_input_nodes}
        entered = {} if isinstance(entering, fx.Node) else entering
        needs = frozenset(key for key, node in entered.items() if key != MAIN and node in read)
        return Segment(
            name, built, *shapes, reads, overwritten, checkpoint, packed, reentrant, *dtypes, passengers, needs
        )

    def _checkpoints(self, run: Sequence[fx.Node]) -> list[int]:
        """The numbers of the network's own checkpoints that the layers of a run are in. If no layer is in any, those
        of its other steps."""
        layers = [n for n in run if has_parameters(self.module(n))]
        found, least = (
            {n.meta[CHECKPOINT]: None for n in steps if n.meta[CHECKPOINT] is not None} for steps in (layers, run)
        )
        return list(found or least)


def _shape(value: Any) -> Any:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else value
