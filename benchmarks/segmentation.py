"""Segmentation on `fashion-scenes`: mIoU, peak memory and time of local methods, beside BP that recomputes.

    python benchmarks/segmentation.py

Trains two networks of `pixel_networks.py`, an FCN and a U-Net, in 1, 2 and 4 blocks. Writes
results/accuracy_fashion_scenes_runs.csv, one row for each run as soon as it is finished, in which the error is 100 -
mIoU; results/accuracy_fashion_scenes.csv, the means over seeds; and results/accuracy_fashion_scenes_pairs.csv, the
differences paired by seed. A run that has a row is not trained again.

At the end it times a step of each row, all rows of a network in turn, and writes results/segmentation_times.csv. There
each local row has an exact one beside it: BP, planned for the peak of the local row. Its mIoU is that of BP. The row
says what would do if no exact plan fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import WARM_UP, Table, medians_in_turn
from step_time import stepper_of, timer

from localgrad.core.sizes import mib
from localgrad.run import data as data_room
from localgrad.run.build import planner_for
from localgrad.run.commands import planned_fields
from localgrad.run.compare import Cell, run_all
from localgrad.run.folder import environment
from localgrad.run.recipe import Recipe, override
from localgrad.run.tables import SAME, paired, read_runs, row_of, show, summarize, write_csv
from localgrad.scale.plan import Planner

RUNS = "accuracy_fashion_scenes_runs.csv"
BASE = Recipe(
    data="fashion-scenes", limit_train=1600, batch_size=32, epochs=10, lr=0.1, warmup=0.1, method="dgl", coupling="none"
)
METHODS = ("dgl", "dgl+man", "dgl+man++", "infopro+man")
# The cuts of each network. The maps of the first units are the largest, so early blocks have few units. Behind down.3
# three skips of the U-Net cross.
CUTS = {"fcn": ("units.1", "units.0,units.1,units.3"), "unet": ("down.3", "down.0,down.3,up.1")}


@dataclass(frozen=True)
class Settings:
    """Train the runs that the table lacks. Ctrl-C stops them, and the same command continues."""

    networks: tuple[str, ...] = tuple(CUTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    results: Path = Path("results")
    out: Path = Path("runs/segmentation")
    jobs: int = 2
    repeats: int = 7
    """Rounds of the timing; with 0 nothing is timed."""


def cell(network: str, label: str, blocks: str, seed: int) -> Cell:
    """A run. `label` names the method and its coupling, and `blocks` the cuts, or is 1."""
    method, _, coupling = label.partition("+")
    model = f"benchmarks.pixel_networks:{network}"
    changes = {"method": method, "coupling": coupling or "none", "blocks": blocks, "model": model, "seed": seed}
    varied = {"model": network} | ({} if blocks == "1" else {"blocks": blocks})
    return Cell(label, blocks.count(",") + (1 if blocks == "1" else 2), override(BASE, changes), varied)


def cells(network: str, seed: int) -> Iterator[Cell]:
    """All runs of a network with a seed, BP first."""
    yield cell(network, "bp", "1", seed)
    for cuts in CUTS[network]:
        for label in METHODS:
            yield cell(network, label, cuts, seed)


def exact(planner: Planner, bp: Recipe, peak: int) -> tuple[Recipe | None, str]:
    """BP's recipe for a step that takes no more than `peak` bytes, or None and the bytes of the least exact plan."""
    plan = planner.within(peak, 1, several=False, as_you_go=False)
    if plan is None:
        least = min(p.peak for p in (planner.checkpointing, *planner.frontier(blocks=1, as_you_go=False)))
        return None, f"none fits, the least is {mib(least)}"
    return override(bp, planned_fields(bp, plan)), ""


def time_steps(settings: Settings, network: str) -> None:
    """Times one step of each row of a network, and of an exact plan within the peak of each local row."""
    rounds = WARM_UP + settings.repeats
    data = data_room.load(BASE.data, limit_train=BASE.batch_size * rounds)
    batches = list(data_room.train_batches(data, batch_size=BASE.batch_size, seed=0, epoch=0))
    rows = list(cells(network, 0))
    steppers = [stepper_of(one.recipe, data) for one in rows]
    for stepper in steppers:
        run = timer(stepper, data, batches)
        _ = run(), run()  # The second step measures the memory.
    bp = steppers[0].peak.total
    planner = planner_for(rows[0].recipe, steppers[0].machine)
    plans = [exact(planner, rows[0].recipe, s.peak.total) for s in steppers if s.peak.total < bp]
    exacts = [recipe and stepper_of(recipe, data) for recipe, _ in plans]
    timers = [timer(stepper, data, batches) for stepper in (*steppers, *filter(None, exacts))]
    medians = iter(medians_in_turn(timers, settings.repeats))
    ms = {id(stepper): f"{1000 * next(medians):.0f}" for stepper in (*steppers, *filter(None, exacts))}
    table = Table(settings.results / "segmentation_times.csv", ("network", "method", "blocks"))
    beside = iter(zip(exacts, plans, strict=True))
    for one, stepper in zip(rows, steppers, strict=True):
        row = {"network": network, "method": one.method, "blocks": one.blocks, "peak_bytes": stepper.peak.total}
        row |= {"milliseconds": ms[id(stepper)]}
        found, why = None, "as BP"
        if stepper.peak.total < bp:
            found, (_, why) = next(beside)
        row |= {
            "exact_peak_bytes": found.peak.total if found else why,
            "exact_milliseconds": ms[id(found)] if found else "",
        }
        table.add(row | {"repeats": settings.repeats, "precision": stepper.machine.precision, **environment()})


def main(settings: Settings) -> None:
    runs = settings.results / RUNS

    def add(one: Cell) -> None:
        row = row_of(settings.out / one.name, one.method, one.blocks, one.setting, one.recipe.seed)
        Table(runs, (*SAME, "seed")).add(row)

    there = Table(runs, (*SAME, "seed"))
    wanted = [c for seed in settings.seeds for network in settings.networks for c in cells(network, seed)]
    lacking = [c for c in wanted if (c.method, c.blocks, c.setting, c.recipe.seed) not in there]
    settings.out.mkdir(parents=True, exist_ok=True)
    failed = run_all(lacking, settings.out, settings.jobs, done=add)
    means, pairs = summarize(read_runs(runs)), paired(read_runs(runs))
    write_csv(settings.results / "accuracy_fashion_scenes.csv", means)
    write_csv(settings.results / "accuracy_fashion_scenes_pairs.csv", pairs)
    show(means, pairs)
    for network in settings.networks if settings.repeats else ():
        time_steps(settings, network)
    if failed:
        raise SystemExit(f"these runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
