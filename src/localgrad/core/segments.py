"""A traced network -> its units: runs of steps between places where exactly one tensor that depends on the input
crosses, each as a module that references the backbone's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map

from localgrad.core.errors import UserError
from localgrad.core.opened import is_unit, weighted_layers
from localgrad.core.rebuild import Rebuild, name_of
from localgrad.core.recomputation import split_recomputed
from localgrad.core.trace import BATCHES, BORN, CHECKPOINT, NO_GRAD, PACKED, REENTRANT, VALUE, WRITES, has_tensor, trace
from localgrad.core.watch import Watch

DRAWS = re.compile("rand|dropout|bernoulli|normal_|uniform_|multinomial")  # in names of functions of chance


@dataclass(frozen=True)
class Segment:
    """A run of steps. enters, leaves: shapes of one sample of what crosses before and after it. reads: the first
    module with parameters that it calls, and the shape that it gave to it. in_place: whether it overwrites what enters.
    checkpoint: which of the network's own it runs in, by number. packed: whether in other hooks on saved tensors.
    reentrant: whether its modules enter reentrant ones. entered, left: the dtypes of what crosses before and after it.
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
    """Of a network: its units in order, its own head (None where the last unit ends it), and the places where it
    cannot be cut, each with the reason. places: all of them, legal or not, in their order. closed: modules whose
    forward cannot be followed, so that each lies within one unit, with the reason. gives: shapes of one sample of what
    the network gives, in the structure in which it does. packed: units and head that the network runs with hooks of
    its own on saved tensors. watch: tells whether the network is still what was cut."""

    units: list[Segment]
    head: Segment | None
    refused: dict[str, str]
    places: list[str]
    closed: dict[str, str]
    gives: Any
    packed: list[str]
    watch: Watch


def segments(backbone: nn.Module, example: Tensor) -> Segments:
    """The units of `backbone`. Raises UserError for a network that cannot be followed, or gives no tensor."""
    graph, closed = trace(backbone, example)
    *nodes, output = graph.nodes
    if not has_tensor(map_arg(output.args[0], lambda n: n.meta[VALUE][0])):
        raise UserError(f"{type(backbone).__name__} gives no tensor")
    return _Flow(backbone, nodes, output).segments(closed)


