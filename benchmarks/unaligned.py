"""Heads that keep position, on images whose contents do not lie in the same place.

    pip install elpv-dataset
    python benchmarks/unaligned.py

Four blocks of ResNet-32, cut evenly, beside backpropagation, in the setting of `fashion_small` unless said otherwise:

- `aligned`: Fashion-MNIST, 20,000 images, as it is.
- `shifted`: the same images, each by up to 8 pixels from the middle of a 44x44 canvas, in the training and in the test
  set. The shift of an image depends on its index alone.
- `digits`: scikit-learn's digits, 20 epochs.
- `cells`: the ELPV photos of solar cells at 96x96 pixels, 20 epochs: whether a cell is more likely defective than not.
  Every fourth photo is for the test.

Writes results/unaligned.csv, one row for each run as soon as it is finished. A run that has a row is not trained again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from loop import run_missing, train
from torch import Tensor
from torch.nn import functional as F

from localgrad.run import data as data_room
from localgrad.run.augment import draws
from localgrad.run.data import Data, Images
from localgrad.run.recipe import Recipe, override
from localgrad.run.recipes import named_recipe

KEY = ("data", "method", "head", "blocks", "seed")
REACH = 8  # pixels by which an image is shifted at most
CANVAS = 28 + 2 * REACH
# The changes of `fashion_small` for each row: those of the method.
ROWS: tuple[dict[str, str], ...] = (
    {"method": "bp"},
    {"blocks": "4", "coupling": "none", "head": "1c2f"},
    {"blocks": "4", "coupling": "none", "head": "1c1f@4"},
    {"blocks": "4", "coupling": "none", "head": "1c2f@4"},
    {"blocks": "4", "coupling": "man", "head": "1c2f"},
    {"blocks": "4", "coupling": "man", "head": "1c1f@4"},
)


@dataclass(frozen=True)
class Settings:
    """Train the runs that the table lacks. Ctrl-C stops them, and the same command continues."""

    data: str = "shifted,digits,cells,aligned"
    seeds: str = "0,1,2"
    out: Path = Path("results/unaligned.csv")
    jobs: int = 2


def shifted(images: Tensor) -> Tensor:
    """Puts images [N, C, 28, 28] on a black canvas, each of them elsewhere: [N, C, 44, 44]."""
    wide = F.pad(images, (REACH,) * 4)
    shifts = (draws(0, 0, np.arange(len(images)), 2) % np.uint64(2 * REACH + 1)).astype(int) - REACH
    moved = [image.roll((int(down), int(right)), (1, 2)) for image, (down, right) in zip(wide, shifts, strict=True)]
    return torch.stack(moved)


def fashion(seed: int, *, move: bool) -> Data:
    data = data_room.load("fashion-mnist", limit_train=20000, seed=seed)
    if not move:
        return data
    splits = {}
    for name in ("train", "test"):
        split = getattr(data, name)
        splits[name] = replace(split, images=shifted(split.images))
    mean, std = data.info.mean[0], data.info.std[0]
    share = (28 / CANVAS) ** 2  # The canvas is black around the image.
    spread = (share * (std**2 + mean**2) - (share * mean) ** 2) ** 0.5
    return replace(data, info=replace(data.info, size=CANVAS, mean=(share * mean,), std=(spread,)), **splits)


def cells() -> Data:
    from elpv_dataset.utils import load_dataset  # pyright: ignore[reportMissingImports]

    photos, likely, _ = load_dataset()
    images = F.interpolate(torch.from_numpy(np.asarray(photos))[:, None].float(), size=96, mode="area").byte()
    labels = (torch.from_numpy(np.array(likely, float)) > 0.5).long()
    test = torch.arange(len(labels)) % 4 == 0
    train = images[~test].float() / 255
    info = replace(data_room.DATASETS["fashion-mnist"], name="cells", classes=2, size=96, pad=4,
                   mean=(float(train.mean()),), std=(float(train.std()),))  # fmt: skip
    return Data(info, Images(images[~test], labels[~test]), Images(images[test], labels[test]))


def trained(name: str, recipe: Recipe) -> dict[str, Any]:
    if name == "digits":
        return train(recipe, data_room.load("digits", seed=recipe.seed))
    return train(recipe, cells() if name == "cells" else fashion(recipe.seed, move=name == "shifted"))


def main(settings: Settings) -> None:
    runs = {}
    for seed in map(int, settings.seeds.split(",")):
        for name in settings.data.split(","):
            for row in ROWS:
                recipe = override(named_recipe("fashion_small"), {"seed": seed, **row})
                if name in ("digits", "cells"):
                    recipe = replace(recipe, epochs=20, lr=0.05, batch_size=64)
                key = (name, recipe.label, recipe.head, 1 if recipe.method == "bp" else 4, seed)
                runs[key] = partial(trained, name, recipe)
    run_missing(settings.out, KEY, runs, settings.jobs)


if __name__ == "__main__":
    main(tyro.cli(Settings))
