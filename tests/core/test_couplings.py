"""Couplings against naive formulas: what they compute, how the average moves, who is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from small import (
    ALL,
    MOMENTUM,
    assert_same,
    auxiliaries,
    averages_of,
    batch,
    branches_of,
    build,
    coupling_of,
    links_of,
    resnet,
    said,
    state,
    vgg,
)
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.blocks import trace_units


def crossing(model: lg.LocalModel) -> list[Tensor]:
    """A tensor for each boundary."""
    return [torch.randn(4, *block.boundary.shape, dtype=torch.float64) for block in model.blocks[:-1]]


@pytest.mark.parametrize("coupling", [lg.MAN(), lg.MAN(ema=False), lg.MAN(learnable=False)])
def test_man_is_the_sum_of_its_branches(coupling: lg.MAN) -> None:
    model = build(coupling)
    for auxiliary, h, successor in zip(auxiliaries(model), crossing(model), model.blocks[1:], strict=True):
        (link,), (unit,) = links_of(auxiliary), coupling_of(auxiliary).sources
        assert (unit.name, unit.module) == (successor.names[0], successor[0])
        assert (link.learnable is not None, link.ema is not None) == (coupling.learnable, coupling.ema)
        branches = [copy.deepcopy(b) for b in (link.learnable, link.ema) if b is not None]
        wanted = branches[0](h) + branches[1](h) if len(branches) == 2 else branches[0](h)
        assert torch.equal(coupling_of(auxiliary)(h), wanted)


@pytest.mark.parametrize("make", ALL)
def test_a_block_learns_through_both_branches(make: type[lg.MAN]) -> None:
    model = build(make())
    auxiliary, h = auxiliaries(model)[0], crossing(model)[0].requires_grad_()
    z = h
    for link in links_of(auxiliary):
        learnable, ema = (copy.deepcopy(b) for b in branches_of(link))
        z = learnable(z) + ema(z)
    out = coupling_of(auxiliary)(h)
    assert torch.equal(out, z)
    got, wanted = (torch.autograd.grad(value.square().sum(), h)[0] for value in (out, z))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_man_plus_plus_weighs_its_branches_by_a_learned_scale() -> None:
    model = build(lg.MANPlusPlus())
    for auxiliary, h in zip(auxiliaries(model), crossing(model), strict=True):
        (link,) = links_of(auxiliary)
        assert isinstance(link.scale, nn.Parameter)
        assert link.scale.item() == 1
        with torch.no_grad():
            link.scale.fill_(1.7)
        learnable, ema = (copy.deepcopy(b) for b in branches_of(link))
        a, b = learnable(h), ema(h)
        out = coupling_of(auxiliary)(h)
        torch.testing.assert_close(out, 1.7 * a + 0.3 * b, rtol=1e-12, atol=1e-12)
        noise = torch.randn_like(out)
        (slope,) = torch.autograd.grad((out * noise).sum(), link.scale)
        torch.testing.assert_close(slope, ((a - b) * noise).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [lg.MAN, lg.MANPlusPlus])
def test_a_second_learnable_unit_stands_behind_the_sum(make: type[lg.MAN]) -> None:
    """As in MAN++'s published code for vision transformers: s LB_0(h) + (2 - s) EMA(h), then LB_1."""
    model = build(make(learnable_units=2))
    for auxiliary, h in zip(auxiliaries(model), crossing(model), strict=True):
        first, second = links_of(auxiliary)
        assert second.ema is None
        assert second.scale is None
        learnable, ema = (copy.deepcopy(b) for b in branches_of(first))
        alone = copy.deepcopy(second.learnable)
        assert alone is not None
        out = coupling_of(auxiliary)(h)
        assert torch.equal(out, alone(learnable(h) + ema(h)))
        sources = [u.name for u in coupling_of(auxiliary).sources]
        names = [name for block in model.blocks for name in block.names]
        assert sources == names[names.index(sources[0]) :][:2]
    before = [state(links_of(a)[1]) for a in auxiliaries(model)]
    lg.local_backward(model, *[t.double() if t.is_floating_point() else t for t in batch()])
    for auxiliary, weights in zip(auxiliaries(model), before, strict=True):
        link = links_of(auxiliary)[1]
        assert all(p.grad is not None for p in link.parameters())
        assert_same(*({k: v for k, v in s.items() if "weight" in k} for s in (weights, state(link))))  # none moves it


