"""Recompute inside a block: tensors of some units are not kept for the backward pass but computed again.

This is activation checkpointing, confined to a block or to the branches of a coupling. Units in a row can be recomputed
together, and some of them once more within that. Gradients, random draws and buffers are those of the plain step, bit
for bit (`core/recomputation.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any

from localgrad.core.blocks import Range, plain_call
from localgrad.core.couplings import Link
from localgrad.core.errors import UserError, unknown
from localgrad.core.model import LocalModel, localized
from localgrad.core.recomputation import recomputed


def recompute(
    model: LocalModel, *, units: bool | Sequence[str] = True, couplings: bool | Sequence[int] = False
) -> LocalModel:
    """Sets what `model` computes again in the backward pass. `recompute(model, units=False)` undoes it.

    Args:
        model: what `localize` gave. If its backbone has activation checkpoints of its own, they are replaced.
        units: all (True), none (False), or a list. "layer1.0" is one unit. "layer1.0:layer1.5" are the units from the
            first to the second, which are recomputed together: only the input of the first is kept. A range may lie
            within another; it is then recomputed once more within that. The network's own head is always kept.
        couplings: each branch of every coupling, or of those of the blocks listed.

    Returns:
        `model` itself.

    Raises:
        UserError: a name is that of no unit, a range goes over the end of a block, or two ranges overlap.
    """
    model = localized(model, "recompute", sharded=True)
    names = [name for block in model.blocks for name in block.names]
    _check_kinds(units, couplings, len(model.auxiliaries))
    units = [units] if isinstance(units, str) else units
    ranges = [unit_range(text, names) for text in (names if units is True else units or ())]
    _check_nested(ranges, names)
    ends = list(accumulate(len(block.names) for block in model.blocks))
    for first, last in ranges:
        for end in ends:
            if first < end <= last:
                raise UserError(
                    f"'{names[first]}:{names[last]}' goes over the end of a block, behind '{names[end - 1]}': only "
                    "units of one block are recomputed together"
                )
    for block, end in zip(model.blocks, ends, strict=True):
        start = end - len(block.names)
        block.recompute([(a - start, b - start) for a, b in ranges if start <= a and b < end])
    for k, auxiliary in enumerate(model.auxiliaries):
        here = couplings if isinstance(couplings, bool) else k in couplings
        for link in auxiliary.modules():
            if isinstance(link, Link):
                link.call = recomputed if here else plain_call
    return model


def _check_kinds(units: Any, couplings: Any, count: int) -> None:
    """Raises UserError unless these are arguments of `recompute`. count: how many auxiliaries there are."""
    if units is not None and not isinstance(units, bool | str | Collection):
        raise UserError(f'units takes True, False, or a list of names such as ["layer1.0"], not {units!r}')
    for name in () if units is None or isinstance(units, bool | str) else units:
        if not isinstance(name, str):
            raise UserError(f'units lists names such as "layer1.0" or "layer1.0:layer1.5", not {name!r}')
    if not isinstance(couplings, bool):
        if not (isinstance(couplings, Collection) and all(isinstance(k, Integral) for k in couplings)):
            raise UserError(f"couplings takes True, False, or a list of numbers of blocks, not {couplings!r}")
        for k in couplings:
            if not 0 <= k < count:
                raise UserError(f"there is no coupling of block {k}: {count} blocks have an auxiliary, numbered from 0")


def unit_range(text: str, names: Sequence[str]) -> Range:
    """The numbers of the first and the last unit of "FIRST:LAST", or of a single unit.

    Raises:
        UserError: A name is that of no unit, or the range runs backwards.
    """
    first, _, last = text.partition(":")
    for name in (first, last or first):
        if name not in names:
            raise unknown("unit", name, names)
    if last and names.index(last) < names.index(first):
        raise UserError(f"'{text}' runs backwards: '{last}' comes first")
    return names.index(first), names.index(last or first)


def _check_nested(ranges: Sequence[Range], names: Sequence[str]) -> None:
    """Raises UserError unless each two ranges lie apart or one within the other."""
    ordered = sorted(ranges, key=lambda r: (r[0], -r[1]))
    around: list[Range] = []
    for this in ordered:
        while around and around[-1][1] < this[0]:
            around.pop()
        if around and around[-1][1] < this[1]:
            one, other = (f"{names[a]}:{names[b]}" for a, b in (around[-1], this))
            raise UserError(f"'{one}' and '{other}' overlap: one must lie within the other, or apart from it")
        around.append(this)
