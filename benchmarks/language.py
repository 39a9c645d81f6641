"""Language models in blocks: bits per byte, memory and time of each head, coupling and objective, beside BP.

    python benchmarks/language.py

A GPT of 6 layers, 128 wide (`gpt.py`), learns the source of Python's standard library byte by byte, from contexts of
256, by AdamW. First, a step of each way is measured and timed in turn, and so is BP with the recomputation and the
micro-batches that the planner chooses for the same bytes. Then each way is trained with each seed for as many steps,
and BP also for as many steps as it has time for at the bytes of each way (in twentieths).

Writes results/language_steps.csv with the steps; results/language.csv, one row for each run as soon as it is finished;
and results/language_means.csv, the means over seeds, each beside BP at the same bytes and time. What has a row is not
measured or trained again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from common import Table, medians_in_turn
from gpt import GPT
from loop import run_missing
from torch import Tensor

import localgrad as lg
from localgrad.run.folder import environment
from localgrad.run.step import rate
from localgrad.run.tables import read_csv

KEY = ("method", "blocks", "steps", "seed")
VOCABULARY = 256
TESTED = 256  # contexts of the test files, which are the same for all runs
SHARES = 20  # BP at the time of another way has a multiple of this share of the steps.
ADAM = partial(torch.optim.AdamW, betas=(0.9, 0.95))
COUPLINGS: dict[str, lg.MAN] = {"man": lg.MAN(), "deep man": lg.DeepMAN()}
# Their heads: of their own; read-only copies of the embedding or of the last readout; none, or SOLO's, which also has
# two layers of its own.
WAYS = ("own", "tied", "shared", "solo", "man", "deep man", "lopt")


@dataclass(frozen=True)
class Settings:
    """Train the runs that the tables lack. Ctrl-C stops them, and the same command continues."""

    ways: tuple[str, ...] = WAYS
    blocks: tuple[int, ...] = (2, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 400
    layers: int = 6
    width: int = 128
    context: int = 256
    batch_size: int = 8
    lr: float = 2e-3
    repeats: int = 7
    """How often a step of each way is timed."""
    results: Path = Path("results")
    jobs: int = 2


def localized(settings: Settings, way: str, blocks: int, seed: int, example: Tensor) -> lg.LocalModel:
    """The GPT in blocks, or in one block with the way "bp"."""
    torch.manual_seed(seed)
    network = GPT(VOCABULARY, settings.context, settings.width, settings.layers, heads=4)
    shared = {"tied": (network.embedding.token, 1), "shared": (network.readout, 10), "solo": (network.readout, 10)}
    method = {"bp": lg.bp(), "solo": lg.auglocal(depth=2, shrink=0.0), "lopt": lg.lopt()}.get(way, lg.dgl())
    task = lg.LanguageModel(VOCABULARY, *shared.get(way, ()))
    return lg.localize(network, blocks=blocks, method=method, coupling=COUPLINGS.get(way), example=example, task=task)


def optimizer_of(settings: Settings, model: lg.LocalModel) -> torch.optim.Optimizer:
    return ADAM(lg.param_groups(model, weight_decay=0.1), lr=settings.lr)


def trained(settings: Settings, way: str, blocks: int, steps: int, seed: int) -> dict[str, Any]:
    """Trains one way, and returns bits per byte on the test files and the seconds of training."""
    torch.set_num_threads(1)
    train, test = lg.read_text("stdlib", context=settings.context)
    model = localized(settings, way, blocks, seed, train.batch(range(settings.batch_size))[0])
    optimizer = optimizer_of(settings, model)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(step, steps, 0.1)
        size = settings.batch_size
        lg.local_backward(model, *train.batch(range(step * size, (step + 1) * size), seed=seed))
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    return {"bits": f"{tested(model, test, settings.batch_size):.4f}", "seconds": f"{seconds:.0f}"}


@torch.no_grad()
def tested(model: lg.LocalModel, test: lg.Text, batch_size: int) -> float:
    """Bits per byte of the backbone on `TESTED` contexts."""
    task: Any = model.task
    backbone = model.backbone.eval()
    sums = {"nats": 0.0, "tokens": 0.0}
    for start in range(0, TESTED, batch_size):
        x, y = test.batch(range(start, min(TESTED, start + batch_size)))
        for name, value in task.metrics(backbone(x), y).items():
            sums[name] += float(value)
    return task.scores(sums)["bits"]


def step_of(settings: Settings, model: lg.LocalModel, x: Tensor, y: Tensor) -> tuple[Callable[[], None], int]:
    """A step of a model, and its peak bytes with everything counted."""
    optimizer = optimizer_of(settings, model)

    def step() -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    return step, lg.measure_peak(step, model=model, optimizers=[optimizer]).total


def exact(settings: Settings, x: Tensor, y: Tensor) -> Callable[[int], tuple[lg.LocalModel, str] | None]:
    """A function from bytes to BP within them and what it does for that, or None if no plan fits."""
    model = localized(settings, "bp", 1, 0, x)
    planner = lg.Planner(
        model.backbone, x, method=lg.bp(), targets=y, task=model.task, optimizer=ADAM, accumulate="any"
    )

    def within(budget: int) -> tuple[lg.LocalModel, str] | None:
        try:
            plan = planner.fastest(budget)
        except lg.UserError:
            return None
        return plan.localize(localized(settings, "bp", 1, 0, x).backbone, x), ", ".join(plan.measures)

    return within


def measure_steps(settings: Settings, ways: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Measures and times a step of each way, and of BP at the same bytes."""
    torch.set_num_threads(1)
    x, y = lg.read_text("stdlib", context=settings.context)[0].batch(range(settings.batch_size))
    within = exact(settings, x, y)
    rows: list[dict[str, Any]] = []
    steps: dict[tuple[int, str], Callable[[], None]] = {}
    for number, (way, blocks) in enumerate(ways):
        step, peak = step_of(settings, localized(settings, way, blocks, 0, x), x, y)
        steps[number, "ms"] = step
        row = {"method": way, "blocks": blocks, "peak_bytes": peak, "ms": "", "exact": "no plan fits"}
        row |= {"exact_peak_bytes": "", "exact_ms": ""}
        if found := within(peak):
            steps[number, "exact_ms"], row["exact_peak_bytes"] = step_of(settings, found[0], x, y)
            row["exact"] = found[1]
        rows.append(row)
        print(row, flush=True)

    def timer(step: Callable[[], None]) -> float:
        began = time.process_time()
        step()
        return time.process_time() - began

    medians = medians_in_turn([partial(timer, step) for step in steps.values()], settings.repeats)
    for (number, column), seconds in zip(steps, medians, strict=True):
        rows[number][column] = f"{1000 * seconds:.1f}"
    return rows


