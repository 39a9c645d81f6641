"""The search behind a plan: the fastest recomputation of each possible block under a cap, and the fastest blocks.

Within a block it is the dynamic programme for heterogeneous chains of Herrmann, Beaumont, Eyraud-Dubois, Joly and
Shilova ("Optimal checkpointing for heterogeneous chains", 2019, arXiv 1911.13214). To train the units s..t of a chain
in m bytes, either all that unit s needs is kept, or units s..c-1 are run and only the input of unit c is kept; s..c-1
are then recomputed when the backward pass arrives there, for which the same question is asked once more:

    T[s, t](m) = min( forward[s] + backward[s] + T[s+1, t](m - kept[s]),
                      min over c of: forward[s..c-1] + T[c, t](m - output[c-1]) + T[s, c-1](m) )

Memory is counted in slots of equal size. A row of a table has the least time for each number of slots: column m is for
m slots, and the last column, which is always infinite, is for less than no slot. A block ends with its auxiliary or
with the loss of the network. The backward pass goes from the last unit to the first, and gradients of parameters stay
once they are made: when it comes to a unit, the gradients of all later units take memory already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from localgrad.core.blocks import Range
from localgrad.scale.costs import Cost, Costs, Work
from localgrad.scale.peaks import block_peak, copies_of, in_a_row, recomputed_cost

SLOTS = 1000  # of memory; fewer for a long chain
MOST_PIECES = 100  # A longer chain is searched in pieces of several units each.
MOST_NUMBERS = 1e8  # that filling a table may take

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class BlockOption:
    """One way to train some units in a row as one block.

    Attributes:
        i: the number of its first unit.
        j: the number of its last unit.
        ranges: units that are recomputed together, by number; a range may lie within another one.
        coupling_recomputed: whether the branches of its coupling are recomputed.
    """

    i: int
    j: int
    ranges: tuple[Range, ...] = ()
    coupling_recomputed: bool = False

    def peak(self, costs: Costs) -> int:
        """The most bytes that it takes above what lives anyway, its input included."""
        return (
            costs.batch
            + costs.entering(self.i)
            + block_peak(costs, self.i, self.j, self.ranges, self.coupling_recomputed)
        )

    def seconds(self, costs: Costs) -> float:
        """The time of a step through it."""
        return sum(runs * cost.seconds[0] + cost.seconds[1] for cost, runs in self._runs(costs))

    def work(self, costs: Costs) -> Work:
        """The work of a step through it."""
        parts = (part for cost, runs in self._runs(costs) for part in [cost.forward] * runs + [cost.backward])
        return reduce(Work.__add__, parts)

    def _runs(self, costs: Costs) -> Iterator[tuple[Cost, int]]:
        """Each unit, and the auxiliary, with how often it runs forward: once more for each range that it lies in."""
        for u, unit in enumerate(costs.of_block(self.i, self.j).units[0][self.i : self.j + 1], self.i):
            yield unit, 1 + sum(a <= u <= b for a, b in self.ranges)
        end = costs.end(self.i, self.j, coupling_recomputed=self.coupling_recomputed)
        if end is not None:
            yield end, 1


class Search:
    """Finds the fastest blocks under a cap. Its tables are made when they are first needed.

    Args:
        costs: of the network, with the time of each unit and auxiliary (`Speed.timed`).
        coupled: whether there are couplings, whose branches can be recomputed.
        recompute: whether anything may be recomputed.
    """

    def __init__(self, costs: Costs, *, coupled: bool, recompute: bool = True) -> None:
        self.costs, self._coupled, self._recompute = costs, coupled and recompute, recompute
        count = len(costs.names)
        size = -(-count // MOST_PIECES) if recompute else 1
        self.pieces = [(a, min(a + size, count) - 1) for a in range(0, count, size)]
        kept = [in_a_row(costs.units[0][a : b + 1]) for a, b in self.pieces]
        remade = [recomputed_cost(costs, a, b, ()) for a, b in self.pieces]
        times = np.array([np.sum([u.seconds for u in costs.units[0][a : b + 1]], axis=0) for a, b in self.pieces])
        self._both = times.sum(axis=1)
        self._until = _sums(times[:, 0])  # the time of the forward pass through all pieces before each one
        self._copies = _sums([copies_of(costs, a, b) for a, b in self.pieces])
        self._before = _sums([piece.gradients for piece in kept])  # bytes of gradients of all pieces before each one
        self._later = self._before[-1] - self._before[1:]
        self._kept, self._output, self._forward, self._backward = (
            np.array([getattr(piece, name) for piece in kept], float)
            for name in ("kept", "output", "forward_peak", "backward_peak")
        )
        self._forward_again, self._backward_again = (
            np.array([getattr(piece, name) for piece in remade], float) for name in ("forward_peak", "backward_peak")
        )
        n = len(self.pieces)
        peaks = (self._forward, self._backward, self._forward_again, self._backward_again)
        ends = [max(end.forward_peak, end.backward_peak) for own in costs.auxiliaries for end in own]
        # More bytes than any block can take: the tables need no more columns than that.
        top = self._kept.sum() + max(peak.max() for peak in peaks) + self._before[-1] + max(ends, default=0)
        top += 2 * (self._output.max() + self._copies[-1])
        most = (
            min(SLOTS, max(60.0, 6 * MOST_NUMBERS / n**3))
            if recompute
            else min(10 * SLOTS, max(100.0, MOST_NUMBERS / n**2))
        )
        slots = int(max(1.0, min(most, top)))
        self._slot = max(1.0, top / slots)  # bytes
        self._m = np.arange(slots + 1)
        self._columns = np.arange(slots + 2)
        self._ranges: Array | None = None
        self._blocks: dict[int, Array] = {}

    def fastest(
        self, cap: float, *, as_you_go: bool, blocks: int | None = None, several: bool = False
    ) -> list[BlockOption] | None:
        """The fastest blocks in a row of which none takes more than `cap`, or None if there are none.

        Args:
            cap: bytes above what lives anyway.
            as_you_go: whether each block steps right after its backward pass. If not, gradients of earlier blocks stay.
            blocks: how many, or None for any number.
            several: whether a single block is left out.
        """
        n = len(self.pieces)
        last = range(n) if blocks != 1 else range(n - 1, n)
        # The fastest blocks up to each piece. The key is the number of that piece, and of blocks if `blocks` asks for a
        # number (otherwise 0). The value is their time, the gradients of their auxiliaries, and the last block.
        best: dict[tuple[int, int], tuple[float, int, tuple[int, int, int] | None]] = {(-1, 0): (0.0, 0, None)}
        for j in last:
            for i in range(j + 1) if blocks != 1 else range(1):
                if several and i == 0 and j == n - 1:
                    continue
                end = self.costs.end(self.pieces[i][0], self.pieces[j][1])
                extra = 0 if end is None else end.gradients
                for length in range(blocks or 1):
                    start = best.get((i - 1, length))
                    if start is None:
                        continue
                    held = 0 if as_you_go else self._before[i] + start[1]
                    here = (j, length + 1 if blocks else 0)
                    spent, m = self._spent(i, j, cap - held)
                    seconds = start[0] + spent
                    if seconds < (best[here][0] if here in best else np.inf):
                        best[here] = (seconds, start[1] + extra, (i, j, m))
        chain: list[BlockOption] = []
        at = (n - 1, blocks or 0)
        while at[0] >= 0:
            found = best[at][2] if at in best else None
            if found is None:
                return None
            chain.insert(0, self._option(*found))
            at = (found[0] - 1, at[1] - 1 if blocks else 0)
        return chain

    def _spent(self, i: int, j: int, left: float) -> tuple[float, int]:
        """The least time of pieces i..j as one block within `left` bytes, and the slots that its table may use."""
        option = BlockOption(self.pieces[i][0], self.pieces[j][1])
        if self.costs.is_frozen(option.i, option.j):
            return (self._until[j + 1] - self._until[i] if option.peak(self.costs) <= left else np.inf), 0
        begin = self._begin(i, j)
        if begin > i:  # The frozen pieces run first. Then the block's own input stays, beside that of piece `begin`.
            if BlockOption(option.i, self.pieces[begin - 1][1]).peak(self.costs) > left:
                return np.inf, 0
            left -= self._output[i - 1]
        m = min(int((left - self._base(begin, j)) // self._slot), len(self._m) - 1)
        spent = self._table_of_blocks(j)[begin, m] if m >= 0 else np.inf
        return self._until[begin] - self._until[i] + spent, m

    def _begin(self, i: int, j: int) -> int:
        """The first of pieces i..j, a block, that a backward pass reaches. The costs of the first block know it."""
        if i == 0:
            return 0
        begin = self.costs.begin(self.pieces[i][0], self.pieces[j][1])
        return next(p for p in range(i, j + 1) if begin <= self.pieces[p][1])

    def _base(self, i: int, j: int) -> float:
        """Bytes that a block of pieces i..j takes and its table does not count, less what that counts too much."""
        enters = self.costs.batch + self.costs.entering(self.pieces[i][0])
        # What the block hands on lives until the block is done.
        return enters + self._output[j] - self._offset(j)

    def _offset(self, j: int) -> float:
        """Bytes that the table of blocks that end with piece j counts too much.

        So that all blocks can use the same numbers, a table counts the gradients of all pieces up to the end of the
        network as if they were there already. In a block, only those of its own pieces and its auxiliary are there.
        """
        last = self.pieces[j][1]
        return self._later[j] - (self.costs.auxiliaries[0][last].gradients if j < len(self.pieces) - 1 else 0)

    def _table_of_blocks(self, j: int) -> Array:
        """The least time of pieces i..j as one block, [i, slots]."""
        if j not in self._blocks:
            self._blocks[j] = self._filled(self._end_of_block(j))
        return self._blocks[j]

    def _table_of_ranges(self) -> Array:
        """The least time to run pieces s..t a second time and to go back through them: [s, t, slots]."""
        if self._ranges is None:
            n = len(self.pieces)
            self._ranges = np.full((n, n, len(self._m) + 1), np.inf)
            for t in range(n):
                self._ranges[: t + 1, t] = self._filled(self._end_of_range(t))[: t + 1]
        return self._ranges

    def _end_of_block(self, j: int) -> _End:
        offset, last = self._offset(j), self.pieces[j][1]
        if j == len(self.pieces) - 1:
            return _End(j, self._nothing(), self._output[j], offset - self._output[j], False)
        row = np.full(len(self._m) + 1, np.inf)
        for variant in self.costs.auxiliaries[: 1 + self._coupled]:
            need = self._slots(max(variant[last].forward_peak, variant[last].backward_peak) + offset)
            row[need:-1] = np.minimum(row[need:-1], sum(variant[last].seconds))
        return _End(j, row, self._output[j], offset - self._output[j], True)

    def _end_of_range(self, t: int) -> _End:
        # The gradient of its output waits while it runs forward.
        return _End(t, self._nothing(), 0.0, self._output[t] + self._later[t], False)

    def _nothing(self) -> Array:
        return np.append(np.zeros(len(self._m)), np.inf)

    def _filled(self, end: _End) -> Array:
        """The least time to train the pieces from s to the end, and what comes after it, for each s: [s, slots]."""
        rows = np.full((end.t + 2, len(self._m) + 1), np.inf)
        rows[end.t + 1] = end.row
        for s in range(end.t, -1, -1):
            rows[s] = self._choices(rows, s, end)[0].min(axis=0)
        return rows

    def _choices(self, rows: Array, s: int, end: _End) -> tuple[Array, Array, Array]:
        """The choices for piece s. Choice 0 keeps what it needs. Choice k recomputes pieces s..s+k-1 together.

        Args:
            rows: the least time from each later piece on, which is filled in already, [piece, slots].
            s: the piece.
            end: where the pieces end.

        Returns:
            The time of each choice, [choice, slots]. How many slots it takes from the pieces after it, [choice]. And
            how many slots it takes from the second run, [choice].
        """
        own = end.held if s == end.t else 0.0
        last = end.t + end.closed if self._recompute else s
        c = np.arange(s + 1, last + 1)
        copies = self._copies[c] - self._copies[s]
        stays = np.append(self._kept[s] - own, self._output[s:last] + copies)
        if end.closed and len(c):
            stays[-1] -= end.held
        less, within = np.rint(stays / self._slot).astype(int), np.rint(2 * copies / self._slot).astype(int)
        times = self._less(rows[s + 1 : max(last, s + 1) + 1][np.append(0, c - s - 1)], less)
        times[0] += self._both[s]
        passing = np.append(0.0, self._output[s : last - 1])[: len(c)]
        first_run = np.maximum.accumulate(self._forward_again[s:last] + passing) + copies + end.offset
        needs = np.append(max(self._backward[s] + self._later[s] - own, self._forward[s] + end.offset), first_run)
        if len(c):
            second = self._less(self._table_of_ranges()[s, s:last], within)
            alone = self._columns >= self._slots(self._backward_again[s] + self._later[s])
            second[0] = np.where(alone, self._both[s], np.inf)
            times[1:] += (self._until[c] - self._until[s])[:, None] + second
        times[self._columns[None] < np.rint(needs / self._slot)[:, None]] = np.inf
        return times, less, np.append(0, within)

    def _slots(self, size: float) -> int:
        return max(0, round(size / self._slot))

    def _less(self, rows: Array, slots: Array) -> Array:
        """Column m of row i becomes column m - slots[i]: the time with so many slots less."""
        index = self._columns[None] - slots[:, None]
        none = (index < 0) | (self._columns[None] == self._columns[-1])
        return np.take_along_axis(rows, np.where(none, -1, np.minimum(index, self._columns[-1] - 1)), axis=1)

    def _option(self, i: int, j: int, m: int) -> BlockOption:
        """The choices behind a time in the table of blocks."""
        if self.costs.is_frozen(self.pieces[i][0], self.pieces[j][1]):
            return BlockOption(self.pieces[i][0], self.pieces[j][1])
        end = self._end_of_block(j)
        ranges, left = self._explained(self._table_of_blocks(j), self._begin(i, j), m, end)
        if j == len(self.pieces) - 1 or not self._coupled:
            return BlockOption(self.pieces[i][0], self.pieces[j][1], tuple(ranges))
        last = self.pieces[j][1]
        plain = self.costs.auxiliaries[0][last]
        fits = left >= self._slots(max(plain.forward_peak, plain.backward_peak) + self._offset(j))
        quick = sum(plain.seconds) <= sum(self.costs.auxiliaries[1][last].seconds)
        return BlockOption(self.pieces[i][0], last, tuple(ranges), not (fits and quick))

    def _explained(self, rows: Array, s: int, m: int, end: _End) -> tuple[list[Range], int]:
        """The ranges with which the pieces from s on take the time `rows[s, m]`, and the slots left after the end."""
        ranges: list[Range] = []
        while s <= end.t:
            times, less, within = self._choices(rows, s, end)
            choice = int(times[:, m].argmin())
            if choice:
                c = s + choice
                ranges.append((self.pieces[s][0], self.pieces[c - 1][1]))
                if choice > 1:
                    inner = np.vstack([self._table_of_ranges()[:c, c - 1], self._nothing()])
                    ranges += self._explained(inner, s, m - within[choice], self._end_of_range(c - 1))[0]
            m = min(int(m - less[choice]), len(self._m) - 1)
            s += choice or 1
        return ranges, m


@dataclass(frozen=True, eq=False)
class _End:
    """The end of the pieces that a table is for: of a block, or of a range that is recomputed.

    Attributes:
        t: the last piece.
        row: the least time of what comes after piece t, for each number of slots: of the auxiliary, or zero.
        held: bytes of the output of piece t, if whoever asks the table has counted them (`_base`).
        offset: bytes that the table counts during the first forward pass beside activations: gradients.
        closed: whether a range may end with piece t. In the last block and in a range, the last piece is kept: its
            backward pass comes at once, so that a second run of it would save nothing.
    """

    t: int
    row: Array
    held: float
    offset: float
    closed: bool


def _sums(values: Any) -> Array:
    """The sum of the values before each one, and of all."""
    return np.append(0.0, np.cumsum(values))
