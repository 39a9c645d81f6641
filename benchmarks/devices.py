"""Predicts the time of a step on 8, 64 and 512 devices, and checks the formulas against what two processes measured.

    python benchmarks/devices.py

The seconds of a step of the whole batch, for P devices of equal speed in a row:

    local pipeline  max(c, transfer, message / 2, 2 (c + message) / (lag + 1))
    1F1B, GPipe     (m + P - 1) c / m, and the time of the messages: the passes are simulated one by one, in their order
    PipeDream-2BW   simulated too, without a flush; as many micro-batches are underway as two versions of weights allow
    data parallel   c + (2 (P - 1) / P parameters / link + 2 log2(P) latency) / H, averaging in every H-th step

Here m is the number of micro-batches, and c are the seconds that the slowest device computes for a batch (for BP
without the auxiliaries). The bytes that one device hands on need `transfer` seconds to cross the link, and arrive after
`message` seconds: the link's latency and the transfer. Two batches may be on the way. The last term is the round trip
of an average's source, which may be `lag` steps old: `lag` + 1 steps can go on in that time. The term is an upper
bound, because a device needs the source only after its first block has computed.

Assumptions: time is proportional to the images of a micro-batch (small ones are slower in truth). Messages do not slow
down arithmetic. The speed of a device is `Speed`: it does its arithmetic and moves its bytes one after the other.

On fast links, messages do not slow each other. Over slow links (1 Gbit/s and 50 ms), each message waits until the link
has taken the one before it; both directions have that speed. Data parallel computes and averages one after the other.
All numbers are float32. With H = 1 its devices average gradients. With a larger H they average weights after steps of
their own, as DiLoCo does. The network has to fit a device for it, and nothing is said about what is learned.

Writes results/scaling_devices.csv, results/scaling_slow.csv (8 devices on slow links) and, from
results/scaling_resnet110.csv, results/scaling_check.csv.
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
LAGS = {"none": math.inf, "man": lg.least_lag()}  # By coupling. Nobody waits for a source where there is none.
SETTLED = 32  # After so many batches a pipeline without a flush is as fast as it gets.


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
    slow_devices: int = 8
    slow_link: float = 125e6
    """Bytes per second of a slow link, 1 Gbit/s."""
    slow_latency: float = 50e-3
    every: tuple[int, ...] = (100, 500)
    """Data parallel over slow links averages its weights once in so many steps."""
    results: Path = Path("results")


def local_pipeline(c: float, message: float, lag: float = 2, transfer: float = 0.0) -> float:
    """The seconds of a step of the local pipeline, by the formula above."""
    return max(c, transfer, message / AHEAD, 2 * (c + message) / (lag + 1))


def one_f_one_b(devices: int, micro: int, c: float, message: float, transfer: float = 0.0) -> float:
    """The seconds of a step in 1F1B's order: some forward passes, then one forward and one backward in turn."""
    orders = []
    for rank in range(devices):
        ahead = min(devices - rank - 1, micro)  # This many forward passes come before the first backward one.
        order = [("forward", i) for i in range(ahead)]
        for i in range(micro - ahead):
            order += [("forward", ahead + i), ("backward", i)]
        orders.append([*order, *(("backward", i) for i in range(micro - ahead, micro))])
    return simulated(orders, c / micro, message, transfer)


def gpipe(devices: int, micro: int, c: float, message: float, transfer: float = 0.0) -> float:
    """The seconds of a step in GPipe's order: all forward passes, then all backward passes."""
    order = [(kind, i) for kind in ("forward", "backward") for i in range(micro)]
    return simulated([order] * devices, c / micro, message, transfer)


