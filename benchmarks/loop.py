"""A training loop in this process, for benchmarks whose step or data `localgrad train` does not have."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from common import Table
from torch import Tensor

import localgrad as lg
from localgrad.core.model import LocalModel
from localgrad.run import data as data_room
from localgrad.run.build import build_model, machine_for, optimizer_of
from localgrad.run.evaluation import evaluate, to_device
from localgrad.run.folder import environment
from localgrad.run.recipe import Recipe
from localgrad.run.step import rate

Step = Callable[[LocalModel, Tensor, Tensor, torch.dtype | None], object]


def local_step(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> None:
    lg.local_backward(model, x, y, autocast=autocast)


def train(recipe: Recipe, data: data_room.Data, step: Step = local_step) -> dict[str, Any]:
    """Trains a recipe's model, and returns its test error, the peak of its third step and the seconds of training.

    Args:
        recipe: The recipe. Its data set is not read.
        data: The data to train on and to test with.
        step: Adds the gradients of a batch. By default those of `local_backward`.
    """
    torch.set_num_threads(1)
    machine = machine_for(recipe)
    model = build_model(recipe, data, machine)
    optimizer = optimizer_of(recipe)(lg.param_groups(model, weight_decay=recipe.weight_decay))
    total = data_room.steps_per_epoch(data, recipe.batch_size) * recipe.epochs
    began, done, peak = time.perf_counter(), 0, 0

    def whole(x: Tensor, y: Tensor) -> None:
        step(model, x, y, machine.autocast)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(recipe.epochs):
        for batch in data_room.train_batches(data, batch_size=recipe.batch_size, seed=recipe.seed, epoch=epoch):
            x, y = to_device(batch, data.info, machine)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate(done, total, recipe.warmup)
            if done == 2:
                peak = lg.measure_peak(lambda x=x, y=y: whole(x, y)).total
            else:
                whole(x, y)
            done += 1
    seconds = time.perf_counter() - began
    error = 100 - evaluate(model.backbone, data, recipe, machine)["eval_top1"]
    return {"error": f"{error:.2f}", "peak_bytes": peak, "seconds": f"{seconds:.0f}"}


def run_missing(
    out: Path, key: Sequence[str], runs: Mapping[tuple[object, ...], Callable[[], dict[str, Any]]], jobs: int
) -> None:
    """Runs what a table lacks, `jobs` at a time, and adds a row as soon as each is finished.

    Args:
        out: The CSV file.
        key: The columns that name a run.
        runs: For the values of these columns, a function that can be pickled and returns the other columns.
        jobs: The number of processes.
    """
    table = Table(out, key, same=environment() | {"threads": 1})
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = {pool.submit(run): name for name, run in runs.items() if name not in table}
        for finished in as_completed(names):
            row = dict(zip(key, names[finished], strict=True)) | finished.result()
            table.add(row)
            print(row, flush=True)
