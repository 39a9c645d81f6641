"""Plans: their peaks are those of the real step, they fit, and no chain of blocks under the same cap is faster."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.costs import Cost, Costs, Work
from localgrad.scale.memory import optimizers_for, training_step
from localgrad.scale.plan import Plan, Planner
from localgrad.scale.search import block_options, fastest_chain
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
    forms = block_options(network, Speed(1.0, 1.0), coupled=True)
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


def stem_frozen(network: nn.Module) -> None:
    for part in (network.conv1, network.bn1, network.layer1[0]):  # pyright: ignore[reportIndexIssue]
        part.requires_grad_(False)  # pyright: ignore[reportCallIssue]


def middle_frozen(network: nn.Module) -> None:
    """A whole stage and one unit of another, whose twins are trained."""
    for part in (network.layer2, network.layer3[1]):  # pyright: ignore[reportIndexIssue]
        part.requires_grad_(False)  # pyright: ignore[reportCallIssue]


def biases_alone(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


class Adapted(nn.Module):
    """A frozen layer beside a small one that is trained, as LoRA has it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Conv2d(layer.in_channels, 2, 1, layer.stride, bias=False)  # pyright: ignore[reportArgumentType]
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h) + self.up(self.down(h))


def adapted(network: nn.Module) -> None:
    network.requires_grad_(False)
    network.fc.requires_grad_(True)  # pyright: ignore[reportCallIssue]
    for stage in (network.layer2, network.layer3):
        for unit in stage:  # pyright: ignore[reportGeneralTypeIssues]
            unit.conv1 = Adapted(unit.conv1)


def classifier_alone(network: nn.Module) -> None:
    network.requires_grad_(False)
    network.fc.requires_grad_(True)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("coupling", [None, lg.MAN()], ids=str)
@pytest.mark.parametrize("freeze", [stem_frozen, middle_frozen, biases_alone, adapted, classifier_alone])
def test_a_network_with_frozen_parameters_has_plans_whose_peaks_are_those_of_the_step(
    freeze: Callable[[nn.Module], None], coupling: lg.MAN | None
) -> None:
    x, y = torch.randn(BATCH, 3, 16, 16), torch.randint(10, (BATCH,))
    network = lg.build("resnet20", classes=10)
    freeze(network)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    made = Planner(network, x, method=lg.dgl("0c1f"), coupling=coupling)
    least = made.exactly(made.frontier()[-1]).peak
    for budget in (2**30, (made.exactly(made.bp).peak + least) // 2, least):
        plan = made.fastest(budget)
        own = coupling if len(plan.blocks) > 1 else None
        model = lg.localize(network, blocks=plan.blocks, method=lg.dgl("0c1f"), coupling=own, example=x)
        plan.apply(model)
        optimizers = optimizers_for(lg.param_groups(model), make, as_you_go=plan.step_as_you_go)
        step = partial(training_step, model, optimizers, x, y, step_as_you_go=plan.step_as_you_go)
        step()
        assert lg.measure_peak(step).total == plan.peak <= budget
    assert made.bp.peak == pytest.approx(made.exactly(made.bp).peak, rel=0.15)


@pytest.mark.parametrize("method", [lg.bp(), lg.dgl("0c1f")], ids=["bp", "dgl"])
def test_a_wholly_frozen_network_has_no_plan(method: lg.Method) -> None:
    network = lg.build("resnet20", classes=10).requires_grad_(False)
    with pytest.raises(UserError, match="nothing can be planned: every parameter of the network is frozen"):
        lg.plan(network, torch.zeros(2, 3, 16, 16), 2**30, method=method)
