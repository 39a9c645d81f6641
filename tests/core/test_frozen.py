"""Frozen parts of a network stay frozen: no loss, no graph and no auxiliary for them, and no trainable copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from small import (
    ALL_COUPLINGS,
    assert_same,
    auxiliaries,
    batch,
    coupling_of,
    gradients,
    links_of,
    local,
    resnet,
    said,
    sgd,
    state,
)
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.heads import classifier
from localgrad.scale.memory import optimizers_for, training_step

RARE = [
    pytest.param(c, marks=pytest.mark.slow) for c in ALL_COUPLINGS if c is not None and not isinstance(c, lg.DeepMAN)
]
METHODS = [lg.dgl("1c1f"), lg.predsim(), lg.infopro(), lg.auglocal()]


class Lora(nn.Module):
    """A frozen linear layer with a trained product of two small ones beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h) + self.up(self.down(h))


def lora(rank: int = 4, **small: Any) -> nn.Module:
    """A vision transformer of which only adapters and the head are trained."""
    network: Any = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=4, **small)
    network.requires_grad_(False)
    for block in network.blocks:
        block.attn.qkv = Lora(block.attn.qkv, rank)
    network.head.requires_grad_(True)
    return network


def begun() -> nn.Module:
    """The stem, the first stage and the unit layer2.1 are frozen."""
    network = resnet()
    for name in ("conv1", "bn1", "layer1", "layer2.1"):
        network.get_submodule(name).requires_grad_(False)
    return network


def biases() -> nn.Module:
    network = resnet()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return network


def last_alone() -> nn.Module:
    network = resnet().requires_grad_(False)
    network.get_submodule("fc").requires_grad_(True)
    return network


def of_adapters() -> nn.Module:
    return lora(depth=4, embed_dim=48, num_heads=4)


FROZEN = [(begun, 8), (biases, 8), (last_alone, 8), (of_adapters, 16)]


def cut(make: Callable[[], nn.Module], size: int, **how: Any) -> lg.LocalModel:
    return lg.localize(make(), **{"blocks": 4, "method": lg.dgl("0c1f"), "example": batch(size=size)[0], **how})


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("make", "size"), FROZEN, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("coupling", [None, lg.DeepMAN(0.9), *RARE], ids=str)
def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one(
    make: Callable[[], nn.Module], size: int, coupling: lg.MAN | None
) -> None:
    model = cut(make, size, coupling=coupling)
    x, y = batch(size=size, classes=4)
    lg.local_backward(model, x, y)
    assert gradients(model).keys() == trained(model)
    assert trained(model.backbone) == trained(make())
    for k, block in enumerate(model.blocks[:-1]):
        assert auxiliaries(model)[k].empty == (not trained(block))
        assert bool(list(model.auxiliaries[k].parameters())) == bool(trained(block))
    for k in range(4):  # Each block's loss reaches it and its auxiliary alone.
        model.zero_grad()
        for done in lg.block_steps(model, x, y):
            assert gradients(model).keys() == {
                n
                for n, p in model.named_parameters()
                if any(p is q for j in range(done.block + 1) for q in model.members(j))
            }
            if done.block == k:
                break


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_leaves_frozen_parts_alone(method: lg.Method) -> None:
    model = cut(begun, 8, method=method, coupling=lg.MAN(0.5))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    own = sgd(lg.param_groups(model))
    for _ in range(2):
        out = lg.local_backward(model, *batch())
        own.step()
        own.zero_grad()
    assert out.losses[0] == 0
    assert not out.parts[0]
    assert out.losses[1] > 0
    kept = {n: p for n, p in before.items() if n.startswith("backbone")}
    assert_same(kept, {n: p for n, p in model.named_parameters() if n in kept})


def test_a_frozen_block_runs_forward_as_the_network_does_and_leaves_no_graph() -> None:
    model, plain = cut(begun, 8), begun()
    plain.load_state_dict(state(model.backbone))
    x, y = batch()
    first, second, *_ = lg.block_steps(model, x, y)
    plain(x)
    assert_same(  # The statistics of its batch norms move once.
        {n: b for n, b in model.backbone.named_buffers() if n.startswith(("bn1", "layer1"))},
        {n: b for n, b in plain.named_buffers() if n.startswith(("bn1", "layer1"))},
    )
    assert first.loss == 0
    assert first.loss.dtype == second.loss.dtype
    assert not first.output.requires_grad
    doubled = cut(lambda: begun().double(), 8, example=x.double())
    assert lg.local_backward(doubled, x.double(), y).losses[0].dtype == torch.float64


