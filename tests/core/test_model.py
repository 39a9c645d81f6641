"""The localized model: its optimizer groups, table, state and task; what warns and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import (
    assert_same,
    auxiliaries,
    batch,
    chain,
    composite,
    coupling_of,
    gradients,
    local,
    mlp,
    resnet,
    said,
    sgd,
    state,
    vgg,
)
from torch import Tensor, nn

import localgrad as lg
from localgrad.scale.memory import training_step


def test_evaluation_needs_no_labels_and_no_auxiliaries() -> None:
    x, _ = batch()
    model = local(lg.DeepMAN())
    model.eval()
    with torch.no_grad():
        logits = model(x)
        model.auxiliaries = nn.ModuleList()
        assert torch.equal(model(x), logits)
        assert torch.equal(chain(model, x), logits)
    assert not any(m.training for block in model.blocks for m in block.modules())


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    x, y = batch()
    model = local(lg.MAN(0.5))
    twin = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    kept = state(model)
    optimizer = sgd(lg.param_groups(twin, weight_decay=1e-3))
    for _ in range(2):
        lg.local_backward(twin, x, y)
        optimizer.step()
    assert_same(model.state_dict(), kept)
    for each in (model, twin):
        assert coupling_of(auxiliaries(each)[0]).sources[0].module is each.blocks[1][0]


def test_the_task_is_the_backbones_or_ones_own() -> None:
    assert lg.localize(mlp(), blocks=2, method=lg.dgl(), example=batch(size=4)[0]).task == lg.Classification(5)

    class Doubled(lg.Classification):
        def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
            return 2 * super().criterion(logits, targets)

    x, y = batch()
    plain = local()
    assert plain.task == lg.Classification(10)
    own = lg.localize(plain.backbone, blocks=4, method=lg.dgl("1c1f"), example=x, task=Doubled(10))
    own.load_state_dict(plain.state_dict())
    for a, b in zip(lg.local_backward(plain, x, y).losses, lg.local_backward(own, x, y).losses, strict=True):
        torch.testing.assert_close(2 * a, b)


class Frozen(nn.Module):
    """Keeps its batch norms in evaluation mode, however it is called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        freeze(self)
        return self


def freeze(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


@pytest.mark.parametrize("build", [resnet, vgg, composite])
@pytest.mark.parametrize("coupling", [None, lg.DeepMAN(0.5)], ids=str)
def test_modules_keep_their_modes(build: Callable[[], nn.Module], coupling: lg.MAN | None) -> None:
    network = build()
    freeze(network)
    modes = [m.training for m in network.modules()]
    statistics = {k: b.clone() for k, b in network.named_buffers()}
    model = lg.localize(network, blocks=2, method=lg.dgl("0c1f"), coupling=coupling, example=batch()[0])
    assert [m.training for m in network.modules()] == modes
    assert all(m.training for m in model.auxiliaries.modules())
    frozen = {id(m) for m in network.modules() if not m.training}
    assert all(m.training for b in model.blocks for m in b.modules() if id(m) not in frozen)
    lg.local_backward(model, *batch())
    lg.local_backward(lg.recompute(model, couplings=True), *batch())
    assert_same(statistics, dict(network.named_buffers()))
    model.zero_grad()
    own, (x, y) = sgd(lg.param_groups(model)), batch()
    training_step(model, [own], x, y)
    measured = lg.measure_peak(lambda: training_step(model, [own], x, y), model=model, optimizers=[own])
    assert lg.predict_peak(model, 4, lambda m: [sgd(lg.param_groups(m))]).total == measured.total


def test_a_network_in_evaluation_mode_is_put_into_training_mode_as_it_does_itself() -> None:
    model = local(backbone=resnet().eval())
    assert model.training
    assert all(m.training for m in model.modules())
    frozen = lg.localize(Frozen(resnet()).eval(), blocks=2, method=lg.dgl("0c1f"), example=batch()[0])
    assert {type(m) for m in frozen.backbone.modules() if not m.training} == {nn.BatchNorm2d}


def test_a_plan_counts_frozen_units_apart_from_those_that_look_alike() -> None:
    network = resnet()
    freeze(network.get_submodule("layer1.1"))
    network.get_submodule("layer2.2").requires_grad_(False)
    units = lg.Planner(network, batch()[0], method=lg.bp()).costs
    kept = dict(zip(units.names, (cost.gradients for cost in units.units[0]), strict=True))
    assert kept["layer1.1"] < kept["layer1.0"] == kept["layer1.2"]
    assert kept["layer2.2"] == 0 < kept["layer2.1"]


def test_options_without_effect_warn() -> None:
    x = batch()[0]
    assert len(lg.localize(vgg(), method=lg.dgl("0c1f"), example=x).blocks) == 4
    assert len(lg.localize(vgg(), method=lg.bp(), example=x).blocks) == 1
    with pytest.warns(UserWarning, match="bp trains end to end: blocks=4 has no effect, there is 1") as seen:
        model = lg.localize(resnet(20), blocks=4, method=lg.bp(), example=x)
    assert len(model.blocks) == 1
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="a coupling has no effect on a single block"):
        model = lg.localize(resnet(20), blocks=1, method=lg.dgl(), coupling=lg.MAN(), example=x)
    assert len(model.auxiliaries) == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.tensor([0, 10]), "targets run from 0 to 10, but the network has 10 classes"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.0]), "one int64 class a sample"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), r"inputs of shape \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 9, 8), torch.tensor([0, 1]), "localized for batch x 3 x 8 x 8"),
        (torch.zeros(3, 3, 8, 8), torch.tensor([0, 1]), "for 2 targets"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_moves(x: Tensor, y: Tensor, message: str) -> None:
    model = local(lg.MAN(0.0))
    kept = state(model)
    for step in (lg.local_backward, lg.block_steps):
        assert re.search(message, said(step, model, x, y))
    assert_same(model.state_dict(), kept)
    assert not gradients(model)


class Named(nn.Sequential):
    """Gives a dictionary, as torchvision's segmentation networks do."""

    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x)}


@pytest.mark.parametrize("make", [nn.Sequential, Named])
@pytest.mark.parametrize("task", [None, lg.Classification(2)])
def test_a_network_without_a_vector_of_logits_needs_a_task_of_its_own(
    make: Any, task: lg.Classification | None
) -> None:
    maps, x = make(*(nn.Conv2d(c, 2, 1) for c in (3, 2, 2))), batch()[0]
    text = said(lg.localize, maps, blocks=2, method=lg.dgl(), example=x, task=task)
    assert re.fullmatch(r"the backbone gives .*\(2, 8, 8\).*, not one vector of logits a sample: pass a .*", text)

    class Maps(lg.Classification):
        """A task of one's own may read them."""

    assert lg.localize(maps, blocks=2, method=lg.dgl(), example=x, task=Maps(2)).task == Maps(2)


def test_a_network_has_as_many_logits_as_its_task_has_classes() -> None:
    text = said(lg.localize, vgg(), method=lg.bp(), example=batch()[0], task=lg.Classification(4))
    assert text == "the backbone gives 10 logits a sample for a task of 4 classes: make it with 4 outputs"
