"""Plans: their peaks are those of the real step, they fit, and no chain of blocks under the same cap is faster."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.costs import Cost, Costs, Work
from localgrad.scale.memory import optimizers_for, training_step
from localgrad.scale.plan import Plan, Planner
from localgrad.scale.search import all_forms, fastest_chain
from localgrad.scale.speed import Speed

BATCH = 16


def planner(name: str = "resnet20", size: int = 32, coupling: lg.MAN | None = lg.MAN(), **how: Any) -> Planner:  # noqa: B008
    method = how.pop("method", lg.dgl("1c2f"))
    example = torch.zeros(BATCH, 3, size, size)
    return Planner(lg.build(name, classes=10), example, method=method, coupling=coupling, **how)


def measured(plan: Plan, name: str = "resnet20", size: int = 32, coupling: lg.MAN | None = lg.MAN()) -> int:  # noqa: B008
    """The peak of a real step of the plan."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))
    backbone, chosen = lg.build(name, classes=10), coupling if len(plan.blocks) > 1 else None
    model = lg.localize(backbone, blocks=list(plan.blocks), method=lg.dgl("1c2f"), coupling=chosen, example=x)
    plan.apply(model)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    optimizers = optimizers_for(lg.param_groups(model), make, as_you_go=plan.step_as_you_go)

    def step() -> None:
        training_step(model, optimizers, x, y, step_as_you_go=plan.step_as_you_go)

    step()
    return lg.measure_peak(step).total


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("coupling", [None, lg.MAN(), lg.DeepMAN()], ids=str)
def test_the_plan_fits_and_its_peak_is_the_real_steps(share: float, coupling: lg.MAN | None) -> None:
    made = planner(coupling=coupling)
    budget = int(share * made.exactly(made.bp).peak)
    plan = made.fastest(budget)
    assert plan.exact
    assert plan.peak <= budget
    assert measured(plan, coupling=coupling) == pytest.approx(plan.peak, rel=0.001)


@pytest.mark.parametrize(
    ("name", "size", "how"),
    [
        ("resnet32", 32, {}),
        ("resnet32", 32, {"coupling": lg.DeepMAN(), "autocast": torch.bfloat16}),
        ("resnet32", 32, {"method": lg.infopro(), "optimizer": torch.optim.AdamW}),
        ("torchvision:resnet18", 64, {"coupling": lg.MANPlusPlus()}),
        ("timm:resnet50", 64, {"coupling": None}),
    ],
)
def test_peaks_put_together_from_pieces_are_the_exact_ones(name: str, size: int, how: Any) -> None:
    made = planner(name, size, **how)
    for plan in (made.bp, made.checkpointing, *made.frontier()[1::5]):
        assert plan.peak == pytest.approx(made.exactly(plan).peak, rel=0.001)


def test_the_frontier_trades_time_for_memory() -> None:
    made = planner("resnet56")
    plans = made.frontier()
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    assert [p.peak for p in plans] == sorted((p.peak for p in plans), reverse=True)
    assert plans[0].blocks == made.bp.blocks  # nothing is faster than backpropagation
    assert plans[0].peak > made.checkpointing.peak > plans[-1].peak
    assert made.bp.seconds < made.checkpointing.seconds < 1.5 * made.bp.seconds


def test_no_plan_fits_says_the_least_that_would() -> None:
    with pytest.raises(
        UserError, match=r"no plan fits 1 MiB: the least is \d+ MiB, of which parameters, .* hold \d+; a"
    ):
        planner().fastest(2**20)


def test_a_large_network_is_planned_in_seconds_and_no_memory() -> None:
    example = torch.zeros(128, 3, 224, 224, device="meta")
    made = Planner(
        lg.build("torchvision:resnet50", classes=1000).to("meta"), example, method=lg.dgl("0c1f"), coupling=lg.MAN()
    )
    plans = [made.fastest(int(share * made.bp.peak)) for share in (0.6, 0.4)]
    for plan, share in zip(plans, (0.6, 0.4), strict=True):
        assert plan.peak <= share * made.bp.peak
    assert plans[0].seconds < plans[1].seconds
    assert len(plans[1].blocks) > 1


# The search against every chain there is


sizes = st.integers(0, 50)
costs = st.builds(
    Cost, output=sizes, kept=sizes, forward_peak=sizes, backward_peak=st.integers(50, 120), gradients=st.just(0),
    state=sizes, forward=st.builds(Work, st.integers(1, 100)), backward=st.builds(Work, st.integers(1, 100)),
)  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> Costs:
    count = draw(st.integers(1, 5))
    lists = [draw(st.lists(costs, min_size=n, max_size=n)) for n in (count, count, count - 1, count - 1)]
    return Costs(tuple("abcde"[:count]), (lists[0], lists[1]), (lists[2], lists[3]), draw(sizes))


@settings(deadline=None, max_examples=150)
@given(networks(), st.integers(60, 600))
def test_no_chain_under_the_cap_is_faster(network: Costs, cap: int) -> None:
    forms = all_forms(network, Speed(1.0, 1.0), coupled=True)
    chain = fastest_chain(network, forms, cap, as_you_go=False)
    count, best = len(network.names), None
    for ends in itertools.chain.from_iterable(itertools.combinations(range(count - 1), n) for n in range(count)):
        starts = [0, *(e + 1 for e in ends)]
        choices = [
            [f for f in forms[j] if f.i == i and f.peak <= cap] for i, j in zip(starts, [*ends, count - 1], strict=True)
        ]
        for row in itertools.product(*choices):
            seconds = sum(f.seconds for f in row)
            best = seconds if best is None else min(best, seconds)
    if chain is None:
        assert best is None
    else:
        assert sum(f.seconds for f in chain) == pytest.approx(best)
        assert [f.i for f in chain] == [0, *(f.j + 1 for f in chain[:-1])]
        assert all(f.peak <= cap for f in chain)


def test_a_budget_is_a_number_of_bytes_or_text() -> None:
    made = planner(coupling=None)
    assert made.fastest("1 GiB") == made.fastest(2**30) == made.fastest(2.0**30)
    for budget in cast("list[Any]", [True, None, "8 apples", -1, float("nan"), [2**30]]):
        with pytest.raises(UserError, match="budget takes"):
            made.fastest(budget)
        with pytest.raises(UserError, match="budget takes"):  # before anything is traced
            lg.plan(lg.build("resnet20", classes=10), torch.zeros(4, 3, 8, 8), budget, method=lg.dgl("0c1f"))