def test_deep_man_takes_three_units_of_a_network_without_stages() -> None:
    plain = trace_units(nn.Sequential(*(nn.Linear(6, 6) for _ in range(9))), torch.zeros(1, 6)).units
    assert [u.name for u in lg.DeepMAN().select(plain[2:])] == ["2", "4", "6"]
    assert [u.name for u in lg.DeepMAN().select(plain[7:])] == ["7"]
    staged = trace_units(resnet(20), torch.zeros(1, 3, 8, 8)).units
    assert [u.name for u in lg.DeepMAN().select(staged[8:])] == ["layer3.1"]


def test_deep_man_walks_a_path() -> None:
    model = build(lg.DeepMAN(), blocks=["layer1.0", "layer2.0"])
    wanted_paths = (["layer1.1", "layer2.0", "layer3.0"], ["layer2.1", "layer3.0"])
    for auxiliary, h, names in zip(auxiliaries(model), crossing(model), wanted_paths, strict=True):
        assert [u.name for u in coupling_of(auxiliary).sources] == names
        assert coupling_of(auxiliary)(h).shape == (4, 64, 2, 2)


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (1, ["layer2.0"]),
        (2, ["layer2.0", "layer3.0"]),
        (3, ["layer1.1", "layer2.0", "layer3.0"]),
        (4, ["layer1.1", "layer2.0", "layer2.2", "layer3.0"]),
        (99, [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3)][1:]),
    ],
)
def test_an_integer_depth_takes_that_many_units(depth: int, names: list[str]) -> None:
    downstream = trace_units(resnet(20), torch.zeros(1, 3, 8, 8)).units[2:]
    assert [u.name for u in lg.DeepMAN(depth=depth).select(downstream)] == names


def naive_average(average: list[Tensor], source: list[Tensor], momentum: float) -> None:
    for e, s in zip(average, source, strict=True):
        for i in range(e.numel()):
            e.view(-1)[i] = momentum * e.view(-1)[i] + (1 - momentum) * s.view(-1)[i]


