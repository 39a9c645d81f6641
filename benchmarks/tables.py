"""Writes the tables of docs/memory.md and docs/networks.md from results/, each between its two marks.

python benchmarks/tables.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("docs/memory.md", "docs/networks.md")


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a file in results/, of which the name may have a pattern for the version."""
    (path,) = (ROOT / "results").glob(name)
    with path.open(newline="") as file:
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


def coverage() -> str:
    """How many networks of each source can be four blocks."""
    body = []
    for source in ("timm", "torchvision", "segmentation"):
        mine = [row["ok"] == "True" for row in rows("coverage_timm-*.csv") if row["source"] == source]
        body.append([source, str(len(mine)), str(sum(mine)), f"{100 * sum(mine) / len(mine):.1f}%"])
    return table(["source", "networks", "cut into four blocks", "share"], body)


def refused() -> str:
    """Those that cannot be, alike ones in one row."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows("coverage_timm-*.csv"):
        if row["ok"] != "True":
            kind = re.split(r"[\d_]", row["name"])[0], re.sub(r"'[^']*'|\d+", "", row["reason"])
            groups.setdefault(kind, []).append(row)
    body = []
    for alike in groups.values():
        names = f"`{alike[0]['name']}`" + (f" and {len(alike) - 1} more" if len(alike) > 1 else "")
        reason = re.sub(r"^blocks=4 is out of range: this network has (.*), so 1 to \d+", r"\1", alike[0]["reason"])
        body.append([names, reason.replace("|", "\\|")])
    return table(["networks", "why not"], body)


def families() -> str:
    """One network of each family: what crosses its boundaries, and what the couplings copy there."""
    body = []
    for row in sorted(rows("families_timm-*.csv"), key=lambda row: row["family"]):
        crosses = "/".join(dict.fromkeys(row["layouts"].split()))
        man, deep = (row[key].split(" | ") for key in ("man_copies", "deep_man_copies"))
        copies = [f"`{name}`" for name in man], [f"`{name}`" for name in deep[0].split(", ")]
        body.append([row["family"], f"`{row['name']}`", row["units"], crosses, *map(", ".join, copies)])
    return table(["family", "network", "units", "crosses", "MAN copies", "deep MAN copies at the first boundary"], body)


def training() -> str:
    """Test errors of the networks that were trained."""
    body = []
    for network in ("vit_tiny", "convnext_atto"):
        for row in rows(f"accuracy_{network}.csv"):
            error = f"{float(row['error_mean']):.2f} ± {float(row['error_std']):.2f}"
            peak = f"{int(row['peak_bytes']) / 2**20:.0f} MiB"
            body.append([network, row["method"], row["blocks"], error, row["n"], peak])
    return table(["network", "method", "blocks", "test error in %", "n", "peak memory"], body)


TABLES: dict[str, Callable[[], str]] = {
    "frontier": frontier, "imagenet": imagenet, "parts": parts, "coverage": coverage, "refused": refused,
    "families": families, "training": training,
}  # fmt: skip


def filled(page: str) -> str:
    """The page with its tables as results/ has them."""
    for name, make in TABLES.items():
        if f"<!-- {name}:begin -->" not in page:
            continue
        text = f"<!-- {name}:begin -->\n{make()}\n<!-- {name}:end -->"
        page = re.sub(f"<!-- {name}:begin -->.*?<!-- {name}:end -->", lambda _, text=text: text, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    for place in PAGES:
        (ROOT / place).write_text(filled((ROOT / place).read_text()))
