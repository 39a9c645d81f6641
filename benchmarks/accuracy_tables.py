"""The tables of docs/experiments.md and README.md about accuracy, from the files in results/."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import mean

from cells import NAMES, added_of, mean_of, name_of, peak_of, table
from common import read_results

RECIPES = {  # The keys are the number of blocks and the setting of a row of DGL.
    ("2", "head=1c1f@4 blocks=layer1.3"): "fashion_small_k2",
    ("4", "head=1c1f@4 blocks=layer1.1,layer1.3,layer2.2"): "fashion_small_k4",
    ("16", "head=1c1f@4"): "fashion_small_k16",
}


def recipe_of(row: dict[str, str]) -> str:
    """The recipe that has the settings of this row, "" if there is none."""
    return RECIPES.get((row["blocks"], row["setting"]), "") if row["method"] == "dgl" else ""


SEEDS = 3  # The seeds that all rows have: 0 to 2.


def runs_by_way() -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """The runs of the common seeds, by method, number of blocks and setting."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in read_results("accuracy_fashion_small_runs.csv"):
        if int(row["seed"]) < SEEDS:
            groups.setdefault((row["method"], row["blocks"], row["setting"]), []).append(row)
    return groups


def above_bp(runs: list[dict[str, str]]) -> str:
    """How far the errors of these runs are above those of BP with the same seeds."""
    bp = {row["seed"]: float(row["error"]) for row in runs_by_way()["bp", "1", ""]}
    return mean_of([float(row["error"]) - bp[row["seed"]] for row in runs])


@dataclass(frozen=True)
class Shown:
    """A row of README.md's table and a point of its picture.

    Attributes:
        kind: What it has in common with other points: a method, or a way of BP to save memory.
        name: How the table calls it.
        timed: Its row of the times, which has the peak memory.
        runs: The runs that have its error, one for each of the common seeds.
    """

    kind: str
    name: str
    timed: dict[str, str]
    runs: list[dict[str, str]]

    @property
    def exact(self) -> bool:
        """Whether it has BP's gradients."""
        return self.kind in ("BP", "BP, recomputing")


def shown() -> list[Shown]:
    """BP, also where it saves memory, the study's main part and the recipes that follow from it, with fewer blocks
    first."""
    order, ways, found = ["bp", "dgl", "dgl+man", "dgl+man++", "dgl+deep-man"], runs_by_way(), []
    timed = read_results("time_fashion_small.csv")
    for row in sorted(timed, key=lambda r: (int(r["blocks"]), order.index(r["method"]))):
        method, setting = name_of(row["method"]), row["setting"]
        way = row["method"], row["blocks"], "" if setting.startswith("recompute=") else setting
        if recipe := recipe_of(row):
            kind, name = "recipes", f"{method} (`{recipe}`)"
        elif not way[2] and setting:
            units = 16 if setting.endswith("=all") else setting.count(",") + 1
            kind, name = f"{method}, recomputing", f"{method}, {units} of 16 units recomputed"
        elif "accumulate=" in setting:
            kind, name = f"{method}, in parts", f"{method}, each batch in {setting.rpartition('=')[2]} parts"
        else:
            kind = name = method
        if way in ways and (kind != method or not setting):
            found.append(Shown(kind, name, row, ways[way]))
    return found


def accuracy() -> str:
    """Error, memory and time of a step."""
    body = []
    for point in shown():
        error = mean_of([float(run["error"]) for run in point.runs])
        above = "0, exact" if point.exact else above_bp(point.runs)
        row = point.timed
        body.append([point.name, row["blocks"], error, above, peak_of(row), row["times_bp"]])
    return table(["method", "blocks", "test error, %", "above BP, points", "peak memory", "time of a step"], body)


def pairs() -> str:
    """Differences paired by seed: between rows without a setting, and between BP and the recipes. The file has more."""
    body = []
    for row in read_results("accuracy_fashion_small_pairs.csv"):
        method, blocks, setting = (*row["second"].split(" ", 2), "")[:3]
        recipe = recipe_of({"method": method, "blocks": blocks.removeprefix("K="), "setting": setting})
        if setting and not (recipe and row["first"] == "bp"):
            continue
        second = f"`{recipe}` {blocks}" if recipe else row["second"]
        body.append(
            [row["first"], second, f"{float(row['difference']):+.2f}",
             f"{float(row['low']):+.2f} to {float(row['high']):+.2f}", row["n"]]
        )  # fmt: skip
    return table(["first", "second", "second less first, points", "95% interval", "n"], body)


def _of_others(row: dict[str, str]) -> bool:
    """Whether a row stands in the table of other methods: each unit is a block, with MAN or without a coupling."""
    plain = row["setting"] in ("", "head=0c1f") and row["blocks"] == "16"
    return plain and row["method"].partition("+")[2] in ("", "man")


def _of_ablation(row: dict[str, str]) -> bool:
    """Whether a row stands in the table of MAN's ablation."""
    plain = row["setting"].partition("=")[0] in ("", "branches", "momentum", "form") and row["blocks"] == "16"
    return plain and row["method"] in ("dgl", "dgl+man")


def _of_long(row: dict[str, str]) -> bool:
    """Whether a row stands in the table of the long training, which has the short one beside it."""
    plain = row["setting"] in ("", "limit_train=60000 epochs=15") and row["blocks"] in ("1", "4")
    return plain and row["method"] in ("bp", "dgl", "dgl+man", "dgl+deep-man")


