"""Tables of runs: mean, standard deviation and n over the seeds, and differences paired by seed."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from localgrad.core.errors import UserError
from localgrad.core.sizes import mib
from localgrad.run.files import write_text
from localgrad.run.folder import read_environment, read_sizes, score_of, summary_rows
from localgrad.run.recipe import OF_METHODS, PLACES

NEEDED = {"blocks": int, "seed": int, "error": float, "peak_bytes": int, "seconds": float}
NUMBERS = {**NEEDED, "parameters": int, "added": int}
SAME = ("method", "blocks", "setting")  # Runs that differ only in their seeds agree in these columns.


def row_of(folder: Path, method: str, blocks: int, setting: str, seed: int) -> dict[str, Any]:
    """Returns the row of a finished run: its last epoch, parameters, machine and versions. Its error is 100 minus the
    score that decides, in percent."""
    last = summary_rows(folder)[-1]
    row = {"method": method, "blocks": blocks, "setting": setting, "seed": seed}
    score, value = score_of(last)
    row |= {"error": round(100 - value, 3), "score": score, "train_loss": last["train_loss"]}
    row |= {"peak_bytes": int(last["peak_bytes"]), "seconds": round(last["seconds"], 1)}
    return row | read_sizes(folder) | read_environment(folder)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Reads rows like those of `row_of` from a CSV file. Raises UserError for a file of another kind."""
    return [{name: NUMBERS.get(name, str)(value) for name, value in row.items()} for row in read_csv(path, NEEDED)]


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Reads the rows of a CSV file. Raises UserError unless it has these columns and they hold numbers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for name in columns:
                float(row[name])
            if None in row or None in row.values():
                raise ValueError("a row has another number of cells than the first line")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not the table that it should be ({error}): restore it, or name others") from error
    return rows


