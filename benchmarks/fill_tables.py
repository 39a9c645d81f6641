"""Writes the tables of README.md and docs/ from results/, each between its two marks.

python benchmarks/fill_tables.py     (or make results, which draws the pictures too)
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/experiments.md", "docs/memory.md", "docs/networks.md", "docs/scaling.md")
NAMES = {"bp": "BP", "dgl": "DGL", "predsim": "PredSim", "infopro": "InfoPro", "auglocal": "AugLocal"}


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a file in results/, of which the name may have a pattern for the version."""
    (path,) = sorted((ROOT / "results").glob(name))
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(method: str) -> str:
    """dgl+deep-man -> DGL + deep MAN."""
    first, _, coupling = method.partition("+")
    return " + ".join(filter(None, (NAMES[first], coupling.replace("-", " ").replace("man", "MAN"))))


def error_of(row: dict[str, str]) -> str:
    return row["error_mean"] and f"{float(row['error_mean']):.2f}" + (
        f" ± {float(row['error_std']):.2f}" if row["error_std"] else ""
    )


def peak_of(row: dict[str, str]) -> str:
    return f"{int(row['peak_bytes']) / 2**20:.0f} MiB"


def seconds() -> dict[tuple[str, str, str], str]:
    """The time of a step over BP's, of each method, number of blocks and setting that was timed."""
    return {(r["method"], r["blocks"], r.get("setting", "")): r["times_bp"] for r in rows("time_fashion_small.csv")}


RECIPES = {  # by the method and setting of their rows
    ("dgl+deep-man", "branches=learnable recompute=layer1.0,layer1.1,layer1.2,layer1.3,layer1.4 "
     "blocks=layer3.1,layer3.2,layer3.3"): "fashion_small_k4",
    ("dgl+deep-man", "branches=learnable"): "fashion_small_k16",
}  # fmt: skip


def recipe_of(row: dict[str, str]) -> str:
    """The name of the recipe that a row was trained by, if it has one of its own."""
    return RECIPES.get((row["method"], row["setting"]), "")


def accuracy() -> str:
    """The main part of the study, and the recipes that came of it: error, memory and time of a step."""
    times, body = seconds(), []
    order = ["bp", "dgl", "dgl+man", "dgl+man++", "dgl+deep-man"]
    every = rows("accuracy_fashion_small.csv")
    main = [r for r in every if (r["method"] in order and not r["setting"]) or recipe_of(r)]
    for row in sorted(main, key=lambda r: (int(r["blocks"]), order.index(r["method"]), r["setting"])):
        name = name_of(row["method"]) + (f" (`{recipe_of(row)}`)" if row["setting"] else "")
        time = times.get((row["method"], row["blocks"], row["setting"]), "")
        cells = [name, row["blocks"], error_of(row), row["n"], peak_of(row), time]
        body.append([*cells, f"{int(row['added']):,}"])
    head = ["method", "blocks", "test error, %", "n", "peak memory", "time of a step", "parameters added"]
    return table(head, body)


def pairs() -> str:
    """Differences by seed, between plain rows and from BP to any; the file has those between settings too."""
    body = []
    for row in rows("accuracy_fashion_small_pairs.csv"):
        method, blocks, setting = (*row["second"].split(" ", 2), "")[:3]
        if setting and row["first"] != "bp":
            continue
        recipe = recipe_of({"method": method, "setting": setting})
        second = f"`{recipe}` {blocks}" if recipe else row["second"]
        body.append(
            [row["first"], second, f"{float(row['difference']):+.2f}",
             f"{float(row['low']):+.2f} to {float(row['high']):+.2f}", row["n"]]
        )  # fmt: skip
    return table(["first", "second", "second less first, points", "95% interval", "n"], body)