def steps_in_time(settings: Settings, row: dict[str, str]) -> int | None:
    """The steps that BP takes at the bytes of a way in the time of all steps of that way, or None if no plan fits."""
    if not row["exact_ms"]:
        return None
    part = settings.steps / SHARES
    return round(max(1, round(SHARES * float(row["ms"]) / float(row["exact_ms"]))) * part)


def means(settings: Settings, steps: list[dict[str, str]], runs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A row for each way: bits per byte over seeds, beside those of BP at the same bytes and time."""

    def bits(way: str, blocks: str, count: int | None) -> list[float]:
        wanted = (way, blocks, str(count))
        return [float(run["bits"]) for run in runs if (run["method"], run["blocks"], run["steps"]) == wanted]

    rows = []
    for row in steps:
        own, beside = bits(row["method"], row["blocks"], settings.steps), steps_in_time(settings, row)
        other = bits("bp", "1", beside)
        told = {"n": len(own), "bits_mean": _mean(own), "bits_std": _std(own), "exact_steps": beside or ""}
        rows.append({**row, **told, "exact_bits_mean": _mean(other), "exact_bits_std": _std(other)})
    return rows


def _mean(values: list[float]) -> str:
    return f"{mean(values):.4f}" if values else ""


def _std(values: list[float]) -> str:
    return f"{stdev(values):.4f}" if len(values) > 1 else ""


def main(settings: Settings) -> None:
    ways = [("bp", 1), *((way, blocks) for blocks in settings.blocks for way in settings.ways)]
    path = settings.results / "language_steps.csv"
    table = Table(path, KEY[:2], same=environment() | {"threads": 1})
    if missing := [way for way in ways if way not in table]:
        table.add(*measure_steps(settings, missing))
    steps = [row for row in read_csv(path) if (row["method"], int(row["blocks"])) in ways]
    counts = {settings.steps} | {count for row in steps if (count := steps_in_time(settings, row))}
    cells = [*((way, blocks, settings.steps) for way, blocks in ways), *(("bp", 1, c) for c in sorted(counts))]
    names = [(*cell, seed) for seed in settings.seeds for cell in dict.fromkeys(cells)]
    out = settings.results / "language.csv"
    run_missing(out, KEY, {name: partial(trained, settings, *name) for name in names}, settings.jobs)
    found = means(settings, steps, read_csv(out))
    Table(settings.results / "language_means.csv").add(*found)
    for row in found:
        print({name: row[name] for name in ("method", "blocks", "bits_mean", "exact_bits_mean")})


if __name__ == "__main__":
    main(tyro.cli(Settings))
