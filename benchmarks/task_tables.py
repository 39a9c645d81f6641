"""The tables of docs/tasks.md, from the files in results/."""

from __future__ import annotations

from cells import mean_of, name_of, peak_of, table
from common import read_results

Row = dict[str, str]
NETWORKS = {"fcn": "FCN", "unet": "U-Net"}


def grouped(rows: list[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by what they have in these columns."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in columns), []).append(row)
    return groups


def less_bp(mine: list[Row], bp: list[Row], column: str) -> str:
    """The mean of the differences to BP with the same seed, and their standard deviation."""
    base = {row["seed"]: float(row[column]) for row in bp}
    return mean_of([float(row[column]) - base[row["seed"]] for row in mine if row["seed"] in base])


def segmentation() -> str:
    """mIoU, memory and time of each way to train the two networks, and the time of exact plans at the same bytes."""
    times = {(r["network"], r["method"], r["blocks"]): r for r in read_results("segmentation_times.csv")}
    runs = [
        {
            **row,
            "network": row["setting"].partition(" ")[0].removeprefix("model="),
            "miou": str(100 - float(row["error"])),
        }
        for row in read_results("accuracy_fashion_scenes_runs.csv")
    ]
    groups = grouped(runs, "network", "method", "blocks")
    body = []
    for (network, method, blocks), mine in sorted(groups.items(), key=lambda item: (item[0][0], int(item[0][2]))):
        bp, step = groups[network, "bp", "1"], times[network, method, blocks]
        whole = float(times[network, "bp", "1"]["milliseconds"])
        beside = step["exact_milliseconds"] and f"{float(step['exact_milliseconds']) / whole:.2f}"
        worse = "" if method == "bp" else less_bp(mine, bp, "miou")
        cells = [mean_of([float(row["miou"]) for row in mine]), worse, str(len(mine)), peak_of(step)]
        slower = f"{float(step['milliseconds']) / whole:.2f}"
        body.append([NETWORKS[network], name_of(method), blocks, *cells, slower, beside or step["exact_peak_bytes"]])
    head = ["network", "method", "blocks", "mIoU, %", "minus BP, paired", "n", "peak memory", "time of a step",
            "exact, same bytes: time"]  # fmt: skip
    return table(head, body)


HEADS = {
    "bp": "BP", "own": "DGL, own readouts", "tied": "DGL, embedding shared", "shared": "DGL, readout shared",
    "solo": "DGL, SOLO's heads", "man": "DGL + MAN", "deep man": "DGL + deep MAN", "lopt": "LoPT",
}  # fmt: skip


def language() -> str:
    """Bits per byte, memory and time of each way, and the bits of BP in the same time at the same bytes."""
    steps = {(row["method"], row["blocks"]): row for row in read_results("language_steps.csv")}
    bp = steps["bp", "1"]
    body = []
    for row in read_results("language_means.csv"):
        if not row["bits_mean"]:
            continue
        step = steps[row["method"], row["blocks"]]
        slower = f"{float(step['ms']) / float(bp['ms']):.2f}"
        exact = f"{float(step['exact_ms']) / float(bp['ms']):.2f}" if step["exact_ms"] else step["exact"]
        bits = [spread(row, "bits"), row["n"], peak_of(step), slower]
        beside = spread(row, "exact_bits") if row["exact_bits_mean"] else ""
        body.append([HEADS[row["method"]], row["blocks"], *bits, exact, beside])
    head = ["way", "blocks", "bits per byte", "n", "peak memory", "time of a step", "BP, same bytes: time",
            "BP, same bytes and seconds: bits"]  # fmt: skip
    return table(head, body)


def spread(row: Row, name: str) -> str:
    """The mean ± standard deviation in two columns of a row."""
    return f"{float(row[f'{name}_mean']):.3f}" + (
        f" ± {float(deviation):.3f}" if (deviation := row[f"{name}_std"]) else ""
    )


def detection() -> str:
    """mAP, memory and time of RetinaNet in one block and in four."""
    steps = {(row["method"], row["batch_size"]): row for row in read_results("detection_steps.csv")}
    groups = grouped(read_results("detection.csv"), "method")
    sizes = sorted({int(size) for _, size in steps})
    body = []
    for name in dict.fromkeys(name for name, _ in steps):
        mine = groups.get((name,), [])
        worse = less_bp(mine, groups["bp",], "map") if mine and name != "bp" else ""
        scores = [mean_of([float(row[what]) for row in mine]) if mine else "as BP" for what in ("map", "ap50")]
        whole = {size: float(steps["bp", str(size)]["cpu_ms"]) for size in sizes}
        mine_steps = {size: steps[name, str(size)] for size in sizes}
        cells = [f"{peak_of(step)}, {float(step['cpu_ms']) / whole[size]:.2f}" for size, step in mine_steps.items()]
        label = {"bp, recompute": "BP, all recomputed"}.get(name) or name_of(name)
        body.append([label, "4" if "dgl" in name else "1", *scores, worse, str(len(mine) or ""), *cells])
    heads = [f"memory and time, batch of {size}" for size in sizes]
    return table(["method", "blocks", "mAP, %", "AP50, %", "minus BP, paired", "n", *heads], body)


TABLES = {"segmentation": segmentation, "language": language, "detection": detection}
