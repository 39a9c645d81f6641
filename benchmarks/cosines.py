"""How far local gradients point where backpropagation's do, over training and depth, on the recipe `fashion_small`.

    python benchmarks/cosines.py

After each epoch, and before the first, four steps compare the gradient of each block with the gradient of the last
block's loss in the same batch and the same weights: the cosine of both over all parameters of the block, and the norm
of the first over the norm of the second. The true gradient changes nothing. The last block's gradient is the true one.

Writes results/cosines_fashion_small.csv, a row for each block of each epoch. A run that has rows is not trained again.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from loop import local_step, run_missing, train
from torch import Tensor

from localgrad.core.boundary import full_precision
from localgrad.core.engine import autocasting
from localgrad.core.model import LocalModel
from localgrad.run import data as data_room
from localgrad.run.recipe import Recipe, override
from localgrad.run.recipes import named_recipe

KEY = ("blocks", "coupling", "head", "seed")
BATCHES = 4  # The steps that are compared at each moment.
ROWS: tuple[dict[str, str], ...] = (
    {"coupling": "none", "head": "1c1f@4"},
    {"coupling": "none", "head": "1c2f"},
    {"coupling": "man", "head": "1c2f"},
    {"coupling": "deep-man", "head": "0c1f"},
)


@dataclass(frozen=True)
class Settings:
    """Train the runs that the table lacks. Ctrl-C stops them, and the same command continues them."""

    blocks: str = "4,16"
    """Numbers of blocks, of even cuts."""
    seeds: str = "0"
    out: Path = Path("results/cosines_fashion_small.csv")
    jobs: int = 2


def true_gradients(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> list[list[Tensor]]:
    """The gradients of the network's own loss for the parameters of each block. The buffers stay as they are."""
    parameters = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    before = [buffer.clone() for buffer in model.buffers()]
    with autocasting(x, autocast):
        output = model.backbone(x)
    loss = model.task.criterion(full_precision(output), y)
    found = iter(torch.autograd.grad(loss, [p for block in parameters for p in block]))
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return [[next(found) for _ in block] for block in parameters]


def compared(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> list[tuple[float, float]]:
    """For each block the cosine of the gradients in `.grad` with the true ones, and the ratio of their norms."""
    found = []
    for block, gradients in zip(model.blocks, true_gradients(model, x, y, autocast), strict=True):
        local = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
        true = torch.cat([g.flatten() for g in gradients])
        found.append((float(local @ true / (local.norm() * true.norm())), float(local.norm() / true.norm())))
    return found


class Compared:
    """A local step that compares gradients at the beginning of each epoch, and in the last steps of training.

    Attributes:
        found: The results of `compared` for each epoch from 0, the number of epochs before it.
    """

    def __init__(self, steps: int, epochs: int) -> None:
        self.steps, self.epochs, self.taken = steps, epochs, 0
        self.found: defaultdict[int, list[list[tuple[float, float]]]] = defaultdict(list)

    def __call__(self, model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> None:
        local_step(model, x, y, autocast)
        epoch, step = divmod(self.taken, self.steps)
        if step < BATCHES:
            self.found[epoch].append(compared(model, x, y, autocast))
        elif self.taken >= self.steps * self.epochs - BATCHES:
            self.found[self.epochs].append(compared(model, x, y, autocast))
        self.taken += 1


def trained(recipe: Recipe) -> list[dict[str, Any]]:
    """Trains a recipe. A row for each block at each moment: the means over the compared steps."""
    data = data_room.load(recipe.data, limit_train=recipe.limit_train, seed=recipe.seed)
    step = Compared(data_room.steps_per_epoch(data, recipe.batch_size), recipe.epochs)
    error = train(recipe, data, step)["error"]
    return [
        {"epoch": epoch, "block": k, "cosine": f"{statistics.fmean(c for c, _ in block):.3f}",
         "norms": f"{statistics.fmean(n for _, n in block):.3g}", "error": error}
        for epoch, steps in step.found.items() for k, block in enumerate(zip(*steps, strict=True))
    ]  # fmt: skip


def main(settings: Settings) -> None:
    runs = {}
    for seed in settings.seeds.split(","):
        for blocks in settings.blocks.split(","):
            for row in ROWS:
                recipe = override(named_recipe("fashion_small"), {"blocks": blocks, "seed": int(seed), **row})
                runs[blocks, row["coupling"], row["head"], seed] = partial(trained, recipe)
    run_missing(settings.out, KEY, runs, settings.jobs)


if __name__ == "__main__":
    main(tyro.cli(Settings))
