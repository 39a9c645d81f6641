"""A traced network -> its units: runs of steps between places where exactly one tensor that depends on the input
crosses, each as a module that references the backbone's own."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from localgrad.core.errors import UserError
from localgrad.core.trace import BATCHES, BORN, VALUE, has_tensor, is_unit, trace, weighted_layers


@dataclass(frozen=True)
class Segment:
    """A run of steps. enters, leaves: shapes of one sample of what crosses before and after it. reads: the first
    module with parameters that it calls, and the shape that it gave to it. in_place: whether it overwrites what enters.
    """

    name: str
    module: nn.Module
    enters: tuple[int, ...]
    leaves: tuple[int, ...]
    reads: tuple[nn.Module, tuple[int, ...]] | None
    in_place: bool


@dataclass(frozen=True)
class Segments:
    """Of a network: its units in order, its own head (None where the last unit ends it), and the places where it
    cannot be cut, each with the reason. places: all of them, legal or not, in their order. closed: modules whose
    forward cannot be followed, so that each lies within one unit, with the reason. gives: shapes of one sample of what
    the network gives, in the structure in which it does."""

    units: list[Segment]
    head: Segment | None
    refused: dict[str, str]
    places: list[str]
    closed: dict[str, str]
    gives: Any


def segments(backbone: nn.Module, example: Tensor) -> Segments:
    """The units of `backbone`. Raises UserError for a network that cannot be followed, or gives no tensor."""
    graph, closed = trace(backbone, example)
    *nodes, output = graph.nodes
    if not has_tensor(map_arg(output.args[0], lambda n: n.meta[VALUE][0])):
        raise UserError(f"{type(backbone).__name__} gives no tensor")
    return _Flow(backbone, nodes, output).segments(closed)


class _Held(nn.Module):
    """Runs a module that another block trains: its parameters are not part of this one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = (module,)  # a tuple, so that it is not registered

    def __deepcopy__(self, memo: dict) -> _Held:
        whole = any(id(p) in memo for p in self.held[0].parameters())
        return _Held(copy.deepcopy(self.held[0], memo) if whole else self.held[0])

    def forward(self, h: Tensor) -> Tensor:
        return self.held[0](h).detach()


