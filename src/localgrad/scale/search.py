"""The search behind a plan: every possible block with what it needs, and the fastest row of blocks under a cap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localgrad.scale.costs import Cost, Costs
from localgrad.scale.speed import Speed

SHARES = 8  # in which a block's units may be recomputed, the first ones first: they are the largest


@dataclass(frozen=True)
class BlockOption:
    """Units i..j as one block, of which the first `recomputed` are recomputed, and its coupling or not."""

    i: int
    j: int
    recomputed: int
    coupling_recomputed: bool
    peak: int
    seconds: float

    @property
    def plain(self) -> bool:
        return not (self.recomputed or self.coupling_recomputed)


Options = Mapping[int, Sequence[BlockOption]]


def block_options(costs: Costs, speed: Speed, *, coupled: bool) -> Options:
    """Every possible block, by its last unit."""
    count = len(costs.names)
    found: dict[int, list[BlockOption]] = {j: [] for j in range(count)}
    kept, remade = costs.units
    times = [[speed.seconds(u.forward + u.backward) for u in units] for units in costs.units]
    for i in range(count):
        enters = costs.batch if i == 0 else costs.batch + kept[i - 1].output
        for j in range(i, count):
            last = j == count - 1
            shares = count if last and i == 0 else SHARES  # each number of units where there is one block only
            for recomputed in sorted({round((j + 1 - i) * n / shares) for n in range(shares + 1)}):
                own = [*remade[i : i + recomputed], *kept[i + recomputed : j + 1]]
                seconds = sum(times[1][i : i + recomputed]) + sum(times[0][i + recomputed : j + 1])
                for coupling_recomputed in (False, True) if coupled and not last else (False,):
                    end = None if last else costs.auxiliaries[coupling_recomputed][j]
                    spent = seconds + (speed.seconds(end.forward + end.backward) if end else 0)
                    found[j].append(BlockOption(i, j, recomputed, coupling_recomputed, enters + peak(own, end), spent))
    return found


def peak(own: Sequence[Cost], end: Cost | None) -> int:
    """The most bytes above a block's input and what lives anyway: forward through the units, through the auxiliary and
    back, and back through the units, whose gradients stay; what the block hands on lives until the end, beside the
    same made again where the last unit has kept nothing else. The output of a frozen unit that keeps nothing lives
    until the next unit has read it, if that keeps nothing either."""
    kept = most = gradients = casts = passing = 0
    held = own[-1].output if own[-1].kept in (0, own[-1].output) else 0
    for unit in own:
        most = max(most, kept + passing + casts + unit.forward_peak)
        kept += unit.kept + (passing if unit.kept else 0)
        casts += unit.casts
        passing = 0 if unit.kept else unit.output
    if end is not None:
        most = max(most, kept + passing + casts + end.forward_peak, kept + passing + end.backward_peak)
        gradients = end.gradients
    for unit in reversed(own):
        kept -= unit.kept
        most = max(most, kept + held + unit.backward_peak + gradients)
        gradients += unit.gradients
        held = own[-1].output
    return most


def fastest_chain(
    costs: Costs, options: Options, cap: int, *, as_you_go: bool, blocks: int | None = None, several: bool = False
) -> list[BlockOption] | None:
    """The fastest blocks in a row, as many as asked for or `several` (not one), none of which goes beyond `cap`; with
    gradients of those before it on top unless each block steps right away. None if there are none."""
    before = [0]
    for unit in costs.units[0]:
        before.append(before[-1] + unit.gradients)
    # By the last unit of a chain, and by its length where that counts: time, gradients of auxiliaries, last block.
    best: dict[tuple[int, int], tuple[float, int, BlockOption | None]] = {(-1, 0): (0.0, 0, None)}
    for j, ending in options.items():
        extra = costs.auxiliaries[0][j].gradients if j < len(options) - 1 else 0
        for option in ending:
            if several and option.i == 0 and j == len(options) - 1:
                continue
            for length in range(blocks or 1):
                start = best.get((option.i - 1, length))
                if start is None or option.peak + (0 if as_you_go else before[option.i] + start[1]) > cap:
                    continue
                here = (j, length + 1 if blocks else 0)
                seconds = start[0] + option.seconds
                if here not in best or seconds < best[here][0]:
                    best[here] = (seconds, start[1] + extra, option)
    chain: list[BlockOption] = []
    at = (len(options) - 1, blocks or 0)
    while at[0] >= 0:
        option = best[at][2] if at in best else None
        if option is None:
            return None
        chain.insert(0, option)
        at = (option.i - 1, at[1] - 1 if blocks else 0)
    return chain
