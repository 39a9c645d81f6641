"""A training loop in this process, for benchmarks whose step or data `localgrad train` does not have."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from common import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.engine import autocasting
from localgrad.core.model import LocalModel
from localgrad.run import data as data_room
from localgrad.run.build import Machine, build_model, machine_for, optimizer_of
from localgrad.run.evaluation import evaluate, to_device
from localgrad.run.folder import environment
from localgrad.run.recipe import Recipe
from localgrad.run.step import rate

Step = Callable[[LocalModel, Tensor, Tensor, torch.dtype | None], object]
Groups = Callable[[LocalModel, Recipe], list[dict[str, Any]]]


def local_step(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> None:
    lg.local_backward(model, x, y, autocast=autocast)


def all_alike(model: LocalModel, recipe: Recipe) -> list[dict[str, Any]]:
    return lg.param_groups(model, weight_decay=recipe.weight_decay)


def train(
    recipe: Recipe,
    data: data_room.Data,
    step: Step = local_step,
    groups: Groups = all_alike,
    *,
    every_epoch: bool = False,
) -> dict[str, Any]:
    """Trains a recipe's model, and returns how good it is, the peak of its third step, the median time of the steps
    after it, and the seconds of training.

    Args:
        recipe: The recipe. Its data set is not read.
        data: The data to train on and to test with.
        step: Adds the gradients of a batch. By default those of `local_backward`.
        groups: Makes the groups of parameters for the optimizer. Their rates follow the schedule of the recipe. By
            default all have the rate of the recipe.
        every_epoch: Whether to return the test errors after all epochs, too, as `errors` in a row of text. The seconds
            then have those of testing in them.
    """
    torch.set_num_threads(1)
    machine = machine_for(recipe)
    model = build_model(recipe, data, machine)
    model.accumulate = recipe.accumulate
    optimizer = optimizer_of(recipe)(groups(model, recipe))
    rates = [group["lr"] for group in optimizer.param_groups]
    size = recipe.batch_size * recipe.accumulate
    total = data_room.steps_per_epoch(data, size) * recipe.epochs
    began, times, errors, peak = time.perf_counter(), [], [], 0

    def whole(x: Tensor, y: Tensor) -> None:
        step(model, x, y, machine.autocast)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(recipe.epochs):
        for batch in data_room.train_batches(data, batch_size=size, seed=recipe.seed, epoch=epoch):
            x, y = to_device(batch, data.info, machine)
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * rate(len(times), total, recipe.warmup)
            before = time.perf_counter()
            if len(times) == 2:
                peak = lg.measure_peak(lambda x=x, y=y: whole(x, y)).total
            else:
                whole(x, y)
            times.append(time.perf_counter() - before)
        if every_epoch:
            errors.append(f"{100 - evaluate(model.backbone, data, recipe, machine)['eval_top1']:.2f}")
    seconds = time.perf_counter() - began
    return {
        **tested(model.backbone, data, recipe, machine), "peak_bytes": peak,
        "time_of_step_ms": f"{1000 * statistics.median(times[3:] or times):.1f}", "seconds": f"{seconds:.0f}",
        **({"errors": " ".join(errors)} if every_epoch else {}),
    }  # fmt: skip


@torch.no_grad()
def tested(network: nn.Module, data: data_room.Data, recipe: Recipe, machine: Machine) -> dict[str, str]:
    """The test error in percent, and the area under the ROC curve: with two classes that of the second one, with more
    the mean over the classes, each against the others. The network is left in evaluation mode."""
    network.eval()
    shares, labels = [], []
    for batch in data_room.eval_batches(data, batch_size=max(recipe.batch_size, 256)):
        x, y = to_device(batch, data.info, machine)
        with autocasting(x, machine.autocast):
            logits = network(x)
        shares.append(logits.double().softmax(1))
        labels.append(y)
    share, label = torch.cat(shares).cpu(), torch.cat(labels).cpu()
    error = 100 * (share.argmax(1) != label).double().mean().item()
    area = roc_auc_score(label, share[:, 1] if share.shape[1] == 2 else share, multi_class="ovr")
    return {"error": f"{error:.2f}", "auc": f"{area:.4f}"}


def run_missing(
    out: Path,
    key: Sequence[str],
    runs: Mapping[tuple[object, ...], Callable[[], dict[str, Any] | list[dict[str, Any]]]],
    jobs: int,
    *,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Runs what a table lacks, `jobs` at a time, and adds the row or rows of each as soon as it is finished.

    Args:
        out: The CSV file.
        key: The columns that name a run.
        runs: For the values of these columns, a function that can be pickled and returns the other columns: of its row,
            or a list of those of its rows.
        jobs: The number of processes.
        done: Called after the rows of each run.
    """
    table = Table(out, key, same=environment() | {"threads": 1})
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = {pool.submit(run): name for name, run in runs.items() if name not in table}
        for finished in as_completed(names):
            name, found = dict(zip(key, names[finished], strict=True)), finished.result()
            rows = [name | row for row in (found if isinstance(found, list) else [found])]
            table.add(*rows)
            print(*rows, sep="\n", flush=True)
            done()
