"""Draws the pictures of README.md and docs/ from the files in results/.

    python benchmarks/draw_pictures.py     (or `make results`, which fills the tables too)

Writes docs/accuracy.svg, docs/probes.svg, docs/frontier.svg, docs/depth.svg and docs/race.svg. The metadata of each
picture has the hashes of the files that it was drawn from, so that a test sees whether it is up to date. A picture
whose files are not there yet is left out.
"""

from __future__ import annotations

from hashlib import sha256
from statistics import mean, stdev

import matplotlib as mpl
from accuracy_tables import Shown, shown
from common import ROOT, read_results
from matplotlib.figure import Figure
from race_tables import LOCAL, curves_of, links_of, ways_of

MIB = 2**20
METHODS = {
    "bp": "BP", "dgl": "DGL", "dgl+man": "DGL + MAN", "dgl+man++": "DGL + MAN++", "dgl+deep-man": "DGL + deep MAN",
}  # fmt: skip
MARKERS = "ovs^DP*X"
SOURCES = {
    "accuracy": ["accuracy_fashion_small_runs.csv", "time_fashion_small.csv"],
    "probes": ["probes_fashion_small.csv"],
    "frontier": ["frontier_resnet110_float32.csv", "frontier_resnet110_bf16.csv"],
    "depth": ["depth.csv"],
    "race": ["race.csv"],
}
KINDS = (("exact", "o", "black"), ("DGL", "v", "tab:green"), ("MAN", "s", "tab:blue"), ("deep MAN", "D", "tab:orange"))

RIVALS = (
    ("checkpoint, unit", "*", "checkpoint, unit by unit"),
    ("sequential", "x", "checkpoint_sequential"),
    ("micro-batches", "+", "micro-batches"),
)


RACERS = {  # The colour and the marker of each way of the race.
    "bp": ("black", "o"), "bp data parallel": ("tab:gray", "v"), "gpipe": ("tab:brown", "+"), "1f1b": ("tab:red", "x"),
    "2bw": ("tab:purple", "*"), "man": ("tab:blue", "s"), "deep man": ("tab:orange", "D"), "1c1f@4": ("tab:green", "^"),
}  # fmt: skip


def is_there(picture: str) -> bool:
    """Whether all files that a picture is drawn from are there."""
    return all((ROOT / "results" / name).exists() for name in SOURCES[picture])


def stamp(picture: str) -> str:
    """The names of the files that a picture is drawn from, each with the hash of its content."""
    content = (f"{name} {sha256((ROOT / 'results' / name).read_bytes()).hexdigest()[:12]}" for name in SOURCES[picture])
    return ", ".join(content)


def accuracy() -> Figure:
    """Test error against memory: the rows of README.md's table."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, curves = figure.subplots(), dict[str, list[Shown]]()
    for point in shown():
        curves.setdefault(point.kind, []).append(point)
    for (label, points), marker in zip(curves.items(), MARKERS, strict=True):
        errors = [[float(run["error"]) for run in point.runs] for point in points]
        places = [int(point.timed["peak_bytes"]) / MIB for point in points], [mean(values) for values in errors]
        spread = [0 if label == "BP, recomputing" else stdev(values) for values in errors]  # As for BP, shown once.
        axes.errorbar(*places, yerr=spread, marker=marker, capsize=3, label=label, linestyle=":")
        for x, y, point in zip(*places, points, strict=True):
            if point.timed["blocks"] != "1":
                beside = (5, -11) if label == METHODS["dgl+man++"] else (5, 5)  # MAN++ and MAN have the same position.
                axes.annotate(f"K={point.timed['blocks']}", (x, y), beside, textcoords="offset points", fontsize=8)
    axes.set(xlabel="peak memory of a step, MiB", ylabel="test error, %, mean and deviation over seeds", xlim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def probes() -> Figure:
    """Accuracy of a linear classifier on each unit, and CKA with BP: means over seeds, for BP and for 16 blocks."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    every = read_results("probes_fashion_small.csv")
    units = list(dict.fromkeys(r["unit"] for r in every))
    ways = ("top1", "accuracy of a linear classifier, %"), ("cka", "CKA with the same unit of BP")
    for axes, (column, what) in zip(figure.subplots(1, 2), ways, strict=True):
        for (method, label), marker in zip(METHODS.items(), MARKERS, strict=False):
            mine = [r for r in every if r["method"] == method and r["blocks"] in ("1", "16")]
            means = [mean(float(r[column]) for r in mine if r["unit"] == unit) for unit in units]
            axes.plot(means, marker=marker, label=label, linestyle=":", markersize=5)
        axes.set_xticks(range(len(units)), units, rotation=90)
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    return figure


