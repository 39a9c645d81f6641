"""On paper: a step on 8, 64 and 512 devices, and the same formulas beside what two processes have measured.

    python benchmarks/devices.py

Seconds of a step of the whole batch, for P devices of equal speed in a row:

    local pipeline  max(c, transfer, message / 2, 2 (c + message) / (lag + 1))
    1F1B, GPipe     (m + P - 1) c / m, and what messages add: each order of passes is followed pass by pass

m: micro-batches. c: seconds that the slowest device computes for a batch (for BP without auxiliaries). message: seconds
until what one device hands on is there: the link's latency, and transfer, its bytes over the link. Two batches may be
on the way. The last term is the round trip of an average's source, which may be `lag` steps old: `lag` + 1 steps go on
in that time. It is an upper bound, as a device waits for the source only when its first block has computed.

Assumed: time is proportional to the images of a micro-batch (small ones are slower in truth), messages do not slow
arithmetic or each other, a device's speed is `Speed`: arithmetic and bytes moved one after the other.

Writes results/scaling_devices.csv and, from results/scaling_resnet110.csv, results/scaling_check.csv.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import tyro

import localgrad as lg
from localgrad.scale.costs import trace_costs
from localgrad.scale.pipeline import AHEAD

DEVICES = (8, 64, 512)


@dataclass(frozen=True)
class Settings:
    """Assumptions on devices and links; the network is cut for each number of devices."""

    model: str = "resnet1202"
    batch_size: int = 1024
    flops: float = 60e12
    """Floating-point operations that a device does in a second."""
    moved: float = 1e12
    """Bytes that it reads and writes in a second."""
    link: float = 25e9
    """Bytes a second from one device to the next."""
    latency: float = 10e-6
    """Seconds."""
    results: Path = Path("results")


def local_pipeline(c: float, message: float, lag: float = 2, transfer: float = 0.0) -> float:
    """transfer: the part of `message` in which the link is busy."""
    return max(c, transfer, message / AHEAD, 2 * (c + message) / (lag + 1))


def one_f_one_b(devices: int, micro: int, c: float, message: float) -> float:
    orders = []
    for rank in range(devices):
        ahead = min(devices - rank - 1, micro)  # forward passes before the first backward pass
        order = [("forward", i) for i in range(ahead)]
        for i in range(micro - ahead):
            order += [("forward", ahead + i), ("backward", i)]
        orders.append([*order, *(("backward", i) for i in range(micro - ahead, micro))])
    return followed(orders, c / micro, message)


def gpipe(devices: int, micro: int, c: float, message: float) -> float:
    order = [(kind, i) for kind in ("forward", "backward") for i in range(micro)]
    return followed([order] * devices, c / micro, message)


def followed(orders: list[list[tuple[str, int]]], c: float, message: float) -> float:
    """Seconds until each device has done its passes in its order, of which a forward pass takes a third of c, a
    backward pass two, and each waits for the message that it needs."""
    devices = len(orders)
    done: dict[tuple[str, int, int], float] = {}
    clock, at, waiting = [0.0] * devices, [0] * devices, list(range(devices))
    while waiting:
        rank = waiting.pop()
        while at[rank] < len(orders[rank]):
            kind, i = orders[rank][at[rank]]
            source = rank - 1 if kind == "forward" else rank + 1
            if 0 <= source < devices:
                if (kind, source, i) not in done:
                    break
                clock[rank] = max(clock[rank], done[kind, source, i] + message)
            clock[rank] += c / 3 if kind == "forward" else c * 2 / 3
            done[kind, rank, i] = clock[rank]
            at[rank] += 1
            waiting += [other for other in (rank - 1, rank + 1) if 0 <= other < devices]
    return max(clock)


def bubble(devices: int, micro: int) -> float:
    """The share of its time in which a device of 1F1B or GPipe has nothing to do, messages apart."""
    return (devices - 1) / (micro + devices - 1)


def slowest(units: list[float], devices: int, ends: list[float] | None = None) -> tuple[float, list[int]]:
    """Seconds of the slowest device, and the last unit of each but the last."""
    shares = lg.shares_of(units, devices, ends or ())
    lasts = [end - 1 for end in accumulate(shares)][:-1]
    firsts = [0, *(last + 1 for last in lasts)]
    spent = [sum(units[first : first + share]) for first, share in zip(firsts, shares, strict=True)]
    return max(s + e for s, e in zip(spent, [*(ends[i] if ends else 0.0 for i in lasts), 0.0], strict=True)), lasts


def on_paper(settings: Settings) -> list[dict[str, Any]]:
    speed = lg.Speed(settings.flops, settings.moved)
    table = []
    for coupling in (None, lg.MAN()):
        x = torch.zeros(2, 3, 32, 32)
        backbone = lg.build(settings.model, classes=10)
        names = lg.units(backbone, x)
        model = lg.localize(backbone, blocks=names[:-1], method=lg.dgl("0c1f"), coupling=coupling, example=x)
        costs = trace_costs(model, settings.batch_size)
        units = [speed.seconds(cost.forward + cost.backward) for cost in costs.units[0]]
        ends = [speed.seconds(cost.forward + cost.backward) for cost in costs.auxiliaries[0]]
        for devices in DEVICES:
            local, cuts = slowest(units, devices, ends)
            bp, _ = slowest(units, devices)
            activation = max(costs.units[0][cut].output for cut in cuts)
            source = max(costs.units[0][cut + 1].state for cut in cuts) if coupling else 0
            transfer = activation / settings.link
            message = settings.latency + transfer
            ideal = sum(units) / devices
            row: dict[str, Any] = {
                "coupling": "man" if coupling else "none", "devices": devices, "units": len(units),
                "activation_bytes": activation, "source_bytes": source,
                "local_seconds": local, "bp_seconds": bp, "message_seconds": message,
                "local_efficiency": ideal / local_pipeline(local, message, 2 if coupling else math.inf, transfer),
            }  # fmt: skip
            for times in (1, 4):
                micro = times * devices
                small = settings.latency + activation / micro / settings.link
                whole = micro <= settings.batch_size
                row[f"bubble_{times}p"] = bubble(devices, micro) if whole else ""
                row[f"1f1b_efficiency_{times}p"] = ideal / one_f_one_b(devices, micro, bp, small) if whole else ""
            table.append(row)
    return [{n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items()} for row in table]


def check(measured: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Two devices: images a second of each row as the formulas have it."""
    found = []
    batch = int(measured[0]["batch_size"])
    # Half of what a process takes for a batch while another computes too.
    c = {row["blocks"]: batch / float(row["images_per_second"]) for row in measured if row["way"].endswith("twice")}
    for row in measured:
        way, micro, late = row["way"], int(row["micro_batches"]), float(row["delay_ms"]) / 1000
        if way == "local pipeline":
            seconds = local_pipeline(c[row["blocks"]], late)
        elif way in ("1f1b", "gpipe"):
            formula = one_f_one_b if way == "1f1b" else gpipe
            seconds = formula(2, micro, c["1"], late)
        else:
            continue
        expected, measured_rate = batch / seconds, float(row["images_per_second"])
        found.append({
            **{name: row[name] for name in ("way", "blocks", "split", "micro_batches", "delay_ms")},
            "expected": f"{expected:.2f}", "measured": f"{measured_rate:.2f}",
            "measured_over_expected": f"{measured_rate / expected:.3f}",
        })  # fmt: skip
    return found


def main(settings: Settings) -> None:
    with (settings.results / "scaling_resnet110.csv").open(newline="") as file:
        measured = list(csv.DictReader(file))
    for name, table in (("scaling_check", check(measured)), ("scaling_devices", on_paper(settings))):
        with (settings.results / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        for row in table:
            print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Settings))
