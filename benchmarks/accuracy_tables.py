"""The tables of docs/experiments.md and README.md about accuracy, from the files in results/."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from statistics import mean

from cells import NAMES, added_of, error_of, mean_of, name_of, peak_of, table
from common import read_results


def time_of(row: dict[str, str]) -> str:
    """The time of a step of this method, number of blocks and setting, in times of BP's; "" if it was not timed."""
    times = {(r["method"], r["blocks"], r["setting"]): r["times_bp"] for r in read_results("time_fashion_small.csv")}
    return times.get((row["method"], row["blocks"], row["setting"]), "")


RECIPES = {  # The keys are the number of blocks and the setting of a row of DGL.
    ("2", "head=1c1f@4 blocks=layer1.3"): "fashion_small_k2",
    ("4", "head=1c1f@4 blocks=layer1.1,layer1.3,layer2.2"): "fashion_small_k4",
    ("16", "head=1c1f@4"): "fashion_small_k16",
}


def recipe_of(row: dict[str, str]) -> str:
    """The recipe that has the settings of this row, "" if there is none."""
    return RECIPES.get((row["blocks"], row["setting"]), "") if row["method"] == "dgl" else ""


def accuracy() -> str:
    """Error, memory and time of a step, for the main part of the study and for the recipes that follow from it."""
    order = ["bp", "dgl", "dgl+man", "dgl+man++", "dgl+deep-man"]
    every = read_results("accuracy_fashion_small.csv")
    main = [r for r in every if (r["method"] in order and not r["setting"]) or recipe_of(r)]
    body = []
    for row in sorted(main, key=lambda r: (int(r["blocks"]), order.index(r["method"]), r["setting"])):
        name = name_of(row["method"]) + (f" (`{recipe_of(row)}`)" if row["setting"] else "")
        body.append([name, row["blocks"], error_of(row), row["n"], peak_of(row), time_of(row), added_of(row)])
    head = ["method", "blocks", "test error, %", "n", "peak memory", "time of a step", "parameters added"]
    return table(head, body)


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
    runs = read_results("accuracy_fashion_small_runs.csv")
    bp = {row["seed"]: float(row["error"]) for row in runs if row["method"] == "bp" and not row["setting"]}
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in runs:
        key = _cut_and_head(row)
        if key is not None and int(row["seed"]) < 3:
            groups.setdefault(key, []).append(row)
    shown = {key[:2] for key in groups if "@" in key[2]}
    order = [*dict.fromkeys(CUTS.values())]
    body = []
    for key in sorted(groups, key=lambda k: (order.index(k[0]), len(k[1]), k[1], k[2])):
        if key[:2] in shown:
            mine = groups[key]
            less = mean_of([float(row["error"]) - bp[row["seed"]] for row in mine])
            error = mean_of([float(row["error"]) for row in mine])
            body.append([*key, error, str(len(mine)), less, peak_of(mine[0]), added_of(mine[0])])
    head = ["blocks", "method", "head", "test error, %", "n", "above BP, points", "peak memory", "parameters added"]
    return table(head, body)


def accumulation() -> str:
    """BP with 128 images a step, in parts, and how far it is from BP with the whole batch of the same seeds."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in read_results("accuracy_fashion_small_runs.csv"):
        parts = re.fullmatch(r"(?:batch_size=\d+ accumulate=(\d+))?", row["setting"])
        if row["method"] == "bp" and parts and int(row["seed"]) < 3:
            groups.setdefault(parts[1] or "1", []).append(row)
    whole = {row["seed"]: float(row["error"]) for row in groups["1"]}
    body = []
    for parts, mine in sorted(groups.items()):
        errors = [float(row["error"]) for row in mine]
        more = [float(row["error"]) - whole[row["seed"]] for row in mine]
        above = "" if parts == "1" else mean_of(more)
        body.append([parts, mean_of(errors), str(len(mine)), above, peak_of(mine[0])])
    return table(["parts", "test error, %", "n", "above one part, points", "peak memory"], body)


def ideas() -> str:
    """Steps that are not in the package."""
    rows = read_results("ideas_fashion_small.csv")
    keys = ("idea", "weight", "blocks", "setting", "error", "seed")
    body = [[*(row[key].removeprefix("head=") for key in keys), peak_of(row)] for row in rows]
    return table(["idea", "weight", "blocks", "head", "test error, %", "seed", "peak memory"], body)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy, "pairs": pairs, "heads": heads, "accumulation": accumulation, "ideas": ideas,
    "others": partial(_learned, _of_others), "ablation": partial(_learned, _of_ablation),
    "long": partial(_learned, _of_long),
}  # fmt: skip
