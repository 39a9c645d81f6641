"""A run of a traced network's steps -> a module that references the backbone's own modules and tensors.

What a run reads beside the chain and depends on no image, such as a table of positions, it computes again; parameters
there belong to the first unit that reads them, and the others read them as they are.
"""

from __future__ import annotations

import copy
import importlib
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_map

from localgrad.core.errors import UserError
from localgrad.core.trace import BATCHES, CHECKPOINT, EVALUATION, NO_GRAD, VALUE, WRITES, has_tensor


class FrozenReference(nn.Module):
    """Runs a module that another block trains: its parameters are not part of this one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.reference = (module,)  # a tuple, so that it is not registered

    def __deepcopy__(self, memo: dict) -> FrozenReference:
        whole = any(id(p) in memo for p in self.reference[0].parameters())
        return FrozenReference(copy.deepcopy(self.reference[0], memo) if whole else self.reference[0])

    def forward(self, h: Tensor) -> Tensor:
        return self.reference[0](h).detach()


class TensorReference(nn.Module):
    """A tensor that is no parameter, read where it lies."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = (owner,), name

    def __deepcopy__(self, memo: dict) -> TensorReference:
        return TensorReference(memo.get(id(self.owner[0]), self.owner[0]), self.name)

    def forward(self) -> Any:
        return getattr(self.owner[0], self.name)


class ModeConstant(nn.Module):
    """What a forward takes in training, and in evaluation, of the network: its own mode is asked, as it asks itself."""

    def __init__(self, network: nn.Module, training: Any, evaluation: Any) -> None:
        super().__init__()
        self.network, self.values = (network,), (evaluation, training)

    def __deepcopy__(self, memo: dict) -> ModeConstant:
        return ModeConstant(memo.get(id(self.network[0]), self.network[0]), *reversed(self.values))

    def forward(self) -> Any:
        return self.values[self.network[0].training]


class Run(fx.GraphModule):
    """A run of steps. Pickled as its steps: PyTorch's own way would follow the code once more when it is read, and make
    constants of what depends on no input."""

    def __reduce__(self) -> tuple[Any, ...]:
        by_name: Any = _Step.of
        steps = [
            (node.op, _by_name(node.target), *map_arg((node.args, node.kwargs), by_name), node.name)
            for node in self.graph.nodes
        ]
        held = {name: value for name, value in vars(self).items() if name not in ("_graph", "_code")}
        return _unpickled_run, (type(self).__name__, steps), held

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@dataclass(frozen=True)
class _Step:
    """Stands for a step where it is an argument."""

    name: str

    @classmethod
    def of(cls, node: fx.Node) -> _Step:
        return cls(node.name)


@dataclass(frozen=True)
class _Function:
    """Stands for a function that its module knows by its name, but which pickle does not find there."""

    module: str
    name: str


def _by_name(target: Any) -> Any:
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    if isinstance(module, str) and isinstance(name, str) and getattr(sys.modules.get(module), name, None) is target:
        return _Function(module, name)
    return target


def _unpickled_run(name: str, steps: Sequence[tuple[Any, ...]]) -> Run:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def step(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Step) else value

    for op, target, args, kwargs, own in steps:
        found = (
            getattr(importlib.import_module(target.module), target.name) if isinstance(target, _Function) else target
        )
        args, kwargs = map_aggregate((args, kwargs), step)
        made[own] = graph.create_node(op, found, args, kwargs, own)
    return Run(
        {node.target: nn.Module() for node in graph.nodes if node.op in ("call_module", "get_attr")}, graph, name
    )


