"""The time to an accuracy over slow links: test error against wall seconds, for pipelines of local blocks and of BP.

    python benchmarks/race.py

Two processes of one thread each train ResNet-32 in the setting of `fashion_small`, over links on which each message is
0, 10 or 100 ms late. What is learned does not depend on the link (see `race_ways.py`). So this benchmark has three
parts, and the wall time of an epoch is its number of steps times the seconds of a step:

- `steps` times a step of all ways in turn, on two processes, once their pipelines are full. It needs an idle machine,
  and times all ways of a link anew if one of them has no row. It writes results/race_steps.csv.
- `curves` trains each way in one process, and tests it after each epoch: first all ways for 6 epochs, seed by seed, and
  then each way for the 9 or 12 epochs that it has time for while the slowest way of a link takes its 6. Pipelines of
  BP are trained with the micro-batches that are best at some link, and as long as there are no times with all numbers
  of them. It writes results/race_curves.csv, one row for each run as soon as it is finished.

- `rates` trains PipeDream-2BW's rule with several rates and warm-ups, with the first seed, because the recipe's own are
  too quick for gradients of older weights. It writes results/race_rates.csv. All other ways have those of the recipe.

A run that has a row is not trained again, so the same command goes on where it stopped. Writes results/race.csv, what
follows from both, after each row: the mean and the deviation of the error over the seeds, for each link, way and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from common import Table, medians_in_turn
from loop import run_missing
from race_tables import EPOCHS, RACE, chosen, epochs_in_time, joined, learned_as
from race_ways import Bench, all_learned, learn, timed
from two_processes import on_two_processes, timer

from localgrad.run.folder import environment
from localgrad.run.recipes import named_recipe
from localgrad.run.tables import read_csv, write_csv

STEPS, CURVES, RATES = "race_steps.csv", "race_curves.csv", "race_rates.csv"
WAY = ("way", "blocks", "micro_batches")


@dataclass(frozen=True)
class Settings:
    """Time and train what the tables lack. Ctrl-C stops it, and the same command continues it."""

    parts: str = "steps,rates,curves"
    recipe: str = "fashion_small"
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (0.1, 0.05, 0.025)
    warmups: tuple[float, ...] = (0.05, 0.2)
    links: tuple[int, ...] = (0, 10, 100)
    """Milliseconds by which messages are late."""
    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 3
    steps: int = 30
    """Timed steps of a repeat. On slow links steps come in bursts, so there must be many of them."""
    jobs: int = 2
    """Runs at a time; timing always takes two processes."""
    results: Path = Path("results")

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a table, none if it is not there."""
        path = self.results / name
        return read_csv(path) if path.exists() else []


def time_steps(rank: int, settings: Settings) -> None:
    """Times all ways at the links of these settings. Runs in each of the two processes, and the first one writes."""
    bench = Bench(rank, named_recipe(settings.recipe))
    ways = [bench.way(*name) for name in timed(settings.micro_batches)]
    same = {"repeats": settings.repeats, "steps": settings.steps, "precision": bench.machine.precision}
    table = Table(settings.results / STEPS, ("link_ms", *WAY), same={**same, **environment()})
    for link in settings.links:
        medians = medians_in_turn([timer(way, rank, settings.steps, link) for way in ways], settings.repeats, warm_up=1)
        rows: list[dict[str, Any]] = [
            {"link_ms": link, **dict(zip(WAY, (way.name, way.blocks, way.micro_batches), strict=True)), "cut": way.cut,
             "processes": way.processes, "step_seconds": f"{seconds:.4f}"}
            for way, seconds in zip(ways, medians, strict=True)
        ]  # fmt: skip
        if rank == 0:
            table.add(*rows)
            for row in rows:
                print(*(f"{name}={value}" for name, value in row.items()), flush=True)


def missing_links(settings: Settings) -> tuple[int, ...]:
    """The links at which a way is not timed yet."""
    table = Table(settings.results / STEPS, ("link_ms", *WAY))
    return tuple(k for k in settings.links if any((k, *way) not in table for way in timed(settings.micro_batches)))


def runs_of(settings: Settings) -> list[tuple[Any, ...]]:
    """The runs to train, in their order: what is learned, the epochs and the seed."""
    best = chosen(settings.rows(STEPS))
    names = [(learned_as(row["way"]), int(row["blocks"]), int(row["micro_batches"])) for row in best]
    first = dict.fromkeys(names) if names else all_learned(settings.micro_batches)
    longer = {(*name, epochs_in_time(row, best)): None for name, row in zip(names, best, strict=True)}
    runs = [(*name, EPOCHS, seed) for seed in settings.seeds for name in first]
    runs += [(*run, seed) for seed in settings.seeds for run in longer]
    return list(dict.fromkeys(runs))


def summed_up(settings: Settings) -> None:
    """Writes the table that follows from the curves and the times that are there."""
    if rows := joined(settings.rows(CURVES), settings.rows(STEPS)):
        write_csv(settings.results / RACE, rows)


def main(settings: Settings) -> None:
    parts = settings.parts.split(",")
    for part in parts:
        if part not in ("steps", "rates", "curves"):
            raise SystemExit(f"the race has no part '{part}': take steps, rates, curves")
    base = replace(named_recipe(settings.recipe), epochs=EPOCHS)
    if "steps" in parts and (links := missing_links(settings)):
        on_two_processes(time_steps, replace(settings, links=links))
    if "rates" in parts:
        seed = settings.seeds[0]
        tried: dict[tuple[object, ...], Any] = {
            ("2bw", lr, warmup, seed): partial(learn, replace(base, seed=seed), "2bw", 1, 1, lr=lr, warmup=warmup)
            for lr in settings.rates
            for warmup in settings.warmups
        }
        run_missing(settings.results / RATES, ("way", "lr", "warmup", "seed"), tried, settings.jobs)
    if "curves" in parts:
        runs: dict[tuple[object, ...], Any] = {
            run: partial(learn, replace(base, epochs=run[-2], seed=run[-1]), *run[:-2]) for run in runs_of(settings)
        }
        out = settings.results / CURVES
        run_missing(out, (*WAY, "epochs", "seed"), runs, settings.jobs, done=partial(summed_up, settings))
    summed_up(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
