"""Divides the blocks of a pipeline among ranks by the seconds that they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from localgrad.core.engine import block_steps
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel, localized

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


def block_seconds(model: LocalModel, x: Tensor, y: Tensor, *, autocast: torch.dtype | None = None) -> list[float]:
    """Measures the seconds that each block takes for a batch: the median of a few passes.

    The model and PyTorch's random generator are left as they were.

    Args:
        model: The result of `localize`.
        x: Normalised inputs, [B, C, H, W].
        y: Targets, [B].
        autocast: The dtype of each block's forward pass. Default: the model's own.
    """
    model = localized(model, "block_seconds")
    devices = [x.device] if x.device.type == "cuda" else []
    kept = [b.clone() for b in model.buffers()]
    passes: list[list[float]] = []

    with torch.random.fork_rng(devices):
        for _ in range(1 + REPEATS):
            passes.append([time.perf_counter()])
            for done in block_steps(model, x, y, autocast=autocast):
                for parameter in model.members(done.block):
                    parameter.grad = None
                if devices:
                    torch.cuda.synchronize(x.device)
                passes[-1].append(time.perf_counter())
    for buffer, old in zip(model.buffers(), kept, strict=True):
        buffer.copy_(old)
    spent = [[b - a for a, b in pairwise(times)] for times in passes[1:]]
    return [statistics.median(times) for times in zip(*spent, strict=True)]
