"""Shares of a pipeline's ranks against every other way to deal the blocks out, and the blocks' seconds."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import localgrad as lg
from localgrad.core.errors import UserError


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.data())
def test_no_other_shares_are_faster(seconds: list[float], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, len(seconds)))
    ends = data.draw(st.none() | st.lists(st.floats(0, 50), min_size=len(seconds) - 1, max_size=len(seconds) - 1))
    later = [*(ends or [0.0] * (len(seconds) - 1)), 0.0]

    def slowest(shares: tuple[int, ...]) -> float:
        bounds = [sum(shares[:i]) for i in range(len(shares) + 1)]
        return max(sum(seconds[a:b]) + later[b - 1] for a, b in pairwise(bounds))

    found = lg.shares_of(seconds, ranks, ends or ())
    cuts = combinations(range(1, len(seconds)), ranks - 1)
    every = [tuple(b - a for a, b in pairwise((0, *cut, len(seconds)))) for cut in cuts]
    assert found in every
    assert slowest(found) == pytest.approx(min(map(slowest, every)))


def test_more_ranks_than_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="2 blocks cannot be dealt out to 3 ranks"):
        lg.shares_of([1, 1], 3)


def test_timing_blocks_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    model = lg.localize(lg.build("resnet20", classes=10), blocks=4, method=lg.dgl(), coupling=lg.MAN(), example=x)
    before, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    seconds = lg.block_seconds(model, x, y)
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])] == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
