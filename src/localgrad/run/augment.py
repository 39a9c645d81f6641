"""Augmentation in which each random draw is a function of seed, epoch and index, so there is no state to save.

A sample looks the same in every batch, worker and order, and the global random generators are not used. The draws come
from SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the
constants of S. Vigna's public-domain splitmix64.c), vectorised in numpy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Each use has a stream of its own, so that the order of an epoch is independent of its crops.
AUGMENT, ORDER, SUBSET, REPLACE, MIX, SCENE = 0, 1, 2, 3, 4, 5
_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns outputs number `steps`, from 0, of the SplitMix64 streams with these seeds. The shapes broadcast."""
    # numpy warns of an overflow of scalars, but not of arrays. Here numbers are meant to overflow.
    z = np.atleast_1d(seeds) + np.uint64(_GAMMA) * (np.atleast_1d(steps) + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draws(seed: int, epoch: int, indices: NDArray[np.integer], count: int, stream: int = AUGMENT) -> NDArray[np.uint64]:
    """Returns `count` draws for each of `indices` [N], uniform over 0 .. 2**64-1: uint64 [N, count].

    Seed, stream and epoch are combined into one key. Output i of the key's stream is the seed of sample i's own stream.
    """
    key = np.array([seed & _MASK], np.uint64)
    for word in (stream, epoch):
        key = splitmix64(key, np.array([word & _MASK], np.uint64))
    own = splitmix64(key, np.asarray(indices).astype(np.uint64))
    return splitmix64(own[:, None], np.arange(count, dtype=np.uint64)[None])


def permutation(size: int, seed: int, epoch: int, stream: int = ORDER) -> NDArray[np.int64]:
    """Returns a random order of 0 .. size-1, int64 [size].

    numpy's Generator.permutation is not used, because its results may change between versions.
    """
    return np.argsort(draws(seed, epoch, np.arange(size), 1, stream)[:, 0], kind="stable")


def crop_flip(images: Tensor, indices: NDArray[np.int64], *, pad: int, flip: bool, seed: int, epoch: int) -> Tensor:
    """Returns the samples `indices` [B] of images uint8 [N, C, H, W], augmented: uint8 [B, C, H, W].

    Each sample is padded by reflection, by `pad` pixels (fewer than H and W), and cropped at random to its old size.
    With `flip`, half of them are mirrored.
    """
    # A batch is too small to be worth several threads, so numpy is faster than torch here.
    batch = images.numpy()[indices]
    _, _, height, width = batch.shape
    # The remainder by n <= 9 is biased by at most n / 2**64, about 5e-19, which nothing could measure.
    draw = draws(seed, epoch, indices, 3)
    if pad:
        top, left = (draw[:, :2] % np.uint64(2 * pad + 1)).astype(np.int64).T
        padded = batch[:, :, _reflected(height, pad)[:, None], _reflected(width, pad)]
        # The view holds all (2*pad+1)**2 crops of each sample, and one of them is copied.
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        batch = windows[np.arange(len(batch)), :, top, left]
    if flip:
        mirrored = draw[:, 2] % np.uint64(2) == 1
        batch[mirrored] = batch[mirrored, :, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(batch))


def resized_crop_box(
    height: int, width: int, *, seed: int, epoch: int, index: int
) -> tuple[tuple[int, int, int, int], bool]:
    """Returns (top, left, height, width) of a random crop of an image, and whether to mirror it.

    The rule is that of torchvision's RandomResizedCrop.get_params, which would draw from the global generator: an area
    of 0.08 to 1 of the image, an aspect ratio of 3/4 to 4/3 (log-uniform), ten attempts, and then the largest central
    crop of an allowed ratio.
    """
    draw = draws(seed, epoch, np.array([index]), 41)[0]
    # The upper 53 bits of a draw become a float64 in [0, 1).
    area, ratio, down, right = ((draw[1:] >> np.uint64(11)) * 2.0**-53).reshape(10, 4).T
    area = height * width * (0.08 + 0.92 * area)
    ratio = np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
    rows, columns = np.rint(np.sqrt(area / ratio)).astype(int), np.rint(np.sqrt(area * ratio)).astype(int)
    fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    mirrored = bool(draw[0] % np.uint64(2) == 1)
    if fits.any():
        k = int(fits.argmax())
        h, w = int(rows[k]), int(columns[k])
        return (int(down[k] * (height - h + 1)), int(right[k] * (width - w + 1)), h, w), mirrored
    h, w = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return ((height - h) // 2, (width - w) // 2, h, w), mirrored


def _reflected(size: int, pad: int) -> NDArray[np.int64]:
    """The source index of each of the size + 2*pad padded pixels. The border pixel itself is not repeated."""
    source = np.abs(np.arange(-pad, size + pad))
    return np.where(source >= size, 2 * (size - 1) - source, source)
