"""Time and memory of one training step: BP, activation checkpointing, and plans of localgrad, in one process.

    python benchmarks/frontier.py --model resnet110 --batch-size 128 --precision float32

All rows take turns, so that a noisy machine is as noisy for each; median of `repeats` after two warm-ups. Random images
of 3x32x32. Beside what is measured stands what was predicted before.
"""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

import localgrad as lg
from localgrad.run.runlog import environment, mib
from localgrad.scale.memory import training_step
from localgrad.scale.plan import Plan, Planner
from localgrad.scale.speed import calibrate

WARM_UP = 2


@dataclass(frozen=True)
class Settings:
    """Measure each row of the frontier."""

    model: str = "resnet110"
    batch_size: int = 128
    precision: Literal["float32", "bf16"] = "float32"
    repeats: int = 7
    out: Path = Path("results")


@dataclass(frozen=True, eq=False)
class Row:
    """A way to train, ready to step."""

    name: str
    plan: Plan
    model: lg.LocalModel
    optimizers: list[torch.optim.Optimizer]

    def step(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype | None) -> None:
        training_step(self.model, self.optimizers, x, y, step_as_you_go=self.plan.step_as_you_go, autocast=dtype)


def row(name: str, backbone: nn.Module, plan: Plan, method: lg.Method, coupling: lg.MAN | None, x: torch.Tensor) -> Row:
    chosen = coupling if len(plan.blocks) > 1 else None
    model = lg.localize(backbone, blocks=list(plan.blocks), method=method, coupling=chosen, example=x)
    plan.apply(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    groups = lg.param_groups(model, weight_decay=1e-4)
    shares = [groups]
    if plan.step_as_you_go:
        shares = [[g for g in groups if g["block"] == k] for k in range(len(model.blocks))]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(g, lr=0.01, momentum=0.9, nesterov=True) for g in shares]
    return Row(name, plan, model, optimizers)


def rows(settings: Settings, x: torch.Tensor, dtype: torch.dtype | None) -> list[Row]:
    def backbone() -> nn.Module:
        torch.manual_seed(0)
        return lg.build(settings.model, classes=10).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    speed = calibrate(backbone(), x, autocast=dtype)
    print(f"calibrated: {speed.flops / 1e9:.0f} GFLOP/s, {speed.moved / 1e9:.1f} GB/s", flush=True)
    local, deep = lg.dgl("1c2f"), lg.dgl("0c1f")
    man = Planner(backbone(), x, method=local, coupling=lg.MAN(), autocast=dtype, speed=speed)
    plain = Planner(backbone(), x, method=local, autocast=dtype, speed=speed)
    deeper = Planner(backbone(), x, method=deep, coupling=lg.DeepMAN(), autocast=dtype, speed=speed)
    again, half, count = man.exactly(man.checkpointing).peak, man.bp.peak // 2, len(man.costs.names)
    wanted = [
        ("DGL, half of BP", plain, half),
        ("DGL, checkpointing's memory", plain, again),
        ("MAN, half of BP", man, half),
        ("MAN, checkpointing's memory", man, again),
        ("MAN, 0.65 of checkpointing's", man, int(0.65 * again)),
        ("MAN, half of checkpointing's", man, again // 2),
    ]
    made: list[tuple[str, Planner, Plan]] = [("BP", man, man.bp), ("checkpointing", man, man.checkpointing)]
    for name, owner, budget in wanted:
        try:
            made.append((name, owner, owner.fastest(budget)))
        except lg.UserError as error:
            print(f"{name}: {error}", flush=True)
    made += [(f"MAN, K={k}, even", man, man.even(k)) for k in (4, 8, count)]
    made += [(f"deep MAN, K={k}, even", deeper, deeper.even(k)) for k in (4, 8, 16) if k <= count]
    couplings = {plain: None, man: lg.MAN(), deeper: lg.DeepMAN()}
    return [
        row(name, backbone(), owner.exactly(plan), deep if owner is deeper else local, couplings[owner], x)
        for name, owner, plan in made
    ]


def main(settings: Settings) -> None:
    dtype = torch.bfloat16 if settings.precision == "bf16" else None
    torch.manual_seed(0)
    x = torch.randn(settings.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (settings.batch_size,))
    table = rows(settings, x, dtype)
    seconds: list[list[float]] = [[] for _ in table]
    for _ in range(WARM_UP + settings.repeats):
        for times, entry in zip(seconds, table, strict=True):
            began = time.perf_counter()
            entry.step(x, y, dtype)
            times.append(time.perf_counter() - began)
    medians = [statistics.median(times[WARM_UP:]) for times in seconds]
    env = environment()
    settings.out.mkdir(parents=True, exist_ok=True)
    place = settings.out / f"frontier_{settings.model}_{settings.precision}.csv"
    with place.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ("row", "blocks", "times_bp", "predicted_times_bp", "milliseconds", "predicted_milliseconds")
        columns += ("peak_bytes", "predicted_peak_bytes", "as_you_go", "cuts", "recomputed", "couplings_recomputed")
        writer.writerow([*columns, "batch_size", "precision", "repeats", *env])
        for entry, median in zip(table, medians, strict=True):
            peak = lg.measure_peak(lambda entry=entry: entry.step(x, y, dtype)).total
            plan, base = entry.plan, table[0].plan.seconds
            numbers = [f"{median / medians[0]:.3f}", f"{plan.seconds / base:.3f}", f"{1000 * median:.0f}"]
            cuts = " ".join(plan.blocks[:-1])
            again = [" ".join(plan.units), " ".join(map(str, plan.couplings))]
            told = [*numbers, f"{1000 * plan.seconds:.0f}", peak, plan.peak, plan.step_as_you_go, cuts, *again]
            rest = [settings.batch_size, settings.precision, settings.repeats, *env.values()]
            writer.writerow([entry.name, len(plan.blocks), *told, *rest])
            print(
                f"{entry.name:30} K={len(plan.blocks):2} {numbers[0]}x (predicted {numbers[1]}x) {mib(peak)}",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Settings))