def groups(runs: Sequence[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Groups runs by method, number of blocks and setting. The last run counts where a seed occurs more than once."""
    found: dict[tuple, dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(tuple(run.get(name, "") for name in SAME), {})[run["seed"]] = run
    return {key: list(by_seed.values()) for key, by_seed in found.items()}


def conditions(setting: str) -> frozenset[str]:
    """Returns the words of a setting that comparable runs must share: all but the fields that belong to the method, and
    those that do not affect what is learned."""
    return frozenset(word for word in setting.split() if word.partition("=")[0] not in OF_METHODS | PLACES)


def error_name(rows: Sequence[dict[str, Any]]) -> str:
    """What the column `error` holds: the test error of a classification, or 100 minus another score."""
    score = rows[0].get("score") or "top1"
    return "test error" if score == "top1" else f"100 - {score}"


def error_text(row: dict[str, Any]) -> str:
    """The error as "mean ± standard deviation"."""
    spread = f" ± {row['error_std']:.2f}" if row["error_std"] != "" else ""
    return f"{row['error_mean']:.2f}{spread}"


def label_of(row: dict[str, Any]) -> str:
    """The name of a row, such as dgl+man K=16 momentum=0.9."""
    blocks = "" if int(row["blocks"]) == 1 else f"K={row['blocks']}"
    return " ".join(word for word in (row["method"], blocks, row.get("setting", "")) if word)


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each method, number of blocks and setting: mean and sample standard deviation of the test error
    over the seeds, the medians of peak and time, and all machines and versions that were used."""
    table = []
    for key, group in groups(runs).items():
        errors = [run["error"] for run in group]
        row = {**dict(zip(SAME, key, strict=True)), "n": len(group), "error_mean": round(statistics.mean(errors), 3)}
        row |= {"error_std": round(statistics.stdev(errors), 3) if len(errors) > 1 else ""}
        row |= {"peak_bytes": int(statistics.median(run["peak_bytes"] for run in group))}
        row |= {"seconds": round(statistics.median(run["seconds"] for run in group), 1)}
        row |= {"seeds": " ".join(str(run["seed"]) for run in group)}
        others = dict.fromkeys(
            name for run in group for name in run if name not in (*row, "seed", "error", "train_loss")
        )
        for name in others:
            values = list(dict.fromkeys(run[name] for run in group if run.get(name, "") != ""))
            row[name] = values[0] if len(values) == 1 else " / ".join(map(str, values))
        table.append(row)
    return table


def paired(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each two groups of runs that can be compared and have at least two seeds in common.

    They have the same conditions and the same number of blocks, or one of them is BP. The difference is the mean over
    the common seeds of the second error minus the first, in points, with its 95% interval by Student's t.
    """
    table = []
    for (a, first), (b, second) in itertools.combinations(groups(runs).items(), 2):
        if (a[1] != b[1] and "bp" not in (a[0], b[0])) or conditions(a[2]) != conditions(b[2]):
            continue
        errors = [{run["seed"]: run["error"] for run in group} for group in (first, second)]
        seeds = sorted(errors[0].keys() & errors[1].keys())
        if len(seeds) < 2:
            continue
        differences = [errors[1][seed] - errors[0][seed] for seed in seeds]
        low, high = _interval(differences)
        row = {"first": label_of(first[0]), "second": label_of(second[0]), "n": len(seeds)}
        row |= {"difference": round(statistics.mean(differences), 3), "low": round(low, 3), "high": round(high, 3)}
        table.append(row | {"seeds": " ".join(map(str, seeds))})
    return table


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The text of a CSV file with all columns of the rows, in the order of their first appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows to a CSV file, which is replaced as a whole."""
    write_text(path, csv_text(rows))


def show(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]] = ()) -> None:
    """Prints the tables of `summarize` and `paired`, and the conclusion."""
    console = Console()
    table = Table("method", f"{error_name(rows)} %", "n", "peak memory", "parameters added", "seconds")
    for row in rows:
        cells = (error_text(row), str(row["n"]), mib(row["peak_bytes"]), str(row.get("added", "")))
        table.add_row(escape(label_of(row)), *cells, f"{row['seconds']:.0f}")
    console.print(table)
    where = f"{rows[0].get('machine')}, torch {rows[0].get('torch')}"
    console.print(f"mean ± standard deviation over seeds; median peak and time; {where}", highlight=False)
    if pairs:
        table = Table("first", "second", "second - first, points", "95% interval", "n")
        for pair in pairs:
            interval = f"{pair['low']:+.2f} to {pair['high']:+.2f}"
            table.add_row(
                escape(pair["first"]), escape(pair["second"]), f"{pair['difference']:+.2f}", interval, str(pair["n"])
            )
        console.print(table)
    text = conclusion(rows)
    if text:
        console.print(text, highlight=False, markup=False)


def conclusion(rows: Sequence[dict[str, Any]]) -> str:
    """Compares the methods with backpropagation in a few sentences. Without either of them it returns ""."""
    bp = next((row for row in rows if row["method"] == "bp" and not row.get("setting")), None)
    others = [row for row in rows if row["method"] != "bp"]
    if bp is None or not others:
        return ""
    nearest = min(others, key=lambda row: (row["error_mean"], row["peak_bytes"]))
    least = min(others, key=lambda row: (row["peak_bytes"], row["error_mean"]))

    def against_bp(row: dict[str, Any]) -> str:
        memory, time = row["peak_bytes"] / bp["peak_bytes"], row["seconds"] / bp["seconds"]
        points = row["error_mean"] - bp["error_mean"]
        return f"{label_of(row)}: {points:+.2f} points, {memory:.2f} times the memory, {time:.2f} times the time"

    lines = [f"Against backpropagation ({error_text(bp)}% error, {mib(bp['peak_bytes'])}):"]
    lines += [f"- the smallest error has {against_bp(nearest)};"]
    lines += [f"- the least memory has {against_bp(least)}."] if least is not nearest else []
    exact = [row for row in rows if row["method"] == "bp" and "recompute=" in row.get("setting", "")]
    lines += [f"- recomputation is exact, and has {against_bp(row)}." for row in exact]
    if any(row["n"] < 3 for row in (bp, nearest, least)):
        lines += ["With fewer than three seeds, differences below a point may be chance."]
    if not exact:
        lines += ["Accumulation and recomputation save memory too, at backpropagation's own error: see docs/memory.md."]
    return "\n".join(lines)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of at least two values, by Student's t."""
    if len(set(values)) == 1:
        return values[0], values[0]
    found = stats.ttest_1samp(values, 0).confidence_interval()
    return float(found.low), float(found.high)
