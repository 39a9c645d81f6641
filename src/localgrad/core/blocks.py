"""Backbone -> units -> K blocks and the boundaries between them, by the names of the backbone's own modules.

A unit or block references the modules that it runs, never copies or renames them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localgrad.core.errors import UserError, unknown
from localgrad.core.trace import first_leaf, trace


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


Way = Callable[[nn.Module, Tensor], Tensor]


def straight(module: nn.Module, h: Tensor) -> Tensor:
    """The way in which a piece of the network is run: as it is. `scale.recompute` has another."""
    return module(h)


class Block(nn.Sequential):
    """Consecutive units that share one loss; the last block also runs the network's own head.

    names: of its units. boundary: what it hands on. ways: how each of its modules is run.
    """

    def __init__(self, units: Sequence[Unit], head: nn.Module | None = None) -> None:
        super().__init__(*[u.module for u in units], *([] if head is None else [head]))
        self.names = tuple(u.name for u in units)
        self.boundary = units[-1].output
        self.ways: list[Way] = [straight] * len(self)

    def forward(self, h: Tensor) -> Tensor:
        for way, module in zip(self.ways, self, strict=True):
            h = way(module, h)
        return h


def units(backbone: nn.Module, example: Tensor) -> list[str]:
    """Names of the units of `backbone`, in order: `blocks=[...]` cuts after those that it lists.

    example: an input batch [B, ...], of which one sample is used. Raises UserError for a network that is no chain.
    """
    return [u.name for u in trace_units(backbone, example)[0]]


def trace_units(backbone: nn.Module, example: Tensor) -> tuple[list[Unit], nn.Module | None]:
    """The units of `backbone` and its head (None where the last unit already gives the output)."""
    modules, tail = trace(backbone)
    names = [name for name, _ in modules]
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
                try:
                    out = module(h)
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"an example of {tuple(example.shape)} does not pass unit '{name}': {reason}"
                    ) from error
                # Dropout writes in training mode only, in which nothing is run here.
                in_place = h._version != version or getattr(first_leaf(module), "inplace", False)
                stage += tuple(out.shape[1:]) != before.shape and bool(found)
                after = _boundary(out, stage)
                found.append(Unit(name, module, before, after, in_place))
                h, before = out, after
    finally:
        for m in was_training:
            m.training = True
    owner: dict[nn.Parameter, str] = {}
    for unit in found:
        for parameter in unit.module.parameters():
            if owner.setdefault(parameter, unit.name) != unit.name or names.count(unit.name) > 1:
                raise UserError(
                    f"unit '{unit.name}' shares parameters with '{owner[parameter]}': they cannot be isolated"
                )
    # A last unit that turns maps into a vector is the network's own head, whatever its module is called.
    if tail is None and len(found) > 1 and len(found[-1].output.shape) < len(found[-1].input.shape):
        tail = found.pop().module
    return found, tail


def split(all_units: Sequence[Unit], blocks: int | Sequence[str]) -> list[list[Unit]]:
    """Groups units into blocks: evenly for a number (early blocks, whose maps are large, take the smaller share), or
    after each named unit (the last unit closes the last block, named or not). Raises UserError for an impossible cut.
    """
    names = [u.name for u in all_units]
    if isinstance(blocks, str):
        blocks = [blocks]
    if isinstance(blocks, bool | float):
        raise UserError(f"blocks takes a whole number or names of units, not {blocks}")
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


def _boundary(h: Tensor, stage: int) -> Boundary:
    layouts = {4: "NCHW", 2: "NC"}
    if h.ndim not in layouts:
        raise UserError(f"a boundary of shape {tuple(h.shape)} is neither a map [B, C, H, W] nor a vector [B, C]")
    return Boundary(tuple(h.shape[1:]), layouts[h.ndim], stage)


def _like_parameters(h: Tensor, backbone: nn.Module) -> Tensor:
    parameter = next(backbone.parameters(), None)
    return h if parameter is None else h.to(parameter.device, parameter.dtype)
