"""Divides the blocks of a pipeline among ranks by the seconds that they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localgrad.core.engine import block_backward
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel, localized
from localgrad.scale.held import Held

REPEATS = 3  # The number of timed passes, after a warm-up.


def shares_of(seconds: Sequence[float], ranks: int, ends: Sequence[float] = ()) -> tuple[int, ...]:
    """Chooses how many blocks each rank trains, so that the slowest rank is as fast as possible.

    >>> shares_of([3, 1, 1, 1], 2)
    (1, 3)

    Args:
        seconds: The seconds of each block.
        ranks: The number of ranks.
        ends: The additional seconds of each block but the last if it is the last block of its rank. Default: none.

    Raises:
        UserError: There are more ranks than blocks.
    """
    n = len(seconds)
    if not 1 <= ranks <= n:
        raise UserError(f"{n} blocks cannot be dealt out to {ranks} ranks: take as many blocks, or more")
    until = np.concatenate([[0.0], np.cumsum(seconds)])
    # spent[i, j]: the seconds of a rank with blocks i to j - 1, of which there must be at least one.
    spent = until[None, :] - until[:, None] + np.array([0.0, *(ends or [0.0] * n)[: n - 1], 0.0])
    spent[np.tril_indices(n + 1)] = np.inf
    best, before = spent[0], []
    for _ in range(ranks - 1):
        slowest = np.maximum(best[:, None], spent)
        before.append(slowest.argmin(0))
        best = slowest.min(0)
    shares, j = list[int](), n
    for i in (int(came[j]) for came in reversed(before)):
        shares.append(j - i)
        j = i
    return (j, *reversed(shares))


def block_seconds(
    model: LocalModel | Held, x: Tensor, y: Tensor, *, autocast: torch.dtype | None = None
) -> list[float]:
    """Measures the seconds that each block takes for a batch: the median of a few passes.

    The model and PyTorch's random generator are left as they were.

    Args:
        model: The result of `localize`.
        x: Normalised inputs, [B, C, H, W].
        y: Targets, [B].
        autocast: The dtype of each block's forward pass. Default: the model's own.
    """
    held = model if isinstance(model, Held) else Held(localized(model, "block_seconds"))
    model = held.model
    images = model.method.images(x) if model.needs_images(range(len(model.blocks))) else None
    h, seconds = model.inputs.crossing(x), list[float]()
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        for k in range(len(model.blocks)):
            with held.lent(k):
                kept = [(b, b.clone()) for b in model.statistics(k)]
                passes = [_pass(model, k, h, y, images, autocast) for _ in range(1 + REPEATS)]
                for buffer, old in kept:
                    buffer.copy_(old)
            h = passes[-1][1]
            seconds.append(statistics.median(spent for spent, _ in passes[1:]))
    return seconds


def _pass(
    model: LocalModel, k: int, h: Any, y: Any, images: Tensor | None, autocast: torch.dtype | None
) -> tuple[float, Any]:
    """The seconds of a pass of block k, and its output."""
    began = time.perf_counter()
    done = block_backward(model, k, h, y, images=images, autocast=autocast)
    for parameter in model.members(k):
        parameter.grad = None
    if done.loss.is_cuda:
        torch.cuda.synchronize(done.loss.device)
    return time.perf_counter() - began, done.output