class Rebuild:
    """Makes modules of runs of steps. depends: the steps of the chain, those made of the input's values."""

    def __init__(self, backbone: nn.Module, nodes: Sequence[fx.Node], depends: set[fx.Node]) -> None:
        self.backbone, self.nodes, self.depends = backbone, nodes, depends
        self.index = {node: i for i, node in enumerate(nodes)}
        self.owner: dict[int, str] = {}  # of parameters beside the chain: the first unit that reads them
        self.writers: dict[int, list[fx.Node]] = {}  # steps beside the chain that change a tensor in place
        for node in nodes:
            for written in () if node in depends else node.meta[WRITES]:
                self.writers.setdefault(id(_base(written)), []).append(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.backbone.get_submodule(name_of(node)) if node.op == "call_module" else None

    def taken(self, node: fx.Node) -> str | None:
        """The name of the module or tensor that a step takes from the backbone."""
        name = name_of(node)
        own = node.op in ("call_module", "get_attr") and not name.rpartition(".")[2].startswith("_tensor_constant")
        return name if own else None

    def parameters_read(self, node: fx.Node) -> set[int]:
        """Parameters that a step reads beside the chain, in no module of the chain."""
        beside = (n for n in node.all_input_nodes if n not in self.depends and has_tensor(n.meta[VALUE]))
        return set().union(*map(self._parameters_beside, beside))

    def build(self, name: str, entering: fx.Node, run: Sequence[fx.Node], leaving: Any) -> nn.Module:
        """The steps of `run`, of the unit `name`, as a module from `entering`'s tensor to the structure `leaving`."""
        graph = fx.Graph()
        roots: dict[str, Any] = {}
        env: dict[fx.Node, Any] = {entering: graph.placeholder("h")}
        h = env[entering]

        def extra(kind: str, module: nn.Module, *args: Any) -> Any:
            roots[f"{kind}_{len(roots)}"] = module
            return graph.call_module(f"{kind}_{len(roots) - 1}", args)

        def add(node: fx.Node) -> Any:
            if node.op == "get_attr" and (where := self._lies(node)) is not None:
                return extra("reads", TensorReference(*where))
            own = node.op in ("call_module", "get_attr")
            if own:
                roots[name_of(node)] = self._attribute(node)
            now = node.args, node.kwargs
            args, kwargs = tree_map(choice, now, node.meta.get(EVALUATION, now))
            added: Any = graph.create_node(node.op, name_of(node) if own else node.target, args, kwargs, node.name)
            added.meta[CHECKPOINT] = node.meta[CHECKPOINT]
            if node.meta[NO_GRAD] and isinstance(node.meta[VALUE][0], Tensor):
                return graph.call_method("detach", (added,))
            return added

        def choice(now: Any, evaluation: Any) -> Any:
            """An argument, by the network's mode where it is another constant in evaluation."""
            if now is evaluation or isinstance(now, fx.Node | slice) or now == evaluation:
                return map_arg(now, value_of)
            return extra("by_mode", ModeConstant(self.backbone, now, evaluation))

        def value_of(node: fx.Node) -> Any:
            if node not in env:  # no tensor: those come in their order
                env[node] = _literal(node.meta[VALUE], h, entering.meta[VALUE][0].dtype)
            return env[node]

        def beside(node: fx.Node) -> Any:
            if node.op in ("call_function", "call_method"):
                return add(node)  # what it reads may belong to several units
            if all(self.owner.setdefault(p, name) == name for p in self._parameters_beside(node)):
                return add(node)
            owner = next(self.owner[p] for p in self._parameters_beside(node))
            return extra("held", FrozenReference(self.build(owner, self.nodes[0], [node], node)), h)

        for node in self._with_beside(run, leaving):
            if node not in env:
                env[node] = add(node) if node in self.depends else beside(node)
        graph.output(map_arg(leaving, value_of))
        return Run(roots, graph, type(self.backbone).__name__)

    def _with_beside(self, run: Sequence[fx.Node], leaving: Any) -> list[fx.Node]:
        """The steps of a run, and those beside the chain that they read or that write there before, in their order."""
        last = self.index[run[-1]]
        found, waiting = set(run), list(run)
        map_arg(leaving, waiting.append)
        while waiting:
            node = waiting.pop()
            read = [n for n in (node, *node.all_input_nodes) if n not in self.depends and has_tensor(n.meta[VALUE])]
            written = [
                w for n in read for w in self.writers.get(id(_base(n.meta[VALUE][0])), ()) if self.index[w] < last
            ]
            new = {*read, *written} - found
            found |= new
            waiting += new
        return sorted(found, key=self.index.__getitem__)

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
            return self.backbone.get_submodule(name_of(node))
        owner, _, name = name_of(node).rpartition(".")
        if name.startswith("_tensor_constant"):  # made while tracing
            return node.meta[VALUE][0]
        return getattr(self.backbone.get_submodule(owner), name)

    def _lies(self, node: fx.Node) -> tuple[nn.Module, str] | None:
        """Where the backbone has a tensor that is no parameter."""
        owner, _, name = name_of(node).rpartition(".")
        if name.startswith("_tensor_constant") or isinstance(self._attribute(node), nn.Parameter):
            return None
        return self.backbone.get_submodule(owner), name


def name_of(node: fx.Node) -> str:
    """Of a module or tensor of the backbone, its name there; of another step, its own."""
    if node.op not in ("call_module", "get_attr"):
        return node.name
    return str(node.target).removeprefix("network").removeprefix(".") or node.name


def _base(value: Any) -> Any:
    """The tensor of which another is a view."""
    return value if not isinstance(value, Tensor) or value._base is None else value._base


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
