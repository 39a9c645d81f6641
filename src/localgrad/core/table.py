"""Shows a model as a table: its blocks with their units, auxiliaries and parameters, and what of it is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from localgrad.core.boundary import Boundary

if TYPE_CHECKING:
    from localgrad.core.blocks import Block
    from localgrad.core.model import LocalModel

HEADER = ("block", "units", "hands on", "auxiliary", "parameters", "auxiliary's", "MiB")
NUMBERS = 4  # The first column of numbers, which are aligned to the right.


def table(model: LocalModel) -> str:
    """Lists the blocks with their units, boundary shape, auxiliary, and the parameters of both, as aligned text.

    Where a network has frozen parameters, the title counts the trained ones, and so does the row of each block that has
    frozen ones.
    """
    rows: list[tuple[str, ...]] = [HEADER]
    for k, (block, auxiliary) in enumerate(zip(model.blocks, [*model.auxiliaries, None], strict=True)):
        own, extra = (list(m.parameters()) if m is not None else [] for m in (block, auxiliary))
        mib = sum(p.numel() * p.element_size() for p in own + extra) / 2**20
        rows.append(
            (
                str(k),
                _units(block),
                "logits" if auxiliary is None else _crossing(block.boundary),
                "-" if auxiliary is None else str(auxiliary),
                f"{count(own):,}",
                f"{count(extra):,}",
                f"{mib:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(w) if i >= NUMBERS else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([_title(model), *aligned])


def count(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _title(model: LocalModel) -> str:
    title = f"{type(model.backbone).__name__}, {model.method.name}, {len(model.blocks)} blocks"
    own, extra = list(model.backbone.parameters()), list(model.auxiliaries.parameters())
    trained, beside = (count([p for p in part if p.requires_grad]) for part in (own, extra))
    if trained == count(own):
        return title
    return f"{title}, trained: {trained:,} of {count(own):,} parameters, and {beside:,} of the auxiliaries"


def _units(block: Block) -> str:
    first, last, number = block.names[0], block.names[-1], len(block.names)
    text = first if number == 1 else f"{first} .. {last} ({number})"
    recomputed = sum(any(a <= i <= b for a, b in block.ranges) for i in range(len(block)))
    own = list(block.parameters())
    trained = count([p for p in own if p.requires_grad])
    if recomputed:
        text += f", {recomputed} recomputed"
    if trained < count(own):
        text += f", {trained:,} trained" if trained else ", frozen"
    return text


def _crossing(boundary: Boundary) -> str:
    """The shape of the main tensor, and how many passengers cross beside it."""
    beside = len(boundary.passengers)
    return "x".join(map(str, boundary.shape)) + (f" + {beside}" if beside else "")