def _learned(belongs: Callable[[dict[str, str]], bool]) -> str:
    """Test error and training loss of the rows that belong to a table, the mean over seeds."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read_results("accuracy_fashion_small_runs.csv"):
        if belongs(row):
            groups.setdefault((name_of(row["method"]), row["blocks"], row["setting"]), []).append(row)
    body = []
    for told, mine in sorted(groups.items(), key=lambda item: list(NAMES.values()).index(item[0][0].partition(" ")[0])):
        error = mean_of([float(row["error"]) for row in mine])
        losses = [float(row["train_loss"]) for row in mine if row["train_loss"]]  # The first runs have none.
        loss = f"{mean(losses):.3f}" if len(losses) == len(mine) else ""
        body.append([*told, error, str(len(mine)), loss, peak_of(mine[0]), added_of(mine[0])])
    head = ["method", "blocks", "setting", "test error, %", "n", "training loss", "peak memory", "parameters added"]
    return table(head, body)


CUTS = {  # How the tables call a cut: the number of blocks and the last units.
    ("2", "layer2.0"): "2, after layer2.0", ("2", "layer1.3"): "2, balanced by bytes", ("4", ""): "4, even",
    ("4", "layer1.1,layer1.3,layer2.2"): "4, balanced by bytes", ("16", ""): "16, a block for each unit",
}  # fmt: skip
HEAD = re.compile(r"(?:branches=learnable ?)?(?:head=(\S+))? ?(?:blocks=(\S+))?")


def _cut_and_head(row: dict[str, str]) -> tuple[str, str, str] | None:
    """The cut, the method and the head of a row of the study of heads, or None if it is none."""
    found = HEAD.fullmatch(row["setting"])
    cut = found and CUTS.get((row["blocks"], found[2] or ""))
    if not (found and cut) or row["method"] not in ("dgl", "dgl+man", "dgl+deep-man"):
        return None
    own = "0c1f" if row["method"] == "dgl+deep-man" else "1c2f"
    method = name_of(row["method"]) + (", learnable" if "branches=learnable" in row["setting"] else "")
    return cut, method, found[1] or own


def heads() -> str:
    """Each cut of the study of heads, with each head: the error, and how far it is from BP's of the same seeds."""
    keyed = ((_cut_and_head(runs[0]), runs) for runs in runs_by_way().values())
    groups = {key: runs for key, runs in keyed if key is not None}
    shown = {key[:2] for key in groups if "@" in key[2]}
    order = [*dict.fromkeys(CUTS.values())]
    body = []
    for key in sorted(groups, key=lambda k: (order.index(k[0]), len(k[1]), k[1], k[2])):
        if key[:2] in shown:
            mine = groups[key]
            error = mean_of([float(row["error"]) for row in mine])
            body.append([*key, error, str(len(mine)), above_bp(mine), peak_of(mine[0]), added_of(mine[0])])
    head = ["blocks", "method", "head", "test error, %", "n", "above BP, points", "peak memory", "parameters added"]
    return table(head, body)


def accumulation() -> str:
    """BP with 128 images a step, in parts, and how far it is from BP with the whole batch of the same seeds."""
    body = []
    for (method, _, setting), runs in sorted(runs_by_way().items(), key=lambda item: item[0][2].rpartition("=")[2]):
        parts = re.fullmatch(r"(?:batch_size=\d+ accumulate=(\d+))?", setting)
        if method == "bp" and parts:
            error = mean_of([float(row["error"]) for row in runs])
            above = above_bp(runs) if parts[1] else ""
            body.append([parts[1] or "1", error, str(len(runs)), above, peak_of(runs[0])])
    return table(["parts", "test error, %", "n", "above one part, points", "peak memory"], body)


def ideas() -> str:
    """Steps that are not in the package."""
    rows = read_results("ideas_fashion_small.csv")
    keys = ("idea", "weight", "blocks", "setting", "error", "seed")
    body = [[*(row[key].removeprefix("head=") for key in keys), peak_of(row)] for row in rows]
    return table(["idea", "weight", "blocks", "head", "test error, %", "seed", "peak memory"], body)


def cosines() -> str:
    """The cosine of local and true gradients for each block but the last, after the first and after the last epoch."""
    runs: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in read_results("cosines_fashion_small.csv"):
        method = name_of("dgl" if row["coupling"] == "none" else f"dgl+{row['coupling']}")
        found = runs.setdefault((method, row["blocks"], row["head"], row["error"]), {})
        found.setdefault(row["epoch"], []).append(row["cosine"])
    body = [[*way, *(", ".join(epochs[e][:-1]) for e in ("1", "6"))] for way, epochs in runs.items()]
    return table(["method", "blocks", "head", "test error, %", "cosines after 1 epoch", "after 6 epochs"], body)


TABLES: dict[str, Callable[[], str]] = {
    "cosines": cosines,
    "accuracy": accuracy, "pairs": pairs, "heads": heads, "accumulation": accumulation, "ideas": ideas,
    "others": partial(_learned, _of_others), "ablation": partial(_learned, _of_ablation),
    "long": partial(_learned, _of_long),
}  # fmt: skip
