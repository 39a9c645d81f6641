"""PNG pictures of a probe's tables. matplotlib is an extra; without it there are the tables alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from localgrad.run.files import replacing

Rows = Sequence[dict[str, Any]]


def draw(name: str, rows: Rows, place: Path) -> bool:
    """Draws the table of that name into a PNG file; False without matplotlib or without rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rows:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    PICTURES[name](figure, rows)
    with replacing(place) as part:
        figure.savefig(part, format="png", dpi=120, metadata={"Software": None})
    return True


def _separability(figure: Any, rows: Rows) -> None:
    axes = figure.subplots()
    axes.plot([r["unit"] for r in rows], [r["top1"] for r in rows], marker="o")
    for before, after in itertools.pairwise(rows):
        if before["block"] != after["block"]:
            axes.axvline((before["index"] + after["index"]) / 2, color="grey", linestyle=":")
    axes.tick_params("x", rotation=90)
    axes.set(ylabel="accuracy of a linear classifier, %", title="Separability (dotted: boundaries of blocks)")
    axes.grid(alpha=0.3)


def _cka(figure: Any, rows: Rows) -> None:
    mine, theirs = (list(dict.fromkeys(r[column] for r in rows)) for column in ("unit", "against_unit"))
    values = iter(r["cka"] for r in rows)
    axes = figure.subplots()
    picture = axes.imshow([[next(values) for _ in theirs] for _ in mine], vmin=0, vmax=1, origin="lower", aspect="auto")
    axes.set_xticks(range(len(theirs)), theirs, rotation=90)
    axes.set_yticks(range(len(mine)), mine)
    axes.set(xlabel=f"units of {rows[0]['against']}", ylabel="units of this run", title="Linear CKA")
    figure.colorbar(picture)


def _tsne(figure: Any, rows: Rows) -> None:
    axes = figure.subplots()
    for label in sorted({r["label"] for r in rows}):
        mine = [r for r in rows if r["label"] == label]
        axes.scatter([r["x"] for r in mine], [r["y"] for r in mine], s=4, label=str(label))
    axes.set(xticks=[], yticks=[], title="t-SNE of the last unit's pooled output")
    figure.legend(loc="outside right center", markerscale=3, title="class")


def _activations(figure: Any, rows: Rows) -> None:
    images, blocks = (list(dict.fromkeys(r[column] for r in rows)) for column in ("image", "block"))
    figure.set_size_inches(1.2 * len(blocks) + 1, 1.2 * len(images) + 0.5)
    every = figure.subplots(len(images), len(blocks), squeeze=False)
    for line, image in zip(every, images, strict=True):
        for axes, block in zip(line, blocks, strict=True):
            cells = [r for r in rows if (r["image"], r["block"]) == (image, block)]
            width = max(r["column"] for r in cells) + 1
            values = [r["value"] for r in cells]
            axes.imshow([values[i : i + width] for i in range(0, len(values), width)], vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if image == images[0]:
                axes.set_title(f"block {block}", fontsize=8)
        line[0].set_ylabel(f"class {next(r['label'] for r in rows if r['image'] == image)}", fontsize=8)


PICTURES: dict[str, Callable[[Any, Rows], None]] = {
    "separability": _separability, "cka": _cka, "tsne": _tsne, "activations": _activations,
}  # fmt: skip
