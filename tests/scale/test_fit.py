"""One call from a budget to a model: exact where that is quick enough, with as few cuts as will do elsewhere."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.fit import _check_repeats, _fewest_cuts

X, Y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
SPEED = lg.Speed()  # No particular device, so that the choices are the same everywhere.


def network() -> nn.Module:
    torch.manual_seed(0)
    return lg.build("resnet20", classes=10)


@cache
def bp() -> int:
    return lg.Planner(network(), X, method=lg.bp()).bp.peak


def fit(share: float, **how: Any) -> lg.Fit:
    return lg.fit(network(), X, int(share * bp()), speed=SPEED, **how)


def measured(found: lg.Fit) -> int:
    optimizer = torch.optim.SGD(lg.param_groups(found.model), lr=0.1, momentum=0.9, nesterov=True)

    def step() -> None:
        lg.local_backward(found.model, X, Y)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return lg.measure_peak(step).total


@pytest.mark.parametrize(
    ("share", "how", "blocks", "words"),
    [
        (1.1, {}, 1, "exact training, nothing recomputed"),
        (0.5, {}, 1, r"exact training, \d+ of 10 units recomputed"),
        (0.4, {"at_most": 1.05}, 1, "exact training"),  # The local plan would take longer still.
        (0.6, {"method": lg.dgl("0c1f")}, 2, "local training in 2 blocks, which is not exact"),
    ],
)
def test_the_step_stays_within_the_budget(share: float, how: dict[str, Any], blocks: int, words: str) -> None:
    found = fit(share, **how)
    assert len(found.model.blocks) == len(found.plan.blocks) == blocks
    assert measured(found) <= share * bp()
    with pytest.raises(AssertionError, match=words):  # The sentence is what `print` shows.
        raise AssertionError(str(found))
    assert f"{found.times_bp:.2f} times the time of backpropagation" in found.why


def test_exact_training_is_backpropagation_to_the_bit() -> None:
    found, twin = fit(0.4, exact=True), network()
    assert found.plan.units
    lg.local_backward(found.model, X, Y)
    nn.functional.cross_entropy(twin(X), Y).backward()
    for one, other in zip(found.model.backbone.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(found.model.backbone.buffers(), twin.buffers(), strict=True))


def test_what_cannot_be_is_said_with_what_would_help() -> None:
    with pytest.raises(UserError, match=r"no plan fits 1 MiB: the least is \d+ MiB, .* in parts \(accumulate='any'"):
        lg.fit(network(), X, 2**20, speed=SPEED)
    with pytest.raises(UserError, match="exact=True is backpropagation: leave the method of local losses out"):
        fit(0.5, exact=True, method=lg.dgl())
    with pytest.raises(UserError, match="budget takes bytes as 8GiB"):
        lg.fit(network(), X, "much")


class Clock(nn.Module):
    """Its result depends on how often any module of its class has run, which no copy of a module can undo."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        type(self).runs += 1
        return self.convs(h) * type(self).runs


class Noisy(Clock):
    """It draws from Python's and numpy's generators, which recomputation replays."""

    def forward(self, h: Tensor) -> Tensor:
        return self.convs(h) * random.random() * float(np.random.rand()) * torch.rand(())  # noqa: NPY002


@pytest.mark.parametrize(("unit", "repeatable"), [(Clock, False), (Noisy, True)])
def test_a_unit_that_cannot_be_run_twice_is_named(unit: type[nn.Module], repeatable: bool) -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *[unit() for _ in range(4)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    budget = int(0.6 * lg.Planner(backbone, X, method=lg.bp()).bp.peak)
    how: Any = {"exact": True, "accumulate": "never", "speed": SPEED}
    if repeatable:
        assert lg.fit(backbone, X, budget, **how).plan.units
        return
    with pytest.raises(UserError, match=r"'\d' cannot be computed again: with the same input and state"):
        lg.fit(backbone, X, budget, **how)


def test_batches_in_parts_are_taken_if_they_are_allowed() -> None:
    found = fit(0.3, exact=True, accumulate="any", at_most=10.0)
    assert found.plan.accumulate > 1
    assert f"each batch in {found.plan.accumulate} parts" in found.why
    assert measured(found) <= 0.3 * bp()
    twin = copy.deepcopy(found.model)
    assert twin.accumulate == found.plan.accumulate


@pytest.mark.slow
def test_the_speed_is_measured_by_default() -> None:
    found = lg.fit(network(), X, int(0.6 * bp()))
    assert 0.9 < found.times_bp < 2


def noisy() -> nn.Module:
    torch.manual_seed(0)
    units = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.1)) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