@pytest.mark.parametrize("form", ["branches", "pull"])
def test_a_copy_of_a_partly_frozen_unit_begins_as_it_and_trains_what_it_trains(form: str) -> None:
    model = cut(of_adapters, 16, coupling=lg.MAN(form=form))
    assert auxiliaries(model)[0].empty
    for auxiliary in auxiliaries(model)[1:]:
        (link,), (source,) = links_of(auxiliary), coupling_of(auxiliary).sources
        assert link.learnable is not None
        assert_same(dict(link.learnable.state_dict()), dict(source.module.state_dict()))
        assert trained(link.learnable) == trained(source.module) != set()
        if form == "branches":
            assert link.ema is not None
            assert not trained(link.ema)


@pytest.mark.parametrize("coupling", [*ALL_COUPLINGS[1:], lg.MAN(ema=False), lg.MAN(learnable_units=2)], ids=str)
def test_a_copy_of_a_frozen_unit_is_one_frozen_branch(coupling: lg.MAN) -> None:
    network = resnet()
    network.get_submodule("layer2").requires_grad_(False)
    model = cut(lambda: network, 8, coupling=coupling, blocks=["layer1.2", "layer2.2", "layer3.2"])
    link, source = links_of(auxiliaries(model)[0])[0], coupling_of(auxiliaries(model)[0]).sources[0]
    (branch,) = filter(None, (link.learnable, link.ema))
    assert link.scale is None
    assert not trained(branch)
    assert_same(dict(branch.state_dict()), dict(source.module.state_dict()))
    h = torch.randn(4, 16, 8, 8)
    assert torch.equal(link(h), source.module(h))
    assert auxiliaries(model)[1].empty


def test_augmented_heads_copy_frozen_units_with_their_values() -> None:
    model = cut(of_adapters, 16, method=lg.auglocal())
    copied = list(auxiliaries(model)[1].copies())
    assert copied
    for module, origin in copied:
        assert_same(dict(module.state_dict()), dict(origin.unit.module.state_dict()))
        assert trained(module) == trained(origin.unit.module)


def test_lora_trains_adapters_and_heads_alone() -> None:
    """ViT-Tiny with adapters of rank 4 beside each qkv: each branch that is trained has one adapter."""
    network, x = lora(), batch(size=16)[0]
    adapter, head = 4 * 192 + 4 * 3 * 192, 193 * 4
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 12 * adapter + head == 37_636
    for coupling, copies in ((None, 0), (lg.MAN(), 3), (lg.DeepMAN(), 9)):
        model = lg.localize(network, blocks=4, method=lg.dgl("0c1f"), coupling=coupling, example=x)
        boundary = model.blocks[0].boundary
        extra = sum(p.numel() for p in classifier("0c1f", boundary, model.task, width=192).parameters())
        counted = sum(p.numel() for group in lg.param_groups(model) for p in group["params"])
        assert counted == 37_636 + copies * adapter + 3 * extra
        assert f"trained: 37,636 of {sum(p.numel() for p in network.parameters()):,} parameters" in str(model)


def test_weights_of_infopro_stay_those_of_the_depth() -> None:
    plain, frozen = (cut(make, 8, method=lg.infopro()) for make in (resnet, begun))
    for a, b in zip(auxiliaries(plain)[1:], auxiliaries(frozen)[1:], strict=True):
        assert [t.weight for t in a.terms.values()] == [t.weight for t in b.terms.values()]


# What cannot be


def test_a_block_that_is_unfrozen_after_the_cut_is_refused() -> None:
    model = cut(begun, 8)
    model.blocks[0].requires_grad_(True)
    assert said(lg.local_backward, model, *batch()).startswith("block 0 was frozen when the network was cut")


