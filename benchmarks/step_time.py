"""Time of one training step of the recipe `fashion_small` with each method, compared with BP.

    python benchmarks/step_time.py

All rows run in one process and take turns. Each time is the median of `repeats` rounds after two warm-up rounds. Writes
results/time_fashion_small.csv, one row for each method, number of blocks and setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from common import WARM_UP, Table, medians_in_turn, seconds_of
from torch import Tensor

from localgrad.core.sizes import mib
from localgrad.run import data as data_room
from localgrad.run.arguments import Compare
from localgrad.run.build import build_model, machine_for
from localgrad.run.compare import grid
from localgrad.run.folder import environment
from localgrad.run.modes import Alone
from localgrad.run.recipe import Recipe
from localgrad.run.recipes import RECIPES
from localgrad.run.step import Stepper
from localgrad.run.tables import label_of
from localgrad.run.train import to_device
from localgrad.scale.groups import Ranks

SMALL = "fashion_small"
FIRST = "/".join(f"layer1.{i}" for i in range(5))
SECOND = "/".join(f"layer2.{i}" for i in range(5))
ROWS = (
    Compare("bp,dgl,dgl+man,dgl+man++,dgl+deep-man", "4,16", recipe=SMALL),
    Compare("dgl", "layer1.3,layer1.1/layer1.3/layer2.2,4,16", vary=("head=1c1f@4",), recipe=SMALL),
    Compare("dgl", "layer1.3,layer1.1/layer1.3/layer2.2", recipe=SMALL),
    Compare("dgl+deep-man", "layer1.0/layer1.2/layer1.4,16", vary=("branches=learnable",), recipe=SMALL),
    Compare("dgl+deep-man", "layer2.0,layer2.0/layer3.1/layer3.3",
            vary=("branches=learnable", "recompute=layer1.0/layer1.1"), recipe=SMALL),
    Compare("dgl+deep-man", "layer3.1/layer3.2/layer3.3",
            vary=("branches=learnable", f"recompute={FIRST}"), recipe=SMALL),
    # The local methods have to beat BP that recomputes.
    Compare("bp", vary=(f"recompute={FIRST},{FIRST}/{SECOND},all",), recipe=SMALL),
    *(Compare("bp", vary=(f"batch_size={128 // n}", f"accumulate={n}"), recipe=SMALL) for n in (2, 4)),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Time one step for each row."""

    repeats: int = 7
    out: Path = Path("results/time_fashion_small.csv")


def stepper_of(recipe: Recipe, data: data_room.Data) -> Stepper:
    machine = machine_for(recipe)
    return Stepper(recipe, Alone(build_model(recipe, data, machine), Ranks()), machine, total=1000)


def timer(stepper: Stepper, data: data_room.Data, batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], float]:
    """A function that trains on the next batch and returns the seconds of the step. The second step is slower, because
    the stepper measures its memory, but it belongs to the warm-up."""
    left = iter(batches)

    def run() -> float:
        x, y = to_device(next(left), data.info, stepper.machine)
        parts = stepper.recipe.accumulate
        return seconds_of(lambda: stepper(zip(x.chunk(parts), y.chunk(parts), strict=True)))

    return run


def main(settings: Settings) -> None:
    small = RECIPES[SMALL]()
    cells = [cell for compare in ROWS for cell in grid(compare)]
    data = data_room.load(small.data, limit_train=small.limit_train)
    stream = data_room.train_batches(data, batch_size=small.batch_size, seed=0, epoch=0)
    batches = list(islice(stream, WARM_UP + settings.repeats))
    steppers = [stepper_of(cell.recipe, data) for cell in cells]
    medians = medians_in_turn([timer(stepper, data, batches) for stepper in steppers], settings.repeats)
    table = Table(settings.out, same={"precision": steppers[0].machine.precision, **environment()})
    for cell, median, stepper in zip(cells, medians, steppers, strict=True):
        row = {"method": cell.method, "blocks": cell.blocks, "setting": cell.setting}
        row |= {"times_bp": f"{median / medians[0]:.2f}", "milliseconds": f"{1000 * median:.0f}"}
        row |= {"peak_bytes": stepper.peak.total, "repeats": settings.repeats}
        table.add(row)
        print(f"{label_of(row)}: {row['times_bp']} times BP, {row['milliseconds']} ms, {mib(stepper.peak.total)}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
