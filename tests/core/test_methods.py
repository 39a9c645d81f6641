"""One suite over methods x couplings x numbers of blocks, then what is each paper's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import ALL_COUPLINGS, auxiliaries, batch, chain, coupling_of, gradients, resnet, said, sgd, vgg
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.methods import METHODS

LOCAL: dict[str, Callable[[], lg.Method]] = {name: make for name, make in METHODS.items() if name != "bp"}
LOCAL["infopro contrast"] = lambda: lg.infopro(contrast=True)
LOCAL["greedy"] = lambda: lg.dgl("0c1f")


def bp_gradients(backbone: nn.Module, x: Tensor, y: Tensor) -> set[str]:
    alone = copy.deepcopy(backbone)
    nn.functional.cross_entropy(alone(x), y).backward()
    return set(gradients(alone))


def check(backbone: nn.Module, model: lg.LocalModel, x: Tensor, y: Tensor, silent: int | None) -> None:
    """One step. Every parameter that BP trains gets a gradient, each auxiliary parameter too, and block k's loss gives
    none to another block. silent: the block whose auxiliary's weights are 0."""
    learned = bp_gradients(backbone, x, y)
    trained = {p: k for k in range(len(model.blocks)) for p in model.members(k)}
    assert set(trained) == {p for p in model.parameters() if p.requires_grad}
    touched: dict[nn.Parameter, tuple[int, int]] = {}
    losses: list[Tensor] = []
    for done in lg.block_steps(model, x, y):
        now = {p: (id(p.grad), p.grad._version) for p in trained if p.grad is not None}
        assert all(trained[p] == done.block for p in now.keys() - touched.keys())
        assert {p: v for p, v in now.items() if p in touched} == touched  # nothing was added to the others
        touched.update(now)
        losses.append(done.loss)
    assert len(losses) == len(model.blocks)
    assert all(bool(loss.isfinite()) for loss in losses)
    names = dict(model.backbone.named_parameters())
    assert {name for name, p in names.items() if p in touched} == learned
    missing = [n for n, p in model.auxiliaries.named_parameters() if p.requires_grad and p not in touched]
    assert not missing
    for name, p in names.items():
        if p.ndim > 1:
            assert p.grad is not None
            assert bool(p.grad.any()) == (trained[p] != silent), name


@pytest.mark.parametrize(("blocks", "build"), [(2, resnet), (10, resnet), (4, vgg)])
@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
@pytest.mark.parametrize("method", LOCAL)
def test_every_method_with_every_coupling(method: str, coupling: lg.MAN | None, blocks: int, build: Any) -> None:
    x, y = batch()
    y[1] = y[0]  # A positive pair for the contrastive loss.
    backbone = build()
    model = lg.localize(backbone, blocks=blocks, method=LOCAL[method](), coupling=coupling, example=x)
    assert len(model.blocks) == blocks
    silent = blocks - 2 if method.startswith("infopro") and blocks > 2 else None
    check(backbone, model, x, y, silent)


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
@pytest.mark.parametrize("method", ["dgl", "predsim", "infopro"])
def test_vectors_cross_as_well_as_maps(method: str, coupling: lg.MAN | None) -> None:
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    layers = [module for _ in range(3) for module in (nn.Linear(6, 6), nn.Tanh())]
    backbone = nn.Sequential(*layers, nn.Linear(6, 3))
    if method == "infopro":  # which reconstructs images
        x, backbone = x.view(4, 6, 1, 1), nn.Sequential(nn.Flatten(), *backbone)
    model = lg.localize(backbone, blocks=3, method=LOCAL[method](), coupling=coupling, example=x)
    check(backbone, model, x, y, 1 if method == "infopro" else None)


