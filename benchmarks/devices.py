"""Predicts the time of a step on 8, 64 and 512 devices, and checks the formulas against what two processes measured.

    python benchmarks/devices.py

The seconds of a step of the whole batch, for P devices of equal speed in a row:

    local pipeline  max(c, transfer, message / 2, 2 (c + message) / (lag + 1))
    1F1B, GPipe     (m + P - 1) c / m, and the time of the messages: the passes are simulated one by one, in their order

Here m is the number of micro-batches, and c are the seconds that the slowest device computes for a batch (for BP
without the auxiliaries). The bytes that one device hands on need `transfer` seconds to cross the link, and arrive after
`message` seconds: the link's latency and the transfer. Two batches may be on the way. The last term is the round trip
of an average's source, which may be `lag` steps old: `lag` + 1 steps can go on in that time. The term is an upper
bound, because a device needs the source only after its first block has computed.

Assumptions: time is proportional to the images of a micro-batch (small ones are slower in truth). Messages do not slow
down arithmetic or each other. The speed of a device is `Speed`: it does its arithmetic and moves its bytes one after
the other.

Writes results/scaling_devices.csv and, from results/scaling_resnet110.csv, results/scaling_check.csv.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import tyro
from common import Table

import localgrad as lg
from localgrad.run.tables import read_csv
from localgrad.scale.costs import trace_costs
from localgrad.scale.pipeline import AHEAD

DEVICES = (8, 64, 512)


@dataclass(frozen=True)
class Settings:
    """Assumptions about devices and links. The network is cut anew for each number of devices."""

    model: str = "resnet1202"
    batch_size: int = 1024
    flops: float = 60e12
    """Floating-point operations per second of a device."""
    moved: float = 1e12
    """Bytes per second that a device reads and writes."""
    link: float = 25e9
    """Bytes per second from one device to the next."""
    latency: float = 10e-6
    """Seconds until an empty message arrives."""
    results: Path = Path("results")


def local_pipeline(c: float, message: float, lag: float = 2, transfer: float = 0.0) -> float:
    """The seconds of a step of the local pipeline, by the formula above."""
    return max(c, transfer, message / AHEAD, 2 * (c + message) / (lag + 1))


def one_f_one_b(devices: int, micro: int, c: float, message: float) -> float:
    """The seconds of a step in 1F1B's order: some forward passes, then one forward and one backward in turn."""
    orders = []
    for rank in range(devices):
        ahead = min(devices - rank - 1, micro)  # This many forward passes come before the first backward one.
        order = [("forward", i) for i in range(ahead)]
        for i in range(micro - ahead):
            order += [("forward", ahead + i), ("backward", i)]
        orders.append([*order, *(("backward", i) for i in range(micro - ahead, micro))])
    return simulated(orders, c / micro, message)


def gpipe(devices: int, micro: int, c: float, message: float) -> float:
    """The seconds of a step in GPipe's order: all forward passes, then all backward passes."""
    order = [(kind, i) for kind in ("forward", "backward") for i in range(micro)]
    return simulated([order] * devices, c / micro, message)


def simulated(orders: list[list[tuple[str, int]]], c: float, message: float) -> float:
    """The seconds until every device has done its passes.

    Args:
        orders: The passes of each device in its order: "forward" or "backward", and the number of the micro-batch.
        c: The seconds of a micro-batch on a device. The forward pass takes a third of them.
        message: The seconds until a message is there. A pass waits for the message that it needs.
    """
    devices = len(orders)
    ended: dict[tuple[str, int, int], float] = {}
    clock, position, waiting = [0.0] * devices, [0] * devices, list(range(devices))
    while waiting:
        rank = waiting.pop()
        while position[rank] < len(orders[rank]):
            kind, i = orders[rank][position[rank]]
            source = rank - 1 if kind == "forward" else rank + 1
            if 0 <= source < devices:
                if (kind, source, i) not in ended:
                    break
                clock[rank] = max(clock[rank], ended[kind, source, i] + message)
            clock[rank] += c / 3 if kind == "forward" else c * 2 / 3
            ended[kind, rank, i] = clock[rank]
            position[rank] += 1
            waiting += [other for other in (rank - 1, rank + 1) if 0 <= other < devices]
    return max(clock)


def bubble(devices: int, micro: int) -> float:
    """The share of the time in which a device of 1F1B or GPipe has nothing to do, without messages."""
    return (devices - 1) / (micro + devices - 1)


def slowest(units: list[float], devices: int, auxiliaries: list[float] | None = None) -> tuple[float, list[int]]:
    """Splits a network over devices so that the slowest one is as fast as possible.

    Args:
        units: The seconds of each unit.
        devices: The number of devices.
        auxiliaries: The seconds of the auxiliary behind each unit; None for BP, which has none.

    Returns:
        The seconds of the slowest device, and the index of the last unit of each device but the last.
    """
    shares = lg.shares_of(units, devices, auxiliaries or ())
    lasts = [end - 1 for end in accumulate(shares)][:-1]
    firsts = [0, *(last + 1 for last in lasts)]
    own = [sum(units[first : first + share]) for first, share in zip(firsts, shares, strict=True)]
    extra = [*(auxiliaries[last] if auxiliaries else 0.0 for last in lasts), 0.0]
    return max(map(sum, zip(own, extra, strict=True))), lasts


def predicted(settings: Settings) -> list[dict[str, Any]]:
    """The rows of many devices, without a coupling and with MAN."""
    speed = lg.Speed(settings.flops, settings.moved)
    table = []
    for coupling in (None, lg.MAN()):
        x = torch.zeros(2, 3, 32, 32)
        backbone = lg.build(settings.model, classes=10)
        names = lg.units(backbone, x)
        model = lg.localize(backbone, blocks=names[:-1], method=lg.dgl("0c1f"), coupling=coupling, example=x)
        costs = trace_costs(model, settings.batch_size)
        units = [speed.seconds(cost.forward + cost.backward) for cost in costs.units[0]]
        auxiliaries = [speed.seconds(cost.forward + cost.backward) for cost in costs.auxiliaries[0]]
        for devices in DEVICES:
            local, cuts = slowest(units, devices, auxiliaries)
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
    """Compares each measured pipeline on two devices with the images per second that the formulas expect."""
    found = []
    batch = int(measured[0]["batch_size"])
    # A device computes half of each batch. The rows "twice" time a whole batch on each of two devices at the same time,
    # so c is half of their seconds.
    c = {row["blocks"]: batch / float(row["images_per_second"]) for row in measured if row["way"].endswith("twice")}
    for row in measured:
        way, micro, delay = row["way"], int(row["micro_batches"]), float(row["delay_ms"]) / 1000
        if way == "local pipeline":
            seconds = local_pipeline(c[row["blocks"]], delay)
        elif way in ("1f1b", "gpipe"):
            formula = one_f_one_b if way == "1f1b" else gpipe
            seconds = formula(2, micro, c["1"], delay)
        else:
            continue
        expected, speed = batch / seconds, float(row["images_per_second"])
        found.append({
            **{name: row[name] for name in ("way", "blocks", "split", "micro_batches", "delay_ms")},
            "expected": f"{expected:.2f}", "measured": f"{speed:.2f}",
            "measured_over_expected": f"{speed / expected:.3f}",
        })  # fmt: skip
    return found


def main(settings: Settings) -> None:
    measured = read_csv(settings.results / "scaling_resnet110.csv")
    for name, rows in (("scaling_check", check(measured)), ("scaling_devices", predicted(settings))):
        Table(settings.results / f"{name}.csv").add(*rows)
        for row in rows:
            print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Settings))
