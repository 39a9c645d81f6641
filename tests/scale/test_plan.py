"""Plans: their peaks are those of the real step, they fit, and no chain of blocks under the same cap is faster."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.memory import optimizers_for, training_step
from localgrad.scale.plan import Plan, Planner

BATCH = 16


@cache
def planner(name: str = "resnet20", size: int = 32, coupling: lg.MAN | None = lg.MAN(), **how: Any) -> Planner:  # noqa: B008
    method = how.pop("method", lg.dgl("1c2f"))
    example = torch.zeros(BATCH, 3, size, size)
    return Planner(lg.build(name, classes=10), example, method=method, coupling=coupling, **how)


def measured(
    plan: Plan,
    name: str = "resnet20",
    coupling: lg.MAN | None = lg.MAN(),  # noqa: B008
    method: lg.Method = lg.dgl("1c2f"),  # noqa: B008
) -> int:
    """The peak of a real step of the plan."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    backbone, chosen = lg.build(name, classes=10), coupling if len(plan.blocks) > 1 else None
    model = lg.localize(
        backbone, blocks=list(plan.blocks) if method.terms else 1, method=method, coupling=chosen, example=x
    )
    plan.apply(model)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    optimizers = optimizers_for(lg.param_groups(model), make, as_you_go=plan.step_as_you_go)

    def step() -> None:
        training_step(model, optimizers, x, y, step_as_you_go=plan.step_as_you_go)

    step()
    return lg.measure_peak(step).total


@pytest.mark.parametrize(
    ("coupling", "share"),
    [(None, 0.5), (lg.MAN(), 0.4), *(pytest.param(c, 0.7, marks=pytest.mark.slow) for c in (lg.MAN(), lg.DeepMAN()))],
    ids=str,
)
def test_the_plan_fits_and_its_peak_is_the_real_steps(coupling: lg.MAN | None, share: float) -> None:
    made = planner(coupling=coupling)
    budget = int(share * made.exactly(made.bp).peak)
    plan = made.fastest(budget)
    assert plan.exact
    assert plan.peak <= budget
    assert measured(plan, coupling=coupling) == pytest.approx(plan.peak, rel=0.001)


@pytest.mark.parametrize(
    ("name", "size", "how"),
    [
        ("resnet20", 32, {"coupling": lg.DeepMAN(), "autocast": torch.bfloat16}),
        pytest.param("resnet32", 32, {}, marks=pytest.mark.slow),
        pytest.param("resnet32", 32, {"method": lg.infopro(), "optimizer": torch.optim.AdamW}, marks=pytest.mark.slow),
        pytest.param("torchvision:resnet18", 64, {"coupling": lg.MANPlusPlus()}, marks=pytest.mark.slow),
        pytest.param("timm:resnet50", 64, {"coupling": None}, marks=pytest.mark.slow),
    ],
)
def test_peaks_put_together_from_pieces_are_the_exact_ones(name: str, size: int, how: Any) -> None:
    made = planner(name, size, **how)
    for plan in (made.bp, made.checkpointing, *made.frontier()[1::5]):
        assert plan.peak == pytest.approx(made.exactly(plan).peak, rel=0.001)


def test_the_frontier_trades_time_for_memory() -> None:
    made = planner("resnet32")
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


@pytest.mark.slow
def test_a_large_network_is_planned_in_seconds_and_no_memory() -> None:
    example = torch.zeros(128, 3, 224, 224, device="meta")
    made = Planner(
        lg.build("torchvision:resnet50", classes=1000).to("meta"), example, method=lg.dgl("0c1f"), coupling=lg.MAN()
    )
    plans = [made.fastest(int(share * made.bp.peak)) for share in (0.6, 0.4)]
    for plan, share in zip(plans, (0.6, 0.4), strict=True):
        assert plan.peak <= share * made.bp.peak
    assert plans[0].seconds < plans[1].seconds
    assert plans[1].exact


@pytest.mark.parametrize("share", [0.5, 0.35, 0.3])
def test_exact_plans_are_nested_as_deep_as_they_must_be_and_their_peaks_those_of_the_step(share: float) -> None:
    made = planner("resnet32", method=lg.bp(), coupling=None)
    plan = made.fastest(int(share * made.bp.peak))
    model = lg.localize(lg.build("resnet32", classes=10), method=lg.bp(), example=torch.zeros(2, 3, 32, 32))
    (block,) = plan.apply(model).blocks
    depth = max(sum(a <= u <= b for a, b in block.ranges) for u in range(len(block.names)))
    assert depth >= {0.5: 1, 0.35: 2, 0.3: 3}[share]
    assert plan.peak <= share * made.bp.peak
    assert measured(plan, "resnet32", coupling=None, method=lg.bp()) == pytest.approx(plan.peak, rel=0.001)


# The batch in parts


