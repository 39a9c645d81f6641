"""The groups of parameters for an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ALL_COUPLINGS, Net, assert_same, batch, cut, local, said, sgd

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.memory import optimizers_for, training_step


def rates(model: lg.LocalModel, **how: Any) -> dict[str, Any]:
    """The learning rate of each trained parameter by its name."""
    of = {id(p): group.get("lr") for group in lg.param_groups(model, **how) for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
@pytest.mark.parametrize("no_decay", [False, True])
def test_groups_hold_every_trainable_parameter_exactly_once(coupling: lg.MAN | None, no_decay: bool) -> None:
    model = local(coupling)
    model.backbone.get_parameter("conv1.weight").requires_grad_(False)
    groups = lg.param_groups(model, weight_decay=0.1, no_decay=no_decay)
    listed = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    for group in groups:
        own = {id(p) for p in model.members(group["block"])}
        assert {id(p) for p in group["params"]} <= own
        assert "lr" not in group
        plain = {p.ndim < 2 for p in group["params"]}
        assert group["weight_decay"] == (0 if no_decay and plain == {True} else 0.1)
        assert not no_decay or len(plain) == 1
    assert {group["block"] for group in groups} == {0, 1, 2, 3}


def test_learning_rates_are_one_or_one_for_each_block() -> None:
    model = local()
    assert {g["lr"] for g in lg.param_groups(model, lr=0.3)} == {0.3}
    groups = lg.param_groups(model, lr=[0.1, 0.2, 0.3, 0.4], no_decay=True)
    assert {(g["block"], g["lr"]) for g in groups} == {(0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4)}
    assert torch.optim.SGD(groups, lr=1.0).param_groups[-1]["lr"] == 0.4
    with pytest.raises(UserError, match="lr lists 2 learning rates for 4 blocks"):
        lg.param_groups(model, lr=[0.1, 0.2])
    for given, wanted in ((None, 0.3), (0.1, 0.1)):  # The decay is the optimizer's unless it is given.
        optimizer = torch.optim.SGD(lg.param_groups(model, weight_decay=given, no_decay=True), lr=0.1, weight_decay=0.3)
        assert {g["weight_decay"] for g in optimizer.param_groups} == {wanted, 0.0}


@pytest.mark.parametrize("no_decay", [False, True])
def test_a_frozen_last_block_has_an_empty_group_and_steps_with_the_others(no_decay: bool) -> None:
    model = local()
    model.blocks[3].requires_grad_(False)
    before = {name: p.clone() for name, p in model.blocks[3].named_parameters()}
    groups = lg.param_groups(model, no_decay=no_decay)
    assert [g["params"] for g in groups if g["block"] == 3] == [[]]
    for as_you_go in (False, True):
        training_step(model, optimizers_for(groups, sgd, as_you_go=as_you_go), *batch(), step_as_you_go=as_you_go)
    assert_same(before, dict(model.blocks[3].named_parameters()))


def test_auxiliaries_may_have_a_rate_of_their_own() -> None:
    model = local(lg.MANPlusPlus())
    for how in ({}, {"lr": 0.1}, {"lr": [0.1, 0.2, 0.3, 0.4], "by_name": {"layer1": {"lr": 7.0}}}):
        plain, own = rates(model, **how), rates(model, auxiliary_lr=0.5, **how)
        for name, rate in own.items():
            assert rate == (0.5 if name.startswith("auxiliaries") else plain[name])
    groups = lg.param_groups(model, auxiliary_lr=0.5)
    assert [(g["block"], g.get("lr")) for g in groups] == [(k, r) for k in range(3) for r in (None, 0.5)] + [(3, None)]


def test_parts_are_chosen_by_name_and_the_inner_one_counts() -> None:
    model = local()
    inner = {"layer1": {"lr": 1.0}, "layer1.1": {"lr": 2.0}, "layer1.1.conv1.weight": {"lr": 3.0}, "fc": {"lr": 4.0}}
    found = rates(model, lr=0.5, by_name=inner)
    for name, rate in found.items():
        short = name.removeprefix("backbone.")
        wanted = [inner[part]["lr"] for part in inner if f"{short}.".startswith(f"{part}.")]
        assert rate == (max(wanted) if wanted else 0.5), name
    assert set(found.values()) == {0.5, 1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize("decay", [{"weight_decay": 0.5}, {}], ids=str)
def test_options_of_a_part_may_be_any_and_win_over_no_decay(decay: dict[str, float]) -> None:
    model = local()
    named = {"layer2": {"momentum": 0.3, **decay}}
    groups = lg.param_groups(model, weight_decay=0.1, no_decay=True, by_name=named)
    own = {id(p) for p in model.backbone.get_submodule("layer2").parameters()}
    for group in groups:
        inside = {id(p) in own for p in group["params"]}
        assert len(inside) == 1
        assert ("momentum" in group) == inside.pop()
        by_size = 0.0 if group["params"][0].ndim < 2 else 0.1
        assert group["weight_decay"] == (decay.get("weight_decay", by_size) if "momentum" in group else by_size)
    assert {g["momentum"] for g in torch.optim.SGD(groups, lr=0.1, momentum=0.9).param_groups} == {0.3, 0.9}


def test_rates_by_unit_take_one_line() -> None:
    net = Net(lambda net, h, x: h * net.table)  # The table belongs to the first unit that reads it, by no prefix.
    model = cut(net)
    units = lg.units(net, torch.zeros(2, 3, 8, 8))
    found = rates(model, by_name={name: {"lr": 0.5 ** (len(units) - i)} for i, name in enumerate(units)})
    for k, block in enumerate(model.blocks):
        for name, parameter in net.named_parameters():
            if any(parameter is p for p in block[0].parameters()):
                assert found[f"backbone.{name}"] == 0.5 ** (4 - k)
    assert found["backbone.table"] == 0.5**3
    assert found["backbone.fc.weight"] is None


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"layer9": {"lr": 1.0}}, "the network has no part 'layer9': did you mean 'layer"),
        ({"layer": {"lr": 1.0}}, "the network has no part 'layer': did you mean 'layer"),
        ({"fc": 0.1}, "by_name takes options of an optimizer for 'fc'"),
        ({"fc": {"params": []}}, "by_name takes options of an optimizer for 'fc'"),
    ],
)
def test_wrong_names_and_options_are_refused(named: Any, message: str) -> None:
    assert said(lg.param_groups, local(), by_name=named).startswith(message)
