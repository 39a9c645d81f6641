"""What follows from the curves and the times of `race.py`: who is how accurate when, over which link.

It has no command. `fill_tables.py` fills in its table from results/race.csv.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from cells import error_of, table
from common import ROOT, read_results

Row = dict[str, str]
RACE = "race.csv"
LENGTHS = (6, 9, 12)  # The epochs of the schedules. A way has those for which there is time.
EPOCHS = LENGTHS[0]  # Those of the slowest way.
AS_FAST = 1.05  # Among steps that take less than this times the fastest, the one with fewer micro-batches is better.
LEVELS = (2.0, 0.5)  # Points above the error of BP on one process after all of its epochs.
FLUSHED = ("gpipe", "1f1b")  # These pipelines of BP give what BP gives that accumulates over their micro-batches.
RIVALS = (*FLUSHED, "2bw")
LOCAL = ("man", "deep man", "1c1f@4")
KEPT, MACHINE = ("link_ms", "way", "blocks", "micro_batches", "step_seconds"), ("torch", "machine", "threads")
NAMES = {
    "bp": "BP, one process", "bp data parallel": "BP, data parallel", "1f1b": "BP, 1F1B", "gpipe": "BP, GPipe",
    "2bw": "BP, PipeDream-2BW", "man": "DGL + MAN", "deep man": "DGL + deep MAN, learnable", "1c1f@4": "DGL, 1c1f@4",
}  # fmt: skip


def learned_as(way: str) -> str:
    """The name of what a way learns."""
    return "bp" if way in FLUSHED else way


def chosen(steps: Sequence[Row]) -> list[Row]:
    """For each link, way and number of blocks the row of its best number of micro-batches: the smallest one whose step
    is about as fast as the fastest, because batch norm sees fewer images in more of them."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in steps:
        groups.setdefault((row["link_ms"], row["way"], row["blocks"]), []).append(row)
    best = []
    for mine in groups.values():
        limit = AS_FAST * min(float(row["step_seconds"]) for row in mine)
        fast = [row for row in mine if float(row["step_seconds"]) <= limit]
        best.append(min(fast, key=lambda row: int(row["micro_batches"])))
    return best


def slowest(row: Row, best: Sequence[Row]) -> float:
    """The seconds of a step of the slowest way at the link of a row."""
    return max(float(other["step_seconds"]) for other in best if other["link_ms"] == row["link_ms"])


def epochs_in_time(row: Row, best: Sequence[Row]) -> int:
    """The longest schedule that a way has time for while the slowest way at its link takes its `EPOCHS`."""
    times = slowest(row, best) / float(row["step_seconds"])
    return max(length for length in LENGTHS if length <= EPOCHS * times + 1e-9)