def layer_norms() -> nn.Module:
    units = [
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.GELU())
        for _ in range(6)
    ]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def test_a_batch_is_split_where_that_changes_nothing() -> None:
    x, y = torch.randn(BATCH, 3, 16, 16), torch.randint(10, (BATCH,))
    torch.manual_seed(0)
    backbone = layer_norms()
    twin = copy.deepcopy(backbone)
    speed = lg.Speed(call=0.0)  # Parts of a batch cost no time then, so they are taken first.
    made = Planner(backbone, x, method=lg.bp(), speed=speed)
    plan = made.fastest(made.accumulation(4).peak + 1000)
    assert plan.accumulate == 4
    assert not plan.units
    assert plan.exact
    model = plan.apply(lg.localize(backbone, method=lg.bp(), example=x))
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.1, momentum=0.9, nesterov=True)
    out = lg.local_backward(model, x, y)
    loss = nn.functional.cross_entropy(twin(x), y)
    loss.backward()
    torch.testing.assert_close(out.losses[0], loss.detach())
    torch.testing.assert_close(out.logits, twin(x).detach())
    for one, other in zip(backbone.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    optimizer.step()
    optimizer.zero_grad()

    def step() -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    assert lg.measure_peak(step).total == pytest.approx(plan.peak, rel=0.001)


def test_a_batch_is_not_split_by_itself_where_statistics_or_pairs_would_change() -> None:
    example = torch.zeros(BATCH, 3, 16, 16)
    cases = [
        (lg.build("resnet20", classes=10), lg.bp(), {False}),
        (layer_norms(), lg.bp(), {True}),
        (layer_norms(), lg.dgl("0c1f"), {True}),
        (layer_norms(), lg.dgl("1c1f"), {False}),  # Its head has a batch norm.
        (layer_norms(), lg.predsim("0c1f"), {False}),  # It compares the samples of a batch with each other.
    ]
    for backbone, method, wanted in cases:
        made = Planner(backbone, example, method=method)
        assert {made._splits_exactly(method.terms is not None)} == wanted, method
        assert Planner(backbone, example, method=method, accumulate="any")._splits_exactly(True)
    never = Planner(layer_norms(), example, method=lg.bp(), accumulate="never", speed=lg.Speed(call=0.0))
    assert {plan.accumulate for plan in never.frontier()} == {1}
    with pytest.raises(UserError, match="accumulate takes never, exact or any, not 'often'"):
        Planner(layer_norms(), example, method=lg.bp(), accumulate=cast(Any, "often"))
    with pytest.raises(UserError, match="a batch of 16 cannot be split into 3 equal micro-batches"):
        never.accumulation(3)


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


FROZEN = [stem_frozen, middle_frozen, biases_alone, adapted, classifier_alone]
QUICK = [(classifier_alone, None), (adapted, lg.MAN())]
LONGER = [pytest.param(f, c, marks=pytest.mark.slow) for f in FROZEN for c in (None, lg.MAN()) if (f, c) not in QUICK]


@pytest.mark.parametrize(("freeze", "coupling"), [*QUICK, *LONGER])
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


def test_parts_of_one_sample_are_left_out_where_a_batch_norm_could_not_take_them() -> None:
    made = Planner(layer_norms(), torch.zeros(4, 3, 16, 16), method=lg.dgl(), speed=lg.Speed(call=0.0))
    assert {way[0] for way in made._ways(None, False, True)} == {1, 2}
    assert made.frontier()[-1].accumulate == 2


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, momentum=0.9, nesterov=True), torch.optim.AdamW])
def test_the_step_of_the_optimizer_counts_where_parameters_are_most_of_the_memory(make: Any) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 300), nn.ReLU(), nn.Linear(300, 10))
    made = Planner(network, torch.zeros(4, 3, 8, 8), method=lg.bp(), optimizer=make)
    assert made.bp.peak == pytest.approx(made.exactly(made.bp).peak, rel=0.005)


def test_an_optimizer_that_wants_a_closure_is_refused() -> None:
    with pytest.raises(UserError, match="LBFGS cannot step by gradients alone"):
        planner(optimizer=torch.optim.LBFGS)


def test_auxiliaries_may_take_many_times_what_backpropagation_takes() -> None:
    x = torch.randn(2, 8)
    network = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)], nn.Linear(8, 3))
    made = Planner(network, x, method=lg.dgl(hidden=1024))
    front = made.frontier(several=True)
    assert front[-1].peak > 100 * made.bp.peak
    assert len(made.balanced(3).blocks) == 3
    with pytest.raises(UserError, match="no plan fits 0 MiB: the least is"):
        made.fastest(made.bp.peak, several=True)
    with pytest.raises(UserError, match="no plan fits 0 MiB: the least is"):
        lg.fit(network, x, made.bp.peak // 2, method=lg.dgl(hidden=1024), speed=lg.Speed())
    for alone in (partial(made.frontier, 1), partial(made.within, 2**30, 1, as_you_go=True)):
        with pytest.raises(UserError, match="several=True leaves plans of one block out"):
            alone(several=True)
