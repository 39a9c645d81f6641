"""Tables over runs: mean, standard deviation and n over the seeds, and differences paired by seed."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from localgrad.run.files import write_text
from localgrad.run.runlog import mib

SAME = ("method", "blocks", "setting")  # runs that differ in their seeds alone agree in these


def groups(runs: Sequence[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The runs, those of one method, number of blocks and setting together."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(tuple(run.get(name, "") for name in SAME), []).append(run)
    return found


def label_of(row: dict[str, Any]) -> str:
    """dgl+man K=16 momentum=0.9."""
    blocks = "" if int(row["blocks"]) == 1 else f"K={row['blocks']}"
    return " ".join(word for word in (row["method"], blocks, row.get("setting", "")) if word)


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method, number of blocks and setting: over its seeds, mean and standard deviation (of the
    sample) of the test error, medians of peak and time, and every machine and version that took part."""
    table = []
    for key, group in groups(runs).items():
        errors = [run["error"] for run in group]
        row = {**dict(zip(SAME, key, strict=True)), "n": len(group), "error_mean": round(statistics.mean(errors), 3)}
        row |= {"error_std": round(statistics.stdev(errors), 3) if len(errors) > 1 else ""}
        row |= {"peak_bytes": int(statistics.median(run["peak_bytes"] for run in group))}
        row |= {"seconds": round(statistics.median(run["seconds"] for run in group), 1)}
        row |= {"seeds": " ".join(str(run["seed"]) for run in group)}
        told = [name for name in group[0] if name not in (*row, "seed", "error", "train_loss")]
        table.append(row | {name: " / ".join(dict.fromkeys(str(run.get(name, "")) for run in group)) for name in told})
    return table


def paired(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each two kinds of run with as many blocks (BP's one block goes with all), the mean over their common seeds
    of the second's test error less the first's, in points, and its 95% interval (Student's t); none below two seeds."""
    table = []
    for (a, first), (b, second) in itertools.combinations(groups(runs).items(), 2):
        if a[1] != b[1] and "bp" not in (a[0], b[0]):
            continue
        errors = [{run["seed"]: run["error"] for run in group} for group in (first, second)]
        seeds = sorted(errors[0].keys() & errors[1].keys())
        if len(seeds) < 2:
            continue
        apart = [errors[1][seed] - errors[0][seed] for seed in seeds]
        mean, deviation = statistics.mean(apart), statistics.stdev(apart)
        half = float(stats.t.ppf(0.975, len(seeds) - 1)) * deviation / len(seeds) ** 0.5
        row = {"first": label_of(first[0]), "second": label_of(second[0]), "n": len(seeds)}
        row |= {"difference": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3)}
        table.append(row | {"seeds": " ".join(map(str, seeds))})
    return table


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a CSV file's text: every column that a row has, in the order of their first appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, csv_text(rows))


def show(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]] = ()) -> None:
    """Prints both tables."""
    console = Console()
    table = Table("method", "test error %", "n", "peak memory", "parameters added", "seconds")
    for row in rows:
        spread = f" ± {row['error_std']:.2f}" if row["error_std"] != "" else ""
        cells = (f"{row['error_mean']:.2f}{spread}", str(row["n"]), mib(row["peak_bytes"]))
        table.add_row(label_of(row), *cells, str(row.get("added", "")), f"{row['seconds']:.0f}")
    console.print(table)
    where = f"{rows[0].get('machine')}, torch {rows[0].get('torch')}"
    console.print(f"mean ± standard deviation over seeds; median peak and time; {where}", highlight=False)
    if pairs:
        table = Table("first", "second", "second - first, points", "95% interval", "n")
        for pair in pairs:
            interval = f"{pair['low']:+.2f} to {pair['high']:+.2f}"
            table.add_row(pair["first"], pair["second"], f"{pair['difference']:+.2f}", interval, str(pair["n"]))
        console.print(table)
