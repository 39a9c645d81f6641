"""Small runs and small data, with which most tests of this folder begin."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localgrad.run.recipe import Recipe

# resnet8, which conftest.py makes known, has four units of the CIFAR ResNets: stem, layer1.0, layer2.0 and layer3.0.
TINY = Recipe(model="resnet8", limit_train=64, batch_size=16, epochs=1, precision="float32", head="1c2f", lr=0.02)
QUICK = ["--model", "resnet8", "--limit-train", "64", "--batch-size", "16", "--epochs", "1", "--precision", "float32"]
BP: dict[str, Any] = {"method": "bp", "coupling": "none", "blocks": "1", "head": "auto"}
Pixels = NDArray[np.uint8]
RNG = np.random.default_rng(0)


def tiny(**changes: Any) -> Recipe:
    """A recipe of four steps in an epoch, each of which takes some hundredths of a second."""
    return dataclasses.replace(TINY, **changes)


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_photos(folder: Path, counts: Mapping[str, int], classes: Iterable[str] = "ab", size: int = 24) -> Path:
    """An image folder of noise, with so many images of each class in each split."""
    for split, count in counts.items():
        for k, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(noise(size, size, 3, seed=100 * k + i)).save(folder / split / name / f"{i}.png")
    return folder


def write_tree(folder: Path, classes: Sequence[str] = ("ant", "bee", "cat"), per_class: int = 5) -> Path:
    """An image folder of noise, whose images differ in size and are JPEG and PNG by turns."""
    for split, (k, kind) in itertools.product(("train", "val"), enumerate(classes)):
        path = folder / split / kind
        path.mkdir(parents=True)
        for i in range(per_class):
            image = Image.fromarray(RNG.integers(0, 256, (40 + 3 * i, 50 - 4 * k, 3), dtype=np.uint8))
            image.save(path / (f"{i}.jpg" if i % 2 else f"{i}.png"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and of those in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def write_masks(folder: Path, names: Sequence[str] = ("sky", "earth", "sea"), size: int = 24) -> Path:
    """A folder of noise with masks: four images to train on and two to test."""
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(size, size, 3, seed=i)).save(folder / "images" / split / f"{i}.png")
            Image.fromarray(noise(size, size, seed=i) % len(names)).save(folder / "masks" / split / f"{i}.png")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return folder
