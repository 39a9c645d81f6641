"""Fills the tables of README.md and docs/ from the files in results/.

    python benchmarks/fill_tables.py     (or `make results`, which draws the pictures too)

Writes each table between its two marks, `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Nothing else of a page changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import accuracy_tables
import race_tables
import task_tables
from cells import error_of, mean_of, name_of, peak_of, table
from common import ROOT, read_results

PAGES = ("README.md", "docs/experiments.md", "docs/memory.md", "docs/networks.md", "docs/scaling.md", "docs/tasks.md")


PROBED = ("stem", "layer1.4", "layer2.4", "layer3.4")  # These units end the stages.


def probes() -> str:
    """Accuracy of a linear classifier on the last unit of each stage, and its CKA with BP: means over seeds."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_results("probes_fashion_small.csv"):
        groups.setdefault((row["method"], row["blocks"]), []).append(row)
    body = []
    for (method, blocks), mine in sorted(groups.items(), key=lambda item: (int(item[0][1]), item[0][0])):
        cells = [
            mean_of([float(row[name]) for row in mine if row["unit"] == unit], digits)
            for name, digits in (("top1", 1), ("cka", 2))
            for unit in PROBED
        ]
        body.append([name_of(method), blocks, str(len({row["seed"] for row in mine})), *cells])
    heads = [f"{what} {unit}" for what in ("linear, %:", "CKA:") for unit in PROBED]
    return table(["method", "blocks", "n", *heads], body)


def deeper() -> str:
    """Peak memory of a step of ResNet-110."""
    body = []
    for row in read_results("memory_resnet110.csv"):
        cuts = "" if row["method"] == "bp" else row["cuts"].replace(" ", ", ")
        below = "" if row["method"] == "bp" else f"{float(row['below_bp_percent']):.1f}%"
        body.append([name_of(row["method"]), row["blocks"], cuts, peak_of(row), below])
    return table(["method", "blocks", "cut after", "peak memory", "below BP"], body)


def frontier() -> str:
    """Time and memory of each plan, float32 beside bf16."""
    sides = [{r["row"]: r for r in read_results(f"frontier_resnet110_{p}.csv")} for p in ("float32", "bf16")]
    names = [name for name in sides[0] if name in sides[1]]

    def told(row: dict[str, str]) -> list[str]:
        return [f"{float(row['times_bp']):.2f}", peak_of(row)]

    body = [[name, sides[0][name]["blocks"], *told(sides[0][name]), *told(sides[1][name])] for name in names]
    return table(["plan", "blocks", "time, float32", "peak, float32", "time, bf16", "peak, bf16"], body)


def large() -> str:
    """Time and memory of each plan and rival of two networks at 224 px."""
    files = {"ConvNeXt-Tiny": "frontier_convnext_tiny_float32.csv", "ViT-Small": "frontier_vit_small*_float32.csv"}
    sides = [{r["row"]: r for r in read_results(file)} for file in files.values()]
    names = list(dict.fromkeys(name for side in sides for name in side))

    def cells(row: dict[str, str] | None) -> list[str]:
        return ["", "", ""] if row is None else [row["blocks"], f"{float(row['times_bp']):.2f}", peak_of(row)]

    body = [[name, *(cell for side in sides for cell in cells(side.get(name)))] for name in names]
    head = [f"{what}, {network}" for network in files for what in ("blocks", "time", "peak")]
    return table(["plan", *head], body)


SIZES = {
    "torchvision:resnet50": "ResNet-50", "timm:convnext_tiny": "ConvNeXt-Tiny",
    "timm:efficientnet_b0": "EfficientNet-B0", "timm:vit_small_patch16_224": "ViT-Small",
    "timm:swin_tiny_patch4_window7_224": "Swin-Tiny",
}  # fmt: skip