def joined(curves: Sequence[Row], steps: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of results/race.csv: the error of each way after each epoch, over its seeds, and when that is. A way has
    several curves, one for each schedule that was trained and for which there is time."""
    best, found = chosen(steps), list[dict[str, Any]]()
    for row in best:
        what = (learned_as(row["way"]), row["blocks"], row["micro_batches"])
        groups: dict[int, list[Row]] = {}
        for run in curves:
            if (run["way"], run["blocks"], run["micro_batches"]) == what:
                groups.setdefault(int(run["epochs"]), []).append(run)
        for epochs, runs in sorted(groups.items()):
            if epochs <= epochs_in_time(row, best):
                first, last = ({name: row[name] for name in names} for names in (KEPT, MACHINE))
                found += [first | point | last for point in _curve(runs, row, slowest(row, best))]
    return found


def _curve(runs: Sequence[Row], row: Row, slowest: float) -> Iterable[dict[str, Any]]:
    """The other columns of the rows of a curve. `limit` is the time that all ways have."""
    steps = int(runs[0]["steps_per_epoch"])
    every = [[float(error) for error in run["errors"].split()] for run in runs]
    for epoch, errors in enumerate(zip(*every, strict=True), 1):
        yield {
            "epochs": len(every[0]), "epoch": epoch, "seconds": f"{epoch * steps * float(row['step_seconds']):.1f}",
            "limit": f"{EPOCHS * steps * slowest:.1f}", "error_mean": f"{mean(errors):.3f}",
            "error_std": f"{stdev(errors):.3f}" if len(errors) > 1 else "", "n": len(errors),
        }  # fmt: skip


def name_of(row: Row) -> str:
    """What the table and the picture call a way."""
    return NAMES[row["way"]] + (f", K={row['blocks']}" if row["blocks"] != "1" else "")


def ways_of(rows: Sequence[Row], link: str) -> dict[str, list[Row]]:
    """All curves of each way at a link, by its name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["link_ms"] == link:
            found.setdefault(name_of(row), []).append(row)
    return found


def curves_of(mine: Sequence[Row]) -> list[list[Row]]:
    """The curves of a way, the longest last. It has as many epochs as there is time for, once all are trained."""
    lengths = sorted({int(row["epochs"]) for row in mine})
    return [[row for row in mine if int(row["epochs"]) == length] for length in lengths]


def seconds_to(mine: Sequence[Row], level: float) -> float | None:
    """When a way has first been tested with a mean error of at most `level`, on whichever of its curves gets there
    first. None if it never was. Curves of fewer seeds than others have do not count."""
    most = max(int(row["n"]) for row in mine)
    good = [row for row in mine if int(row["n"]) == most and float(row["error_mean"]) <= level]
    return min((float(row["seconds"]) for row in good), default=None)


def error_at(curves: Iterable[Sequence[Row]], seconds: float) -> float | None:
    """The mean error of the last test until then, on whichever curve is best. None before the first test."""
    tested = ([row for row in curve if float(row["seconds"]) <= seconds] for curve in curves)
    return min((float(rows[-1]["error_mean"]) for rows in tested if rows), default=None)


def lead(ours: Sequence[Sequence[Row]], theirs: Sequence[Sequence[Row]], limit: float) -> float | None:
    """The share of the time until `limit` in which the best of our curves is below the best of theirs. The time begins
    when both have been tested. None if that is never."""
    times = sorted({float(row["seconds"]) for curve in (*ours, *theirs) for row in curve} | {limit})
    ahead = whole = 0.0
    for start, end in pairwise(time for time in times if time <= limit):
        mine, other = error_at(ours, start), error_at(theirs, start)
        if mine is not None and other is not None:
            whole += end - start
            ahead += (end - start) * (mine < other)
    return ahead / whole if whole else None


def levels_of(rows: Sequence[Row]) -> list[float]:
    """The errors whose times are told, the largest first: some points above that of BP on one process after all of its
    epochs. None before BP has a curve."""
    last = str(EPOCHS)
    final = [float(r["error_mean"]) for r in rows if r["way"] == "bp" and r["epochs"] == r["epoch"] == last]
    return [error + points for error in final[:1] for points in LEVELS]


ABOUT = f"""### Time to an accuracy

Blocks cost accuracy, so speed alone does not tell who is ahead. `python benchmarks/race.py` compares test error with
wall time, for ResNet-32 in the setting of `fashion_small` ([experiments.md](experiments.md)), on two processes of one
thread each. What is learned does not depend on the link. So each way is trained in one process, which gives the same
result, and its wall time is the number of steps times the measured seconds of a step on two processes with full
pipelines. Reading images and testing are not counted. All ways have the time that the slowest one at a link takes for
{EPOCHS} epochs, and each has the schedules of {LENGTHS[0]}, {LENGTHS[1]} and {LENGTHS[2]} epochs for which there is
time. The picture and the error in the end are those of the longest one. An error at a moment, or the time to an error,
are those of whichever schedule is best. Networks are tested after each epoch, and the figures are means over the seeds.
The two errors whose times are told are {LEVELS[0]} and {LEVELS[1]} points above that of BP on one process after its
{EPOCHS} epochs; for them, only curves with all seeds count.

Pipelines of BP have their best number of micro-batches at each link, and batch norm sees one of them at a time. With
one micro-batch, processes take turns. PipeDream-2BW (written for this benchmark) does not flush: its gradients are
exact, of weights that are one step old, and two batches may be underway. It has half of the recipe's rate and a longer
warm-up, with which it learns best of what was tried (`results/race_rates.csv`). In data parallel, batch norm sees half
of the batch, and an all-reduce of two processes takes two messages. DGL's head `1c1f@4` is that of the recipes
`fashion_small_k2` and `fashion_small_k4`. "Deep MAN, learnable" is `localgrad train --recipe fashion_small --coupling
deep-man --branches learnable`, with `--blocks layer2.0` for two blocks.

![Test error against wall seconds, at each link](race.svg)
"""


def race() -> str:
    """The section of docs/scaling.md about the race, with a sentence for each link and a table. Without results it is
    empty."""
    if not (ROOT / "results" / RACE).exists():
        return ""
    rows = read_results(RACE)
    return "\n".join([ABOUT, *(told(rows, link) for link in links_of(rows)), "", compared(rows)])


def links_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["link_ms"] for row in rows))


