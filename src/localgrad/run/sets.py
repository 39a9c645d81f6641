"""What is known about the data sets before they are read: classes, images, normalisation, and the kind of targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localgrad.run.recipe import MASKS

FOLDER_SIZE = 224  # This is the usual crop of ImageNet, in pixels.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # All published recipes use this mean and standard deviation.
SCENES_MEAN, SCENES_STD = (0.5009, 0.4892, 0.4843), (0.2170, 0.2147, 0.2132)


@dataclass(frozen=True)
class DataInfo:
    """What is known about a data set before it is read.

    Attributes:
        name: Its name in `DATASETS`.
        classes: How many classes it has. A folder of the user's own has 0 until it is read.
        channels: How many channels its images have.
        size: The side of its square images in pixels.
        mean: The mean of each channel over the training images, with pixels in [0, 1].
        std: The standard deviation of each channel, likewise.
        pad: The pixels by which an image is padded before a random crop. An image folder is cropped by area instead.
        flip: Whether half of the training images are mirrored.
    """

    name: str
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    @property
    def masks(self) -> bool:
        """Whether its targets are masks, a class for each pixel, and not a class for each image."""
        return self.name in MASKS

    @property
    def files(self) -> str:
        """The name of the data set from whose files it is made."""
        return "fashion-mnist" if self.name == "fashion-scenes" else self.name

    def targets(self, count: int) -> Tensor:
        """An example of the targets of so many images: class 0, of each image or of each of its pixels."""
        return torch.zeros((count, self.size, self.size) if self.masks else count, dtype=torch.int64)

    @property
    def input(self) -> dict[str, Any]:
        """What a program must know to make an input of the network from an image."""
        return {"channels": self.channels, "size": self.size, "mean": list(self.mean), "std": list(self.std)}


DATASETS: dict[str, DataInfo] = {
    info.name: info
    for info in (
        # A digit fills most of its eight pixels, so it is shifted by one at most. Mirrored, it is no digit any more.
        DataInfo("digits", 10, 1, 8, (0.3054,), (0.3760,), pad=1, flip=False),
        DataInfo("fashion-mnist", 10, 1, 28, (0.2860,), (0.3530,), pad=2, flip=True),
        DataInfo("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True),
        DataInfo("cifar100", 100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), pad=4, flip=True),
        DataInfo("svhn", 10, 3, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), pad=2, flip=False),
        DataInfo("stl10", 10, 3, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), pad=4, flip=True),
        DataInfo("fashion-scenes", 11, 3, 96, SCENES_MEAN, SCENES_STD, pad=4, flip=True),
        DataInfo("image-folder", 0, 3, FOLDER_SIZE, *IMAGENET, pad=0, flip=True),
        DataInfo("mask-folder", 0, 3, FOLDER_SIZE, *IMAGENET, pad=FOLDER_SIZE // 8, flip=True),
    )
}


def described(info: DataInfo, names: Sequence[str]) -> dict[str, str]:
    """What the metadata of a file of weights say about its data, as JSON: `classes` lists the names in the order of the
    logits, and `input` has the channels, the side in pixels, and the mean and std of pixels in [0, 1]."""
    return {"classes": json.dumps(list(names)), "input": json.dumps(info.input)} if names else {}