def test_blocks_that_are_frozen_after_the_cut_are_told_of_once() -> None:
    model = local(lg.MAN(0.9))
    before = state(model.backbone)
    model.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"block 0 is frozen, and training its auxiliary changes nothing") as seen:
        lg.local_backward(model, *batch())
    assert seen[0].filename == __file__
    assert len(seen) == 1
    own = sgd(lg.param_groups(model))
    for _ in range(5):  # Warnings are errors here.
        lg.local_backward(model, *batch())
        own.step()
        own.zero_grad()
    assert_same({n: before[n] for n, _ in model.backbone.named_parameters()}, dict(model.backbone.named_parameters()))


def test_what_is_frozen_on_purpose_is_told_of_in_no_way() -> None:
    whole, part, asked = local(lg.MAN()), local(lg.MAN()), local(lg.MAN())
    whole.blocks[1].requires_grad_(False)
    whole.auxiliaries[1].requires_grad_(False)
    next(part.blocks[1].parameters()).requires_grad_(False)
    asked.blocks[0].requires_grad_(False)
    x, y = batch()
    for model in (whole, part):
        lg.local_backward(model, x, y)
    lg.local_backward(asked, x.requires_grad_(), y)
    assert x.grad is not None


def test_an_input_gets_no_gradient_from_a_frozen_block() -> None:
    x, y = batch()
    assert said(lg.local_backward, cut(begun, 8), x.requires_grad_(), y).startswith(
        "x requires a gradient, but block 0"
    )


def test_a_wholly_frozen_network_cannot_be_trained() -> None:
    model = cut(lambda: resnet().requires_grad_(False), 8)
    assert all(a.empty for a in auxiliaries(model))
    assert said(lg.local_backward, model, *batch()).startswith("every parameter is frozen")


# Memory


@pytest.mark.parametrize(("make", "size"), FROZEN, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("as_you_go", [False, True])
def test_the_memory_of_a_step_is_predicted(make: Callable[[], nn.Module], size: int, as_you_go: bool) -> None:
    model, (x, y) = cut(make, size, coupling=lg.MAN()), batch(size=size, classes=4)

    def optimizers(own: lg.LocalModel) -> list[torch.optim.Optimizer]:
        return optimizers_for(lg.param_groups(own), sgd, as_you_go=as_you_go)

    own = optimizers(model)
    training_step(model, own, x, y, step_as_you_go=as_you_go)
    step = lambda: training_step(model, own, x, y, step_as_you_go=as_you_go)  # noqa: E731
    measured = lg.measure_peak(step, model=model, optimizers=own)
    assert lg.predict_peak(model, len(x), optimizers, step_as_you_go=as_you_go).total == measured.total


def test_a_frozen_start_takes_less_memory_than_a_trained_one() -> None:
    def peak(make: Callable[[], nn.Module]) -> int:
        return lg.predict_peak(cut(make, 8), 64, lambda own: [sgd(lg.param_groups(own))]).total

    assert peak(begun) < 0.8 * peak(resnet)


@pytest.mark.parametrize("coupling", [None, lg.MAN()], ids=str)
def test_plans_have_cheap_frozen_blocks(coupling: lg.MAN | None) -> None:
    x = torch.zeros(32, 3, 16, 16)
    planner = lg.Planner(begun(), x, method=lg.dgl("0c1f"), coupling=coupling)
    found = planner.cut(["layer1.2", "layer2.1", "layer3.2"])
    exact = planner.exactly(found)
    assert found.lasting == pytest.approx(exact.lasting)
    assert found.peak == pytest.approx(exact.peak, rel=0.01)
    local = lg.localize(begun(), blocks=found.blocks, method=lg.dgl("0c1f"), coupling=coupling, example=x)
    slots = sum(p.numel() * 4 for group in lg.param_groups(local) for p in group["params"])
    assert found.lasting == slots + sum(t.numel() * t.element_size() for t in (*local.parameters(), *local.buffers()))
    whole = lg.Planner(resnet(), x, method=lg.dgl("0c1f"), coupling=coupling).cut(found.blocks)
    assert found.seconds < 0.8 * whole.seconds
    for plan in (planner.even(2), planner.even(4)):  # The block behind layer2.0 begins with a frozen unit.
        assert plan.peak == pytest.approx(planner.exactly(plan).peak, rel=0.01)
    fastest = planner.fastest(2**30, 2)
    assert math.isfinite(fastest.seconds)
    assert fastest.seconds <= planner.even(2).seconds


# Starting anew


@pytest.mark.parametrize("coupling", [lg.MANPlusPlus(lag=2), lg.DeepMAN(0.9), *RARE], ids=str)
@pytest.mark.parametrize(
    "method", [lg.dgl("0c1f"), pytest.param(lg.auglocal(), marks=pytest.mark.slow)], ids=lambda m: m.name
)
def test_refresh_starts_copies_as_localize_does(coupling: lg.MAN, method: lg.Method) -> None:
    for make, size in ((resnet, 8), (of_adapters, 16)):
        model, other = (cut(make, size, method=method, coupling=coupling) for _ in range(2))
        x, y = batch(size=size, classes=4)
        own = sgd(lg.param_groups(model))
        for _ in range(3):
            lg.local_backward(model, x, y)
            own.step()
        heads = {n: v for n, v in state(model.auxiliaries).items() if ".heads." in n}
        model.backbone.load_state_dict(other.backbone.state_dict())
        model.refresh()
        for (_, mine), (_, its) in zip(model.isolated, other.isolated, strict=True):
            for (a, origin), (b, _) in zip(mine.copies(), its.copies(), strict=True):
                if origin.fresh:
                    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]
                else:
                    assert_same(dict(a.state_dict()), dict(b.state_dict()))
                    assert_same(dict(a.state_dict()), dict(origin.unit.module.state_dict()))
            if mine.coupling is None or its.coupling is None:
                assert mine.empty
                continue
            left = {n: v for n, v in mine.coupling.state_dict().items() if n.endswith((".scale", ".turn"))}
            assert_same(left, {n: v for n, v in its.coupling.state_dict().items() if n in left})
            assert not mine.is_stale()
        if method.name == "dgl":
            assert_same(heads, {n: v for n, v in state(model.auxiliaries).items() if n in heads})


