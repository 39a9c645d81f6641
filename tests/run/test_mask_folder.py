"""A folder of images with masks: what is read, and each input that is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny import noise, write_masks

from localgrad.core.errors import RunError
from localgrad.run import data as datasets


def test_images_and_masks_are_cropped_alike(tmp_path: Path) -> None:
    write_masks(tmp_path)
    for path in (tmp_path / "images/val").iterdir():  # The image shows its own mask, and is wider than high.
        mask = np.kron(RNG.integers(0, 3, (5, 9)), np.ones((8, 8))).astype(np.uint8)
        Image.fromarray(np.repeat(mask[:, :, None] * 80, 3, 2)).save(path)
        Image.fromarray(mask).save(tmp_path / "masks/val" / f"{path.stem}.png")
    data = datasets.load("mask-folder", data_dir=str(tmp_path), image_size=40)
    assert data.info.classes == 3
    assert data.names == ("sky", "earth", "sea")
    assert (data.info.size, data.info.pad) == (40, 5)
    assert isinstance(data.test, datasets.Images)
    assert data.test.images.shape == (2, 3, 40, 40)
    assert torch.equal(data.test.images[:, 0], data.test.labels * 80)
    assert len(data.train) == 4
    assert len(datasets.load("mask-folder", data_dir=str(tmp_path), image_size=40, only_test=True).train) == 0
    small = datasets.load("mask-folder", data_dir=str(tmp_path), image_size=20)
    assert isinstance(small.test, datasets.Images)
    assert set(small.test.labels.unique().tolist()) <= {0, 1, 2}  # Masks are not blended.


RNG = np.random.default_rng(0)


def spoil(folder: Path, what: str) -> None:
    mask, image = folder / "masks/train/0.png", folder / "images/train/0.png"
    match what:
        case "size":
            Image.fromarray(noise(20, 24)).save(mask)
        case "class":
            Image.fromarray(np.full((24, 24), 3, np.uint8)).save(mask)
        case "colours":
            Image.fromarray(noise(24, 24, 3)).save(mask)
        case "turned":
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 3
            Image.open(image).save(image, exif=exif)
        case "missing":
            mask.unlink()
        case "empty":
            [path.unlink() for path in (folder / "images/val").iterdir()]
        case "one":
            (folder / "classes.txt").write_text("sky\n")
        case "twice":
            (folder / "classes.txt").write_text("sky\nsea\nsky\n")
        case "no names":
            (folder / "classes.txt").unlink()
        case "damaged":
            image.write_bytes(image.read_bytes()[:60])


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("size", "masks/train/0.png is 24x20 pixels, but its image is 24x24: give each image a mask of its own size"),
        (
            "class",
            "masks/train/0.png has the value 3, but classes.txt names the classes 0 to 2, and 255 is",
        ),
        (
            "colours",
            "masks/train/0.png has pixels of mode RGB, but one byte a pixel is wanted",
        ),
        ("turned", "images/train/0.png is turned or mirrored by its EXIF data, and its mask may not be: turn"),
        ("missing", "images/train/0.png has no mask: "),
        ("empty", "images/val holds no image: what is read ends in .jpg"),
        ("one", "must name 2 to 255 classes, one a line and no two alike, and has 1 names"),
        ("twice", "must name 2 to 255 classes, one a line and no two alike, and has 3 names"),
        ("no names", "does not hold all of images/train, images/val, masks/train, masks/val, classes.txt: name"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    what: str, sentence: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    spoil(write_masks(tmp_path / "set"), what)
    out = tmp_path / "out"
    words = ("--data", "mask-folder", "--data-dir", tmp_path / "set", "--image-size", 24, "--batch-size", 2)
    assert sentence in fails("train", *words, "--out", out).replace("\\", "/")
    assert not out.exists()


def test_a_damaged_image_is_a_failure_of_the_run(tmp_path: Path) -> None:
    spoil(write_masks(tmp_path), "damaged")
    with pytest.raises(RunError, match=r"images/train/0.png is not a readable image"):
        datasets.load("mask-folder", data_dir=str(tmp_path), image_size=24)
