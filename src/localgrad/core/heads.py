"""Heads: layers that turn a boundary into logits, an image or a similarity feature.

Each function takes the boundary that the head reads and returns an `nn.Sequential`, which names layers by position.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from localgrad.core.boundary import Boundary
from localgrad.core.errors import UserError, unknown

if TYPE_CHECKING:
    from localgrad.core.task import Task

# Heads that `--head` names, with the numbers of their convolutions and linear layers.
CONVOLUTIONAL = {"0c1f": (0, 1), "1c1f": (1, 1), "1c2f": (1, 2), "1c3f": (1, 3), "2c2f": (2, 2)}
HEADS = ("dgl", *CONVOLUTIONAL)


def classifier(head: str, boundary: Boundary, task: Task, *, width: int, hidden: int = 128) -> nn.Sequential:
    """Makes a classifier by its name: [B, *boundary.shape] -> [B, classes].

    `1c2f@4` is `1c2f`, but it pools to 4x4 before its linear layers. It has 16 weights for each channel there, so that
    positions get gradients that differ. Of tokens it reads the grid, not the class token.

    Args:
        head: One of `HEADS`, alone or with @ and the side of the pooled map. Default side: 1, as published.
        boundary: The input of the classifier.
        task: The task, which builds the last layer.
        width: The most channels of a convolution: those of the backbone's last unit.
        hidden: The features of hidden linear layers. Default: 128.

    Raises:
        UserError: No head has this name, or the side is no number from 1 on.
    """
    if (own := of_task(boundary, task)) is not None:
        return own
    name, at, number = head.partition("@")
    if at and not re.fullmatch(r"[1-9]\d*", number):
        raise UserError(f"head takes the side of a pooled map behind @, as in 1c2f@4, not '{head}'")
    side = int(number) if at else None
    if name == "dgl":
        return dgl_classifier(boundary, task, side=side)
    if name not in CONVOLUTIONAL:
        raise unknown("head", name, HEADS)
    return convolutional(boundary, task.output, *CONVOLUTIONAL[name], width=width, hidden=hidden, side=side)


def of_task(boundary: Boundary, task: Task) -> nn.Sequential | None:
    """The whole head that the task makes for a boundary, whatever the method, or None if it makes none."""
    make = getattr(task, "head", None)
    made = make and make(boundary)
    return None if made is None else nn.Sequential(made)


def convolutional(
    boundary: Boundary,
    output,
    convolutions: int,
    linears: int,
    *,
    width: int,
    hidden: int = 128,
    side: int | None = None,
) -> nn.Sequential:
    """`convolutions` x (3x3, norm, ReLU), pool, `linears` layers: [B, *boundary.shape] -> [B, outputs].

    Each convolution doubles the channels up to `width`, but never reduces them. It has a stride of 2 while the map is
    larger than 8. `output(features)` builds the last layer. Sources: `0c1f` is greedy learning (Belilovsky et al.,
    ICML 2019), `1c2f` with 128 hidden features is InfoPro's CIFAR auxiliary (ICLR 2021, appendix).
    """
    layers, boundary = boundary.summary(grid=side is not None)
    layers += boundary.to_map()
    channels, size = boundary.channels, boundary.size
    for _ in range(convolutions):
        out, stride = max(channels, min(2 * channels, width)), 2 if max(size) > 8 else 1
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels, size = out, (-(-size[0] // stride), -(-size[1] // stride))
    pooled, features = _pooled(channels, size, side)
    layers += pooled
    for _ in range(linears - 1):
        layers += [nn.Linear(features, hidden), nn.ReLU()]
        features = hidden
    return nn.Sequential(*layers, output(features))


def dense(boundary: Boundary, shape: tuple[int, ...]) -> nn.Sequential:
    """One layer for each position: [B, *boundary.shape] -> [B, *shape].

    For a map it is a 1x1 convolution, whose output is resized, as in InfoPro's segmentation (ICLR 2021). For a map of
    one row it is such a convolution, too, which keeps the length. For tokens it is a layer norm and a linear layer.

    Args:
        boundary: The input of the head.
        shape: [C, H, W] or [C, D, H, W] for a map, [C, L] for one row, or [L, C] for tokens.

    Raises:
        UserError: The boundary has no such positions.
    """
    if len(shape) == 2:
        if boundary.layout == "NLC" and boundary.shape[0] == shape[0]:
            return nn.Sequential(nn.LayerNorm(boundary.channels), nn.Linear(boundary.channels, shape[1]))
        if boundary.layout == "NCL" and boundary.shape[1] == shape[1] != shape[0]:
            return nn.Sequential(nn.Conv1d(boundary.channels, shape[0], 1))
    elif boundary.layout == "NCDHW" and len(shape) == 4:
        return nn.Sequential(nn.Conv3d(boundary.channels, shape[0], 1), nn.Upsample(shape[1:], mode="trilinear"))
    elif boundary.layout != "NCDHW" and len(shape) == 3:
        resized = [] if boundary.size == shape[1:] else [nn.Upsample(shape[1:], mode="bilinear")]
        return nn.Sequential(*boundary.to_map(), nn.Conv2d(boundary.channels, shape[0], 1), *resized)
    raise UserError(
        f"the network gives {shape} for a sample, and a head cannot make that of {boundary.shape}: train it in one "
        "block, by lg.bp(), or pass a task of your own"
    )


def dgl_classifier(
    boundary: Boundary, task: Task, *, channels: int = 128, hidden: int = 512, side: int | None = None
) -> nn.Sequential:
    """Pool to at most 8x8, 3 x (1x1 convolution, norm, ReLU), pool, 3 x (linear, norm, ReLU), linear.

    [B, *boundary.shape] -> [B, classes]. Source: DGL (Belilovsky et al., ICML 2020), the "MLP-SR" auxiliary.
    """
    layers, boundary = boundary.summary(grid=side is not None)
    layers += [*boundary.to_map(), *_pool_to(8, boundary.size)]
    before = boundary.channels
    for _ in range(3):
        layers += [nn.Conv2d(before, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    pooled, before = _pooled(channels, (min(8, boundary.size[0]), min(8, boundary.size[1])), side)
    layers += pooled
    for _ in range(3):
        layers += [nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        before = hidden
    return nn.Sequential(*layers, task.output(before))


def predsim_classifier(boundary: Boundary, task: Task, *, limit: int = 4096) -> nn.Sequential:
    """Pool until at most `limit` features are left, then one linear layer: [B, *boundary.shape] -> [B, classes].

    Source: PredSim (ICML 2019), appendix.
    """
    layers, boundary = boundary.summary()
    side = max(boundary.size)
    while side > 1 and boundary.channels * side**2 > limit:
        side = (side + 1) // 2
    height, width = (min(side, s) for s in boundary.size)
    features = boundary.channels * height * width
    layers += [*boundary.to_map(), *_pool_to(side, boundary.size)]
    return nn.Sequential(*layers, nn.Flatten(), task.output(features))


def similarity(boundary: Boundary) -> nn.Sequential:
    """One 3x3 convolution, whose output has the boundary's own shape and goes to similarity matching (ICML 2019).

    It has no bias, because the standard deviation over the map would cancel it.
    """
    return nn.Sequential(*boundary.to_map(), nn.Conv2d(boundary.channels, boundary.channels, 3, padding=1, bias=False))


def imagenet_classifier(boundary: Boundary, task: Task) -> nn.Sequential:
    """1x1 to a quarter of the channels, 3x3/2 to 256, 3x3/2 to 512, 1x1 to 2048, pool, linear.

    [B, *boundary.shape] -> [B, classes]. Source: InfoPro (ICLR 2021), ImageNet auxiliary.
    """
    layers, boundary = boundary.summary()
    layers, before = [*layers, *boundary.to_map()], boundary.channels
    for channels, kernel, stride in ((max(1, before // 4), 1, 1), (256, 3, 2), (512, 3, 2), (2048, 1, 1)):
        convolution = nn.Conv2d(before, channels, kernel, stride, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), task.output(before))


def imagenet_decoder(boundary: Boundary, image: tuple[int, int, int]) -> nn.Sequential:
    """1x1 to 128, then bilinear steps that double the map up to the image's size, each with a 3x3 convolution.

    The last convolutions have 32, 12 and the image's channels. The output is logits of the image:
    [B, *boundary.shape] -> [B, *image]. Source: InfoPro (ICLR 2021), ImageNet auxiliary. The published code takes three
    steps from maps of 28x28.
    """
    channels, *full = image
    size, sizes = boundary.size, []
    while size[0] < full[0] or size[1] < full[1]:
        size = (min(2 * size[0], full[0]), min(2 * size[1], full[1]))
        sizes.append(size)
    sizes = sizes or [size]
    widths = [*[128] * (len(sizes) - 3), 32, 12, channels][-len(sizes) :]
    layers = [*boundary.to_map(), nn.Conv2d(boundary.channels, 128, 1), nn.BatchNorm2d(128), nn.ReLU()]
    before = 128
    for step, out in zip(sizes, widths, strict=True):
        layers += [nn.Upsample(step, mode="bilinear", align_corners=True), nn.Conv2d(before, out, 3, padding=1)]
        layers += [nn.BatchNorm2d(out), nn.ReLU()]
        before = out
    return nn.Sequential(*layers[:-2])


def feature_decoder(boundary: Boundary, entering: Boundary) -> nn.Sequential:
    """Layer norm, linear to a quarter of the width, GELU, linear: [B, L, width] -> the features that entered the block.

    Linear layers start small (Glorot's uniform distribution times 0.1, no bias). Source: LoPT (arXiv 2605.04913).

    Args:
        boundary: The input of the head.
        entering: What is to be rebuilt.

    Raises:
        UserError: These are not as many tokens.
    """
    if (boundary.layout, entering.layout) != ("NLC", "NLC") or boundary.shape[0] != entering.shape[0]:
        raise UserError(
            f"lopt rebuilds tokens of tokens, and {entering.shape} enters a block that {boundary.shape} leaves: take "
            "another method, or other cuts"
        )
    width = max(1, boundary.channels // 4)
    first, last = nn.Linear(boundary.channels, width), nn.Linear(width, entering.channels)
    for layer in (first, last):
        nn.init.xavier_uniform_(layer.weight, gain=0.1)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.LayerNorm(boundary.channels), first, nn.GELU(), last)


def _pooled(channels: int, size: tuple[int, int], side: int | None) -> tuple[list[nn.Module], int]:
    """The layers that pool a map to at most side x side (default: 1) and flatten it, and the number of features."""
    side = side or 1
    features = channels * min(side, size[0]) * min(side, size[1])
    return [*_pool_to(side, size), nn.Flatten()], features


def _pool_to(side: int, size: tuple[int, int]) -> list[nn.Module]:
    """Average pooling to at most side x side.

    It is not adaptive where the sizes divide, because adaptive pooling is slower and not deterministic on CUDA.
    """
    target = tuple(min(side, s) for s in size)
    if target == size:
        return []
    if all(s % t == 0 for s, t in zip(size, target, strict=True)):
        return [nn.AvgPool2d((size[0] // target[0], size[1] // target[1]))]
    return [nn.AdaptiveAvgPool2d(target)]