def sizes() -> str:
    """Predicted time in half and in a third of BP's memory, and the least memory, of exact and of local plans."""
    rows = {(row["model"], row["row"]): row for row in read_results("imagenet_memory.csv")}

    def cell(model: str, name: str) -> str:
        row = rows.get((model, name))
        if row is None:
            return "-"
        blocks = f", {row['blocks']} blocks" if row["blocks"] != "1" else ""
        return f"{float(row['time_times_bp']):.2f}x{blocks}"

    def least(model: str, name: str) -> str:
        row = rows[model, name]
        share = int(row["peak_bytes"]) / int(rows[model, "BP"]["peak_bytes"])
        return f"{int(row['peak_bytes']) / 2**30:.1f} GiB ({share:.0%}), {cell(model, name)}"

    body = []
    for model, title in SIZES.items():
        bp = f"{int(rows[model, 'BP']['peak_bytes']) / 2**30:.1f} GiB"
        body.append([title, "unit by unit", bp, "", "", least(model, "exact, unit by unit")])
        for kind in ("exact", "DGL", "MAN"):
            half, third = (cell(model, f"{kind}, the fastest in {share} of BP's memory") for share in ("50%", "33%"))
            body.append(["", kind, "", half, third, least(model, f"{kind}, the least")])
    return table(["network", "way", "BP", "in half", "in a third", "the least"], body)


def fits() -> str:
    """What `lg.fit` chose for each network, from a wide budget to a tight one, and whether the step stayed within."""
    rows = read_results("fits.csv")
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        within = sum(row["within"] == "True" for row in mine)
        cells = [f"{row['blocks']}, {float(row['predicted_times_bp']):.2f}x" for row in mine]
        body.append([model.rpartition(":")[2], *cells, f"{within} of {len(mine)}"])
    shares = [f"{float(share):.0%}" for share in dict.fromkeys(row["share"] for row in rows)]
    return table(["network", *(f"blocks and time, {share}" for share in shares), "within the budget"], body)


def imagenet() -> str:
    """Memory and arithmetic of each plan, compared with BP. Each network has a column."""
    every = read_results("imagenet_memory.csv")
    models = list(dict.fromkeys(row["model"] for row in every))
    found = {(row["row"], row["model"]): row for row in every}

    def told(name: str, model: str) -> str:
        row = found.get((name, model))
        if row is None:
            return ""
        below, arithmetic = float(row["below_bp_percent"]), float(row["flops_times_bp"])
        size = f"{int(row['peak_bytes']) / 2**30:.1f} GiB"
        return size if name == "BP" else f"{size}, -{below:.0f}%, {arithmetic:.2f}x"

    body = [[name, *(told(name, model) for model in models)] for name in dict.fromkeys(row["row"] for row in every)]
    return table(["plan", *(model.partition(":")[2] for model in models)], body)


def parts() -> str:
    """The times of each part of an auxiliary, computed in two ways."""
    body = []
    for row in read_results("parts.csv"):
        what, _, ways = row["what: one way, another"].partition(": ")
        one, another = (f"{row[f'milliseconds_{which}']} ms" for which in ("one", "another"))
        body.append([what, f"{row['channels']} x {row['size']} x {row['size']}", ways, one, another])
    return table(["part", "map", "one way, another", "one", "another"], body)


def coverage() -> str:
    """The number of networks of each source that can be cut into four blocks."""
    body = []
    for source in ("timm", "torchvision", "segmentation"):
        mine = [row["ok"] == "True" for row in read_results("coverage_timm-*.csv") if row["source"] == source]
        body.append([source, str(len(mine)), str(sum(mine)), f"{100 * sum(mine) / len(mine):.1f}%"])
    libraries: dict[str, list[bool]] = {}
    for row in read_results("coverage_networks.csv"):
        libraries.setdefault(row["library"], []).append(row["cut"] == "True")
    for library, mine in libraries.items():
        body.append([f"{library}, small", str(len(mine)), str(sum(mine)), f"{100 * sum(mine) / len(mine):.1f}%"])
    return table(["source", "networks", "cut into four blocks", "share"], body)


