"""Cells and tables in Markdown, for the scripts that fill tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

NAMES = {"bp": "BP", "dgl": "DGL", "predsim": "PredSim", "infopro": "InfoPro", "auglocal": "AugLocal"}


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The text of a table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(method: str) -> str:
    """dgl+deep-man -> DGL + deep MAN."""
    first, _, coupling = method.partition("+")
    return " + ".join(filter(None, (NAMES[first], coupling.replace("-", " ").replace("man", "MAN"))))


def mean_of(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation. One value has no deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def error_of(row: dict[str, str]) -> str:
    """The mean ± standard deviation of the error in a row of results/."""
    spread = f" ± {float(row['error_std']):.2f}" if row["error_std"] else ""
    return row["error_mean"] and f"{float(row['error_mean']):.2f}{spread}"


def peak_of(row: dict[str, str]) -> str:
    return f"{int(row['peak_bytes']) / 2**20:.0f} MiB"


def added_of(row: dict[str, str]) -> str:
    return f"{int(row['added']):,}"
