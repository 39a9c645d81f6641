"""The search finds what trying everything finds: no cuts and no recomputation under the same cap are faster."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad.core.blocks import Range
from localgrad.scale import search as search_module
from localgrad.scale.costs import Cost, Costs, Work
from localgrad.scale.search import BlockOption, Search

seconds = st.tuples(st.integers(1, 20), st.integers(1, 20))


@st.composite
def units(draw: st.DrawFn) -> tuple[Cost, Cost]:
    """A unit as it is, and recomputed: it then keeps its output and copies of its buffers."""
    output, more, copies = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(0, 3))
    kept = Cost(
        output=output, kept=output + more, forward_peak=output + more + draw(st.integers(0, 5)),
        backward_peak=output + more + draw(st.integers(20, 60)), gradients=draw(st.integers(0, 10)), state=0,
        forward=Work(), backward=Work(), seconds=draw(seconds),
    )  # fmt: skip
    remade = replace(kept, kept=output + copies, backward_peak=kept.backward_peak + copies + draw(st.integers(0, 20)))
    return kept, remade


@st.composite
def auxiliaries(draw: st.DrawFn) -> tuple[Cost, Cost]:
    one = Cost(
        output=4, kept=4, forward_peak=draw(st.integers(5, 60)), backward_peak=draw(st.integers(5, 90)),
        gradients=draw(st.integers(0, 5)), state=0, forward=Work(), backward=Work(), seconds=draw(seconds),
    )  # fmt: skip
    less = {"backward_peak": max(1, one.backward_peak - draw(st.integers(0, 40)))}
    return one, replace(one, **less, seconds=(one.seconds[0], one.seconds[1] + draw(st.integers(1, 20))))


@st.composite
def networks(draw: st.DrawFn, most: int = 4) -> Costs:
    count = draw(st.integers(1, most))
    own = draw(st.lists(units(), min_size=count, max_size=count))
    ends = draw(st.lists(auxiliaries(), min_size=count - 1, max_size=count - 1))
    trained = (True, *(draw(st.booleans()) for _ in own[1:]))  # The costs of a frozen first unit are others.
    own = [[c if yes else replace(c, gradients=0) for c in pair] for pair, yes in zip(own, trained, strict=True)]
    columns = [list(column) for column in zip(*own, strict=True)]
    return Costs(
        names=tuple("abcdef"[:count]), units=(columns[0], columns[1]),
        auxiliaries=([a for a, _ in ends], [b for _, b in ends]), batch=draw(st.integers(1, 20)), trained=trained,
    )  # fmt: skip


def ranges_of(first: int, last: int, *, closed: bool) -> Iterator[tuple[Range, ...]]:
    """All ways to recompute units `first` to `last`. closed: whether a range may end with the last one."""
    if first > last:
        yield ()
        return
    yield from ranges_of(first + 1, last, closed=closed)  # the first unit is kept
    for end in range(first, last + closed):
        for inner in ranges_of(first, end, closed=False) if end > first else [()]:
            for rest in ranges_of(end + 1, last, closed=closed):
                yield ((first, end), *inner, *rest)


def options(costs: Costs, i: int, j: int) -> list[BlockOption]:
    if costs.is_frozen(i, j):
        return [BlockOption(i, j)]
    last = j == len(costs.names) - 1
    return [
        BlockOption(i, j, ranges, coupling)
        for ranges in ranges_of(costs.begin(i, j), j, closed=not last)
        for coupling in ((False,) if last else (False, True))
    ]


def fits(costs: Costs, chain: tuple[BlockOption, ...], cap: int, as_you_go: bool) -> bool:
    before = 0
    for option in chain:
        if before + option.peak(costs) > cap:
            return False
        if not as_you_go:
            before += sum(unit.gradients for unit in costs.units[0][option.i : option.j + 1])
            end = costs.end(option.i, option.j)
            before += 0 if end is None else end.gradients
    return True


def best_of_all(costs: Costs, cap: int, as_you_go: bool, blocks: int | None) -> float | None:
    count, best = len(costs.names), None
    numbers = range(1, count + 1) if blocks is None else [blocks]
    cuts = [c for n in numbers for c in itertools.combinations(range(count - 1), n - 1)]
    for ends in cuts:
        starts = [0, *(end + 1 for end in ends)]
        rows = [options(costs, i, j) for i, j in zip(starts, [*ends, count - 1], strict=True)]
        for chain in itertools.product(*rows):
            time = sum(option.seconds(costs) for option in chain)
            if (best is None or time < best) and fits(costs, chain, cap, as_you_go):
                best = time
    return best


@settings(deadline=None, max_examples=150)
@given(networks(), st.integers(60, 500))
def test_no_recomputation_of_one_block_under_the_cap_is_faster(costs: Costs, cap: int) -> None:
    chain = Search(costs, coupled=True).fastest(cap, as_you_go=False, blocks=1)
    best = best_of_all(costs, cap, False, 1)
    assert (None if chain is None else chain[0].seconds(costs)) == best
    assert chain is None or fits(costs, tuple(chain), cap, False)


@settings(deadline=None, max_examples=150)
@given(networks(3), st.integers(60, 400), st.sampled_from([None, 2]))
def test_no_blocks_under_the_cap_are_faster(costs: Costs, cap: int, blocks: int | None) -> None:
    chain = Search(costs, coupled=True).fastest(cap, as_you_go=True, blocks=blocks)
    best = best_of_all(costs, cap, True, blocks)
    assert (None if chain is None else sum(option.seconds(costs) for option in chain)) == best
    assert chain is None or fits(costs, tuple(chain), cap, True)


@settings(deadline=None, max_examples=50)
@given(networks(4), st.integers(60, 400), st.integers(1, 4))
def test_blocks_are_as_many_as_asked_for_and_fit_with_gradients_of_those_before(
    costs: Costs, cap: int, blocks: int
) -> None:
    chain = Search(costs, coupled=True).fastest(cap, as_you_go=False, blocks=blocks)
    if chain is not None:
        assert len(chain) == blocks
        assert [option.i for option in chain] == [0, *(option.j + 1 for option in chain[:-1])]
        assert fits(costs, tuple(chain), cap, False)


def test_a_long_chain_is_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Cost(10, 50, 50, 60, 1, 0, Work(), Work(), seconds=(1.0, 2.0))
    costs = Costs(tuple(map(str, range(12))), ([unit] * 12, [replace(unit, kept=10)] * 12), ([], []), 10)
    cap = 300
    fine = Search(costs, coupled=False).fastest(cap, as_you_go=False, blocks=1)
    monkeypatch.setattr(search_module, "MOST_PIECES", 4)
    coarse = Search(costs, coupled=False).fastest(cap, as_you_go=False, blocks=1)
    assert fine is not None
    assert coarse is not None
    assert coarse[0].peak(costs) <= cap
    assert fine[0].seconds(costs) <= coarse[0].seconds(costs)
    assert all(a % 3 == 0 and b % 3 == 2 for a, b in coarse[0].ranges)