def losses_of(model: lg.LocalModel, steps: int) -> list[float]:
    """The losses of some steps on the same batches."""
    torch.manual_seed(3)
    own = sgd(lg.param_groups(model))
    losses = []
    for _ in range(steps):
        losses += [float(loss) for loss in lg.local_backward(model, *batch()).losses]
        own.step()
        own.zero_grad()
    return losses


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    "coupling",
    [
        lg.MAN(0.9, form="pull"),
        lg.DeepMAN(0.9, form="pull"),
        lg.DeepMAN(0.9, lag=1),
        lg.MANPlusPlus(0.9, lag=3, ema_every=2),
        lg.MAN(0.9, learnable_units=2, buffers=True),
    ],
    ids=str,
)
def test_a_refreshed_model_is_a_newly_localized_one(coupling: lg.MAN, recomputed: bool) -> None:
    model, other = (local(coupling, 3, lg.CifarResNet(14)) for _ in range(2))
    for one in (model, other):
        lg.recompute(one, units=recomputed, couplings=recomputed)
    losses_of(model, 4)
    model.backbone.load_state_dict(other.backbone.state_dict())
    model.refresh()
    # Heads keep their weights, and what is drawn is drawn again. All else is compared.
    drawn = {n: p for n, p in model.auxiliaries.named_parameters() if ".learnable." in n and coupling.form != "pull"}
    kept = {n: v for n, v in state(model.auxiliaries).items() if ".heads." in n}
    other.auxiliaries.load_state_dict(drawn | kept, strict=False)
    assert_same(state(model), state(other))
    assert losses_of(model, 4) == losses_of(other, 4)
    assert_same(state(model), state(other))


def test_a_learnable_branch_that_is_drawn_is_drawn_again() -> None:
    model = local(lg.MAN())
    learnable: Any = links_of(auxiliaries(model)[0])[0].learnable
    before = state(learnable)
    model.refresh()
    assert not torch.equal(before["conv1.weight"], learnable.conv1.weight)
    torch.manual_seed(3)
    model.refresh()
    once = state(learnable)
    torch.manual_seed(3)
    model.refresh()
    assert_same(once, state(learnable))