class _Flow:
    """The steps of a network, and what flows between them."""

    def __init__(self, backbone: nn.Module, nodes: list[fx.Node], output: fx.Node) -> None:
        last = max(nodes.index(node) for node in output.all_input_nodes)
        self.backbone, self.nodes, self.output = backbone, nodes[: last + 1], output
        self.depends = self._dependent()
        self.rebuild = Rebuild(backbone, self.nodes, self.depends)
        self.index, self.module = self.rebuild.index, self.rebuild.module
        self.steps = [node for node in self.nodes if node in self.depends]  # the input first
        self.last_use = {
            node: max((self.index[u] for u in self._users(node)), default=self.index[node]) for node in self.steps
        } | dict.fromkeys(output.all_input_nodes, len(self.nodes))
        self.shared = self._shared()
        self.worthy = sum(m is not None and is_unit(m) for m in map(self.module, self.steps)) > 1

    def _dependent(self) -> set[fx.Node]:
        """Steps that give tensors made of the input's values, and those that must not run twice. Sizes and devices are
        none."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            made = node.op == "placeholder" or any(n in found for n in node.all_input_nodes)
            if (made or self._once(node)) and has_tensor(node.meta[VALUE]):
                found.add(node)
        return found

    def _once(self, node: fx.Node) -> bool:
        """Whether a step is another one each time that it runs: by chance, or because it changes the network."""
        held = [id(n.meta[VALUE][0]) for n in node.all_input_nodes if n.op == "get_attr"]
        if any(id(written) in held for written in node.meta[WRITES]):
            return True
        if node.op == "call_module":
            parts = self.backbone.get_submodule(name_of(node)).modules()
            return any(isinstance(m, _NormBase) or (isinstance(m, _DropoutNd) and m.p > 0) for m in parts)
        return bool(DRAWS.search(getattr(node.target, "__name__", str(node.target))))

    def _shared(self) -> list[tuple[fx.Node, fx.Node]]:
        """Steps that share parameters of modules: the first and the last that use each."""
        uses: dict[int, set[fx.Node]] = {}
        for node in self.steps:
            for parameter in (self.module(node) or nn.Identity()).parameters():
                uses.setdefault(id(parameter), set()).add(node)
        for node in self.steps:  # one may also read what is another's as a tensor
            for parameter in self.rebuild.parameters_read(node) & uses.keys():
                uses[parameter].add(node)
        ordered = (sorted(nodes, key=self.index.__getitem__) for nodes in uses.values() if len(nodes) > 1)
        return list({(nodes[0], nodes[-1]) for nodes in ordered})

    def _users(self, node: fx.Node) -> Iterable[fx.Node]:
        """Steps that read the values of `node`."""
        return (u for u in node.users if u in self.depends and u in self.index)

    def crossing(self, after: int) -> list[fx.Node]:
        """What crosses behind step number `after`."""
        return [n for n in self.steps if self.index[n] <= after < self.last_use[n]]

    def is_cut(self, after: int) -> bool:
        """Whether one tensor of real numbers crosses there, whose first dimension is the batch, and no parameters are
        shared across."""
        crossing = self.crossing(after)
        if len(crossing) != 1 or any(self.index[a] <= after < self.index[b] for a, b in self.shared):
            return False
        values = crossing[0].meta[VALUE]
        tensors = all(isinstance(v, Tensor) and v.ndim > 1 and v.is_floating_point() for v in values)
        return tensors and [len(v) for v in values] == list(BATCHES)

    def segments(self, closed: dict[str, str]) -> Segments:
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
        watch = Watch(self.backbone, filter(None, map(self.rebuild.taken, self.nodes)))
        return Segments(found, head, refused, [order[p] for p in sorted(order)], closed, gives, packed, watch)

    def _is_start(self, node: fx.Node) -> bool:
        """Whether a unit begins at a step: at modules worth it, or at every layer with weights where there are none."""
        module = self.module(node)
        if module is None:
            return False
        return is_unit(module) if self.worthy else weighted_layers(module) > 0

    def _begins_with_unit(self, run: Sequence[fx.Node]) -> bool:
        return self.worthy and any(map(self._is_start, run))

    def _ends(self) -> tuple[list[int], dict[str, str]]:
        """The last step of each unit but the last, and the places where no cut can be."""
        starts = [self.index[n] for n in self.steps if self._is_start(n)]
        if not starts:
            raise UserError(f"{type(self.backbone).__name__} cannot be cut into units: it has no module with weights")
        ends: list[int] = []
        refused: dict[str, str] = {}
        # Behind each unit comes what has no weights (pooling, say); a layer with weights in between goes to the next,
        # if it can: in a partial stage, whose units run beside a shortcut, the cut lies behind where the two meet.
        for start, following in zip(starts, [*starts[1:], len(self.nodes)], strict=True):
            between = [n for n in self.steps if start < self.index[n] < following]
            weighted = [n for n in between if (m := self.module(n)) is not None and _has_parameters(m)]
            if following == len(self.nodes):  # the network's own head follows, where there are units worth the name
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
        """The module that made a step's tensor, or the last before it."""
        while node.op != "call_module" and any(n in self.depends for n in node.all_input_nodes):
            node = next(n for n in node.all_input_nodes if n in self.depends)
        return "the input" if node.op == "placeholder" else name_of(node)

    def _names(self, runs: Sequence[Sequence[fx.Node]]) -> list[str]:
        """Of each run: the module that makes it up, or "stem" for what comes before the first unit."""
        calls = [[name_of(n) for n in run if n.op == "call_module"] for run in runs]
        every = [name for names in calls for name in names]
        found = []
        for i, run in enumerate(runs):
            starts = [name_of(n) for n in run if self._is_start(n)]
            if not starts:
                found.append("stem" if i == 0 else "head")
                continue
            name, inside = starts[-1], set(calls[i])
            while len(starts) > 1 and "." in name:  # several in one: the module that holds them all, if there is one
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
        """The network's own checkpoints that the layers of a run are in, by number; where no layer is in any, those of
        its other steps."""
        layers = [n for n in run if (m := self.module(n)) is not None and _has_parameters(m)]
        found, least = (
            {n.meta[CHECKPOINT]: None for n in steps if n.meta[CHECKPOINT] is not None} for steps in (layers, run)
        )
        return list(found or least)


def _shape(value: Any) -> Any:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else value


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
