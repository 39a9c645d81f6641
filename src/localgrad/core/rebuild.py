"""Some of a traced network's steps -> a module that runs them with the backbone's own modules and tensors.

`Rebuild.build` gets the steps of one unit, the step before them and the step whose tensor leaves:

    h (what entered) -> layers.0 -> add(table) -> layers.1 -> out           table = mul(position, scale)

Several tensors may enter or leave. Then h is a dictionary, and so is what the module returns.

The steps from `h` to `out` are the chain: their tensors depend on the network's input. The others, such as `table`, are
beside the chain, and several units may read them. Each unit computes them again. A parameter there, such as `position`,
belongs to the first unit that reads it. The others read its value, and send no gradient to it.
"""

from __future__ import annotations

import copy
import importlib
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_map

from localgrad.core.boundary import MAIN
from localgrad.core.errors import UserError
from localgrad.core.pairs import BATCHES
from localgrad.core.steps import CHECKPOINT, CONSTANT, EVALUATION, NO_GRAD, VALUE, WRITES, has_tensor


class FrozenReference(nn.Module):
    """Runs a module with parameters that another unit trains. These are not part of this one.

    Args:
        module: The module.
        frozen: The names of these parameters. Its others are part of this one.

    Attributes:
        whole: Whether the block that runs it trains these parameters, too. Else they get no gradient from it.
    """

    def __init__(self, module: nn.Module, frozen: Iterable[str]) -> None:
        super().__init__()
        self.reference, self.frozen, self.whole = (module,), tuple(frozen), False  # A tuple registers no submodule.
        for name, parameter in module.named_parameters():
            if name not in self.frozen:
                self.register_parameter(name.replace(".", "_"), parameter)

    def __deepcopy__(self, memo: dict) -> FrozenReference:
        shared = {id(p): p for p in map(self.reference[0].get_parameter, self.frozen) if id(p) not in memo}
        twin = FrozenReference(copy.deepcopy(self.reference[0], memo | shared), self.frozen)
        twin.whole = self.whole
        return twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.reference[0]
        if self.whole:
            return module(*args, **kwargs)
        return functional_call(module, {n: module.get_parameter(n).detach() for n in self.frozen}, args, kwargs)


class TensorReference(nn.Module):
    """Reads a tensor that is no parameter, such as a buffer, from the module that holds it."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = (owner,), name

    def __deepcopy__(self, memo: dict) -> TensorReference:
        return TensorReference(memo.get(id(self.owner[0]), self.owner[0]), self.name)

    def forward(self) -> Any:
        return getattr(self.owner[0], self.name)


class ModeConstant(nn.Module):
    """Returns one of two constants, by the mode of the network: its forward asks for its own mode, not for a unit's."""

    def __init__(self, network: nn.Module, training: Any, evaluation: Any) -> None:
        super().__init__()
        self.network, self.values = (network,), (evaluation, training)

    def __deepcopy__(self, memo: dict) -> ModeConstant:
        return ModeConstant(memo.get(id(self.network[0]), self.network[0]), *reversed(self.values))

    def forward(self) -> Any:
        return self.values[self.network[0].training]


class Run(fx.GraphModule):
    """A module of steps.

    It is pickled as a list of its steps. PyTorch's own way would trace its code again when it is read, and would make
    constants of the steps that depend on no input.
    """

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
    """Stands in a pickle for a step that is the argument of another one."""

    name: str

    @classmethod
    def of(cls, node: fx.Node) -> _Step:
        return cls(node.name)


