"""Time and memory of one training step, plans of localgrad beside the best that PyTorch alone offers.

    python benchmarks/frontier.py
    python benchmarks/frontier.py --precision bf16
    python benchmarks/frontier.py --model timm:convnext_tiny --size 224 --batch-size 32 --repeats 5
    python benchmarks/frontier.py --model timm:vit_small_patch16_224 --size 224 --batch-size 32 --repeats 5

Random images. All rows run in one process and take turns. Each time is the median of `repeats` rounds after two
warm-up rounds. The planner's prediction stands beside each measurement. Freed memory stays with the process
(`keep_freed_memory`). This favours BP: otherwise the system would map its gigabyte anew in each step. Writes
results/frontier_MODEL_PRECISION.csv, one row for each plan and each rival (`rivals.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from common import Table, keep_freed_memory, medians_in_turn, seconds_of
from rivals import rivals
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.sizes import mib
from localgrad.run.folder import environment
from localgrad.scale.memory import optimizers_for, training_step
from localgrad.scale.plan import Plan, Planner
from localgrad.scale.speed import Speed, calibrate

SHARES = {"half of BP's": 0.5, "checkpointing's": 1.0, "0.65 of checkpointing's": 0.65, "half of checkpointing's": 0.5,
          "0.4 of checkpointing's": 0.4}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Measure each row of the frontier."""

    model: str = "resnet110"
    batch_size: int = 128
    size: int = 32
    """Height and width of an image."""
    precision: Literal["float32", "bf16"] = "float32"
    repeats: int = 7
    cuts: bool = True
    """Whether cuts of other kinds than the fastest are measured too: even, balanced, and one unit a block."""
    allocator: Literal["keep", "system"] = "keep"
    """Whether freed memory stays with the process, or goes back whenever the system's allocator returns it."""
    out: Path = Path("results")

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def file(self) -> Path:
        tail = "" if self.allocator == "keep" else "_system_allocator"
        return self.out / f"frontier_{self.model.rpartition(':')[2]}_{self.precision}{tail}.csv"


@dataclass(frozen=True, eq=False)
class Way:
    """A method with a coupling, and the planner of both."""

    method: lg.Method
    coupling: lg.MAN | None
    planner: Planner


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table: a plan with the way that it belongs to, or none, and a training step."""

    name: str
    step: Callable[[], object]
    plan: Plan | None = None


def network(settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    backbone = lg.build(settings.model, classes=10)
    return backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def plans(settings: Settings, x: Tensor, speed: Speed) -> Iterator[tuple[str, Way, Plan]]:
    """The name of each row that follows a plan, its way and its plan. The first is BP."""

    def way(method: lg.Method, coupling: lg.MAN | None) -> Way:
        how: dict[str, Any] = {"method": method, "coupling": coupling, "autocast": settings.autocast, "speed": speed}
        return Way(method, coupling, Planner(network(settings), x, accumulate="never", **how))

    exact, dgl = way(lg.bp(), None), way(lg.dgl("1c2f"), None)
    man, deep = way(lg.dgl("1c2f"), lg.MAN()), way(lg.dgl("0c1f"), lg.DeepMAN())
    bp, units = exact.planner.exactly(exact.planner.bp), len(exact.planner.costs.names)
    checkpointing = exact.planner.exactly(exact.planner.checkpointing)
    yield "BP", exact, bp
    yield "exact, unit by unit", exact, checkpointing
    for where, share in SHARES.items():
        budget = int(share * (bp if where.endswith("BP's") else checkpointing).peak)
        for name, one in (("exact", exact), ("DGL", dgl), ("MAN", man), ("deep MAN", deep)):
            plan = one.planner.within(budget, 1 if one is exact else None, several=one is not exact, as_you_go=True)
            if plan is None:
                print(f"{name}, in {where} memory: nothing fits", flush=True)
            else:
                yield f"{name}, in {where} memory", one, plan
    for k in (k for k in (4, 8, 16) if k < units and settings.cuts):
        for name, one in (("MAN", man), ("deep MAN", deep)):
            yield f"{name}, K={k}, even", one, one.planner.even(k)
        if k < 16:
            yield f"MAN, K={k}, balanced", man, man.planner.balanced(k)
    if settings.cuts:
        yield f"MAN, K={units}", man, man.planner.even(units)


def ready(name: str, way: Way, plan: Plan, settings: Settings, x: Tensor, y: Tensor) -> Row:
    """A row with the exact peak that is predicted for its plan, and its training step."""
    blocks = list(plan.blocks) if way.method.terms else 1
    coupling = way.coupling if len(plan.blocks) > 1 else None
    model = lg.localize(network(settings), blocks=blocks, method=way.method, coupling=coupling, example=x)
    plan.apply(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
    groups, as_you_go = lg.param_groups(model, weight_decay=1e-4), plan.step_as_you_go
    optimizers = optimizers_for(groups, sgd, as_you_go=as_you_go)
    step = partial(training_step, model, optimizers, x, y, step_as_you_go=as_you_go, autocast=settings.autocast)
    return Row(name, step, plan if plan.exact else way.planner.exactly(plan))


def main(settings: Settings) -> None:
    if settings.allocator == "keep":
        keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(settings.batch_size, 3, settings.size, settings.size).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (settings.batch_size,))
    speed = calibrate(network(settings), x, autocast=settings.autocast)
    print(f"calibrated: {speed}", flush=True)
    rows = [ready(*found, settings, x, y) for found in plans(settings, x, speed)]
    rows += [Row(name, step) for name, step in rivals(partial(network, settings), x, y, settings.autocast)]
    print(f"{len(rows)} rows", flush=True)
    medians = medians_in_turn([partial(seconds_of, row.step) for row in rows], settings.repeats)
    same = {"batch_size": settings.batch_size, "precision": settings.precision, "allocator": settings.allocator}
    table = Table(settings.file, same={**same, "size": settings.size, "repeats": settings.repeats, **environment()})
    off, bp = [], rows[0].plan
    assert bp is not None
    for row, median in zip(rows, medians, strict=True):
        peak = lg.measure_peak(row.step).total
        found = {"row": row.name, "blocks": "", "times_bp": f"{median / medians[0]:.3f}", "predicted_times_bp": ""}
        found |= {"milliseconds": f"{1000 * median:.0f}", "predicted_milliseconds": "", "peak_bytes": peak}
        if (plan := row.plan) is not None:
            found |= {
                "blocks": len(plan.blocks), "predicted_times_bp": f"{plan.seconds / bp.seconds:.3f}",
                "predicted_milliseconds": f"{1000 * plan.seconds:.0f}", "predicted_peak_bytes": plan.peak,
                "as_you_go": plan.step_as_you_go, "units": " ".join(plan.units),
                "couplings_recomputed": len(plan.couplings), "cuts": " ".join(plan.blocks[:-1]),
            }  # fmt: skip
            off.append(100 * abs(plan.seconds / median - 1))
        table.add(found)
        predicted = found["predicted_times_bp"] or "-"
        print(f"{row.name:45} {found['times_bp']}x (predicted {predicted}x) {mib(peak)}", flush=True)
    print(f"predicted seconds are off by {max(off):.1f}% at most, {statistics.median(off):.1f}% in the median")


if __name__ == "__main__":
    main(tyro.cli(Settings))
