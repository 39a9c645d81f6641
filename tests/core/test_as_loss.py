"""One loss for K passes: the gradients and memory of `local_backward`, and all that PyTorch does with a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import ALL_COUPLINGS, assert_same, batch, gradients, local, resnet, said, sgd, state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import localgrad as lg


def double(coupling: lg.MAN | None = None, blocks: int = 4) -> lg.LocalModel:
    return local(coupling, blocks, resnet(20).double())


def images(count: int = 4) -> tuple[Tensor, Tensor]:
    x, y = batch(count)
    return x.double(), y


def times(factor: float, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: factor * g for name, g in grads.items()}


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_steps_are_those_of_local_backward_bit_for_bit(coupling: lg.MAN | None, blocks: int) -> None:
    model = double(coupling, blocks)
    other = copy.deepcopy(model)
    ours, theirs = sgd(lg.param_groups(model)), sgd(lg.param_groups(other))
    for _ in range(3):
        x, y = images()
        out, wanted = lg.as_loss(model, x, y), lg.local_backward(other, x, y)
        assert not gradients(model)  # until the trainer's backward
        out.loss.backward()
        assert out.loss.item() == torch.stack(wanted.losses).sum().item()
        assert torch.equal(out.logits, wanted.logits)
        assert all(torch.equal(a, b) for a, b in zip(out.losses, wanted.losses, strict=True))
        assert [part.keys() for part in out.parts] == [part.keys() for part in wanted.parts]
        assert not any(t.requires_grad for t in (*out.losses, out.logits))
        assert_same(gradients(model), gradients(other))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert_same(model.state_dict(), other.state_dict())


def test_what_is_done_to_the_loss_reaches_the_gradients() -> None:
    model, (x, y) = double(lg.MAN()), images()
    plain = copy.deepcopy(model)
    lg.local_backward(plain, x, y)
    norm = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    (lg.as_loss(model, x, y).loss / 3 + 0.5 * norm).backward()
    wanted = {n: gradients(plain)[n] / 3 + p for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_two_losses_before_one_backward_and_gradients_from_before_add_up() -> None:
    model, (x, y) = double(), images()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()  # frozen, so that both losses are the same
    plain = copy.deepcopy(model)
    lg.local_backward(plain, x, y)
    once = gradients(plain)
    first, second = lg.as_loss(model, x, y), lg.as_loss(model, x, y)
    (first.loss + second.loss).backward()
    assert_same(gradients(model), times(2, once))
    lg.as_loss(model, x, y).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 3 * once[name], rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_accumulated_losses_are_the_loop_that_moves_averages_once(coupling: lg.MAN | None) -> None:
    model = double(coupling)
    other = copy.deepcopy(model)
    ours, theirs = sgd(lg.param_groups(model)), sgd(lg.param_groups(other))
    ours.register_step_pre_hook(lambda *_: model.move_averages())
    ours.register_step_post_hook(lambda *_: model.move_averages(stepped=True))
    for _ in range(2):
        x, y = images(8)
        for half in (slice(4), slice(4, 8)):
            (lg.as_loss(model, x[half], y[half], move_averages=False).loss / 2).backward()
            for _ in lg.block_steps(other, x[half], y[half], scale=0.5):
                pass
        other.move_averages()
        assert_same(gradients(model), gradients(other))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        other.move_averages(stepped=True)
        assert_same(model.state_dict(), other.state_dict())


def test_parts_of_a_batch_recomputation_and_frozen_parameters_give_the_same_gradients() -> None:
    model, (x, y) = double(lg.MAN()), images(8)
    lg.recompute(model, couplings=True)
    model.accumulate = 3
    model.blocks[1][0].requires_grad_(False)
    model.auxiliaries[0].requires_grad_(False)
    plain = copy.deepcopy(model)
    lg.local_backward(plain, x, y)
    lg.as_loss(model, x, y).loss.backward()
    assert gradients(model).keys() == gradients(plain).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(plain)[name], rtol=1e-12, atol=1e-14, msg=name)


class Words(nn.Module):
    """Its first layer has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, sparse=True)
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.words(x).mean(1))


@pytest.mark.parametrize("parts", [1, 2])
def test_sparse_gradients_stay_sparse(parts: int) -> None:
    x, y = torch.randint(20, (4, 3)), torch.arange(4)
    model = lg.localize(Words().double(), blocks=2, method=lg.dgl("0c1f"), example=x)
    model.accumulate = parts
    plain = copy.deepcopy(model)
    lg.local_backward(plain, x, y)
    lg.as_loss(model, x, y).loss.backward()
    assert gradients(model)["backbone.words.weight"].is_sparse
    dense = [{n: g.to_dense() for n, g in gradients(m).items()} for m in (model, plain)]
    assert_same(dense[0], dense[1])


