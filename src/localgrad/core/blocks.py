"""Backbone -> units -> K blocks and the boundaries between them, by the names of the backbone's own modules.

The backbone is traced symbolically with its repeated units as leaves; a unit or block references the modules that it
runs, never copies or renames them. Only chains are cut here: each traced operation reads what the one before it made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from localgrad.core.errors import UserError, unknown

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Boundary:
    """What crosses between two units: the shape of one sample, its layout, and how many shape changes came before.

    layout: "NCHW" feature maps, or "NC" vectors. Heads read it through `to_map`; nobody guesses from `ndim`.
    """

    shape: tuple[int, ...]
    layout: str
    stage: int

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map; a vector is a map of one pixel."""
        return (self.shape[1], self.shape[2]) if self.layout == "NCHW" else (1, 1)

    def to_map(self) -> list[nn.Module]:
        """Modules that turn what crosses, [B, *shape], into a map [B, C, H, W]: none where it is one already."""
        return [] if self.layout == "NCHW" else [nn.Unflatten(1, (self.channels, 1, 1))]


class _Here:
    """Marks the place of the crossing tensor among traced arguments; one object even after a deep copy."""

    def __deepcopy__(self, memo: dict) -> _Here:
        return self


_HERE = _Here()


class Call(nn.Module):
    """A traced function or tensor method as a module: `target(h, ...)` with the traced constant arguments."""

    def __init__(self, target: Callable[..., Tensor] | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.target = target
        self.args = tuple(_HERE if isinstance(a, fx.Node) else a for a in args)
        self.kwargs = {name: _HERE if isinstance(a, fx.Node) else a for name, a in kwargs.items()}

    def forward(self, h: Tensor) -> Tensor:
        args = [h if a is _HERE else a for a in self.args]
        kwargs = {name: h if a is _HERE else a for name, a in self.kwargs.items()}
        if "training" in kwargs:  # traced as a constant, yet it has to follow .train() and .eval()
            kwargs["training"] = self.training
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


class Clone(nn.Module):
    """Keeps its input from a unit that begins in place."""

    def forward(self, h: Tensor) -> Tensor:
        return h.clone()


@dataclass(frozen=True, eq=False)
class Unit:
    """The smallest piece that a cut may not split. `module` runs it and references the backbone's own modules."""

    name: str
    module: nn.Module
    input: Boundary
    output: Boundary
    begins_in_place: bool = False

    @property
    def changes_shape(self) -> bool:
        return self.input.shape != self.output.shape

    def copy(self, *, fresh: bool) -> nn.Module:
        """A copy with parameters of its own; `fresh` draws them anew (a bare parameter keeps its value)."""
        module = copy.deepcopy(self.module)
        if fresh:
            for part in module.modules():
                reset = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
        return nn.Sequential(Clone(), module) if self.begins_in_place else module


class Block(nn.Sequential):
    """Consecutive units that share one loss; the last block also runs the network's own head.

    names: of its units. boundary: what it hands on.
    """

    def __init__(self, units: Sequence[Unit], head: nn.Module | None = None) -> None:
        super().__init__(*[u.module for u in units], *([] if head is None else [head]))
        self.names = tuple(u.name for u in units)
        self.boundary = units[-1].output


def units(backbone: nn.Module, example: Tensor) -> list[str]:
    """Names of the units of `backbone`, in order: `blocks=[...]` cuts after those that it lists.

    example: an input batch [B, ...], of which one sample is used. Raises UserError for a network that is no chain.
    """
    return [u.name for u in trace_units(backbone, example)[0]]


def trace_units(backbone: nn.Module, example: Tensor) -> tuple[list[Unit], nn.Module | None]:
    """The units of `backbone` and its head (None where the last unit already gives the output)."""
    pieces, head = _pieces(backbone, _trace(backbone))
    modules = [(name, _chain(backbone, nodes)) for name, nodes in pieces]
    found: list[Unit] = []
    was_training = [m for m in backbone.modules() if m.training]
    backbone.eval()
    try:
        h = _like_parameters(example[:1].detach().clone(), backbone)
        stage = 0
        with torch.no_grad():
            before = _boundary(h, stage)
            for name, module in modules:
                version = h._version
                out = module(h)
                in_place = h._version != version
                stage += tuple(out.shape[1:]) != before.shape and bool(found)
                after = _boundary(out, stage)
                found.append(Unit(name, module, before, after, in_place))
                h, before = out, after
    finally:
        for m in was_training:
            m.training = True
    tail = _chain(backbone, head) if head else None
    # A last unit that turns maps into a vector is the network's own head, whatever its module is called.
    if tail is None and len(found) > 1 and len(found[-1].output.shape) < len(found[-1].input.shape):
        tail = found.pop().module
    return found, tail


def split(all_units: Sequence[Unit], blocks: int | Sequence[str]) -> list[list[Unit]]:
    """Groups units into blocks: evenly for a number (early blocks, whose maps are large, take the smaller share), or
    after each named unit (the last unit closes the last block, named or not). Raises UserError for an impossible cut.
    """
    names = [u.name for u in all_units]
    if isinstance(blocks, int):
        if not 1 <= blocks <= len(names):
            raise UserError(
                f"blocks={blocks} is out of range: this network has {len(names)} units, so 1 to {len(names)}"
            )
        ends = [i * len(names) // blocks for i in range(1, blocks + 1)]
    else:
        for name in blocks:
            if name not in names:
                raise unknown("unit", name, names)
        ends = [names.index(name) + 1 for name in blocks]
        if sorted(set(ends)) != ends or not ends:
            raise UserError(f"blocks must list units in their order, each once: got {', '.join(blocks) or 'none'}")
        if ends[-1] != len(names):
            ends.append(len(names))
    return [list(all_units[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def select_path(downstream: Sequence[Unit], depth: int) -> list[Unit]:
    """`depth` units of `downstream`, in order: those that change the shape come first, or the rest would not chain;
    what is left of `depth` is spread evenly over the others. With fewer than `depth` units, all of them.
    """
    changing = [i for i, u in enumerate(downstream) if u.changes_shape][:depth]
    others = [i for i, u in enumerate(downstream) if not u.changes_shape]
    extra = max(0, min(depth - len(changing), len(others)))
    spread = [others[i * len(others) // extra] for i in range(extra)]
    return [downstream[i] for i in sorted(changing + spread)]


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


def _trace(backbone: nn.Module) -> list[fx.Node]:
    """The operations of `backbone` in order, each reading only the one before. Raises UserError otherwise."""
    try:
        graph = _UnitTracer(_elements(backbone)).trace(backbone)
    except Exception as error:  # symbolic tracing fails in as many ways as Python has control flow
        raise UserError(f"{type(backbone).__name__} cannot be cut into units: tracing it failed ({error})") from error
    *nodes, last = [n for n in graph.nodes if n.op != "placeholder" or n.users]
    for before, node in zip(nodes, [*nodes[1:], last], strict=True):
        if node.all_input_nodes != [before]:
            other = next((n for n in node.all_input_nodes if n is not before), before)
            skips, over = (str(n.target) if n.op == "call_module" else n.name for n in (other, before))
            raise UserError(
                f"{type(backbone).__name__} is no chain: the tensor of '{skips}' skips over '{over}' to '{node.name}'; "
                "give its repeated units as elements of an nn.Sequential or nn.ModuleList"
            )
    return nodes[1:]


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
    modules = [
        backbone.get_submodule(str(n.target)) if n.op == "call_module" else Call(n.target, n.args, n.kwargs)
        for n in nodes
    ]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _boundary(h: Tensor, stage: int) -> Boundary:
    layouts = {4: "NCHW", 2: "NC"}
    if h.ndim not in layouts:
        raise UserError(f"a boundary of shape {tuple(h.shape)} is neither a map [B, C, H, W] nor a vector [B, C]")
    return Boundary(tuple(h.shape[1:]), layouts[h.ndim], stage)


def _like_parameters(h: Tensor, backbone: nn.Module) -> Tensor:
    parameter = next(backbone.parameters(), None)
    return h if parameter is None else h.to(parameter.device, parameter.dtype)
