"""Recompute inside a block: a unit's tensors are not kept for its backward pass but made again.

Plain activation checkpointing, confined to a block, or to the branches of a coupling. Gradients, random draws and
batch-norm statistics are those of the plain step, bit for bit; PyTorch's own checkpointing alone would update the
statistics twice (pytorch issue 96136).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localgrad.core.blocks import straight
from localgrad.core.couplings import Link
from localgrad.core.engine import LocalModel, localized
from localgrad.core.errors import unknown


def recompute(
    model: LocalModel, *, units: bool | Sequence[str] = True, couplings: bool | Sequence[int] = False
) -> LocalModel:
    """Sets what `model` makes again in the backward pass, and returns it.

    units: all, none, or those named. The network's own head counts to its last unit's block and is always kept.
    couplings: each branch of every coupling, or of those of the blocks listed. `recompute(model, units=False)` undoes
    it. Raises UserError for a name that is no unit.
    """
    model = localized(model, "recompute")
    names = [name for block in model.blocks for name in block.names]
    chosen = set(names) if units is True else set(units or ())
    for name in chosen - set(names):
        raise unknown("unit", name, names)
    for block in model.blocks:
        own = [again if name in chosen else straight for name in block.names]
        block.ways = own + [straight] * (len(block) - len(own))
    for k, auxiliary in enumerate(model.auxiliaries):
        here = couplings if isinstance(couplings, bool) else k in couplings
        for link in auxiliary.modules():
            if isinstance(link, Link):
                link.way = again if here else straight
    return model


def again(module: nn.Module, h: Tensor) -> Tensor:
    """`module(h)`, of which only `h` is kept; run again in the backward pass."""
    return checkpoint(module, h, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _keeping(module)))


@contextlib.contextmanager
def _keeping(module: nn.Module) -> Iterator[None]:
    """Buffers as they were, whatever is run inside: the first run has updated them."""
    kept = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), kept, strict=True):
                buffer.copy_(value)