def frontier() -> Figure:
    """Time against memory of the plans that were made for a budget, float32 beside bf16."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, precision in zip(figure.subplots(1, 2, sharey=True), ("float32", "bf16"), strict=True):
        rows = read_results(f"frontier_resnet110_{precision}.csv")
        for kind, marker, colour in KINDS:
            mine = [r for r in rows if r["row"].startswith(f"{kind}, in ") or (r["row"], kind) == ("BP", "exact")]
            mine.sort(key=lambda r: int(r["peak_bytes"]))
            label = "exact (BP, recomputed)" if kind == "exact" else kind
            places = [int(r["peak_bytes"]) / MIB for r in mine], [float(r["times_bp"]) for r in mine]
            axes.plot(*places, marker=marker, color=colour, label=label)
        for words, marker, label in RIVALS:
            mine = [r for r in rows if r["row"].startswith("PyTorch: ") and words in r["row"]]
            places = [int(r["peak_bytes"]) / MIB for r in mine], [float(r["times_bp"]) for r in mine]
            axes.plot(*places, marker, color="tab:red", label=f"PyTorch alone: {label}")
        axes.set(title=f"ResNet-110, batch 128, {precision}", xlabel="peak memory of a step, MiB", xscale="log")
        ticks = (75, 150, 300, 500) if precision == "bf16" else (150, 300, 500, 1000)
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time of a step, times BP")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


def depth() -> Figure:
    """Memory against depth, for BP and for one unit per block."""
    rows = read_results("depth.csv")
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
    return figure


def race() -> Figure:
    """Test error against wall time, with a panel for each link. Lines of four blocks are dashed."""
    rows = read_results("race.csv")
    links = links_of(rows)
    figure = Figure(figsize=(4 * len(links), 5), layout="constrained")
    panels = figure.subplots(1, len(links), sharey=True, squeeze=False)[0]
    for axes, link in zip(panels, links, strict=True):
        for name, mine in ways_of(rows, link).items():
            curve = curves_of(mine)[-1]
            places = [float(r["seconds"]) for r in curve], [float(r["error_mean"]) for r in curve]
            spread = [float(r["error_std"] or 0) for r in curve]
            (colour, marker), width = RACERS[curve[0]["way"]], 1.5 if curve[0]["way"] in LOCAL else 1.0
            style = {"color": colour, "marker": marker, "linestyle": "--" if curve[0]["blocks"] == "4" else "-"}
            axes.errorbar(*places, yerr=spread, label=name, linewidth=width, elinewidth=0.5, markersize=4, **style)
        axes.set(title=f"messages {link} ms late", xlabel="wall time, s", xlim=(0, None), yscale="log")
        low, high = axes.get_ylim()
        ticks = [tick for tick in (8, 9, 10, 12, 15, 20, 30, 50, 90) if low <= tick <= high]
        axes.set_yticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test error, %, mean and deviation over seeds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "localgrad"  # Without it, names inside the file would differ each time.
    for draw in (accuracy, probes, frontier, depth, race):
        if is_there(draw.__name__):
            place = ROOT / "docs" / f"{draw.__name__}.svg"
            draw().savefig(place, metadata={"Date": None, "Source": stamp(draw.__name__)})