@pytest.mark.parametrize("coupling", [lg.MAN(MOMENTUM), lg.MANPlusPlus(MOMENTUM), lg.DeepMAN(MOMENTUM)])
def test_the_average_after_n_steps_is_the_naive_one(coupling: lg.MAN) -> None:
    x, y = batch()
    backbone = vgg().double()
    model = lg.localize(backbone, blocks=3, method=lg.dgl("0c1f"), coupling=coupling, example=x)
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.5, momentum=0.9)
    pairs = [pair for auxiliary in auxiliaries(model) for pair in averages_of(auxiliary)]
    naive = [[p.detach().clone() for p in source.parameters()] for _, source in pairs]
    started = copy.deepcopy(naive)
    for _ in range(4):
        for average, (_, source) in zip(naive, pairs, strict=True):  # the sources as they are before the step
            naive_average(average, [p.detach() for p in source.parameters()], MOMENTUM)
        lg.local_backward(model, x.double(), y)
        optimizer.step()
        optimizer.zero_grad()
    for average, start, (ema, _) in zip(naive, started, pairs, strict=True):
        got = [p.detach() for p in ema.parameters()]
        torch.testing.assert_close(got, average, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(got[0], start[0], rtol=1e-3)


@pytest.mark.parametrize("make", ALL)
def test_momentum_0_is_the_source_and_1_never_moves(make: type[lg.MAN]) -> None:
    for momentum in (0, 1):
        for auxiliary in auxiliaries(build(make(momentum=momentum), double=False)):
            coupling = coupling_of(auxiliary)
            for ema, source in averages_of(auxiliary):
                before = copy.deepcopy(ema)
                with torch.no_grad():
                    for p in source.parameters():
                        p.mul_(-1.7).add_(0.3)
                coupling.update()
                wanted = source if momentum == 0 else before
                assert_same(dict(ema.named_parameters()), dict(wanted.named_parameters()))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_average_starts_at_its_source_and_the_learnable_copy_does_not(make: type[lg.MAN], loaded: bool) -> None:
    backbone = resnet(20)
    if loaded:
        with torch.no_grad():
            other = {k: v + 0.5 if v.is_floating_point() else v + 3 for k, v in backbone.state_dict().items()}
        backbone.load_state_dict(other)
    model = lg.localize(backbone, blocks=4, method=lg.dgl("0c1f"), coupling=make(), example=batch()[0])
    for auxiliary in auxiliaries(model):
        for ema, source in averages_of(auxiliary):
            assert_same(ema.state_dict(), source.state_dict())
        for link, source in zip(links_of(auxiliary), coupling_of(auxiliary).sources, strict=True):
            drawn, first = (m.get_parameter("conv1.weight") for m in (branches_of(link)[0], source.module))
            assert not torch.equal(drawn, first)


@pytest.mark.parametrize("buffers", [False, True])
def test_buffers_are_averaged_when_asked(buffers: bool) -> None:
    source, average = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    assert source.running_mean is not None
    assert average.running_mean is not None
    assert average.num_batches_tracked is not None
    source(torch.randn(8, 2, 3, 3) + 4)
    mean, counted = source.running_mean.clone(), 1
    lg.update_ema(average, source, 0.75, buffers=buffers)
    torch.testing.assert_close(average.running_mean, 0.25 * mean if buffers else torch.zeros(2))
    assert average.num_batches_tracked.item() == (counted if buffers else 0)
    auxiliary = auxiliaries(build(lg.MAN(momentum=0, buffers=buffers), double=False))[0]
    coupling_of(auxiliary).sources[0].module.get_buffer("bn1.running_mean").fill_(7)
    coupling_of(auxiliary).update()
    moved = branches_of(links_of(auxiliary)[0])[1].get_buffer("bn1.running_mean")
    assert bool((moved == 7).all()) == buffers


@pytest.mark.parametrize("make", ALL)
def test_averages_are_never_trained_and_share_nothing_with_the_backbone(make: type[lg.MAN]) -> None:
    model = build(make(), double=False)
    lg.local_backward(model, *batch())
    trained = {id(p) for group in lg.param_groups(model) for p in group["params"]}
    own = {p.data_ptr() for p in model.backbone.parameters()}
    for link in (link for a in auxiliaries(model) for link in links_of(a)):
        learnable, ema = branches_of(link)
        for p in ema.parameters():
            assert not p.requires_grad
            assert p.grad is None
            assert id(p) not in trained
        assert all(id(p) in trained and p.grad is not None for p in learnable.parameters())
        assert not own & {p.data_ptr() for branch in (learnable, ema) for p in branch.parameters()}
        assert (link.scale is not None) == (make is lg.MANPlusPlus)
        assert link.scale is None or id(link.scale) in trained


def test_a_switched_off_branch_costs_no_parameters() -> None:
    def count(coupling: lg.MAN) -> int:
        return sum(p.numel() for p in build(coupling, double=False).auxiliaries.parameters())

    assert count(lg.MAN(ema=False)) == count(lg.MAN(learnable=False)) < count(lg.MAN())
    assert count(lg.MAN(form="pull")) == count(lg.MAN(ema=False))


def naive_pull(model: lg.LocalModel, batches: list[tuple[Tensor, Tensor]], lr: float, momentum: float) -> None:
    """The same steps without the engine: the copy's own gradient step, then the move towards its source."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for x, y in batches:
        grads: dict[int, Tensor] = {}
        h = x
        for k, block in enumerate(model.blocks):
            h = block(h)
            logits = h if k == len(model.auxiliaries) else auxiliaries(model)[k](h)["classifier"]
            loss = nn.functional.cross_entropy(logits, y)
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            grads |= {i: g for i, g in enumerate(found) if g is not None}
            h = h.detach()
        with torch.no_grad():
            for i, g in grads.items():
                trained[i].sub_(lr * g)
            for auxiliary in auxiliaries(model):
                for link, source in zip(links_of(auxiliary), coupling_of(auxiliary).sources, strict=True):
                    assert link.learnable is not None
                    for c, s in zip(link.learnable.parameters(), source.module.parameters(), strict=True):
                        c.copy_(momentum * c + (1 - momentum) * s)


@pytest.mark.parametrize("make", [lg.MAN, lg.DeepMAN])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pull_moves_the_copy_after_each_of_its_own_steps(make: type[lg.MAN], accumulate: int) -> None:
    x = torch.randn(4, 4, 3, 8, 8, dtype=torch.float64)
    y = torch.randint(0, 10, (4, 4))
    backbone = nn.Sequential(*[m for m in vgg() if not isinstance(m, nn.BatchNorm2d)]).double()  # so halves add up
    model = lg.localize(
        backbone, blocks=3, method=lg.dgl("0c1f"), coupling=make(momentum=MOMENTUM, form="pull"), example=x[0]
    )
    for auxiliary in auxiliaries(model):
        for link, source in zip(links_of(auxiliary), coupling_of(auxiliary).sources, strict=True):
            assert link.ema is None
            assert link.learnable is not None
            assert_same(link.learnable.state_dict(), source.module.state_dict())
    naive = copy.deepcopy(model)
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.1)
    for step in range(4):
        for part in range(accumulate):
            half = slice(part, None, accumulate)
            assert len(list(lg.block_steps(model, x[step][half], y[step][half], scale=1 / accumulate))) == 3
        model.move_averages()
        optimizer.step()
        optimizer.zero_grad()
        model.move_averages(stepped=True)
    naive_pull(naive, list(zip(x, y, strict=True)), 0.1, MOMENTUM)
    for (name, got), wanted in zip(model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12, msg=name)


# What is refused


BOTH = (lg.MAN, lg.DeepMAN)


@pytest.mark.parametrize(
    ("makes", "settings", "message"),
    [
        (BOTH, {"momentum": -0.1}, "momentum must lie between 0 and 1, not -0.1"),
        (BOTH, {"momentum": 1.5}, "momentum must lie between 0 and 1, not 1.5"),
        (BOTH, {"learnable": False, "ema": False}, "is coupling none"),
        (BOTH, {"form": "push"}, "form must be branches or pull, not 'push'"),
        (BOTH, {"form": "pull", "ema": False}, "has one branch"),
        (BOTH, {"lag": -1}, "not -1 and 1"),
        (BOTH, {"ema_every": 0}, "not 0 and 0"),
        (BOTH, {"lag": 1, "form": "pull"}, "leave lag and ema_every out"),
        (BOTH, {"ema_every": 2, "ema": False}, "leave lag and ema_every out"),
        (BOTH, {"learnable_units": 0}, "takes 1 unit or more, not 0"),
        (BOTH, {"learnable_units": 2, "learnable": False}, "takes 1 unit or more, not 2"),
        ([lg.DeepMAN], {"depth": 0}, "at least 1, not 0"),
        ([lg.DeepMAN], {"learnable_units": 2}, "give depth instead"),
        ([lg.MAN], {"form": "pull", "learnable_units": 2}, "has one branch"),
        ([lg.MANPlusPlus], {"ema": False}, "weighs its two branches"),
        ([lg.MANPlusPlus], {"form": "pull"}, "has one branch"),
    ],
)
def test_impossible_couplings_are_refused(makes: Sequence[type[lg.MAN]], settings: dict, message: str) -> None:
    for make in makes:
        assert message in said(make, **settings)
