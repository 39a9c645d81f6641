"""Plans and fits for targets of every kind, for frozen units and for inputs of integers: peaks are the real step's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.memory import optimizers_for, training_step

BATCH, CLASSES = 16, 10
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
Y = torch.arange(BATCH) % CLASSES


def network(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    units = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for c in (3, 8, 8, 8)]
    return nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))


def mixup(output: Tensor, targets: Any) -> Tensor:
    return targets[2] * F.cross_entropy(output, targets[0]) + (1 - targets[2]) * F.cross_entropy(output, targets[1])


def weighted(output: Tensor, targets: Any) -> Tensor:
    return (targets["weight"] * F.cross_entropy(output, targets["class"], reduction="none")).mean()


KINDS: dict[str, tuple[Any, Any, int]] = {
    "mixup": (mixup, (Y, Y.flip(0), 0.3), CLASSES),
    "multi-label": (nn.BCEWithLogitsLoss(), torch.eye(CLASSES)[Y], CLASSES),
    "regression": (nn.MSELoss(), torch.rand(BATCH, 3), 3),
    "weights": (weighted, {"class": Y, "weight": torch.rand(BATCH)}, CLASSES),
    "ignored": (nn.CrossEntropyLoss(ignore_index=-1), Y.where(Y > 0, -1), CLASSES),
    "weighted classes": (nn.CrossEntropyLoss(weight=torch.rand(CLASSES)), None, CLASSES),
}


def measured(plan: lg.Plan, model: lg.LocalModel, x: Tensor, y: Any, autocast: torch.dtype | None = None) -> int:
    optimizers = optimizers_for(lg.param_groups(model), SGD, as_you_go=plan.step_as_you_go)
    step = partial(training_step, model, optimizers, x, y, step_as_you_go=plan.step_as_you_go, autocast=autocast)
    step()
    return lg.measure_peak(step).total


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_of_any_criterion_is_the_real_step(kind: str) -> None:
    criterion, targets, outputs = KINDS[kind]
    x, backbone = torch.randn(BATCH, 3, 16, 16), network(outputs)
    how: Any = {"method": lg.dgl("0c1f"), "criterion": criterion, "targets": targets}
    made = lg.Planner(backbone, x, **how)
    plan = made.fastest("70%")
    assert plan.peak <= 0.7 * made.exactly(made.bp).peak
    y = Y if targets is None else targets
    assert measured(plan, plan.localize(backbone, x), x, y) == pytest.approx(plan.peak, rel=0.001)
    assert made.bp.peak == pytest.approx(made.exactly(made.bp).peak, rel=0.001)


@pytest.mark.parametrize("kind", ["mixup", "regression", "weighted classes"])
def test_fit_takes_any_criterion(kind: str) -> None:
    criterion, targets, outputs = KINDS[kind]
    x = torch.randn(BATCH, 3, 16, 16)
    found = lg.fit(network(outputs), x, "80%", criterion=criterion, targets=targets, speed=lg.Speed())
    assert found.plan.accumulate == 1  # Only of the default loss is it known that parts change nothing.
    y = Y if targets is None else targets
    assert measured(found.plan, found.model, x, y) == pytest.approx(found.plan.peak, rel=0.001)
    assert torch.isfinite(torch.stack(lg.local_backward(found.model, x, y).losses)).all()


def test_a_criterion_that_needs_other_targets_asks_for_an_example() -> None:
    x, backbone = torch.randn(4, 3, 16, 16), network()
    how: Any = {"criterion": nn.BCEWithLogitsLoss()}
    model = lg.localize(backbone, method=lg.bp(), example=x, **how)
    for call in (
        lambda: lg.plan(backbone, x, 2**30, **how),
        lambda: lg.fit(backbone, x, 2**30, **how, speed=lg.Speed()),
        lambda: lg.predict_peak(model, 4, lambda m: [SGD(lg.param_groups(m))]),
    ):
        with pytest.raises(
            UserError, match=r"the criterion does not take .*give an example of the targets, as targets=y"
        ):
            call()
    with pytest.raises(UserError, match=r"does not take an output of shape \(4, 10\).*targets of shape \(4, 3\)"):
        lg.plan(backbone, x, 2**30, **how, targets=torch.rand(4, 3))
    large, little = (
        lg.predict_peak(model, 4, lambda m: [SGD(lg.param_groups(m))], targets=torch.rand(rows, CLASSES)).total
        for rows in (1, 8)
    )
    assert large == little


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x)}


class FromNamed(lg.Classification):
    def criterion(self, output: Any, targets: Any) -> Tensor:
        return super().criterion(output["logits"] if isinstance(output, dict) else output, targets)


@pytest.mark.parametrize("method", [lg.bp(), lg.dgl("0c1f")], ids=["bp", "dgl"])
def test_a_dictionary_is_planned_with_a_task_of_ones_own(method: lg.Method) -> None:
    x, backbone = torch.randn(BATCH, 3, 16, 16), Named()
    plan = lg.plan(backbone, x, "90%", method=method, task=FromNamed(CLASSES))
    assert measured(plan, plan.localize(backbone, x), x, Y) == pytest.approx(plan.peak, rel=0.001)


def test_any_output_is_planned_in_one_block() -> None:
    x = torch.randn(BATCH, 3, 16, 16)
    backbone = nn.Sequential(*[nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8, 8)])
    plan = lg.plan(backbone, x, "95%", criterion=F.mse_loss, targets=torch.rand(BATCH, 8, 16, 16))
    model = plan.localize(backbone, x)
    assert measured(plan, model, x, torch.rand(BATCH, 8, 16, 16)) == pytest.approx(plan.peak, rel=0.001)


@pytest.mark.parametrize("criterion", [F.mse_loss, F.smooth_l1_loss, F.soft_margin_loss, F.l1_loss, F.huber_loss])
def test_the_peak_of_a_loss_of_maps_is_predicted_to_the_byte(criterion: Any) -> None:
    x, y = torch.randn(4, 3, 16, 16), torch.rand(4, 8, 16, 16)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    model = lg.localize(backbone, method=lg.bp(), example=x, criterion=criterion)
    optimizers = [SGD(lg.param_groups(model))]
    step = partial(training_step, model, optimizers, x, y)
    step()
    predicted = lg.predict_peak(model, 4, lambda m: [SGD(lg.param_groups(m))], targets=y[:1])
    assert predicted.total == lg.measure_peak(step).total


# What is frozen, and integers


class Lora(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h) + self.up(self.down(h))


def words(*, frozen: bool, lora: bool) -> nn.Module:
    """Numbers of words, [B, 12], to classes."""

    def layer(width: int) -> nn.Module:
        linear = nn.Linear(16, width)
        return Lora(linear) if lora else linear

    units = [nn.Sequential(layer(16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16)) for _ in range(4)]
    table = nn.Embedding(50, 16).requires_grad_(not frozen)
    return nn.Sequential(table, *units, nn.Flatten(), nn.Linear(12 * 16, CLASSES))


@pytest.mark.parametrize(("frozen", "lora"), [(False, False), (True, True)])
@pytest.mark.parametrize("method", [lg.bp(), lg.dgl("0c1f")], ids=["bp", "dgl"])
def test_numbers_of_words_are_planned_and_fitted(frozen: bool, lora: bool, method: lg.Method) -> None:
    x = torch.randint(50, (BATCH, 12))
    backbone = words(frozen=frozen, lora=lora)
    plan = lg.plan(backbone, x, "90%", method=method, accumulate="never")
    assert measured(plan, plan.localize(backbone, x), x, Y) == pytest.approx(plan.peak, rel=0.001)
    found = lg.fit(backbone, x, "95%", method=None if method.terms is None else method)  # The speed is measured, too.
    assert found.plan.peak > 0


@pytest.mark.parametrize("method", [lg.bp(), lg.dgl("0c1f")], ids=["bp", "dgl"])
def test_a_network_whose_first_unit_is_frozen_is_planned_and_fitted(method: lg.Method) -> None:
    x, backbone = torch.randn(BATCH, 3, 16, 16), network()
    next(backbone.children()).requires_grad_(False)
    plan = lg.plan(backbone, x, "90%", method=method)
    assert measured(plan, plan.localize(backbone, x), x, Y) == pytest.approx(plan.peak, rel=0.001)
    found = lg.fit(backbone, x, "90%", method=None if method.terms is None else method)
    assert measured(found.plan, found.model, x, Y) == pytest.approx(found.plan.peak, rel=0.001)


# What a plan is


def test_a_plan_says_what_it_is_and_makes_its_model_without_a_warning() -> None:
    x, backbone = torch.randn(BATCH, 3, 16, 16), network()
    how: Any = {"method": lg.dgl("0c1f"), "coupling": lg.MAN(), "optimizer": torch.optim.AdamW}
    how |= {"autocast": torch.bfloat16}
    made = lg.Planner(backbone, x, **how)
    whole = lg.plan(backbone, x, "100%", **how)
    assert str(whole).startswith("backpropagation: ")
    exact = made.fastest("90%", 1)
    assert f"{exact}".startswith(f"backpropagation, {exact.recomputed} of 4 units recomputed: ")
    assert f"{exact.peak / 2**20:.1f} MiB predicted" in repr(exact)
    several = made.fastest("100%", 3)
    assert str(several).startswith("local training in 3 blocks")
    for plan, blocks in ((whole, 1), (exact, 1), (several, 3)):
        model = plan.localize(backbone, x)
        assert len(model.blocks) == blocks
        recomputed = sum(any(a <= u <= b for a, b in block.ranges) for block in model.blocks for u in range(len(block)))
        assert recomputed == plan.recomputed
    again = lg.localize(backbone, blocks=exact.blocks, method=lg.bp(), example=x)
    assert len(exact.apply(again).blocks) == 1


@pytest.mark.parametrize("budget", ["0%", "-5%", "half%", "inf%", "nan%"])
def test_a_share_is_above_nothing(budget: str) -> None:
    with pytest.raises(UserError, match="budget takes a share of backpropagation's memory as 50%, not"):
        lg.plan(network(), torch.zeros(4, 3, 8, 8), budget)