@pytest.mark.parametrize("method", LOCAL)
def test_a_blocks_own_auxiliary_alone_decides_its_gradient(method: str) -> None:
    x, y = batch()
    y[1] = y[0]
    model = lg.localize(resnet(20), blocks=4, method=LOCAL[method](), coupling=lg.MAN(), example=x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in auxiliaries(other)[1].heads.parameters():
            p.add_(torch.randn_like(p))
    for each in (model, other):
        lg.local_backward(each, x, y)
    for k in range(4):
        same = [torch.equal(a, b) for a, b in zip(grads_of(model.blocks[k]), grads_of(other.blocks[k]), strict=True)]
        assert not any(same) if k == 1 else all(same)


def grads_of(block: lg.Block) -> list[Tensor]:
    return [p.grad for p in block.parameters() if p.grad is not None]


def kinds(head: nn.Module) -> tuple[int, int]:
    return tuple(sum(isinstance(m, kind) for m in head.modules()) for kind in (nn.Conv2d, nn.Linear))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("method", ["dgl", "predsim", "infopro", "auglocal"])
@pytest.mark.parametrize("coupling", [None, lg.MAN(), lg.DeepMAN()])
def test_a_named_head_wins_over_the_methods_and_the_couplings(method: str, coupling: lg.MAN | None) -> None:
    x = batch()[0]
    # The last boundary: behind it auglocal has no unit left beyond the coupling's copy.
    model = lg.localize(
        resnet(20), blocks=["layer1.0", "layer3.1"], method=METHODS[method]("2c2f"), coupling=coupling, example=x
    )
    head = auxiliaries(model)[-1].heads["classifier"]
    copied = 2 if method == "auglocal" and coupling is None else 0
    assert kinds(head) == (2 + copied, 2)


def test_deep_man_prefers_pool_and_linear_and_man_the_methods_own() -> None:
    x = batch()[0]
    for coupling, wanted in ((lg.MAN(), (3, 4)), (lg.DeepMAN(), (0, 1))):
        model = lg.localize(resnet(20), blocks=2, method=lg.dgl(), coupling=coupling, example=x)
        assert kinds(auxiliaries(model)[0].heads["classifier"]) == wanted
    head = auxiliaries(model)[0].heads["classifier"]  # The same as greedy learning's.
    assert [type(m).__name__ for m in head.children()] == ["AvgPool2d", "Flatten", "Linear"]


def test_label_smoothing_reaches_the_auxiliaries() -> None:
    x, y = batch()
    model = lg.localize(resnet(20), blocks=2, method=lg.dgl("0c1f"), example=x)
    plain = lg.local_backward(model, x, y)
    task = lg.Classification(10, label_smoothing=0.9)
    smooth = lg.localize(model.backbone, blocks=2, method=lg.dgl("0c1f"), example=x, task=task)
    smooth.auxiliaries.load_state_dict(model.auxiliaries.state_dict())
    logits = auxiliaries(smooth)[0](smooth.blocks[0](x))["classifier"]
    wanted = nn.functional.cross_entropy(logits, y, label_smoothing=0.9)
    out = lg.local_backward(smooth, x, y)
    assert float(out.losses[0]) == pytest.approx(wanted.item(), rel=1e-5)
    assert all(float(a) != pytest.approx(float(b), rel=1e-3) for a, b in zip(plain.losses, out.losses, strict=True))


@pytest.mark.parametrize("beta", [0.99, 0.25])
def test_predsim_weighs_matching_by_beta(beta: float) -> None:
    x, y = batch()
    model = lg.localize(resnet(20), blocks=3, method=lg.predsim(beta=beta), example=x)
    out = lg.local_backward(model, x, y)
    for loss, parts in zip(out.losses[:-1], out.parts, strict=False):
        wanted = (1 - beta) * float(parts["classifier"]) + beta * float(parts["similarity"])
        assert float(loss) == pytest.approx(wanted, rel=1e-5)


def weights_of(model: lg.LocalModel) -> list[tuple[float, float]]:
    return [(a.terms["decoder"].weight, a.terms["classifier"].weight) for a in auxiliaries(model)]


def test_infopros_weights_are_ramped_by_block_or_given() -> None:
    x, y = batch()
    ramped = lg.localize(resnet(32), blocks=16, method=lg.infopro(), example=x)
    assert weights_of(ramped)[0] == (5, 0.5)
    assert weights_of(ramped)[14] == (0, 0)
    assert weights_of(ramped)[7] == pytest.approx((2.5, 0.25))
    assert weights_of(lg.localize(resnet(20), blocks=2, method=lg.infopro(), example=x)) == [(5, 0.5)]
    own = [(1.0, 2.0), (3.0, 4.0)]
    given = lg.localize(resnet(20), blocks=3, method=lg.infopro(weights=own), example=x)
    assert weights_of(given) == own
    out = lg.local_backward(given, x, y)
    for k, (reconstruct, classify) in enumerate(own):
        wanted = reconstruct * float(out.parts[k]["decoder"]) + classify * float(out.parts[k]["classifier"])
        assert float(out.losses[k]) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UserError, match="infopro got 2 pairs of weights for 3 auxiliaries"):
        lg.localize(resnet(20), blocks=4, method=lg.infopro(weights=own), example=x)


