"""Time of one training step of the recipe `fashion_small`, method by method, against BP.

    python benchmarks/step.py --out results/time_fashion_small.csv

All rows in one process, in turn, so that a noisy machine is as noisy for each; median of `repeats` after two warm-ups.
"""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from localgrad.run import data as data_room
from localgrad.run.build import build_model, machine_for
from localgrad.run.recipe import Recipe, override
from localgrad.run.recipes import RECIPES
from localgrad.run.runlog import environment
from localgrad.run.step import Stepper
from localgrad.run.train import to_device

ROWS = [("bp", "none", "1"), *(("dgl", c, k) for k in ("4", "16") for c in ("none", "man", "man++", "deep-man"))]
WARM_UP = 2


@dataclass(frozen=True)
class Settings:
    """Time one step for each row."""

    repeats: int = 7
    out: Path = Path("results/time_fashion_small.csv")


def stepper_of(recipe: Recipe, data: data_room.Data) -> Stepper:
    machine = machine_for(recipe)
    stepper = Stepper(recipe, build_model(recipe, data, machine), machine, total=1000)
    stepper.measured = -1  # no step runs under the memory meter, which would slow it
    return stepper


def main(settings: Settings) -> None:
    small = RECIPES["fashion_small"]()
    recipes = [override(small, {"method": m, "coupling": c, "blocks": k}) for m, c, k in ROWS]
    data = data_room.load(small.data, limit_train=small.limit_train)
    steppers = [stepper_of(recipe, data) for recipe in recipes]
    stream = data_room.train_batches(data, batch_size=small.batch_size, seed=0, epoch=0)
    seconds: list[list[float]] = [[] for _ in ROWS]
    for batch in islice(stream, WARM_UP + settings.repeats):
        for times, stepper in zip(seconds, steppers, strict=True):
            ready = to_device(batch, data.info, stepper.machine)
            start = time.perf_counter()
            stepper(iter([ready]))
            times.append(time.perf_counter() - start)
    medians = [statistics.median(times[WARM_UP:]) for times in seconds]
    env = environment()
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with settings.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "blocks", "times_bp", "milliseconds", "repeats", "precision", *env])
        for recipe, median, stepper in zip(recipes, medians, steppers, strict=True):
            ratio, milliseconds = f"{median / medians[0]:.2f}", f"{1000 * median:.0f}"
            row = [recipe.label, recipe.blocks, ratio, milliseconds, settings.repeats, stepper.machine.precision]
            writer.writerow([*row, *env.values()])
            print(f"{recipe.label:13} {recipe.blocks:>2} blocks: {ratio} times BP, {milliseconds} ms")


if __name__ == "__main__":
    main(tyro.cli(Settings))
