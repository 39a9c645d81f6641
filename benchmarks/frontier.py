"""Time and memory of one training step: BP, activation checkpointing, and plans of localgrad, in one process.

    python benchmarks/frontier.py --model resnet110 --batch-size 128 --precision float32

All rows take turns, so that a noisy machine is as noisy for each; median of `repeats` after two warm-ups. Random images
of 3x32x32. Beside what is measured stands what was predicted before. Memory that is freed stays with the process
(`keep_freed_memory`), which favours BP: else its gigabyte is mapped anew in each step, and local plans look faster.
"""

from __future__ import annotations

import csv
import ctypes
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.run.runlog import environment, mib
from localgrad.scale.memory import optimizers_for, training_step
from localgrad.scale.plan import Plan, Planner
from localgrad.scale.speed import calibrate

WARM_UP = 2
COLUMNS = (
    "row", "blocks", "times_bp", "predicted_times_bp", "milliseconds", "predicted_milliseconds", "peak_bytes",
    "predicted_peak_bytes", "as_you_go", "units_recomputed", "couplings_recomputed", "cuts",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Measure each row of the frontier."""

    model: str = "resnet110"
    batch_size: int = 128
    precision: Literal["float32", "bf16"] = "float32"
    repeats: int = 7
    allocator: Literal["keep", "system"] = "keep"
    """Whether freed memory stays with the process, or goes where the system's allocator lets it."""
    out: Path = Path("results")

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def file(self) -> Path:
        tail = "" if self.allocator == "keep" else "_system_allocator"
        return self.out / f"frontier_{self.model}_{self.precision}{tail}.csv"


@dataclass(frozen=True, eq=False)
class Way:
    """A method with a coupling, and its plans."""

    method: lg.Method
    coupling: lg.MAN | None
    planner: Planner


@dataclass(frozen=True, eq=False)
class Row:
    """A way to train, ready to step."""

    name: str
    plan: Plan
    model: lg.LocalModel
    optimizers: list[torch.optim.Optimizer]

    def step(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype | None) -> None:
        training_step(self.model, self.optimizers, x, y, step_as_you_go=self.plan.step_as_you_go, autocast=dtype)


def keep_freed_memory() -> None:
    """Tells glibc to hand nothing back to the system; without glibc, does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**30)):
            mallopt(option, value)


def network(settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    return lg.build(settings.model, classes=10).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def plans(settings: Settings, x: torch.Tensor) -> list[tuple[str, Way, Plan]]:
    speed = calibrate(network(settings), x, autocast=settings.autocast)
    print(f"calibrated: {speed.flops / 1e9:.0f} GFLOP/s, {speed.moved / 1e9:.1f} GB/s", flush=True)

    def way(method: lg.Method, coupling: lg.MAN | None) -> Way:
        how = {"method": method, "coupling": coupling, "autocast": settings.autocast, "speed": speed}
        return Way(method, coupling, Planner(network(settings), x, **how))

    dgl, man = way(lg.dgl("1c2f"), None), way(lg.dgl("1c2f"), lg.MAN())
    infopro, deep = way(lg.infopro(), lg.MAN()), way(lg.dgl("0c1f"), lg.DeepMAN())
    own = man.planner
    bp, again, count = own.bp, own.exactly(own.checkpointing).peak, len(own.costs.names)
    made = [("BP", man, bp), ("checkpointing", man, own.checkpointing)]
    budgets = [("half of BP's", bp.peak // 2), ("checkpointing's", again)]
    budgets += [("0.65 of checkpointing's", int(0.65 * again)), ("half of checkpointing's", again // 2)]
    kinds = [("BP", man, 1), ("DGL", dgl, None), ("MAN", man, None), ("deep MAN", deep, None)]
    wanted = [(f"{kind}, in {told} memory", who, b, blocks) for told, b in budgets for kind, who, blocks in kinds]
    spread = [k for k in (4, 8, 16) if k < count]
    for k in spread:
        told = f"deep MAN, K={k}, in the memory of even cuts"
        wanted.append((told, deep, deep.planner.exactly(deep.planner.even(k)).peak, k))
    for name, who, budget, blocks in wanted:
        try:
            made.append((name, who, who.planner.fastest(budget, blocks)))
        except UserError as error:
            print(f"{name}: {error}", flush=True)
    made += [(f"MAN, K={k}, balanced", man, own.balanced(k)) for k in spread[:2]]
    made += [(f"{n}, K={k}, even", w, w.planner.even(k)) for n, w in (("MAN", man), ("deep MAN", deep)) for k in spread]
    made += [(f"{n}, K={count}", w, w.planner.even(count)) for n, w in (("MAN", man), ("InfoPro + MAN", infopro))]
    return made


def row(name: str, who: Way, plan: Plan, settings: Settings, x: torch.Tensor) -> Row:
    coupling = who.coupling if len(plan.blocks) > 1 else None
    model = lg.localize(network(settings), blocks=list(plan.blocks), method=who.method, coupling=coupling, example=x)
    plan.apply(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
    groups = lg.param_groups(model, weight_decay=1e-4)
    return Row(name, who.planner.exactly(plan), model, optimizers_for(groups, sgd, as_you_go=plan.step_as_you_go))


def main(settings: Settings) -> None:
    if settings.allocator == "keep":
        keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(settings.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (settings.batch_size,))
    table = [row(name, who, plan, settings, x) for name, who, plan in plans(settings, x)]
    seconds: list[list[float]] = [[] for _ in table]
    for _ in range(WARM_UP + settings.repeats):
        for times, entry in zip(seconds, table, strict=True):
            began = time.perf_counter()
            entry.step(x, y, settings.autocast)
            times.append(time.perf_counter() - began)
    medians = [statistics.median(times[WARM_UP:]) for times in seconds]
    extra = {"batch_size": settings.batch_size, "precision": settings.precision, "allocator": settings.allocator}
    extra |= {"repeats": settings.repeats, **environment()}
    settings.out.mkdir(parents=True, exist_ok=True)
    off = []
    with settings.file.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *extra])
        for entry, median in zip(table, medians, strict=True):
            peak = lg.measure_peak(lambda entry=entry: entry.step(x, y, settings.autocast)).total
            plan, base = entry.plan, table[0].plan.seconds
            told = [f"{median / medians[0]:.3f}", f"{plan.seconds / base:.3f}"]
            told += [f"{1000 * s:.0f}" for s in (median, plan.seconds)]
            what = [peak, plan.peak, plan.step_as_you_go, len(plan.units), len(plan.couplings)]
            cuts = " ".join(plan.blocks[:-1])
            writer.writerow([entry.name, len(plan.blocks), *told, *what, cuts, *extra.values()])
            off.append(abs(plan.seconds / median - 1))
            print(f"{entry.name:45} K={len(plan.blocks):2} {told[0]}x (predicted {told[1]}x) {mib(peak)}", flush=True)
    print(
        f"predicted seconds are off by {100 * max(off):.1f}% at most, {100 * statistics.median(off):.1f}% in the median"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
