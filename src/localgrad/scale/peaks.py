"""The peak memory of a block, put together from what its units cost alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from localgrad.core.blocks import Range
from localgrad.scale.costs import Cost, Costs, Work


def in_a_row(run: Sequence[Cost], end: Cost | None = None, *, handed_on: int = 0, last_keeps_it: bool = True) -> Cost:
    """Several pieces of a network as one piece: forward through all, through `end` and back, and back through all.

    Args:
        run: what each piece costs.
        end: what follows them and is gone before they run backward, such as the auxiliary of a block.
        handed_on: bytes of the output that lives until the end, because the next block reads it.
        last_keeps_it: whether the output is part of what the last piece keeps for its backward pass. Then it is not
            counted a second time there.
    """
    live = casts = passing = forward_peak = backward_peak = gradients = 0
    for piece in run:
        forward_peak = max(forward_peak, live + passing + casts + piece.forward_peak)
        # The output of a frozen piece that keeps nothing lives until the next piece has read it.
        live += piece.kept + (passing if piece.kept else 0)
        casts += piece.casts
        passing = 0 if piece.kept else piece.output
    kept = live
    if end is not None:
        forward_peak = max(forward_peak, live + passing + casts + end.forward_peak)
        backward_peak = live + passing + end.backward_peak
        gradients = end.gradients
    held = 0 if last_keeps_it else handed_on
    for piece in reversed(run):
        live -= piece.kept
        backward_peak = max(backward_peak, live + held + piece.backward_peak + gradients)
        gradients += piece.gradients
        held = handed_on
    return Cost(
        output=run[-1].output,
        kept=kept,
        forward_peak=forward_peak,
        backward_peak=backward_peak,
        gradients=sum(piece.gradients for piece in run),
        state=sum(piece.state for piece in run),
        forward=reduce(Work.__add__, (piece.forward for piece in run)),
        backward=reduce(Work.__add__, (piece.backward for piece in run)),
        casts=casts,
    )


def copies_of(costs: Costs, first: int, last: int) -> int:
    """Bytes of the buffers of these units that are copied, so that a second run finds what the first one found."""
    kept, remade = costs.units
    return sum(max(0, remade[u].kept - kept[u].output) for u in range(first, last + 1) if remade[u].kept)


def recomputed_cost(costs: Costs, first: int, last: int, ranges: Sequence[Range]) -> Cost:
    """The units from `first` to `last`, recomputed together, and once more within that in `ranges`."""
    kept, remade = costs.units
    if first == last:
        return remade[first]
    inside = in_a_row(pieces(costs, first, last, ranges))
    copies, passing, forward_peak = copies_of(costs, first, last), 0, 0
    for u in range(first, last + 1):
        forward_peak = max(forward_peak, copies + passing + remade[u].forward_peak)
        passing = kept[u].output
    again = 2 * copies + max(inside.output + inside.forward_peak, inside.backward_peak)
    return replace(
        inside,
        kept=inside.output + copies if inside.kept else 0,
        forward_peak=forward_peak,
        backward_peak=again,
        backward=inside.forward + inside.backward,
    )


def pieces(costs: Costs, first: int, last: int, ranges: Sequence[Range]) -> list[Cost]:
    """What the units from `first` to `last` cost: each of the outermost `ranges`, and each unit between them."""
    found, start = [], first
    for a, b in sorted(ranges, key=lambda r: (r[0], -r[1])):
        if a < start:  # It lies within the range before.
            continue
        inner = [r for r in ranges if a <= r[0] and r[1] <= b and r != (a, b)]
        found += [*costs.units[0][start:a], recomputed_cost(costs, a, b, inner)]
        start = b + 1
    return [*found, *costs.units[0][start : last + 1]]


def block_peak(costs: Costs, i: int, j: int, ranges: Sequence[Range], coupling_recomputed: bool) -> int:
    """The most bytes that units i..j take as one block, above its input and what lives anyway."""
    costs = costs.of_block(i, j)
    end = costs.end(i, j, coupling_recomputed=coupling_recomputed)
    output = costs.units[0][j].output
    # `kept` includes the output. If there is nothing else in it, the backward pass of the unit may not need the output.
    kept_by_last = not any(b == j for _, b in ranges) and costs.units[0][j].kept not in (0, output)
    cost = in_a_row(pieces(costs, i, j, ranges), end, handed_on=output, last_keeps_it=kept_by_last)
    return max(cost.forward_peak, cost.backward_peak)
