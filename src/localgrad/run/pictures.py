"""PNG pictures of a probe's tables. matplotlib is an extra; without it there are the tables alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from localgrad.run.files import replacing

Rows = Sequence[dict[str, Any]]
TICKS = 40  # names beside a picture, at most


def draw(name: str, rows: Rows, place: Path) -> bool:
    """Draws the table of that name into a PNG file; False, and none is left, without matplotlib or without rows."""
    place.unlink(missing_ok=True)
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
    axes.plot(range(len(rows)), [r["top1"] for r in rows], marker="o")
    for before, after in itertools.pairwise(rows):
        if before["block"] != after["block"]:
            axes.axvline((before["index"] + after["index"]) / 2, color="grey", linestyle=":")
    at = range(0, len(rows), 1 + len(rows) // TICKS)
    axes.set_xticks(at, [rows[i]["unit"] for i in at], rotation=90)
    axes.set(ylabel="accuracy of a linear classifier, %", title="Separability (dotted: boundaries of blocks)")
    axes.grid(alpha=0.3)


def _cka(figure: Any, rows: Rows) -> None:
    mine, theirs = (list(dict.fromkeys(r[column] for r in rows)) for column in ("unit", "against_unit"))
    values = iter(float(r["cka"]) if r["cka"] != "" else float("nan") for r in rows)
    axes = figure.subplots()
    picture = axes.imshow([[next(values) for _ in theirs] for _ in mine], vmin=0, vmax=1, origin="lower", aspect="auto")
    for set_ticks, names, turned in ((axes.set_xticks, theirs, 90), (axes.set_yticks, mine, 0)):
        at = range(0, len(names), 1 + len(names) // TICKS)
        set_ticks(at, [names[i] for i in at], rotation=turned)
    axes.set(xlabel=f"units of {_plain(rows[0]['against'])}", ylabel="units of this run", title="Linear CKA")
    figure.colorbar(picture)


def _tsne(figure: Any, rows: Rows) -> None:
    axes = figure.subplots()
    labels = sorted({r["label"] for r in rows})
    for label in labels:
        mine = [r for r in rows if r["label"] == label]
        axes.scatter([r["x"] for r in mine], [r["y"] for r in mine], s=4, label=str(label))
    axes.set(xticks=[], yticks=[], title="t-SNE of the last unit's pooled output")
    if len(labels) <= TICKS:
        figure.legend(loc="outside right center", markerscale=3, title="class")


def _activations(figure: Any, rows: Rows) -> None:
    images, units = (list(dict.fromkeys(r[column] for r in rows)) for column in ("image", "unit"))
    figure.set_size_inches(1.2 * len(units) + 1, 1.2 * len(images) + 0.5)
    maps: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        maps.setdefault((row["image"], row["unit"]), []).append(row)
    every = figure.subplots(len(images), len(units), squeeze=False)
    for line, image in zip(every, images, strict=True):
        for axes, unit in zip(line, units, strict=True):
            cells = maps[image, unit]
            width = max(r["column"] for r in cells) + 1
            values = [r["value"] for r in cells]
            colours = "gray" if unit == "image" else "viridis"
            axes.imshow([values[i : i + width] for i in range(0, len(values), width)], vmin=0, vmax=1, cmap=colours)
            axes.set(xticks=[], yticks=[])
            if image == images[0]:
                axes.set_title(unit if unit == "image" else f"{unit}\n(block {cells[0]['block']})", fontsize=8)
        line[0].set_ylabel(f"class {maps[image, units[0]][0]['label']}", fontsize=8)


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


PICTURES: dict[str, Callable[[Any, Rows], None]] = {
    "separability": _separability, "cka": _cka, "tsne": _tsne, "activations": _activations,
}  # fmt: skip
