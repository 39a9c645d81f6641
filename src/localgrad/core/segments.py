"""A traced network -> its units, each a module that maps one tensor to one tensor.

A network can be cut behind a step if exactly one tensor that depends on the input crosses there:

    x -> conv -> norm -> relu -+-> conv -> norm -+-> add -> relu -> fc -> out
                               |                 |
                               +-----------------+       no cut between these: two tensors cross

The steps between two cuts are a unit. A unit begins at a module that is worth it (`is_unit`), such as a residual unit,
or at each layer with weights where the network has no such modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.passes.split_module import split_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map

from localgrad.core.errors import UserError
from localgrad.core.opened import is_unit, weighted_layers
from localgrad.core.rebuild import Rebuild, name_of
from localgrad.core.recomputation import Recomputed
from localgrad.core.trace import Trace, trace
from localgrad.core.tracer import BATCHES, BORN, CHECKPOINT, NO_GRAD, PACKED, REENTRANT, VALUE, WRITES, has_tensor
from localgrad.core.watch import Watch

DRAWS = re.compile("rand|dropout|bernoulli|normal_|uniform_|multinomial")  # Functions with such names draw numbers.


@dataclass(frozen=True)
class Segment:
    """The steps of one unit, or of the network's own head.

    Attributes:
        name: Its name: that of the module that it runs, or "stem" or "head".
        module: Runs the steps.
        enters: The shape of one sample of the tensor that enters.
        leaves: The shape of one sample of the tensor that leaves.
        reads: The first module with parameters that it calls, and the shape of one sample of what that module gets.
        in_place: Whether it overwrites the tensor that enters.
        checkpoint: The number of the network's own activation checkpoint that it runs in, or None.
        packed: Whether the network runs it with other hooks on saved tensors.
        reentrant: Whether its modules enter reentrant checkpoints.
        entered: The dtype of the tensor that enters.
        left: The dtype of the tensor that leaves.
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
    """

    units: list[Segment]
    head: Segment | None
    refused: dict[str, str]
    places: list[str]
    closed: dict[str, str]
    gives: Any
    packed: list[str]
    watch: Watch


def segments(backbone: nn.Module, example: Tensor) -> Segments:
    """Finds the units of a network.

    Args:
        backbone: The network.
        example: An input batch [B, ...], of which the shape and dtype count.

    Raises:
        UserError: The network cannot be followed, returns no tensor, or has no module with weights.
    """
    traced = trace(backbone, example)
    *nodes, output = traced.graph.nodes
    if not has_tensor(map_arg(output.args[0], lambda n: n.meta[VALUE][0])):
        raise UserError(f"{type(backbone).__name__} gives no tensor")
    return _Flow(backbone, nodes, output).segments(traced)


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


class _Flow:
    """The steps of a network, and the tensors that flow between them.

    Attributes:
        nodes: All steps, up to the last one whose value the network returns.
        output: The step that returns it.
        depends: The steps whose tensors depend on the input's values.
        steps: `depends` in order, the input first.
        index: The number of each step in `nodes`.
        last_use: The number of the last step that reads the tensor of a step.
        shared: Pairs of steps that share parameters, the first and the last step that use them.
        worthy: Whether the network has modules that are worth being units.
    """

    def __init__(self, backbone: nn.Module, nodes: list[fx.Node], output: fx.Node) -> None:
        last = max(nodes.index(node) for node in output.all_input_nodes)
        self.backbone, self.nodes, self.output = backbone, nodes[: last + 1], output
        self.depends = self._dependent()
        self.rebuild = Rebuild(backbone, self.nodes, self.depends)
        self.index, self.module = self.rebuild.index, self.rebuild.module
        self.steps = [node for node in self.nodes if node in self.depends]
        self.last_use = {
            node: max((self.index[u] for u in self._users(node)), default=self.index[node]) for node in self.steps
        } | dict.fromkeys(output.all_input_nodes, len(self.nodes))
        self.shared = self._shared()
        self.worthy = sum(m is not None and is_unit(m) for m in map(self.module, self.steps)) > 1

    def _dependent(self) -> set[fx.Node]:
        """The steps that return tensors computed from the input's values, and those that must not run twice. A step
        that returns no tensor, such as a size or a device, is not among them."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            made = node.op == "placeholder" or any(n in found for n in node.all_input_nodes)
            if (made or self._once(node)) and has_tensor(node.meta[VALUE]):
                found.add(node)
        return found

    def _once(self, node: fx.Node) -> bool:
        """Whether a step must not run twice, because it draws random numbers or changes the network."""
        held = [id(n.meta[VALUE][0]) for n in node.all_input_nodes if n.op == "get_attr"]
        if any(id(written) in held for written in node.meta[WRITES]):
            return True
        if node.op == "call_module":
            parts = self.backbone.get_submodule(name_of(node)).modules()
            return any(isinstance(m, _NormBase) or (isinstance(m, _DropoutNd) and m.p > 0) for m in parts)
        return bool(DRAWS.search(getattr(node.target, "__name__", str(node.target))))

    def _shared(self) -> list[tuple[fx.Node, fx.Node]]:
        """The first and the last step that use a parameter, for each parameter of a module that several steps use."""
        uses: dict[int, set[fx.Node]] = {}
        for node in self.steps:
            for parameter in (self.module(node) or nn.Identity()).parameters():
                uses.setdefault(id(parameter), set()).add(node)
        for node in self.steps:  # A step may also read the parameter of another step's module as a tensor.
            for parameter in self.rebuild.parameters_read(node) & uses.keys():
                uses[parameter].add(node)
        ordered = (sorted(nodes, key=self.index.__getitem__) for nodes in uses.values() if len(nodes) > 1)
        return list({(nodes[0], nodes[-1]) for nodes in ordered})

    def _users(self, node: fx.Node) -> Iterable[fx.Node]:
        """The steps of the chain that read what `node` returns."""
        return (u for u in node.users if u in self.depends and u in self.index)

    def crossing(self, after: int) -> list[fx.Node]:
        """The steps whose tensors are still needed behind step number `after`."""
        return [n for n in self.steps if self.index[n] <= after < self.last_use[n]]

    def is_cut(self, after: int) -> bool:
        """Whether the network can be cut behind step number `after`: one floating-point tensor crosses there, its first
        dimension is the batch, and no parameters are used on both sides."""
        crossing = self.crossing(after)
        if len(crossing) != 1 or any(self.index[a] <= after < self.index[b] for a, b in self.shared):
            return False
        values = crossing[0].meta[VALUE]
        tensors = all(isinstance(v, Tensor) and v.ndim > 1 and v.is_floating_point() for v in values)
        return tensors and [len(v) for v in values] == list(BATCHES)

    def segments(self, traced: Trace) -> Segments:
        ends, refused = self._ends()
        bounds = list(zip([0, *(end + 1 for end in ends)], [*ends, len(self.nodes) - 1], strict=True))
        runs = [[n for n in self.steps[1:] if a <= self.index[n] <= b] for a, b in bounds]
        names = self._names(runs)
        found: list[Segment] = []
        entering: Any = self.steps[0]
        for name, run, (_, end) in zip(names, runs, bounds, strict=True):
            leaving = self.output.args[0] if run is runs[-1] else self.crossing(end)[0]
            found.append(self._segment(name, entering, run, leaving))
            entering = leaving
        gives = map_arg(self.output.args[0], lambda n: tree_map(_shape, n.meta[VALUE][0]))
        packed = [segment.name for segment in found if segment.packed]
        head = None
        if len(found) > 1 and not self._begins_with_unit(runs[-1]):
            head = found.pop()
        starts = {self.index[n]: name_of(n) for n in self.steps if self._is_start(n)}
        legal = {end: segment.name for (_, end), segment in zip(bounds, found, strict=False)}
        order = {**{p: n for p, n in starts.items() if n in refused}, **legal}
        taken = filter(None, map(self.rebuild.taken, self.nodes))
        watch = Watch(self.backbone, taken, traced.written, traced.runs)
        return Segments(found, head, refused, [order[p] for p in sorted(order)], traced.closed, gives, packed, watch)

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
        starts = [self.index[n] for n in self.steps if self._is_start(n)]
        if not starts:
            raise UserError(f"{type(self.backbone).__name__} cannot be cut into units: it has no module with weights")
        ends: list[int] = []
        refused: dict[str, str] = {}
        # Steps without weights behind a unit, such as pooling, belong to it. A layer with weights between two units
        # belongs to the next one if it can: where units run beside a shortcut, the cut is behind where the two meet.
        for start, following in zip(starts, [*starts[1:], len(self.nodes)], strict=True):
            between = [n for n in self.steps if start < self.index[n] < following]
            weighted = [n for n in between if (m := self.module(n)) is not None and _has_parameters(m)]
            if following == len(self.nodes):  # Behind the last unit comes the network's own head.
                reading = [self.index[n] for n in between if n in weighted or self.rebuild.parameters_read(n)]
                places = [*range(start, reading[-1])] if self.worthy and reading else []
            else:
                first = (self.index[weighted[0]] if weighted else following) - 1
                places = [*range(first, following), *range(start, first)]
            cut = next((p for p in places if self.is_cut(p)), None)
            if cut is not None:
                ends.append(cut)
            elif places:
                refused[name_of(self.nodes[start])] = self._reason(start)
        first = starts[0]
        before = [m for n in self.steps if self.index[n] < first and (m := self.module(n)) is not None]
        if any(map(_has_parameters, before)) and self.is_cut(first - 1):
            ends.insert(0, first - 1)
        return ends, refused

    def _reason(self, after: int) -> str:
        for a, b in self.shared:
            if self.index[a] <= after < self.index[b]:
                again = name_of(a) == name_of(b)
                return (
                    f"'{name_of(a)}' runs again" if again else f"'{name_of(b)}' shares parameters with '{name_of(a)}'"
                )
        crossing = self.crossing(after)
        others = [n for n in crossing if n is not self.nodes[after]]
        if not crossing:
            return "nothing crosses there"
        if not others:
            value = crossing[0].meta[VALUE][0]
            if isinstance(value, Tensor) and not value.is_floating_point():
                return (
                    f"a tensor of {str(value.dtype).removeprefix('torch.')} numbers crosses, and heads read real ones"
                )
            given = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            return f"for {BATCHES[0]} samples {given} crosses, not one tensor whose first dimension is the samples"
        skips = self._maker(others[0])
        later = [u for u in self._users(others[0]) if self.index[u] > after]
        if not later:
            return f"the network gives the tensor of '{skips}' at its end"
        to = min(later, key=self.index.__getitem__)
        return f"the tensor of '{skips}' skips over it to '{name_of(to)}'"

    def _maker(self, node: fx.Node) -> str:
        """The name of the module that made a step's tensor, or of the last module before it."""
        while node.op != "call_module" and any(n in self.depends for n in node.all_input_nodes):
            node = next(n for n in node.all_input_nodes if n in self.depends)
        return "the input" if node.op == "placeholder" else name_of(node)

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

    def _segment(self, name: str, entering: fx.Node, run: Sequence[fx.Node], leaving: Any) -> Segment:
        before = entering.meta[VALUE][0]
        leaves = tree_leaves(map_arg(leaving, lambda n: n.meta[VALUE][0]))
        after = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        reads = None
        for node in run:
            module = self.module(node)
            if module is not None and _has_parameters(module):
                given = next((n.meta[VALUE][0] for n in node.all_input_nodes if n in self.depends), before)
                reads = (module, tuple(given.shape[1:]))
                break
        only = [leaving] == list(run) and leaving.args == (entering,) and not leaving.kwargs
        alone = self.module(leaving) if only and not leaving.meta[NO_GRAD] else None
        built = self.rebuild.build(name, entering, run, leaving) if alone is None else alone
        overwritten = before._version != entering.meta[BORN]
        checkpoint, *others = self._checkpoints(run) or [None]
        if others:
            checkpoint, built = None, split_recomputed(built, CHECKPOINT)
        packed, reentrant = (any(node.meta[key] for node in run) for key in (PACKED, REENTRANT))
        shapes, dtypes = (tuple(before.shape[1:]), tuple(after.shape[1:])), (before.dtype, after.dtype)
        return Segment(name, built, *shapes, reads, overwritten, checkpoint, packed, reentrant, *dtypes)

    def _checkpoints(self, run: Sequence[fx.Node]) -> list[int]:
        """The numbers of the network's own checkpoints that the layers of a run are in. If no layer is in any, those
        of its other steps."""
        layers = [n for n in run if (m := self.module(n)) is not None and _has_parameters(m)]
        found, least = (
            {n.meta[CHECKPOINT]: None for n in steps if n.meta[CHECKPOINT] is not None} for steps in (layers, run)
        )
        return list(found or least)


def _shape(value: Any) -> Any:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else value


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
