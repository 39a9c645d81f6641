"""Backbone -> named runs of its modules: a symbolic trace with the repeated units as leaves.

Only chains are traced: each operation reads what the one before it made, and numbers of its shape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from localgrad.core.errors import UserError

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


def trace(backbone: nn.Module) -> tuple[list[tuple[str, nn.Module]], nn.Module | None]:
    """The units of `backbone` in order, each with the module that runs it, and the network's own head (None where
    the last unit ends the network). Raises UserError for a network that is no chain."""
    runs, head = _pieces(backbone, _nodes(backbone))
    return [(name, _chain(backbone, nodes)) for name, nodes in runs], _chain(backbone, head) if head else None


class _Here:
    """Marks the place of the crossing tensor among traced arguments; one object even after a deep copy."""

    def __deepcopy__(self, memo: dict) -> _Here:
        return self


_HERE = _Here()


@dataclass(frozen=True)
class _Size:
    """A number read off the crossing tensor as it passes, such as `h.size(0)`: its target and arguments."""

    target: Callable[..., Any] | str
    args: tuple[Any, ...]


class Call(nn.Module):
    """A traced function or tensor method as a module: `target(h, ...)` with the traced constant arguments."""

    def __init__(self, target: Callable[..., Tensor] | str, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.target = target
        self.args, self.kwargs = args, kwargs

    def forward(self, h: Tensor) -> Tensor:
        kwargs = _fill(self.kwargs, h)
        if "training" in kwargs:  # traced as a constant, yet it has to follow .train() and .eval()
            kwargs = {**kwargs, "training": self.training}
        return _apply(self.target, _fill(self.args, h), kwargs)


def _is_composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_stage(module: nn.Module) -> bool:
    """A container of composite modules, such as a ResNet's layer1: cut between its elements."""
    with_parameters = [m for m in module.children() if next(m.parameters(), None) is not None]
    container = isinstance(module, nn.Sequential | nn.ModuleList)
    return container and bool(with_parameters) and all(map(_is_composite, with_parameters))


def _elements(backbone: nn.Module) -> set[str]:
    """Names of the modules that stand in a Sequential or ModuleList and are no stage themselves."""
    found = set()
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            prefix = f"{name}." if name else ""
            found |= {prefix + child for child, m in module.named_children() if not _is_stage(m)}
    return found


class _UnitTracer(fx.Tracer):
    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)


def _nodes(backbone: nn.Module) -> list[fx.Node]:
    """The operations of `backbone` in order, each reading only the one before. Raises UserError otherwise."""
    try:
        graph = _UnitTracer(_elements(backbone)).trace(backbone)
    except Exception as error:  # symbolic tracing fails in as many ways as Python has control flow
        raise UserError(f"{type(backbone).__name__} cannot be cut into units: tracing it failed ({error})") from error
    *nodes, output = [n for n in graph.nodes if not _reads_size(n) and (n.op != "placeholder" or n.users)]
    if not isinstance(output.args[0], fx.Node):
        raise UserError(f"{type(backbone).__name__} gives a {type(output.args[0]).__name__}, not one tensor")
    for before, node in zip(nodes, [*nodes[1:], output], strict=True):
        sources = set().union(*map(_tensors_of, node.all_input_nodes))
        if sources != {before}:
            other = next((n for n in sources if n is not before), before)
            skips, over = (str(n.target) if n.op == "call_module" else n.name for n in (other, before))
            raise UserError(
                f"{type(backbone).__name__} is no chain: the tensor of '{skips}' skips over '{over}' to '{node.name}'; "
                "give its repeated units as elements of an nn.Sequential or nn.ModuleList"
            )
    return nodes[1:]


def _reads_size(node: fx.Node) -> bool:
    """Whether a node gives numbers of a shape (`h.size(0)`, `h.shape[1] * 16`), not a tensor."""
    if node.op == "call_method":
        return node.target == "size"
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    arithmetic = getattr(node.target, "__module__", "") == operator.mul.__module__
    return arithmetic and all(map(_reads_size, node.all_input_nodes))


def _tensors_of(node: fx.Node) -> set[fx.Node]:
    """The tensor that a node is, or those whose shapes it reads."""
    return set().union(*map(_tensors_of, node.all_input_nodes)) if _reads_size(node) else {node}


def _freeze(arguments: Any) -> Any:
    """Traced arguments without the graph: the crossing tensor as _HERE, what is read off its shape as _Size."""
    return map_arg(arguments, lambda n: _Size(n.target, _freeze(n.args)) if _reads_size(n) else _HERE)  # pyright: ignore[reportArgumentType]


def _fill(arguments: Any, h: Tensor) -> Any:
    """Frozen arguments with the tensor that passes now."""

    def value(a: Any) -> Any:
        if isinstance(a, _Size):
            return _apply(a.target, _fill(a.args, h), {})
        return h if a is _HERE else a

    return map_aggregate(arguments, value)


def _apply(target: Callable[..., Any] | str, args: Any, kwargs: Any) -> Any:
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def _pieces(backbone: nn.Module, nodes: list[fx.Node]) -> tuple[list[tuple[str, list[fx.Node]]], list[fx.Node]]:
    """Named runs of nodes, one per unit, and the nodes of the network's own head."""

    def module(node: fx.Node) -> nn.Module:
        return backbone.get_submodule(str(node.target)) if node.op == "call_module" else nn.Identity()

    def has_parameters(node: fx.Node) -> bool:
        return next(module(node).parameters(), None) is not None

    elements = _elements(backbone)
    composite = [n.target in elements and _is_composite(module(n)) for n in nodes]
    plain = not any(composite)
    starts = [
        i
        for i, n in enumerate(nodes)
        if (has_parameters(n) and not isinstance(module(n), _NORMS) if plain else composite[i])
    ]
    if not starts:
        raise UserError(f"{type(backbone).__name__} cannot be cut into units: it has no module with parameters")
    runs = [(str(nodes[a].target), nodes[a:b]) for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]
    before, head = nodes[: starts[0]], []
    if any(map(has_parameters, before)):
        runs.insert(0, ("stem", before))
    else:
        runs[0] = (runs[0][0], before + runs[0][1])
    if plain and len(runs) > 1:  # the last layer is the network's own head, as in any classifier
        head = runs.pop()[1]
    elif any(map(has_parameters, runs[-1][1][1:])):  # pool, flatten, linear after the last repeated unit
        name, last = runs[-1]
        runs[-1], head = (name, last[:1]), last[1:]
    return runs, head


def _chain(backbone: nn.Module, nodes: Iterable[fx.Node]) -> nn.Module:
    modules = [backbone.get_submodule(str(n.target)) if n.op == "call_module" else _call(backbone, n) for n in nodes]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _call(backbone: nn.Module, node: fx.Node) -> Call:
    args, kwargs = node.args, node.kwargs
    if node.op == "call_function":  # by name, so that a `training` that was passed by its place is found
        named = node.normalized_arguments(backbone, normalize_to_only_use_kwargs=True)
        if named is not None and "training" in named.kwargs:
            args, kwargs = (), named.kwargs
    return Call(node.target, _freeze(args), _freeze(kwargs))  # pyright: ignore[reportArgumentType]


def first_leaf(module: nn.Module) -> nn.Module:
    """The first module of `module` that has no modules of its own."""
    return next(m for m in module.modules() if not _is_composite(m))
