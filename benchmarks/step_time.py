"""Time of one training step of the recipe `fashion_small`, method by method, against BP.

    python benchmarks/step_time.py --out results/time_fashion_small.csv

All rows in one process, in turn, so that a noisy machine is as noisy for each; median of `repeats` after two warm-ups.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from localgrad.run import data as data_room
from localgrad.run.arguments import Compare
from localgrad.run.build import build_model, machine_for
from localgrad.run.compare import grid
from localgrad.run.modes import Alone
from localgrad.run.recipe import Recipe
from localgrad.run.recipes import RECIPES
from localgrad.run.runlog import environment, mib
from localgrad.run.step import Stepper
from localgrad.run.tables import label_of, write_csv
from localgrad.run.train import to_device
from localgrad.scale.replicas import Ranks

FIRST = "/".join(f"layer1.{i}" for i in range(5))
SECOND = "/".join(f"layer2.{i}" for i in range(5))
SMALL = "fashion_small"
ROWS = (
    Compare("bp,dgl,dgl+man,dgl+man++,dgl+deep-man", "4,16", recipe=SMALL),
    Compare("dgl+deep-man", "layer1.0/layer1.2/layer1.4,16", vary=("branches=learnable",), recipe=SMALL),
    Compare("dgl+deep-man", "layer2.0,layer2.0/layer3.1/layer3.3",
            vary=("branches=learnable", "recompute=layer1.0/layer1.1"), recipe=SMALL),
    Compare("dgl+deep-man", "layer3.1/layer3.2/layer3.3",
            vary=("branches=learnable", f"recompute={FIRST}"), recipe=SMALL),
    Compare("bp", vary=(f"recompute={FIRST},{FIRST}/{SECOND},all",), recipe=SMALL),  # the rival
)  # fmt: skip
WARM_UP = 2  # of which the second runs under the memory meter


@dataclass(frozen=True)
class Settings:
    """Time one step for each row."""

    repeats: int = 7
    out: Path = Path("results/time_fashion_small.csv")


def stepper_of(recipe: Recipe, data: data_room.Data) -> Stepper:
    machine = machine_for(recipe)
    return Stepper(recipe, Alone(build_model(recipe, data, machine), Ranks()), machine, total=1000)


def main(settings: Settings) -> None:
    small = RECIPES["fashion_small"]()
    cells = [cell for compare in ROWS for cell in grid(compare)]
    data = data_room.load(small.data, limit_train=small.limit_train)
    steppers = [stepper_of(cell.recipe, data) for cell in cells]
    stream = data_room.train_batches(data, batch_size=small.batch_size, seed=0, epoch=0)
    seconds: list[list[float]] = [[] for _ in cells]
    for batch in islice(stream, WARM_UP + settings.repeats):
        for times, stepper in zip(seconds, steppers, strict=True):
            ready = to_device(batch, data.info, stepper.machine)
            start = time.perf_counter()
            stepper(iter([ready]))
            times.append(time.perf_counter() - start)
    medians = [statistics.median(times[WARM_UP:]) for times in seconds]
    env, rows = environment(), []
    for cell, median, stepper in zip(cells, medians, steppers, strict=True):
        row = {"method": cell.method, "blocks": cell.blocks, "setting": cell.setting}
        row |= {"times_bp": f"{median / medians[0]:.2f}", "milliseconds": f"{1000 * median:.0f}"}
        row |= {"peak_bytes": stepper.peak.total, "repeats": settings.repeats}
        print(f"{label_of(row)}: {row['times_bp']} times BP, {row['milliseconds']} ms, {mib(stepper.peak.total)}")
        rows.append(row | {"precision": stepper.machine.precision} | env)
    write_csv(settings.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
