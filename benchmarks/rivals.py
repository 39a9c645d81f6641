"""The steps of exact training that a person can take without localgrad, for `frontier.py` to time beside our plans.

Each is written with PyTorch alone: end-to-end backpropagation, accumulation of micro-batches, `checkpoint` around each
unit, and `checkpoint_sequential` with some number of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from localgrad.core.blocks import trace_units

Forward = Callable[[Tensor], Tensor]


def rivals(
    network: Callable[[], nn.Module], x: Tensor, y: Tensor, autocast: torch.dtype | None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The name of each rival, and its training step. Each has a network and an optimizer of its own."""
    for parts in (1, 2, 4, 8):
        own = network()
        yield f"PyTorch: {'BP' if parts == 1 else f'{parts} micro-batches'}", _step(own, own, x, y, autocast, parts)
    own = network()
    yield "PyTorch: checkpoint, unit by unit", _step(own, _unit_by_unit(_sequence(own, x)), x, y, autocast)
    count = len(_sequence(network(), x))
    for segments in sorted({2, 4, 6, 8, 12, 16, count // 2} & set(range(2, count))):
        own = network()
        forward = _in_segments(_sequence(own, x), segments)
        yield f"PyTorch: checkpoint_sequential, {segments} segments", _step(own, forward, x, y, autocast)


def _sequence(network: nn.Module, x: Tensor) -> list[nn.Module]:
    """The units of a network, and its head, as modules that run one after the other."""
    traced = trace_units(network, x[:2])
    return [*[unit.module for unit in traced.units], *([] if traced.head is None else [traced.head])]


def _unit_by_unit(parts: list[nn.Module]) -> Forward:
    *units, head = parts

    def forward(h: Tensor) -> Tensor:
        for unit in units:
            h = checkpoint(unit, h, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return head(h)

    return forward


def _in_segments(parts: list[nn.Module], segments: int) -> Forward:
    sequence = nn.Sequential(*parts)

    def forward(h: Tensor) -> Tensor:
        return checkpoint_sequential(sequence, segments, h, use_reentrant=False)

    return forward


def _step(
    network: nn.Module, forward: Forward, x: Tensor, y: Tensor, autocast: torch.dtype | None, parts: int = 1
) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        for images, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                logits = forward(images)
            (F.cross_entropy(logits.float(), targets) / parts).backward()
            del logits
        optimizer.step()
        optimizer.zero_grad()

    return step