class _Reads(nn.Module):
    """A tensor that is no parameter, read where it lies."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = (owner,), name

    def __deepcopy__(self, memo: dict) -> _Reads:
        return _Reads(memo.get(id(self.owner[0]), self.owner[0]), self.name)

    def forward(self) -> Any:
        return getattr(self.owner[0], self.name)


class _Follows(nn.Module):
    """A function whose `training` was traced as a constant, yet has to follow .train() and .eval()."""

    def __init__(self, target: Callable[..., Any]) -> None:
        super().__init__()
        self.target = target

    def forward(self, **kwargs: Any) -> Any:
        return self.target(**kwargs, training=self.training)


class _Flow:
    """The steps of a network, and what flows between them."""

    def __init__(self, backbone: nn.Module, nodes: list[fx.Node], output: fx.Node) -> None:
        last = max(nodes.index(node) for node in output.all_input_nodes)
        self.backbone, self.nodes, self.output = backbone, nodes[: last + 1], output
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.depends = self._dependent()
        self.steps = [node for node in self.nodes if node in self.depends]  # the input first
        self.last_use = {
            node: max((self.place[u] for u in self._users(node)), default=self.place[node]) for node in self.steps
        } | dict.fromkeys(output.all_input_nodes, len(self.nodes))
        self.shared = self._shared()
        self.worthy = sum(m is not None and is_unit(m) for m in map(self.module, self.steps)) > 1
        self.owner: dict[int, str] = {}  # of parameters beside the chain: the first unit that reads them

    def _dependent(self) -> set[fx.Node]:
        """Steps that give tensors made of the input's values. Sizes and devices are none."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            made = node.op == "placeholder" or any(n in found for n in node.all_input_nodes)
            if made and has_tensor(node.meta[VALUE]):
                found.add(node)
        return found

    def _shared(self) -> list[tuple[fx.Node, fx.Node]]:
        """Steps that share parameters: the first and the last that use each."""
        uses: dict[int, list[fx.Node]] = {}
        for node in self.steps:
            for parameter in (self.module(node) or nn.Identity()).parameters():
                uses.setdefault(id(parameter), []).append(node)
        return list({(nodes[0], nodes[-1]) for nodes in uses.values() if len(nodes) > 1})

    def _users(self, node: fx.Node) -> Iterable[fx.Node]:
        """Steps that read the values of `node`."""
        return (u for u in node.users if u in self.depends and u in self.place)

    def crossing(self, after: int) -> list[fx.Node]:
        """What crosses behind step number `after`."""
        return [n for n in self.steps if self.place[n] <= after < self.last_use[n]]

    def is_cut(self, after: int) -> bool:
        """Whether one tensor crosses there, whose first dimension is the batch, and no parameters are shared across."""
        crossing = self.crossing(after)
        if len(crossing) != 1 or any(self.place[a] <= after < self.place[b] for a, b in self.shared):
            return False
        values = crossing[0].meta[VALUE]
        tensors = all(isinstance(v, Tensor) and v.ndim > 1 for v in values)
        return tensors and [len(v) for v in values] == list(BATCHES)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.backbone.get_submodule(_name(node)) if node.op == "call_module" else None

    def segments(self, closed: dict[str, str]) -> Segments:
        ends, refused = self._ends()
        bounds = list(zip([0, *(end + 1 for end in ends)], [*ends, len(self.nodes) - 1], strict=True))
        runs = [[n for n in self.steps[1:] if a <= self.place[n] <= b] for a, b in bounds]
        names = self._names(runs)
        found: list[Segment] = []
        entering: Any = self.steps[0]
        for name, run, (_, end) in zip(names, runs, bounds, strict=True):
            leaving = self.output.args[0] if run is runs[-1] else self.crossing(end)[0]
            found.append(self._segment(name, entering, run, leaving))
            entering = leaving
        gives = map_arg(self.output.args[0], lambda n: tree_map(_shape, n.meta[VALUE][0]))
        head = None
        if len(found) > 1 and not self._begins_with_unit(runs[-1]):
            head = found.pop()
        starts = {self.place[n]: _name(n) for n in self.steps if self._is_start(n)}
        legal = {end: segment.name for (_, end), segment in zip(bounds, found, strict=False)}
        order = {**{p: n for p, n in starts.items() if n in refused}, **legal}
        return Segments(found, head, refused, [order[p] for p in sorted(order)], closed, gives)

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
        starts = [self.place[n] for n in self.steps if self._is_start(n)]
        if not starts:
            raise UserError(f"{type(self.backbone).__name__} cannot be cut into units: it has no module with weights")
        ends: list[int] = []
        refused: dict[str, str] = {}
        # Behind each unit comes what has no weights (pooling, say); a layer with weights in between goes to the next,
        # if it can: in a partial stage, whose units run beside a shortcut, the cut lies behind where the two meet.
        for start, following in zip(starts, [*starts[1:], len(self.nodes)], strict=True):
            between = [n for n in self.steps if start < self.place[n] < following]
            weighted = [self.place[n] for n in between if (m := self.module(n)) is not None and _has_parameters(m)]
            if following == len(self.nodes):  # the network's own head follows, where there are units worth the name
                places = [*range(start, weighted[-1])] if self.worthy and weighted else []
            else:
                first = (weighted or [following])[0] - 1
                places = [*range(first, following), *range(start, first)]
            cut = next((p for p in places if self.is_cut(p)), None)
            if cut is not None:
                ends.append(cut)
            elif places:
                refused[_name(self.nodes[start])] = self._reason(start)
        first = starts[0]
        before = [m for n in self.steps if self.place[n] < first and (m := self.module(n)) is not None]
        if any(map(_has_parameters, before)) and self.is_cut(first - 1):
            ends.insert(0, first - 1)
        return ends, refused

    def _reason(self, after: int) -> str:
        for a, b in self.shared:
            if self.place[a] <= after < self.place[b]:
                return f"'{_name(b)}' shares parameters with '{_name(a)}'"
        crossing = self.crossing(after)
        others = [n for n in crossing if n is not self.nodes[after]] or crossing
        if not others:
            return "nothing crosses there"
        skips = self._maker(others[0])
        to = min((u for u in self._users(others[0]) if self.place[u] > after), key=lambda n: self.place[n])
        reader = _name(to) if to.op == "call_module" else to.name
        return f"the tensor of '{skips}' skips over it to '{reader}'"

    def _maker(self, node: fx.Node) -> str:
        """The module that made a step's tensor, or the last before it."""
        while node.op != "call_module" and any(n in self.depends for n in node.all_input_nodes):
            node = next(n for n in node.all_input_nodes if n in self.depends)
        return "the input" if node.op == "placeholder" else _name(node)

    def _names(self, runs: Sequence[Sequence[fx.Node]]) -> list[str]:
        """Of each run: the module that makes it up, or "stem" for what comes before the first unit."""
        calls = [[_name(n) for n in run if n.op == "call_module"] for run in runs]
        every = [name for names in calls for name in names]
        found = []
        for i, run in enumerate(runs):
            starts = [_name(n) for n in run if self._is_start(n)]
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
        alone = self.module(leaving) if only else None
        built = self._build(name, entering, run, leaving) if alone is None else alone
        overwritten = before._version != entering.meta[BORN]
        return Segment(name, built, tuple(before.shape[1:]), tuple(after.shape[1:]), reads, overwritten)

    def _build(self, name: str, entering: fx.Node, run: Sequence[fx.Node], leaving: Any) -> nn.Module:
        """The steps of `run` as a module of `entering`'s tensor. What they read beside it and depends on no unit, such
        as a table of positions, is computed here again; its parameters belong to the first unit that reads them."""
        graph = fx.Graph()
        roots: dict[str, Any] = {}
        env: dict[fx.Node, Any] = {entering: graph.placeholder("h")}
        h = env[entering]

        def add(node: fx.Node) -> Any:
            if node.op == "get_attr" and (where := self._lies(node)) is not None:
                roots[f"reads_{len(roots)}"] = _Reads(*where)
                return graph.call_module(f"reads_{len(roots) - 1}")
            if node.op in ("call_module", "get_attr"):
                roots[_name(node)] = self._attribute(node)
            copied = graph.node_copy(node, place)
            copied.target = _name(node) if node.op in ("call_module", "get_attr") else copied.target
            if node.op == "call_function":
                self._follow_training(copied, graph, roots)
            return copied

        def place(node: fx.Node) -> Any:
            if node not in env:
                values = node.meta[VALUE]
                env[node] = beside(node) if has_tensor(values) else _literal(values, h, entering.meta[VALUE][0].dtype)
            return env[node]

        def beside(node: fx.Node) -> Any:
            if node.op in ("call_function", "call_method"):
                return add(node)  # what it reads may belong to several units
            if all(self.owner.setdefault(p, name) == name for p in self._parameters_beside(node)):
                return add(node)
            held = f"held_{len(roots)}"
            roots[held] = _Held(self._build(self.owner_of(node), self.nodes[0], [node], node))
            return graph.call_module(held, (h,))

        for node in run:
            env[node] = add(node)
        graph.output(map_arg(leaving, place))
        return fx.GraphModule(roots, graph, type(self.backbone).__name__)

    def owner_of(self, node: fx.Node) -> str:
        return next(self.owner[p] for p in self._parameters_beside(node))

    def _parameters_beside(self, node: fx.Node) -> set[int]:
        """Parameters that a step beside the chain depends on."""
        found: set[int] = set()
        waiting = [node]
        while waiting:
            now = waiting.pop()
            waiting += [n for n in now.all_input_nodes if n not in self.depends and has_tensor(n.meta[VALUE])]
            if now.op == "get_attr" and isinstance(value := self._attribute(now), nn.Parameter):
                found.add(id(value))
            elif (module := self.module(now)) is not None:
                found.update(map(id, module.parameters()))
        return found

    def _attribute(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return self.backbone.get_submodule(_name(node))
        owner, _, name = _name(node).rpartition(".")
        if name.startswith("_tensor_constant"):  # made while tracing
            return node.meta[VALUE][0]
        return getattr(self.backbone.get_submodule(owner), name)

    def _lies(self, node: fx.Node) -> tuple[nn.Module, str] | None:
        """Where the backbone has a tensor that is no parameter."""
        owner, _, name = _name(node).rpartition(".")
        if name.startswith("_tensor_constant") or isinstance(self._attribute(node), nn.Parameter):
            return None
        return self.backbone.get_submodule(owner), name

    def _follow_training(self, node: fx.Node, graph: fx.Graph, roots: dict[str, Any]) -> None:
        named = node.normalized_arguments(self.backbone, normalize_to_only_use_kwargs=True)
        if named is None or "training" not in named.kwargs:
            return
        name = f"follows_{len(roots)}"
        roots[name] = _Follows(node.target)  # pyright: ignore[reportArgumentType]
        node.op, node.target = "call_module", name
        node.args, node.kwargs = (), {key: value for key, value in named.kwargs.items() if key != "training"}


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("network").removeprefix(".") or node.name


def _shape(value: Any) -> Any:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else value


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _literal(values: tuple[Any, ...], h: fx.Node, dtype: torch.dtype) -> Any:
    """What is no tensor, as the unit reads it: a constant, or what follows the batch, device or dtype of `h`."""
    first, other = values
    if isinstance(first, torch.device):
        return h.graph.call_function(getattr, (h, "device"))
    if first is dtype:
        return h.graph.call_function(getattr, (h, "dtype"))
    if isinstance(first, tuple | list):
        parts = [_literal((a, b), h, dtype) for a, b in zip(first, other, strict=True)]
        return parts if isinstance(first, list) else tuple(parts)
    if first == other:
        return first
    if not isinstance(first, int) or first * BATCHES[1] != other * BATCHES[0]:
        raise UserError(f"what is {first} for a batch of {BATCHES[0]} is {other} for one of {BATCHES[1]}: no cut there")
    size, times = h.graph.call_method("size", (h, 0)), first // BATCHES[0]
    return size if times == 1 else h.graph.call_function(operator.mul, (size, times))
