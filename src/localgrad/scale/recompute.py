"""Recompute inside a block: a unit's tensors are not kept for its backward pass but made again.

Plain activation checkpointing, confined to a block, or to the branches of a coupling. Gradients, random draws and
buffers are those of the plain step, bit for bit (`core.recomputation`).
"""

from __future__ import annotations

from collections.abc import Sequence

from localgrad.core.blocks import plain_call
from localgrad.core.couplings import Link
from localgrad.core.errors import unknown
from localgrad.core.model import LocalModel, localized
from localgrad.core.recomputation import recomputed


def recompute(
    model: LocalModel, *, units: bool | Sequence[str] = True, couplings: bool | Sequence[int] = False
) -> LocalModel:
    """Sets what `model` makes again in the backward pass, and returns it. A model of a backbone that has checkpoints of
    its own has these until then.

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
        own = [recomputed if name in chosen else plain_call for name in block.names]
        block.calls = own + [plain_call] * (len(block) - len(own))
    for k, auxiliary in enumerate(model.auxiliaries):
        here = couplings if isinstance(couplings, bool) else k in couplings
        for link in auxiliary.modules():
            if isinstance(link, Link):
                link.call = recomputed if here else plain_call
    return model