def refused() -> str:
    """The networks that cannot be cut into four blocks. Networks of one kind share a row."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_results("coverage_timm-*.csv"):
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
    """For one network of each family: the layouts at its boundaries, and the units that the couplings copy there."""
    body = []
    for row in sorted(read_results("families_timm-*.csv"), key=lambda row: row["family"]):
        crosses = "/".join(dict.fromkeys(row["layouts"].split()))
        man, deep = (row[key].split(" | ") for key in ("man_copies", "deep_man_copies"))
        copies = [f"`{name}`" for name in man], [f"`{name}`" for name in deep[0].split(", ")]
        body.append([row["family"], f"`{row['name']}`", row["units"], crosses, *map(", ".join, copies)])
    return table(["family", "network", "units", "crosses", "MAN copies", "deep MAN copies at the first boundary"], body)


def training() -> str:
    """Test errors of the trained networks of other kinds."""
    body = [
        [network, row["method"], row["blocks"], error_of(row), row["n"], peak_of(row)]
        for network in ("vit_tiny", "convnext_atto")
        for row in read_results(f"accuracy_{network}.csv")
    ]
    return table(["network", "method", "blocks", "test error in %", "n", "peak memory"], body)


def finetune() -> str:
    """Each way to fine-tune: error, its difference to plain fine-tuning with the same seed, area under the curve,
    memory, and the time of a step over plain fine-tuning's."""
    rows = read_results("finetune.csv")
    plain = {row["seed"]: float(row["error"]) for row in rows if row["way"] == "plain"}
    times = {(r["way"], r["blocks"]): float(r["cpu_ms_of_step"]) for r in read_results("finetune_times.csv")}
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["way"], row["blocks"]), []).append(row)
    body = []
    for told, mine in sorted(groups.items(), key=lambda item: int(item[0][1])):
        error, auc = (mean_of([float(row[name]) for row in mine], n) for name, n in (("error", 2), ("auc", 4)))
        worse = "" if told[0] == "plain" else mean_of([float(row["error"]) - plain[row["seed"]] for row in mine])
        slower = f"{times[told] / times['plain', '1']:.2f}"
        body.append([*told, str(len(mine)), error, worse, auc, peak_of(mine[0]), slower])
    head = ["way", "blocks", "n", "test error, %", "minus plain, paired", "AUC", "peak memory", "time of a step"]
    return table(head, body)


def memory_any() -> str:
    """Bytes and time of a step of three networks that are no classifiers. Times are there once they were measured."""
    times: dict[tuple[str, str], float] = {}
    if (ROOT / "results" / "memory_any_times.csv").exists():
        times = {(r["network"], r["way"]): float(r["seconds_of_step"]) for r in read_results("memory_any_times.csv")}
    rows = read_results("memory_any.csv")
    whole = {row["network"]: int(row["peak_bytes"]) for row in rows if row["way"] == "BP"}
    body = []
    for row in rows:
        key, plain = (row["network"], row["way"]), (row["network"], "BP")
        share = f"{int(row['peak_bytes']) / whole[row['network']]:.0%}"
        slower = f"{times[key] / times[plain]:.2f}" if key in times else ""
        cuts = ", ".join(f"`{name}`" for name in row["cuts"].split())
        body.append([*key, cuts, row["recomputed"], peak_of(row), share, slower])
    head = ["network", "way", "cut after", "units recomputed", "peak memory", "of BP's", "time of a step"]
    return table(head, body)


WAYS = {
    "bp": "BP", "bp, twice": "BP, twice", "bp with fsdp2": "BP with FSDP2", "1f1b": "BP, 1F1B", "gpipe": "BP, GPipe",
    "interleaved 1f1b": "BP, interleaved 1F1B", "zero bubble": "BP, zero bubble",
}  # fmt: skip


def way_of(row: dict[str, str]) -> list[str]:
    """The first cells of a row about scaling: the way to train, its blocks and its micro-batches."""
    micro = row["micro_batches"] if row["micro_batches"] != "1" else ""
    return [WAYS.get(row["way"], row["way"]), row["blocks"] if "local" in row["way"] else "", micro]


def pipeline_memory() -> str:
    """The rank of a pipeline that needs most, beside one process."""

    def told(row: dict[str, str]) -> list[str]:
        cuts = row["cuts"].replace(" ", ", ")
        rss = f"{int(row['rss_bytes']) / 2**20:.0f} MiB"
        processes = row["ranks"] + (f" x {row['shards']}" if row["shards"] != "1" else "")
        cells = [row["blocks"], row["batch_size"], cuts, processes, peak_of(row), rss, row["times_one_process"]]
        return [name_of(row["method"]), *cells]

    body = [told(row) for row in read_results("pipeline_memory.csv")]
    head = ["method", "blocks", "batch", "cut after", "processes", "peak", "taken from the system", "times one"]
    return table(head, body)