def settings() -> str:
    """The rows of the study that have a setting of their own, but for those of the next three tables."""
    times, body = seconds(), []
    for row in rows("accuracy_fashion_small.csv"):
        if row["setting"] and not any(belongs(row) for belongs in (_of_others, _of_ablation, _of_long)):
            setting = re.sub(r"init=\S+/(\S+)/model.safetensors", r"init=\1", row["setting"].replace("_", "-"))
            cells = [name_of(row["method"]), row["blocks"], setting, error_of(row), row["n"]]
            time = times.get((row["method"], row["blocks"], row["setting"]), "")
            body.append([*cells, peak_of(row), time, f"{int(row['added']):,}"])
    head = ["method", "blocks", "setting", "test error, %", "n", "peak memory", "time of a step", "parameters added"]
    return table(head, body)


def _of_others(row: dict[str, str]) -> bool:
    """Each unit a block, without a coupling or with MAN."""
    plain = row["setting"] in ("", "head=0c1f") and row["blocks"] == "16"
    return plain and row["method"].partition("+")[2] in ("", "man")


def _of_ablation(row: dict[str, str]) -> bool:
    plain = row["setting"].partition("=")[0] in ("", "branches", "momentum", "form") and row["blocks"] == "16"
    return plain and row["method"] in ("dgl", "dgl+man")


def _of_long(row: dict[str, str]) -> bool:
    """The long training, and beside it the short one."""
    plain = row["setting"] in ("", "limit_train=60000 epochs=15") and row["blocks"] in ("1", "4")
    return plain and row["method"] in ("bp", "dgl", "dgl+man", "dgl+deep-man")


def _learned(belongs: Callable[[dict[str, str]], bool]) -> str:
    """What these runs learned, of the test images and of the training images; the mean over seeds."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows("accuracy_fashion_small_runs.csv"):
        if belongs(row):
            groups.setdefault((name_of(row["method"]), row["blocks"], row["setting"]), []).append(row)
    body = []
    for told, mine in sorted(groups.items(), key=lambda item: list(NAMES.values()).index(item[0][0].partition(" ")[0])):
        errors = [float(row["error"]) for row in mine]
        spread = str(stdev(errors)) if len(errors) > 1 else ""
        error = error_of({"error_mean": str(mean(errors)), "error_std": spread})
        losses = [float(row["train_loss"]) for row in mine if row["train_loss"]]  # the first runs did not note it
        loss = f"{mean(losses):.3f}" if len(losses) == len(mine) else ""
        numbers = [error, str(len(mine)), loss, peak_of(mine[0]), f"{int(mine[0]['added']):,}"]
        body.append([*told, *numbers])
    head = ["method", "blocks", "setting", "test error, %", "n", "training loss", "peak memory", "parameters added"]
    return table(head, body)


PROBED = ("stem", "layer1.4", "layer2.4", "layer3.4")  # the ends of the stages


def probes() -> str:
    """What each stage's last unit has learned, the mean over seeds."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows("probes_fashion_small.csv"):
        groups.setdefault((row["method"], row["blocks"]), []).append(row)
    body = []
    for (method, blocks), mine in sorted(groups.items(), key=lambda item: (int(item[0][1]), item[0][0])):
        cells = []
        for name, digits in (("top1", 1), ("cka", 2)):
            for unit in PROBED:
                values = [float(row[name]) for row in mine if row["unit"] == unit]
                spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.{digits}f}{spread}")
        body.append([name_of(method), blocks, str(len({row["seed"] for row in mine})), *cells])
    heads = [f"{what} {unit}" for what in ("linear, %:", "CKA:") for unit in PROBED]
    return table(["method", "blocks", "n", *heads], body)


def deeper() -> str:
    """Memory of ResNet-110."""
    body = []
    for row in rows("memory_resnet110.csv"):
        cuts = "" if row["method"] == "bp" else row["cuts"].replace(" ", ", ")
        below = "" if row["method"] == "bp" else f"{float(row['below_bp_percent']):.1f}%"
        body.append([name_of(row["method"]), row["blocks"], cuts, peak_of(row), below])
    return table(["method", "blocks", "cut after", "peak memory", "below BP"], body)


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
            body.append([network, row["method"], row["blocks"], error_of(row), row["n"], peak_of(row)])
    return table(["network", "method", "blocks", "test error in %", "n", "peak memory"], body)