LOCAL: dict[str, Any] = {"method": lg.dgl("0c1f"), "coupling": lg.MAN()}


@pytest.mark.parametrize(
    "call",
    [
        lg.calibrate,
        lambda net, x: lg.plan(net, x, "60%", **LOCAL),
        lambda net, x: lg.Planner(net, x, **LOCAL).frontier(),
        lambda net, x: lg.fit(net, x, "60%", exact=True),
    ],
    ids=["calibrate", "plan", "frontier", "fit"],
)
def test_random_numbers_are_what_they_are_without_the_call(call: Callable[[nn.Module, Tensor], object]) -> None:
    net = noisy()
    before, python = torch.get_rng_state(), random.getstate()
    call(net, X)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_a_fit_draws_what_localize_draws() -> None:
    net = noisy()
    found = lg.fit(net, X, "70%", speed=SPEED, **LOCAL)
    drawn = torch.get_rng_state()
    net = noisy()
    made = found.plan.localize(net, X)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert made.state_dict().keys() == found.model.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_what_was_asked_for_is_what_is_made() -> None:
    found = fit(0.6, method=lg.dgl("0c1f"), coupling=lg.MAN(0.5))
    assert all(auxiliary.coupling.spec.momentum == 0.5 for _, auxiliary in found.model.isolated)  # pyright: ignore
    least = lg.Planner(network(), X, method=lg.bp(), speed=SPEED).frontier(1)[-1].peak
    with pytest.raises(UserError, match="no plan fits"):  # Exact training would fit, but was not asked for.
        lg.fit(network(), X, least + 2**17, method=lg.dgl(), coupling=lg.DeepMAN(), speed=SPEED)


def test_trying_units_twice_moves_nothing() -> None:
    units = nn.Sequential(*[nn.Sequential(Noisy(), nn.BatchNorm2d(8)) for _ in range(3)])
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model = lg.recompute(lg.localize(backbone, method=lg.bp(), example=X))
    before = [t.clone() for t in model.state_dict().values()]
    states = torch.get_rng_state(), random.getstate()
    _check_repeats(model, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"at_most": "1.3"}, "at_most takes a number of times backpropagation's time"),
        ({"at_most": float("nan")}, "at_most takes a number"),
        ({"at_most": 0}, "at_most takes a number"),
        ({"exact": True, "coupling": lg.MAN()}, "leave the coupling of local losses out"),
        ({"method": lg.bp(), "coupling": lg.MAN()}, "backpropagation has no coupling"),
        ({"method": lg.dgl}, "method takes what its function gives, such as lg.dgl()"),
        ({"coupling": "man"}, "coupling takes what its function gives"),
        ({"optimizer": "adam"}, "optimizer takes a function that makes one from groups of parameters"),
        ({"autocast": "bf16"}, "autocast takes a dtype"),
        ({"speed": 3}, "speed takes what lg.calibrate gives"),
        ({"example": X.numpy()}, "example takes a tensor, not an array of numpy"),
        ({"backbone": "resnet32"}, "the network to cut is an nn.Module, not a str"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(how: dict[str, Any], words: str) -> None:
    given = {"backbone": network(), "example": X, "budget": 2**30} | how
    with pytest.raises(UserError, match=re.escape(words)):
        lg.fit(given.pop("backbone"), given.pop("example"), given.pop("budget"), **given)


def test_without_gradients_nothing_is_fitted() -> None:
    with torch.no_grad(), pytest.raises(UserError, match="gradients are switched off"):
        lg.fit(network(), X, 2**30)


def test_a_deep_network_that_fits_in_no_way_is_refused_in_seconds() -> None:
    units = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(1, 4)) for _ in range(30)]
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    planner = lg.Planner(backbone, X[:4, :, :8, :8], method=lg.dgl("0c1f"), coupling=lg.MAN(), speed=SPEED)
    asked: list[int | None] = []
    within = planner.within

    def counted(budget: int, blocks: int | None = None, **how: Any) -> Any:
        asked.append(blocks)
        return within(budget, blocks, **how)

    planner.within = counted
    assert _fewest_cuts(planner, 10_000, 1.0) is None
    assert asked == [None]
    found = _fewest_cuts(planner, planner.bp.peak, 10.0)
    assert found is not None
    assert len(found.blocks) == 2