@pytest.mark.parametrize("head", [None, "dgl", "0c1f", "2c2f"])
def test_infopro_contrasts_the_components_of_any_head(head: str | None) -> None:
    x, y = batch()
    model = lg.localize(resnet(20), blocks=2, method=lg.infopro(head, contrast=True, features=24), example=x)
    (auxiliary,) = auxiliaries(model)
    assert auxiliary(model.blocks[0](x))["classifier"].shape == (4, 24)
    assert bool(lg.local_backward(model, x, y).losses[0].isfinite())


@pytest.mark.parametrize("method", [lg.dgl("1c2g"), lg.infopro("1c2g", contrast=True), lg.auglocal("1c2g")])
def test_an_unknown_head_is_refused_when_it_is_built(method: lg.Method) -> None:
    with pytest.raises(UserError, match="unknown head '1c2g': did you mean '1c2f'"):
        lg.localize(resnet(20), blocks=2, method=method, example=batch()[0])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lg.predsim, {"beta": 2}, "beta must lie between 0 and 1, not 2"),
        (lg.infopro, {"temperature": 0}, "temperature must be above 0, not 0"),
        (lg.auglocal, {"depth": 0}, "at least 1 unit and a shrink from 0 to 1, not 0 and 0.5"),
        (lg.Classification, {"classes": 10, "label_smoothing": 2.0}, "from 0 to below 1, not 2.0"),
        (lg.Classification, {"classes": 0}, "at least 2 classes, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    assert message in said(make, **settings)


def test_infopro_recovers_images_from_the_normalisation() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    images = torch.rand(4, 3, 8, 8)
    x = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    method = lg.infopro(mean=mean, std=std)
    torch.testing.assert_close(method.images(x), images)
    assert float(method.images(100 * x).max()) == 1  # never beyond what an image can hold
    model = lg.localize(resnet(20), blocks=3, method=method, example=x)
    twin = copy.deepcopy(model)
    y = batch()[1]
    found, given = lg.local_backward(model, x, y), lg.local_backward(twin, x, y, images=images)
    assert float(found.parts[0]["decoder"]) == pytest.approx(float(given.parts[0]["decoder"]), rel=1e-5)
    other = lg.local_backward(twin, x, y, images=1 - images)
    assert float(other.parts[0]["decoder"]) != pytest.approx(float(given.parts[0]["decoder"]), rel=1e-3)


def test_normalised_inputs_of_infopro_without_mean_and_std_are_warned_of_once() -> None:
    x, y = batch()
    for method, inputs, warned in (
        (lg.infopro("1c1f"), x, True),
        (lg.infopro("1c1f"), x.clamp(-0.01, 1.01), False),
        (lg.infopro("1c1f", mean=(0.5,) * 3, std=(0.25,) * 3), x, False),
        (lg.dgl("1c1f"), x, False),
    ):
        model = lg.localize(resnet(), blocks=3, method=method, example=x)
        lg.predict_peak(model, 4, lambda own: sgd(lg.param_groups(own)))
        for count in (int(warned), 0):  # The second step says nothing.
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                lg.local_backward(model, inputs.clone().requires_grad_(), y)
            assert ["give infopro the mean=... and std=..." in str(w.message) for w in said] == [True] * count
    images = lg.localize(resnet(), blocks=3, method=lg.infopro("1c1f"), example=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lg.local_backward(images, x, y, images=x.sigmoid())


def test_infopro_on_large_images_has_the_imagenet_auxiliaries() -> None:
    x, y = batch(2, 128)
    model = lg.localize(lg.build("torchvision:resnet18", classes=10), blocks=4, method=lg.infopro(), example=x)
    assert weights_of(model) == [(5, 0.75)] * 3
    for auxiliary, block in zip(auxiliaries(model), model.blocks, strict=False):
        widths = [c.out_channels for c in auxiliary.heads["classifier"].modules() if isinstance(c, nn.Conv2d)]
        assert widths == [block.boundary.channels // 4, 256, 512, 2048]
        decoded = [c.out_channels for c in auxiliary.heads["decoder"].modules() if isinstance(c, nn.Conv2d)]
        assert decoded[-3:] == [32, 12, 3] if len(decoded) > 3 else [12, 3]
    out = lg.local_backward(model, x, y)
    assert all(bool(loss.isfinite()) for loss in out.losses)
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.members(0) if p.ndim > 1)


def copied(auxiliary: lg.Auxiliary) -> int:
    """Units in the head, besides its own end."""
    return len(list(auxiliary.heads["classifier"].children())) - 1


def test_auglocals_depth_shrinks_towards_the_end() -> None:
    x = batch()[0]
    model = lg.localize(resnet(56), blocks=28, method=lg.auglocal(depth=6), example=x)
    depths = [copied(a) for a in auxiliaries(model)]
    assert depths[0] == 6
    assert depths[24:] == [3, 2, 1]  # As many as are left.
    assert depths == sorted(depths, reverse=True)
    assert depths[15] == round(6 - 3 * 15 / 26)
    steady = lg.localize(resnet(56), blocks=5, method=lg.auglocal(depth=5, shrink=0), example=x)
    assert {copied(a) for a in auxiliaries(steady)} == {5}


def test_auglocal_always_takes_the_units_that_change_the_shape() -> None:
    x = batch()[0]
    model = lg.localize(resnet(20), blocks=["stem", "layer1.2", "layer2.0"], method=lg.auglocal(depth=1), example=x)
    assert [copied(a) for a in auxiliaries(model)] == [2, 2, 1]
    for auxiliary in auxiliaries(model):
        head = auxiliary.heads["classifier"]
        last = [m for m in head.modules() if isinstance(m, nn.Linear)][-1]
        assert last.in_features == 64


def test_auglocal_draws_its_units_anew() -> None:
    x, _ = batch()
    model = lg.localize(resnet(20), blocks=2, method=lg.auglocal(), example=x)
    own = {tuple(p.flatten()[:4].tolist()) for p in model.backbone.parameters() if p.ndim == 4}
    drawn = {tuple(p.flatten()[:4].tolist()) for p in model.auxiliaries.parameters() if p.ndim == 4}
    assert drawn
    assert not own & drawn


def test_auglocal_with_nothing_left_is_pool_and_linear() -> None:
    x, y = batch()
    # The coupling copies the only unit beyond the boundary.
    model = lg.localize(resnet(20), blocks=["layer3.1"], method=lg.auglocal(), coupling=lg.MAN(), example=x)
    (auxiliary,) = auxiliaries(model)
    assert [u.name for u in coupling_of(auxiliary).sources] == ["layer3.2"]
    assert kinds(auxiliary.heads["classifier"]) == (0, 1)
    assert lg.local_backward(model, x, y).logits.shape == chain(model, x).shape


def test_inputs_of_infopro_get_the_gradient_of_the_first_block_alone() -> None:
    """The images that decoders compare with are made of the inputs, but they are targets."""
    x, y = batch()
    method = lg.infopro("1c1f", mean=(0.5,) * 3, std=(0.25,) * 3)
    model = lg.localize(resnet().double(), blocks=4, method=method, example=x.double())
    x = x.double().requires_grad_()
    other = x.detach().clone().requires_grad_()
    loss = lg.as_loss(copy.deepcopy(model), x, y).loss
    loss.backward()
    first, images = auxiliaries(model)[0], (other.detach() * 0.25 + 0.5).clamp(0, 1)
    first.total(first.losses(first(model.blocks[0](other)), y, images)).backward()
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-14)