def told(rows: Sequence[Row], link: str) -> str:
    """Who is ahead at a link, in a few sentences."""
    ways = ways_of(rows, link)
    limit = float(next(iter(ways.values()))[0]["limit"])
    text = [f"- **Messages {link} ms late.** The slowest way takes {limit:.0f} s for {EPOCHS} epochs."]
    for level in levels_of(rows):
        times = {name: seconds_to(mine, level) for name, mine in ways.items()}
        there = sorted((seconds, name) for name, seconds in times.items() if seconds is not None)
        said = [f"{name} after {seconds:.0f} s" for seconds, name in there[:2]]
        text.append(f"First at {level:.1f}%: {', then '.join(said) or 'none'}.")
    ends = {name: float(curves_of(mine)[-1][-1]["error_mean"]) for name, mine in ways.items()}
    best = min(ends, key=lambda name: ends[name])
    text.append(f"In the end {best} has the smallest error, {ends[best]:.2f}%.")
    ours, theirs = (
        [curve for mine in ways.values() if mine[0]["way"] in kind for curve in curves_of(mine)]
        for kind in (LOCAL, RIVALS)
    )
    share = lead(ours, theirs, limit)
    if share is not None:
        text.append(f"The best local pipeline errs less than the best pipeline of BP {share:.0%} of the time.")
    return " ".join(text)


def compared(rows: Sequence[Row]) -> str:
    """A table of all links and ways: the time of a step, errors at three moments, and the times to two errors."""
    levels, body = levels_of(rows), []
    for link in links_of(rows):
        for name, mine in ways_of(rows, link).items():
            curves = curves_of(mine)
            last = curves[-1][-1]
            micro = last["micro_batches"] if last["way"] in RIVALS else ""
            step = f"{1000 * float(last['step_seconds']):.0f}"
            early = [_number(error_at(curves, share * float(last["limit"])), 1) for share in (0.25, 0.5)]
            times = [_number(seconds_to(mine, level), 0) for level in levels]
            body.append([link, name, micro, step, last["epochs"], *early, error_of(last), last["n"], *times])
    head = ["ms late", "way", "micro-batches", "ms a step", "epochs", "error, % after a quarter of the time",
            "after half", "in the end", "n", *(f"s to {level:.1f}%" for level in levels)]  # fmt: skip
    return table(head, body)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def slow() -> str:
    """The predictions for a few devices on slow links."""
    body = []
    for row in read_results("scaling_slow.csv"):
        way, _, coupling = row["way"].partition(", ")
        name = f"{way}, {coupling}" if coupling else NAMES.get(way, way)
        if way == "bp data parallel":
            name += ", each step" if row["every"] == "1" else f", every {row['every']} steps"
        micro = row["micro_batches"] if way in RIVALS else ""
        speed = int(row["batch_size"]) / float(row["step_seconds"])
        body.append([name, micro, f"{1000 * float(row['step_seconds']):.0f}", f"{speed:.0f}",
                     f"{float(row['efficiency']):.0%}"])  # fmt: skip
    return table(["way", "micro-batches", "ms a step", "images/s", "of ideal"], body)


TABLES = {"race": race, "slow": slow}