@dataclass(frozen=True)
class _Function:
    """Stands in a pickle for a function that its module holds by this name: pickle does not find all of them itself."""

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
    """Makes modules of the steps of a traced network.

    Attributes:
        backbone: The network.
        nodes: All steps in their order.
        depends: The steps of the chain, whose tensors depend on the network's input.
        index: The number of each step.
        owner: The unit that a parameter beside the chain, or a tied one, belongs to, by the parameter's id.
        tied: The ids of tied parameters: a table of an embedding that other modules use, too.
        writers: The steps beside the chain that change a tensor in place, by the tensor's id.
    """

    def __init__(self, backbone: nn.Module, nodes: Sequence[fx.Node], depends: set[fx.Node]) -> None:
        self.backbone, self.nodes, self.depends = backbone, nodes, depends
        self.index = {node: i for i, node in enumerate(nodes)}
        self.owner: dict[int, str] = {}
        self.tied: set[int] = set()
        self.writers: dict[int, list[fx.Node]] = {}
        for node in nodes:
            for written in () if node in depends else node.meta[WRITES]:
                self.writers.setdefault(id(base_of(written)), []).append(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.backbone.get_submodule(name_of(node)) if node.op == "call_module" else None

    def taken(self, node: fx.Node) -> str | None:
        """The name of the module or tensor that a step takes from the backbone."""
        name = name_of(node)
        own = node.op in ("call_module", "get_attr") and not name.rpartition(".")[2].startswith(CONSTANT)
        return name if own else None

    def parameters_read(self, node: fx.Node) -> set[int]:
        """The ids of the parameters that a step reads beside the chain."""
        beside = (n for n in node.all_input_nodes if n not in self.depends and has_tensor(n.meta[VALUE]))
        return set().union(*map(self.parameters_beside, beside))

    def tied_elsewhere(self, unit: str, node: fx.Node) -> list[str]:
        """The names of the tied parameters of a step's module that an earlier unit trains."""
        module = self.module(node)
        named = module.named_parameters() if module is not None else ()
        return [name for name, p in named if id(p) in self.tied and self.owner.setdefault(id(p), unit) != unit]

    def build(
        self, unit: str, entering: fx.Node | dict[str, fx.Node], run: Sequence[fx.Node], leaving: Any
    ) -> nn.Module:
        """Makes the module of a unit.

        Args:
            unit: The unit's name.
            entering: The step whose tensor the module takes as its input, or several of them by name, the main one
                first.
            run: The steps of the chain that the module runs.
            leaving: The step whose tensor the module returns, or a structure of steps such as a tuple.
        """
        return _UnitBuilder(self, unit, entering).build(run, leaving)

    def with_beside(self, run: Sequence[fx.Node], leaving: Any) -> list[fx.Node]:
        """The steps of a run in their order, with the steps beside the chain that they need: those whose tensors they
        read, and those that have changed such a tensor in place before."""
        last = self.index[run[-1]]
        found, waiting = set(run), list(run)
        map_arg(leaving, waiting.append)
        while waiting:
            node = waiting.pop()
            read = [n for n in (node, *node.all_input_nodes) if n not in self.depends and has_tensor(n.meta[VALUE])]
            written = [
                w for n in read for w in self.writers.get(id(base_of(n.meta[VALUE][0])), ()) if self.index[w] < last
            ]
            new = {*read, *written} - found
            found |= new
            waiting += new
        return sorted(found, key=self.index.__getitem__)

    def parameters_beside(self, node: fx.Node) -> set[int]:
        """The ids of the parameters that a step beside the chain depends on."""
        found: set[int] = set()
        waiting = [node]
        while waiting:
            now = waiting.pop()
            waiting += [n for n in now.all_input_nodes if n not in self.depends and has_tensor(n.meta[VALUE])]
            if now.op == "get_attr" and isinstance(value := self.attribute(now), nn.Parameter):
                found.add(id(value))
            elif (module := self.module(now)) is not None:
                found.update(map(id, module.parameters()))
        return found

    def attribute(self, node: fx.Node) -> Any:
        """The module that a step calls, or the tensor that it reads."""
        if node.op == "call_module":
            return self.backbone.get_submodule(name_of(node))
        owner, _, name = name_of(node).rpartition(".")
        if name.startswith(CONSTANT):  # The forward itself has made this tensor.
            return node.meta[VALUE][0]
        return getattr(self.backbone.get_submodule(owner), name)

    def holder(self, node: fx.Node) -> tuple[nn.Module, str] | None:
        """The module that holds the tensor that a step reads, and the tensor's name there. None for a parameter."""
        owner, _, name = name_of(node).rpartition(".")
        if name.startswith(CONSTANT) or isinstance(self.attribute(node), nn.Parameter):
            return None
        return self.backbone.get_submodule(owner), name


class _UnitBuilder:
    """Copies the steps of one unit into a new graph.

    Attributes:
        graph: The new graph.
        main: The step whose tensor is the main one of those that enter.
        input: The new step that gives that tensor.
        roots: The modules and tensors that the new steps call and read, by the names that the steps have for them.
        made: The new step, or the constant, that stands for an old step.
    """

    def __init__(self, rebuild: Rebuild, unit: str, entering: fx.Node | dict[str, fx.Node]) -> None:
        self.rebuild, self.unit = rebuild, unit
        self.graph = fx.Graph()
        self.roots: dict[str, Any] = {}
        self.made: dict[fx.Node, Any] = {}
        h = self.graph.placeholder("h")
        if isinstance(entering, fx.Node):
            self.main = entering
            self.made[entering] = h
        else:
            self.main = entering[MAIN]
            for name, node in entering.items():
                self.made[node] = self.graph.call_function(passenger, (h, name))
        self.input = self.made[self.main]

    def build(self, run: Sequence[fx.Node], leaving: Any) -> nn.Module:
        for node in self.rebuild.with_beside(run, leaving):
            if node not in self.made:
                self.made[node] = self._copy(node) if self._is_own(node) else self._read_frozen(node)
        self.graph.output(map_arg(leaving, self._value))
        return Run(self.roots, self.graph, type(self.rebuild.backbone).__name__)

    def _is_own(self, node: fx.Node) -> bool:
        """Whether the unit itself runs a step. If not, the parameters of that step belong to another unit."""
        if node in self.rebuild.depends or node.op in ("call_function", "call_method"):
            return True  # A function has no parameters. Reading one is a step of its own.
        parameters = self.rebuild.parameters_beside(node)
        return all(self.rebuild.owner.setdefault(p, self.unit) == self.unit for p in parameters)

    def _read_frozen(self, node: fx.Node) -> fx.Node:
        """Builds a step that another unit owns as a module of that unit, and reads its value without a gradient."""
        rebuild = self.rebuild
        owner = next(rebuild.owner[p] for p in rebuild.parameters_beside(node))
        module = rebuild.build(owner, rebuild.nodes[0], [node], node)
        return self._call("held", FrozenReference(module, (n for n, _ in module.named_parameters())), self.input)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and (holder := self.rebuild.holder(node)) is not None:
            return self._call("reads", TensorReference(*holder))
        target = node.target
        if node.op in ("call_module", "get_attr"):
            target = name_of(node)
            self.roots[target] = self.rebuild.attribute(node)
            if frozen := self.rebuild.tied_elsewhere(self.unit, node):
                self.roots[target] = FrozenReference(self.roots[target], frozen)
        training = node.args, node.kwargs
        args, kwargs = tree_map(self._argument, training, node.meta.get(EVALUATION, training))
        copied: Any = self.graph.create_node(node.op, target, args, kwargs, node.name)
        copied.meta[CHECKPOINT] = node.meta[CHECKPOINT]
        if node.meta[NO_GRAD] and isinstance(node.meta[VALUE][0], Tensor):
            return self.graph.call_method("detach", (copied,))
        return copied

    def _argument(self, training: Any, evaluation: Any) -> Any:
        """An argument of a new step. If it is another constant in evaluation mode, the network's mode chooses."""
        if training is evaluation or isinstance(training, fx.Node | slice) or training == evaluation:
            return map_arg(training, self._value)
        return self._call("by_mode", ModeConstant(self.rebuild.backbone, training, evaluation))

    def _value(self, node: fx.Node) -> Any:
        if node not in self.made:  # It gives no tensor: steps that do were copied before, in their order.
            self.made[node] = _literal(node.meta[VALUE], self.input, self.main.meta[VALUE][0].dtype)
        return self.made[node]

    def _call(self, kind: str, module: nn.Module, *args: Any) -> fx.Node:
        name = f"{kind}_{len(self.roots)}"
        self.roots[name] = module
        return self.graph.call_module(name, args)


def passenger(h: dict[str, Tensor], name: str) -> Tensor | None:
    """One of the tensors that enter, or None: a copy of a unit elsewhere in the network does not get what it only hands
    on."""
    return h.get(name)


def name_of(node: fx.Node) -> str:
    """The name in the backbone of the module or tensor that a step takes from there. Else the step's own name."""
    if node.op not in ("call_module", "get_attr"):
        return node.name
    return str(node.target)


def base_of(value: Any) -> Any:
    """The tensor whose view `value` is, or `value` itself."""
    return value if not isinstance(value, Tensor) or value._base is None else value._base


def _literal(values: tuple[Any, ...], h: fx.Node, dtype: torch.dtype) -> Any:
    """A value that is no tensor, as the unit reads it: a constant, or the batch size, device or dtype of its input.

    Args:
        values: The value for each of BATCHES.
        h: The unit's input.
        dtype: The dtype of `h` when the network was traced.
    """
    first, other = values
    if isinstance(first, torch.device):
        return h.graph.call_function(getattr, (h, "device"))
    if isinstance(first, torch.dtype):
        return h.graph.call_function(getattr, (h, "dtype")) if first is dtype else first
    if isinstance(first, tuple | list):
        parts = [_literal((a, b), h, dtype) for a, b in zip(first, other, strict=True)]
        return parts if isinstance(first, list) else tuple(parts)
    if first == other:
        return first
    if not isinstance(first, int) or first * BATCHES[1] != other * BATCHES[0]:
        raise UserError(
            f"the forward computes {first} from a batch of {BATCHES[0]} and {other} from one of {BATCHES[1]}, which no "
            "block can follow: let a module compute what needs it"
        )
    size, times = h.graph.call_method("size", (h, 0)), first // BATCHES[0]
    return size if times == 1 else h.graph.call_function(operator.mul, (size, times))