def test_inputs_get_their_gradient_once_the_loss_goes_back() -> None:
    model, (x, y) = double(), images()
    plain = copy.deepcopy(model)
    stem, other = (nn.Conv2d(3, 3, 1).double() for _ in range(2))
    other.load_state_dict(stem.state_dict())
    lg.local_backward(plain, other(x), y)
    loss = lg.as_loss(model, stem(x), y).loss
    assert stem.weight.grad is None
    loss.backward()
    assert_same(gradients(stem), gradients(other))
    assert_same(gradients(model), gradients(plain))


class Tempered(nn.Module):
    """A criterion that learns a temperature, and holds a learned tensor where nobody looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        shift = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        self.shifts = {"of classes": shift}

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy((output + self.shifts["of classes"]) / self.heat, y)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_criterion_that_learns_gets_its_gradients(parts: int) -> None:
    x, y = images()
    found = []
    for step in (lg.local_backward, lambda *args: (lg.as_loss(*args).loss / 4).backward()):
        torch.manual_seed(0)
        loss = Tempered()
        model = lg.localize(resnet().double(), blocks=3, method=lg.dgl("0c1f"), example=x, criterion=loss)
        model.accumulate = parts
        step(model, x, y)
        found.append([loss.heat.grad, loss.shifts["of classes"].grad])
    for whole, quarter in zip(*found, strict=True):
        assert whole is not None
        assert whole.any()
        torch.testing.assert_close(quarter, whole / 4, rtol=1e-12, atol=1e-15)


def test_hooks_of_parameters_run_once_when_the_loss_goes_back() -> None:
    model, (x, y) = double(), images()
    plain = copy.deepcopy(model)
    weight = model.backbone.get_parameter("layer1.0.conv1.weight")
    weight.register_hook(lambda g: 2 * g)
    ran: list[Tensor] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(ran.append)
    loss = lg.as_loss(model, x, y).loss
    assert not ran
    loss.backward()
    lg.local_backward(plain, x, y)
    assert len(ran) == len(gradients(plain))
    wanted = gradients(plain)
    wanted["backbone.layer1.0.conv1.weight"] *= 2
    assert_same(gradients(model), wanted)


def test_optimizers_that_step_in_the_backward_pass() -> None:
    model, (x, y) = double(), images()
    plain = copy.deepcopy(model)
    each = {p: sgd([p]) for p in model.parameters() if p.requires_grad}

    def step(parameter: Tensor) -> None:
        each[parameter].step()  # pyright: ignore[reportArgumentType]
        parameter.grad = None

    for parameter in each:
        parameter.register_post_accumulate_grad_hook(step)
    whole = sgd(lg.param_groups(plain))
    for _ in range(2):
        lg.as_loss(model, x, y).loss.backward()
        lg.local_backward(plain, x, y)
        whole.step()
        whole.zero_grad()
        assert_same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("enabled", [False, True])
def test_a_scaler_of_losses_and_clipping_work_as_ever(enabled: bool) -> None:
    model, (x, y) = local(lg.MAN()), batch()
    plain = copy.deepcopy(model)
    optimizers = sgd(lg.param_groups(model)), sgd(lg.param_groups(plain))
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)  # pyright: ignore[reportPrivateImportUsage]
    scaler.scale(lg.as_loss(model, x, y).loss).backward()
    scaler.unscale_(optimizers[0])
    lg.local_backward(plain, x, y)
    assert_same(gradients(model), gradients(plain))  # The scale is a power of two.
    for m in (model, plain):
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    scaler.step(optimizers[0])
    scaler.update()
    optimizers[1].step()
    assert_same(model.state_dict(), plain.state_dict())


def test_an_enclosing_autocast_is_that_of_each_block() -> None:
    x, y = batch(8, 16)
    model = lg.localize(resnet(20), blocks=4, method=lg.dgl("1c1f"), coupling=lg.MAN(), example=x)
    plain = copy.deepcopy(model)
    wanted = lg.local_backward(plain, x, y, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = lg.as_loss(model, x, y)
        assert torch.is_autocast_enabled("cpu")
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert torch.equal(out.loss, torch.stack(wanted.losses).sum())
    assert_same(gradients(model), gradients(plain))

    model.zero_grad()

    def enclosed() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            lg.as_loss(model, x, y).loss.backward()
        model.zero_grad()

    def alone() -> None:
        lg.local_backward(model, x, y, autocast=torch.bfloat16)
        model.zero_grad()

    assert lg.measure_peak(enclosed).total <= 1.02 * lg.measure_peak(alone).total


@pytest.mark.parametrize(
    ("coupling", "blocks", "parts"),
    [(None, 2, 1), (None, 4, 1), (lg.MAN(), 2, 1), (lg.MAN(), 4, 1), (lg.MAN(), 4, 2)],
)
def test_the_peak_is_that_of_local_backward(coupling: lg.MAN | None, blocks: int, parts: int) -> None:
    x, y = batch(16, 16)
    model = lg.localize(resnet(32), blocks=blocks, method=lg.dgl("1c1f"), coupling=coupling, example=x)
    model.accumulate = parts
    plain = resnet(32)
    optimizer, whole = sgd(lg.param_groups(model)), sgd(plain.parameters())

    def by_loss() -> None:
        lg.as_loss(model, x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def by_engine() -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    def by_backpropagation() -> None:
        nn.functional.cross_entropy(plain(x), y).backward()
        whole.step()
        whole.zero_grad()

    by_loss()
    by_backpropagation()
    ours, theirs, exact = (lg.measure_peak(step).total for step in (by_loss, by_engine, by_backpropagation))
    assert abs(ours - theirs) <= 0.02 * theirs
    assert ours < exact


def test_a_loss_goes_back_once_and_not_after_a_step() -> None:
    model, (x, y) = double(), images()
    optimizer = sgd(lg.param_groups(model))
    loss = lg.as_loss(model, x, y).loss
    later = lg.as_loss(model, x, y).loss
    loss.backward(retain_graph=True)
    assert "call as_loss again for each backward()" in said(loss.backward)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()
    loss = lg.as_loss(model, x, y).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


# Mistakes


X, Y = images()


def in_evaluation(model: lg.LocalModel) -> Any:
    model.eval()
    return lg.as_loss(model, X, Y)


def backbone_in_evaluation(model: lg.LocalModel) -> Any:
    model.backbone.eval()
    return lg.as_loss(model, X, Y)


@torch.no_grad()
def without_gradients(model: lg.LocalModel) -> Any:
    return lg.as_loss(model, X, Y)


@torch.inference_mode()
def in_inference(model: lg.LocalModel) -> Any:
    return lg.as_loss(model, X, Y)


def in_half(model: lg.LocalModel) -> Any:
    with torch.autocast("cpu", torch.float16):
        return lg.as_loss(model, X, Y)


MISTAKES: list[tuple[Callable[[lg.LocalModel], Any], str]] = [
    (in_evaluation, "this model is in evaluation mode: call model.train() first, or evaluate model.backbone(x)"),
    (backbone_in_evaluation, "in evaluation mode"),
    (without_gradients, "gradients are switched off"),
    (in_inference, "gradients are switched off"),
    (in_half, "small ones of float16 would become 0: take torch.bfloat16"),
    (lambda m: lg.as_loss(m, X, Y, autocast=torch.float16), "small ones of float16 would become 0"),
    (lambda m: lg.as_loss(m, X, Y, autocast="bf16"), "autocast takes a dtype"),  # pyright: ignore[reportArgumentType]
    (lambda m: lg.as_loss(m.backbone, X, Y), "as_loss takes the LocalModel"),  # pyright: ignore[reportArgumentType]
    (lambda m: lg.as_loss(m, (X, Y), Y), "x is a tuple of x0, x1, and this model was localized for a tensor"),
    (lambda m: lg.as_loss(m, X[:, :2], Y), "this model was localized for batch x 3 x 8 x 8"),
    (lambda m: lg.as_loss(m, X, Y[:3]), "for 3 targets"),
    (lambda m: lg.as_loss(m, X, Y + 10), "targets run from 10 to 13"),
    (lambda m: lg.as_loss(m.requires_grad_(False), X, Y), "every parameter is frozen"),
    (lambda m: lg.as_loss(m, X, Y, move_averages=1), "move_averages takes True or False, not 1"),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_mistakes_get_one_sentence_before_anything_has_changed(
    mistake: Callable[[lg.LocalModel], Any], message: str
) -> None:
    model = double(lg.MAN(0.5, form="pull"))
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.1)  # so that a move of an average shows
    before = state(model)
    assert message in said(mistake, model)
    assert_same(state(model), before)
    assert not gradients(model)


def test_ddp_has_to_wrap_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    assert "give it a module whose forward returns" in said(lg.as_loss, wrapped, X, Y)
