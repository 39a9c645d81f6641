"""The door of a step: a batch of one sample, and an optimizer that knows nothing of the auxiliaries."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from small import ALL_COUPLINGS, assert_same, batch, gradients, local, mlp, resnet, sgd, state
from torch import nn

import localgrad as lg
from localgrad.core.errors import UserError

X, Y = batch()

# A batch of one sample


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=4, num_classes=10)


def to_one_pixel() -> nn.Module:
    """Its last units have batch norms on maps of one pixel."""

    def unit(stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 3, stride, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))

    units = nn.Sequential(*[unit(s) for s in (1, 2, 2, 2, 1)])
    return nn.Sequential(units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))


REFUSED = {
    "the head 'classifier' of the auxiliary of block 0 .behind 'blocks.0'.*lg.dgl": (vit, lg.dgl(), None),
    "the head 'classifier' of the auxiliary of block 0 .behind 'layer2.0'.*lg.dgl": (resnet, lg.dgl(), lg.MAN()),
    "the coupling of the auxiliary of block 0": (to_one_pixel, lg.dgl("0c1f"), lg.DeepMAN(depth=3)),
    "block 1 .up to '0.4'": (to_one_pixel, lg.predsim(), None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_batch_of_one_is_refused_where_it_cannot_be_trained(message: str) -> None:
    make, method, coupling = REFUSED[message]
    model = lg.localize(make(), blocks=2, method=method, coupling=coupling, example=X)
    lg.local_backward(model, X, Y)
    model.zero_grad()
    kept, drawn = state(model), torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(UserError, match=f"a batch of one sample cannot train {message}.*"):
            lg.local_backward(model, X[:1], Y[:1])
        with pytest.raises(UserError, match="drop_last=True"):
            lg.predict_peak(model, 1, lambda m: [sgd(lg.param_groups(m))])
    assert_same(model.state_dict(), kept)
    assert not gradients(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    model.eval()  # in which a batch norm asks for no other value
    lg.local_backward(model, X[:1], Y[:1])
    model.train()
    with pytest.raises(UserError, match=message):
        lg.local_backward(model, X[:1], Y[:1])


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_a_batch_of_one_is_trained_where_it_can_be(coupling: lg.MAN | None) -> None:
    for make in (vit, resnet):
        model = lg.localize(make(), blocks=2, method=lg.dgl("0c1f"), coupling=coupling, example=X)
        twin = copy.deepcopy(model)
        drawn = torch.get_rng_state()
        out = lg.local_backward(lg.recompute(model, couplings=True), X[:1], Y[:1])
        torch.set_rng_state(drawn)
        twin.checks = model.checks  # so that nothing is tried
        assert torch.equal(out.logits, lg.local_backward(twin, X[:1], Y[:1]).logits)
        assert_same(gradients(model), gradients(twin))


def test_plans_for_one_image_say_what_they_cannot_train() -> None:
    with pytest.raises(UserError, match="a batch of one sample cannot train the head 'classifier'"):
        lg.plan(vit(), X[:1], 2**40, method=lg.dgl(), coupling=lg.MAN())
    with pytest.raises(UserError, match=r"a batch of one sample cannot train block \d"):
        lg.Planner(to_one_pixel(), X[:1], method=lg.bp())
    assert lg.plan(vit(), X[:1], 2**40, method=lg.dgl("0c1f"), coupling=lg.MAN()).blocks


# An optimizer that knows nothing of the auxiliaries


def steps(model: lg.LocalModel, optimizer: torch.optim.Optimizer, clear: Callable[[], object], count: int) -> int:
    """How many steps were taken until the warning came."""
    for n in range(count):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lg.local_backward(model, X, Y)
        if said:
            assert [w.filename for w in said] == [__file__]
            assert "the optimizer steps block 0 but not its auxiliary" in str(said[0].message)
            assert "make the optimizer after localize, of lg.param_groups(model)" in str(said[0].message)
            return n
        optimizer.step()
        clear()
    return count


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_an_optimizer_made_before_localize_is_told_at_its_second_step_and_once(coupling: lg.MAN | None) -> None:
    network = resnet()
    optimizer = sgd(network.parameters())
    model = local(coupling, backbone=network)
    assert steps(model, optimizer, optimizer.zero_grad, 4) == 1
    assert steps(model, optimizer, optimizer.zero_grad, 4) == 4  # it was said


@pytest.mark.parametrize("to_none", [True, False])
def test_so_it_is_where_all_gradients_are_cleared_a_little_later(to_none: bool) -> None:
    network = resnet()
    optimizer = sgd(network.parameters())
    model = local(lg.MAN(), backbone=network)
    assert steps(model, optimizer, lambda: model.zero_grad(set_to_none=to_none), 6) == 3


def test_so_it_is_where_blocks_step_as_they_go() -> None:
    model = local()
    own = [sgd(block.parameters()) for block in model.blocks]

    def step() -> None:
        for done in lg.block_steps(model, X, Y):
            own[done.block].step()
            own[done.block].zero_grad()

    step()
    with pytest.warns(UserWarning, match="block 0 but not its auxiliary"):
        step()


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
@pytest.mark.parametrize("to_none", [True, False])
def test_who_trains_the_auxiliaries_is_told_nothing(coupling: lg.MAN | None, to_none: bool) -> None:
    """Warnings are errors here."""
    model = local(coupling)
    optimizer = torch.optim.AdamW(lg.param_groups(model), lr=1e-3)
    start = state(model.backbone)
    for n in range(8):
        for _ in range(2):  # accumulated
            assert len(list(lg.block_steps(model, X, Y, scale=0.5))) == len(model.blocks)
        model.move_averages()
        if n == 3:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        if n % 3 == 2:
            model.backbone.load_state_dict(start)
        if n == 4:
            model.load_state_dict(state(model))


def test_who_only_looks_at_gradients_is_told_nothing() -> None:
    model = local(lg.MAN())
    others = [state(resnet()) for _ in range(2)]
    for weights in others:
        model.backbone.load_state_dict(weights)
        lg.local_backward(model, X, Y)
        model.zero_grad()
    lg.local_backward(model, X, Y)
    model.backbone.load_state_dict(others[0])
    lg.local_backward(model, X, Y)  # nothing was cleared


def test_frozen_auxiliaries_and_frozen_blocks_are_told_nothing() -> None:
    network = resnet()
    optimizer = sgd(network.parameters())
    model = local(backbone=network)
    model.auxiliaries.requires_grad_(False)
    assert steps(model, optimizer, optimizer.zero_grad, 5) == 5
    model = local()
    model.blocks[0].requires_grad_(False)
    optimizer = sgd([p for k in range(4) for p in model.members(k)])
    assert steps(model, optimizer, optimizer.zero_grad, 5) == 5
    model = local()
    optimizer = sgd(model.parameters())
    lg.local_backward(model, X, Y)
    model.auxiliaries.requires_grad_(False)  # from now on
    optimizer.step()
    optimizer.zero_grad()
    assert steps(model, optimizer, optimizer.zero_grad, 5) == 5


def test_a_copy_begins_anew() -> None:
    model = local()
    optimizer = sgd(lg.param_groups(model))
    for _ in range(2):
        lg.local_backward(model, X, Y)
        optimizer.step()
        optimizer.zero_grad()
        model = copy.deepcopy(model)
        optimizer = sgd(lg.param_groups(model))
    lg.local_backward(
        lg.localize(mlp(), blocks=2, method=lg.dgl("0c1f"), example=torch.ones(2, 48)), X[:, :, :4, :4].flatten(1), Y
    )
