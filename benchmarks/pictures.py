"""Draws docs/frontier.svg and docs/depth.svg from results/.

python benchmarks/pictures.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

MIB = 2**20
KINDS = (("BP", "o", "black"), ("DGL", "v", "tab:green"), ("MAN", "s", "tab:blue"), ("deep MAN", "D", "tab:orange"))


def read(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def save(figure: Figure, place: str) -> None:
    mpl.rcParams["svg.hashsalt"] = "localgrad"  # or each drawing would have other names in it
    figure.savefig(place, metadata={"Date": None})


def frontier() -> None:
    """Time against memory, of plans that were made for a budget; float32 beside bf16."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, precision in zip(figure.subplots(1, 2, sharey=True), ("float32", "bf16"), strict=True):
        rows = read(f"results/frontier_resnet110_{precision}.csv")
        for kind, marker, colour in KINDS:
            mine = [
                r for r in rows if r["row"] == kind or (r["row"].startswith(f"{kind}, in ") and "even" not in r["row"])
            ]
            if kind == "BP":
                mine = [r for r in mine if "checkpointing" not in r["row"]]
                mine += [r for r in rows if r["row"] == "checkpointing"]
            mine.sort(key=lambda r: int(r["peak_bytes"]))
            label = "BP, recomputing more and more" if kind == "BP" else kind
            places = [int(r["peak_bytes"]) / MIB for r in mine], [float(r["times_bp"]) for r in mine]
            axes.plot(*places, marker=marker, color=colour, label=label)
        axes.set(title=f"ResNet-110, batch 128, {precision}", xlabel="peak memory of a step, MiB", xscale="log")
        ticks = (75, 150, 300, 500) if precision == "bf16" else (150, 300, 500, 1000)
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time of a step, times BP")
    figure.axes[0].legend()
    save(figure, "docs/frontier.svg")


def depth() -> None:
    """Memory against depth, BP and one unit per block."""
    rows = read("results/depth.csv")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    local = [r for r in rows if r["method"] != "bp"]
    series = [
        ("BP, all (predicted)", "o", [r for r in rows if r["method"] == "bp"], "peak_bytes"),
        ("one unit per block with MAN, all", "s", local, "peak_bytes"),
        ("its activations alone", "^", local, "activations"),
    ]
    for label, marker, mine, column in series:
        axes.plot([int(r["depth"]) for r in mine], [int(r[column]) / MIB for r in mine], marker=marker, label=label)
    depths = [int(r["depth"]) for r in local]
    axes.set(xscale="log", yscale="log", xlabel="layers of the ResNet", ylabel="peak memory of a step, MiB")
    axes.set_xticks(depths, map(str, depths))
    axes.set_yticks([100, 300, 1000, 3000, 10000], ["100", "300", "1000", "3000", "10000"])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, "docs/depth.svg")


if __name__ == "__main__":
    frontier()
    depth()
