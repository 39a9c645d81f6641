"""Writes the tables of docs/memory.md from results/, each between its two marks.

python benchmarks/tables.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"


def rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def frontier() -> str:
    """Time and memory of each row, float32 beside bf16."""
    sides = [{r["row"]: r for r in rows(f"frontier_resnet110_{p}.csv")} for p in ("float32", "bf16")]
    names = [name for name in sides[0] if name in sides[1]]

    def told(row: dict[str, str]) -> list[str]:
        return [f"{float(row['times_bp']):.2f}", f"{int(row['peak_bytes']) / 2**20:.0f} MiB"]

    body = [[name, sides[0][name]["blocks"], *told(sides[0][name]), *told(sides[1][name])] for name in names]
    return table(["plan", "blocks", "time, float32", "peak, float32", "time, bf16", "peak, bf16"], body)


def imagenet() -> str:
    """Memory below BP's and arithmetic of each row, a column a network."""
    every = rows("imagenet_memory.csv")
    models = list(dict.fromkeys(row["model"] for row in every))
    found = {(row["row"], row["model"]): row for row in every}

    def told(name: str, model: str) -> str:
        row = found.get((name, model))
        if row is None:
            return ""
        size = f"{int(row['peak_bytes']) / 2**30:.1f} GiB"
        return (
            size
            if name == "BP"
            else f"{size}, -{float(row['below_bp_percent']):.0f}%, {float(row['flops_times_bp']):.2f}x"
        )

    body = [[name, *(told(name, model) for model in models)] for name in dict.fromkeys(row["row"] for row in every)]
    return table(["plan", *(model.partition(":")[2] for model in models)], body)


def parts() -> str:
    """One way and another, of each part."""
    body = []
    for row in rows("parts.csv"):
        what, _, ways = row["what: one way, another"].partition(": ")
        one, another = (f"{row[f'milliseconds_{which}']} ms" for which in ("one", "another"))
        body.append([what, f"{row['channels']} x {row['size']} x {row['size']}", ways, one, another])
    return table(["part", "map", "one way, another", "one", "another"], body)


TABLES: dict[str, Callable[[], str]] = {"frontier": frontier, "imagenet": imagenet, "parts": parts}


def filled(page: str) -> str:
    """The page with its tables as results/ has them."""
    for name, make in TABLES.items():
        text = f"<!-- {name}:begin -->\n{make()}\n<!-- {name}:end -->"
        page = re.sub(f"<!-- {name}:begin -->.*?<!-- {name}:end -->", text, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
