"""The data set `fashion-scenes`: garments of Fashion-MNIST that overlap on textures, with masks, boxes and labels.

A scene is a function of the garments, a seed and a number, so it is the same in each process and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localgrad.run.augment import SCENE, draws

SIZE = 96  # The side of a scene in pixels.
SIDES = (24, 56)  # The smallest and the largest side of a garment in a scene.
COUNTS = (3, 6)  # The fewest and the most garments of a scene.
CLOTH = 24  # A pixel of a garment is brighter than this; the rest of its picture is black.
SEEN = 0.1  # A garment has a box if so much of it is visible.
TRAIN, TEST = 2000, 500  # The scenes of each split.
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Scene:
    """A scene of N garments that are visible.

    Attributes:
        image: uint8 [3, 96, 96].
        mask: The class of each pixel, uint8 [96, 96]: 0 is the background, and k + 1 is class k of Fashion-MNIST.
        boxes: The smallest boxes around the visible pixels of each garment, int64 [N, 4]: left, top, right and bottom
            in pixels, of which right and bottom are the first ones beyond the garment, as torchvision counts them.
        labels: The class of each box, int64 [N], from 1 to 10 as in the mask.
    """

    image: Tensor
    mask: Tensor
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scenes:
    """A split of the data set, whose scenes are drawn when they are first asked for.

    Attributes:
        garments: The pictures of a split of Fashion-MNIST, uint8 [M, 28, 28].
        classes: Their classes, uint8 [M].
        seed: The seed of the split.
        indices: The numbers of its scenes, int64 [N].
    """

    garments: Bytes
    classes: Bytes
    seed: int
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: NDArray[np.int64]) -> Scenes:
        """The scenes at these indices, in their order."""
        return Scenes(self.garments, self.classes, self.seed, self.indices[indices])

    @property
    def images(self) -> Tensor:
        """uint8 [N, 3, 96, 96]."""
        return self._drawn[0]

    @property
    def labels(self) -> Tensor:
        """The masks, uint8 [N, 96, 96]."""
        return self._drawn[1]

    @property
    def objects(self) -> dict[str, Tensor]:
        """What a detector is to find: "boxes", float32 [N, 6, 4] in pixels, and their "labels", int64 [N, 6].

        The rows behind the last garment of a scene are zeros with the label -1.
        """
        return self._drawn[2]

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        images = torch.empty(len(self), 3, SIZE, SIZE, dtype=torch.uint8)
        masks = torch.empty(len(self), SIZE, SIZE, dtype=torch.uint8)
        boxes = torch.zeros(len(self), COUNTS[1], 4)
        labels = torch.full((len(self), COUNTS[1]), -1)
        for i, index in enumerate(self.indices):
            drawn = scene(self.garments, self.classes, self.seed, int(index))
            images[i], masks[i] = drawn.image, drawn.mask
            count = len(drawn.labels)
            boxes[i, :count], labels[i, :count] = drawn.boxes.float(), drawn.labels
        return images, masks, {"boxes": boxes, "labels": labels}


def scene(garments: Bytes, classes: Bytes, seed: int, index: int) -> Scene:
    """Draws a scene: 3 to 6 garments, tinted, at places and sizes that are drawn, each over those before it.

    The background is cloth: crops of garments, blown up and tinted. A quarter of a garment may lie outside.

    Args:
        garments: The pictures to take garments from, uint8 [M, 28, 28].
        classes: Their classes, 0 to 9, [M].
        seed: It determines the scene, together with the index.
        index: The number of the scene.
    """
    from scipy.ndimage import binary_fill_holes

    words = iter(draws(seed, 0, np.array([index]), 9 + 7 * COUNTS[1], SCENE)[0].tolist())

    def draw(low: int, high: int) -> int:
        """A whole number from low to high."""
        return low + next(words) % (high - low + 1)

    image = _texture(garments, draw)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    owner = np.zeros((SIZE, SIZE), np.int64)  # The number of the garment that each pixel shows, from 1.
    whole, labels = [0], [0]  # The pixels and the class of each garment; 0 is the background.
    for number in range(1, 1 + draw(*COUNTS)):
        which, side, tint = draw(0, len(garments) - 1), draw(*SIDES), [draw(96, 255) for _ in range(3)]
        left, top = (draw(-(side // 4), SIZE - side + side // 4) for _ in range(2))
        rows, columns = (slice(max(0, a), min(SIZE, a + side)) for a in (top, left))
        inside = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        cloth = _resized(garments[which], side)[inside]
        shape: Any = binary_fill_holes(cloth > CLOTH)
        shade = 0.25 + 0.75 * cloth[shape, None] / 255  # Black cloth stays visible.
        image[rows, columns][shape] = shade * tint
        mask[rows, columns][shape] = classes[which] + 1
        owner[rows, columns][shape] = number
        whole.append(int(shape.sum()))
        labels.append(int(classes[which]) + 1)
    found = [(box, labels[n]) for n in range(1, len(whole)) if (box := _box(owner == n, SEEN * whole[n]))]
    return Scene(
        torch.from_numpy(image.round().astype(np.uint8).transpose(2, 0, 1).copy()),
        torch.from_numpy(mask),
        torch.tensor([box for box, _ in found], dtype=torch.int64).reshape(-1, 4),
        torch.tensor([label for _, label in found], dtype=torch.int64),
    )


def split_of(garments: Bytes, classes: Bytes, *, test: bool, empty: bool = False) -> Scenes:
    """The training or test split. They have different seeds, and are made of different garments if these differ."""
    return Scenes(garments, classes, int(test), np.arange(0 if empty else TEST if test else TRAIN))


def _texture(garments: Bytes, draw: Any) -> NDArray[np.float64]:
    """Cloth of two garments in two colours: one crop blown up to the whole scene, and one repeated as a pattern."""
    coarse, fine = (garments[draw(0, len(garments) - 1)][8:20, 8:20] for _ in range(2))
    fine = np.block([[fine, fine[:, ::-1]], [fine[::-1], fine[::-1, ::-1]]])  # Mirrored, so that the edges meet.
    light = 0.6 * _resized(coarse, SIZE) + 0.4 * np.tile(fine, (4, 4))
    dark, bright = (np.array([draw(0, 255) for _ in range(3)], np.float64) for _ in range(2))
    return dark + (bright - dark) * light[:, :, None] / 255


def _resized(picture: Bytes, side: int) -> NDArray[np.float64]:
    from PIL import Image

    bilinear = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize((side, side), bilinear), np.float64)


def _box(visible: NDArray[np.bool_], least: float) -> tuple[int, int, int, int] | None:
    """The box around the visible pixels of a garment, or None if there are fewer than `least` of them, or none."""
    if not visible.any() or visible.sum() < least:
        return None
    rows, columns = (np.flatnonzero(visible.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