WAYS = {"bp": "BP", "bp, twice": "BP, twice", "1f1b": "BP, 1F1B", "gpipe": "BP, GPipe"}


def way_of(row: dict[str, str]) -> list[str]:
    micro = row["micro_batches"] if row["way"] in ("1f1b", "gpipe") else ""
    return [WAYS.get(row["way"], row["way"]), row["blocks"] if "local" in row["way"] else "", micro]


def scaling() -> str:
    """Each way's speed and memory, without delays."""
    body = []
    for row in rows("scaling_resnet110.csv"):
        if row["delay_ms"] == "0":
            split = {"local": row["cut"], "bp": f"{row['cut']}, BP's halves"}[row["split"]]
            numbers = [row["images_per_second"], row["times_bp"], row["times_local"], peak_of(row)]
            body.append([*way_of(row), row["processes"], split if row["processes"] == "2" else "", *numbers])
    head = ["way", "blocks", "micro-batches", "processes", "split after", "images/s", "times BP", "times local", "peak"]
    return table(head, body)


def delays() -> str:
    """What is left of a way's speed when messages are late."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows("scaling_resnet110.csv"):
        if row["processes"] == "2" and row["split"] == "local" and not row["way"].endswith("twice"):
            found.setdefault(tuple(way_of(row)), {})[row["delay_ms"]] = float(row["images_per_second"])
    late = [delay for delay in next(iter(found.values())) if delay != "0"]
    body = []
    for way, speeds in found.items():
        lost = [f"{speeds[delay]:.2f}, {speeds[delay] / speeds['0'] - 1:+.0%}" for delay in late]
        body.append([*way, f"{speeds['0']:.2f}", *lost])
    return table(["way", "blocks", "micro-batches", "images/s", *(f"{delay} ms late" for delay in late)], body)


def check() -> str:
    """The formulas beside the measurement."""
    body = []
    for row in rows("scaling_check.csv"):
        if row["split"] == "local":
            numbers = [row["expected"], row["measured"], row["measured_over_expected"]]
            body.append([*way_of(row), row["delay_ms"], *numbers])
    head = ["way", "blocks", "micro-batches", "ms late", "images/s expected", "measured", "measured / expected"]
    return table(head, body)


def devices() -> str:
    """Many devices, on paper."""
    body = []
    for row in rows("scaling_devices.csv"):
        sizes = [f"{int(row[name]) / 2**20:.1f} MiB" for name in ("activation_bytes", "source_bytes")]
        times = [f"{1e3 * float(row[name]):.1f} ms" for name in ("local_seconds", "bp_seconds", "message_seconds")]
        names = ("local_efficiency", "1f1b_efficiency_1p", "bubble_1p", "1f1b_efficiency_4p", "bubble_4p")
        shares = [f"{float(row[name]):.0%}" if row[name] else "" for name in names]
        body.append([row["devices"], {"man": "MAN", "none": "none"}[row["coupling"]], *sizes, *times, *shares])
    head = ["devices", "coupling", "handed on", "EMA source", "slowest group, local", "slowest group, BP", "message",
            "local, of ideal", "1F1B, m = P", "its bubble", "1F1B, m = 4P", "its bubble"]  # fmt: skip
    return table(head, body)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy, "pairs": pairs, "settings": settings, "others": partial(_learned, _of_others),
    "ablation": partial(_learned, _of_ablation), "long": partial(_learned, _of_long), "probes": probes,
    "deeper": deeper, "frontier": frontier, "imagenet": imagenet, "parts": parts, "coverage": coverage,
    "refused": refused, "families": families, "training": training, "scaling": scaling, "delays": delays,
    "check": check, "devices": devices,
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