def two_versions(devices: int, micro: int, c: float, message: float, transfer: float = 0.0) -> float:
    """The seconds of a step of PipeDream-2BW, whose batches follow each other without a flush.

    The first device has `micro` + 1 micro-batches underway, the most for which two versions of the weights are enough.
    The last one has one of them, and those between have evenly many.
    """

    def until(batches: int) -> float:
        orders = []
        for rank in range(devices):
            most = 1 + (devices - 1 - rank) * micro // (devices - 1)
            order = [("forward", i) for i in range(most - 1)]
            for i in range(batches * micro - most + 1):
                order += [("forward", most - 1 + i), ("backward", i)]
            orders.append(order)
        return simulated(orders, c / micro, message, transfer)

    return (until(2 * SETTLED) - until(SETTLED)) / SETTLED


def all_reduce(devices: int, size: float, link: float, latency: float) -> float:
    """The seconds of an average of `size` bytes by halving and doubling: each device sends 2 (P - 1) / P of the bytes,
    in 2 log2(P) messages one after the other."""
    return 2 * (devices - 1) / devices * size / link + 2 * math.log2(devices) * latency


def simulated(orders: list[list[tuple[str, int]]], c: float, message: float, transfer: float = 0.0) -> float:
    """The seconds until every device has done its passes.

    Args:
        orders: The passes of each device in its order: "forward" or "backward", and the number of the micro-batch.
        c: The seconds of a micro-batch on a device. The forward pass takes a third of them.
        message: The seconds until a message is there. A pass waits for the message that it needs.
        transfer: The seconds of them in which no other message can enter the same link in this direction.
    """
    devices = len(orders)
    arrives: dict[tuple[str, int, int], float] = {}
    free: dict[tuple[str, int], float] = {}
    clock, position, waiting = [0.0] * devices, [0] * devices, list(range(devices))
    while waiting:
        rank = waiting.pop()
        while position[rank] < len(orders[rank]):
            kind, i = orders[rank][position[rank]]
            source = rank - 1 if kind == "forward" else rank + 1
            if 0 <= source < devices:
                if (kind, source, i) not in arrives:
                    break
                clock[rank] = max(clock[rank], arrives[kind, source, i])
            clock[rank] += c / 3 if kind == "forward" else c * 2 / 3
            enters = max(clock[rank], free.get((kind, rank), 0.0))
            arrives[kind, rank, i], free[kind, rank] = enters + message, enters + transfer
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


@dataclass(frozen=True)
class Traced:
    """What each unit of a network costs, each a block with a linear head.

    Attributes:
        units: The seconds of each unit.
        auxiliaries: The seconds of the auxiliary behind each unit.
        outputs: The bytes that each unit hands on.
        states: The bytes of each unit's parameters and buffers.
        parameters: The bytes of all parameters.
    """

    units: list[float]
    auxiliaries: list[float]
    outputs: list[int]
    states: list[int]
    parameters: int


def traced(settings: Settings, coupling: lg.MAN | None) -> Traced:
    """The costs of the network in these settings."""
    speed = lg.Speed(settings.flops, settings.moved)
    x = torch.zeros(2, 3, 32, 32)
    backbone = lg.build(settings.model, classes=10)
    names = lg.units(backbone, x)
    model = lg.localize(backbone, blocks=names[:-1], method=lg.dgl("0c1f"), coupling=coupling, example=x)
    costs = trace_costs(model, settings.batch_size)
    units, auxiliaries = (
        [speed.seconds(cost.forward + cost.backward) for cost in some[0]] for some in (costs.units, costs.auxiliaries)
    )
    outputs, states = [cost.output for cost in costs.units[0]], [cost.state for cost in costs.units[0]]
    return Traced(units, auxiliaries, outputs, states, sum(p.nbytes for p in backbone.parameters()))