def scaling() -> str:
    """Speed and memory of each way to train, without delays."""
    body = []
    for row in read_results("scaling_resnet110.csv"):
        if row["delay_ms"] == "0":
            split = {"local": row["cut"], "bp": f"{row['cut']}, BP's halves"}[row["split"]]
            numbers = [row["images_per_second"], row["times_bp"], row["times_local"], peak_of(row)]
            body.append([*way_of(row), row["processes"], split if row["processes"] == "2" else "", *numbers])
    head = ["way", "blocks", "micro-batches", "processes", "split after", "images/s", "times BP", "times local", "peak"]
    return table(head, body)


def delays() -> str:
    """The speed of each way to train when messages are late."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in read_results("scaling_resnet110.csv"):
        if row["processes"] == "2" and row["split"] == "local" and not row["way"].endswith("twice"):
            found.setdefault(tuple(way_of(row)), {})[row["delay_ms"]] = float(row["images_per_second"])
    found = {way: speeds for way, speeds in found.items() if len(speeds) > 1}  # Shards are not delayed.
    late = [delay for delay in next(iter(found.values())) if delay != "0"]
    body = []
    for way, speeds in found.items():
        lost = [f"{speeds[delay]:.2f}, {speeds[delay] / speeds['0'] - 1:+.0%}" for delay in late]
        body.append([*way, f"{speeds['0']:.2f}", *lost])
    return table(["way", "blocks", "micro-batches", "images/s", *(f"{delay} ms late" for delay in late)], body)


def check() -> str:
    """The speeds that the formulas expect on two devices, and the measured ones."""
    names = ("delay_ms", "expected", "measured", "measured_over_expected")
    rows = [row for row in read_results("scaling_check.csv") if row["split"] == "local"]
    body = [[*way_of(row), *(row[name] for name in names)] for row in rows]
    head = ["way", "blocks", "micro-batches", "ms late", "images/s expected", "measured", "measured / expected"]
    return table(head, body)


def devices() -> str:
    """The predictions for many devices."""
    body = []
    for row in read_results("scaling_devices.csv"):
        sizes = [f"{int(row[name]) / 2**20:.1f} MiB" for name in ("activation_bytes", "source_bytes")]
        times = [f"{1e3 * float(row[name]):.1f} ms" for name in ("local_seconds", "bp_seconds", "message_seconds")]
        names = ("local_efficiency", "1f1b_efficiency_1p", "bubble_1p", "1f1b_efficiency_4p", "bubble_4p")
        shares = [f"{float(row[name]):.0%}" if row[name] else "" for name in names]
        body.append([row["devices"], {"man": "MAN", "none": "none"}[row["coupling"]], *sizes, *times, *shares])
    head = ["devices", "coupling", "handed on", "EMA source", "slowest group, local", "slowest group, BP", "message",
            "local, of ideal", "1F1B, m = P", "its bubble", "1F1B, m = 4P", "its bubble"]  # fmt: skip
    return table(head, body)


TABLES: dict[str, Callable[[], str]] = {
    **accuracy_tables.TABLES, **race_tables.TABLES, **task_tables.TABLES, "probes": probes,
    "deeper": deeper, "frontier": frontier, "large": large, "sizes": sizes, "fits": fits,
    "imagenet": imagenet, "parts": parts, "coverage": coverage,
    "refused": refused, "families": families, "training": training, "finetune": finetune,
    "memory_any": memory_any, "pipeline_memory": pipeline_memory, "scaling": scaling,
    "delays": delays, "check": check, "devices": devices,
}  # fmt: skip


def filled(page: str) -> str:
    """The text of a page with its tables filled from results/."""

    def fill(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return f"{begin}\n{TABLES[name]()}\n{end}"

    return re.sub(r"(<!-- (\w+):begin -->).*?(<!-- \2:end -->)", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for place in PAGES:
        (ROOT / place).write_text(filled((ROOT / place).read_text()))
