"""Who trains which blocks of a pipeline: the blocks' seconds, and how they are dealt out to ranks."""

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

REPEATS = 3  # timed passes, after a warm-up


def shares_of(seconds: Sequence[float], ranks: int, ends: Sequence[float] = ()) -> tuple[int, ...]:
    """How many blocks each rank trains, so that the slowest rank is as fast as can be. seconds: of each block. ends:
    what each block takes more as the last one of its rank, but for the last of all.

    >>> shares_of([3, 1, 1, 1], 2)
    (1, 3)
    """
    n = len(seconds)
    if not 1 <= ranks <= n:
        raise UserError(f"{n} blocks cannot be dealt out to {ranks} ranks: take as many blocks, or more")
    until = np.concatenate([[0.0], np.cumsum(seconds)])
    # Seconds of a rank with blocks i to j - 1, of which there is one or more.
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
    """How long each block takes for a batch, median of a few passes, which leave the model and PyTorch's random
    generator as they were."""
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