def predicted(settings: Settings, costs: dict[str, Traced]) -> list[dict[str, Any]]:
    """The rows of many devices, without a coupling and with MAN."""
    table = []
    for coupling, cost in costs.items():
        for devices in DEVICES:
            local, cuts = slowest(cost.units, devices, cost.auxiliaries)
            bp, _ = slowest(cost.units, devices)
            activation = max(cost.outputs[cut] for cut in cuts)
            source = max(cost.states[cut + 1] for cut in cuts) if coupling == "man" else 0
            transfer = activation / settings.link
            message = settings.latency + transfer
            ideal = sum(cost.units) / devices
            lag = LAGS[coupling]
            row: dict[str, Any] = {
                "coupling": coupling, "devices": devices, "units": len(cost.units),
                "activation_bytes": activation, "source_bytes": source,
                "local_seconds": local, "bp_seconds": bp, "message_seconds": message,
                "local_efficiency": ideal / local_pipeline(local, message, lag, transfer),
            }  # fmt: skip
            for times in (1, 4):
                micro = times * devices
                small = settings.latency + activation / micro / settings.link
                whole = micro <= settings.batch_size
                row[f"bubble_{times}p"] = bubble(devices, micro) if whole else ""
                row[f"1f1b_efficiency_{times}p"] = ideal / one_f_one_b(devices, micro, bp, small) if whole else ""
            table.append(row)
    return [{n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items()} for row in table]


def over_slow_links(settings: Settings, costs: dict[str, Traced]) -> list[dict[str, Any]]:
    """The seconds of a step of each way to train on a few devices with slow links, on which a message waits for the
    one before it. Devices of data parallel have a part of the batch each."""
    devices, link, latency = settings.slow_devices, settings.slow_link, settings.slow_latency
    found: list[tuple[str, int, int, float]] = []
    for coupling, cost in costs.items():
        local, cuts = slowest(cost.units, devices, cost.auxiliaries)
        transfer = max(cost.outputs[cut] for cut in cuts) / link
        step = local_pipeline(local, latency + transfer, LAGS[coupling], transfer)
        found.append(("local pipeline" + (", MAN" if coupling == "man" else ""), 1, 1, step))
    cost = costs["none"]
    bp, cuts = slowest(cost.units, devices)
    for name, formula in (("gpipe", gpipe), ("1f1b", one_f_one_b), ("2bw", two_versions)):
        for micro in (devices, 4 * devices, 16 * devices):
            small = max(cost.outputs[cut] for cut in cuts) / micro / link
            found.append((name, micro, 1, formula(devices, micro, bp, latency + small, small)))
    ideal, average = sum(cost.units) / devices, all_reduce(devices, cost.parameters, link, latency)
    found += [("bp data parallel", 1, every, ideal + average / every) for every in (1, *settings.every)]
    same = {"devices": devices, "link_bytes_per_second": f"{link:.4g}", "latency_seconds": latency,
            "model": settings.model, "batch_size": settings.batch_size}  # fmt: skip
    return [
        {"way": way, "micro_batches": micro, "every": every, "step_seconds": f"{step:.4g}",
         "efficiency": f"{ideal / step:.4g}", **same}
        for way, micro, every, step in found
    ]  # fmt: skip


def check(measured: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Compares each measured pipeline on two devices with the images per second that the formulas expect."""
    found = []
    batch = int(measured[0]["batch_size"])
    # The rows "twice" time a whole batch on each of two devices at the same time. A device takes its share of these
    # seconds: in the local pipeline the measured one of the slower device, and half of them in BP's pipelines.
    twice = (row for row in measured if row["way"].endswith("twice"))
    whole = {row["blocks"]: 2 * batch / float(row["images_per_second"]) for row in twice}
    for row in measured:
        way, micro, delay = row["way"], int(row["micro_batches"]), float(row["delay_ms"]) / 1000
        if way == "local pipeline":
            seconds = local_pipeline(whole[row["blocks"]] * float(row["slowest_share"]), delay)
        elif way in ("1f1b", "gpipe"):
            formula = one_f_one_b if way == "1f1b" else gpipe
            seconds = formula(2, micro, whole["1"] / 2, delay)
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
    costs = {"none": traced(settings, None), "man": traced(settings, lg.MAN())}
    tables = {
        "scaling_check": check(measured),
        "scaling_devices": predicted(settings, costs),
        "scaling_slow": over_slow_links(settings, costs),
    }
    for name, rows in tables.items():
        Table(settings.results / f"{name}.csv").add(*rows)
        for row in rows:
            print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Settings))
