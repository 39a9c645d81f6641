"""The step: equal to plain backpropagation where it has to be, isolated, accumulated, stepped either way."""

from __future__ import annotations

import copy
from typing import Any
from weakref import ref

import pytest
import torch
from small import ALL_COUPLINGS, assert_same, auxiliaries, batch, gradients, local, resnet, sgd, state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import localgrad as lg


@pytest.mark.parametrize("method", [lg.bp(), lg.dgl(), lg.infopro()], ids=lambda m: m.name)
def test_one_block_is_plain_backpropagation_bit_for_bit(method: lg.Method) -> None:
    backbone = resnet(32)
    plain = copy.deepcopy(backbone)
    model = lg.localize(backbone, blocks=1, method=method, example=batch()[0])
    ours, theirs = sgd(lg.param_groups(model, weight_decay=1e-3)), sgd(plain.parameters())
    for _ in range(5):
        x, y = batch()
        out = lg.local_backward(model, x, y)
        logits = plain(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        assert torch.equal(out.logits, logits)
        assert torch.equal(out.losses[0], loss)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert_same(backbone.state_dict(), plain.state_dict())
    assert len(out.losses) == len(out.parts) == 1


def test_losses_are_those_of_each_block_and_detached() -> None:
    x, y = batch()
    model = local()
    twin = copy.deepcopy(model)
    out = lg.local_backward(model, x, y)
    h, wanted = x, []
    for block, auxiliary in zip(twin.blocks, auxiliaries(twin), strict=False):
        h = block(h)
        wanted.append(nn.functional.cross_entropy(auxiliary(h)["classifier"], y))
    logits = twin.blocks[-1](h)
    wanted.append(nn.functional.cross_entropy(logits, y))
    assert all(torch.equal(a, b) for a, b in zip(out.losses, wanted, strict=True))
    assert torch.equal(out.logits, logits)
    assert [sorted(part) for part in out.parts] == [["classifier"]] * 3 + [[]]
    values = [*out.losses, out.logits, *(v for part in out.parts for v in part.values())]
    assert not any(v.requires_grad for v in values)


def test_scale_multiplies_every_gradient_and_no_loss() -> None:
    x, y = batch()
    model = local(lg.MANPlusPlus())
    models = [copy.deepcopy(model) for _ in range(3)]
    scales = (1.0, 4.0, torch.tensor(4.0))
    losses = [lg.local_backward(m, x, y, scale=s).losses for m, s in zip(models, scales, strict=True)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*losses, strict=True))
    grads, scaled, by_tensor = (gradients(m) for m in models)
    assert_same({k: 4 * g for k, g in grads.items()}, scaled)  # Powers of two are exact.
    assert_same(scaled, by_tensor)


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_two_halves_accumulate_what_they_give_apart_and_averages_move_once(coupling: lg.MAN | None) -> None:
    x, y = batch(8)
    model = local(coupling)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    with torch.no_grad():
        model.backbone.get_parameter("layer3.0.conv1.weight").mul_(2)  # Now a move of an average shows.
    apart = []
    for half in halves:
        alone = copy.deepcopy(model)
        run_through(alone, *half, scale=0.5)
        apart.append(gradients(alone))
    once, averages = copy.deepcopy(model), of_averages(state(model.auxiliaries))
    for half in halves:
        run_through(model, *half, scale=0.5)
    assert_same(averages, of_averages(state(model.auxiliaries)))
    assert_same(gradients(model), {k: apart[0][k] + apart[1][k] for k in apart[0]})
    moved = moved_averages(model, averages)
    assert bool(moved) == (coupling is not None and coupling.form == "branches")
    moved_averages(once, averages)
    assert_same(of_averages(state(once.auxiliaries)), of_averages(state(model.auxiliaries)))


def run_through(model: lg.LocalModel, x: Tensor, y: Tensor, scale: float = 1.0) -> list[lg.BlockResult]:
    """Adds gradients and moves no average."""
    return list(lg.block_steps(model, x, y, scale=scale))


def of_averages(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in stored.items() if ".ema." in k and k.endswith(("weight", "bias"))}


def moved_averages(model: lg.LocalModel, before: dict[str, Tensor]) -> list[str]:
    model.move_averages()
    return [k for k, v in before.items() if not torch.equal(v, model.auxiliaries.state_dict()[k])]


def test_halves_without_batch_statistics_are_the_whole_batch() -> None:
    x, y = batch(8)
    model = local(lg.MAN())
    model.eval()  # a norm in evaluation mode reads no batch
    whole = copy.deepcopy(model)
    lg.local_backward(whole, x, y)
    for which in range(2):
        run_through(model, x[which::2], y[which::2], scale=0.5)
    wanted = gradients(whole)
    for name, got in gradients(model).items():
        torch.testing.assert_close(got, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_blocks_come_in_order_with_their_gradients() -> None:
    model = local(lg.MAN(), blocks=5)
    seen: list[int] = []
    for done in lg.block_steps(model, *batch()):
        seen.append(done.block)
        for other in range(5):
            has = [p.grad is not None for p in model.members(other)]
            assert all(has) if other <= done.block else not any(has)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_local_backward_is_the_loop_over_block_steps(coupling: lg.MAN | None) -> None:
    model = local(coupling)
    own = copy.deepcopy(model)
    optimizers = sgd(lg.param_groups(model)), sgd(lg.param_groups(own))
    for _ in range(3):
        x, y = batch()
        out, done = lg.local_backward(model, x, y), run_through(own, x, y)
        own.move_averages()
        assert all(torch.equal(a, b.loss) for a, b in zip(out.losses, done, strict=True))
        assert [part.keys() for part in out.parts] == [d.parts.keys() for d in done]
        assert torch.equal(out.logits, done[-1].output)
        assert [tuple(d.output.shape[1:]) for d in done[:-1]] == [b.boundary.shape for b in model.blocks[:-1]]
        assert_same(gradients(model), gradients(own))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        own.move_averages(stepped=True)
    if coupling is not None and coupling.form == "pull":
        model.move_averages(stepped=True)  # `local_backward` does so when the next step begins.
    assert_same(model.state_dict(), own.state_dict())


@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(3.0)])
def test_a_backward_of_ones_own_is_given_each_scaled_loss(scale: float | Tensor) -> None:
    model = local(lg.MAN())
    plain, x, y = copy.deepcopy(model), *batch()
    sent: list[float] = []

    def backward(loss: Tensor) -> None:
        sent.append(loss.item())
        loss.backward()

    out = lg.local_backward(model, x, y, scale=scale, backward=backward)
    lg.local_backward(plain, x, y, scale=scale)
    assert sent == [float(loss * scale) for loss in out.losses]
    assert_same(gradients(model), gradients(plain))
    model.zero_grad()
    lg.local_backward(model, x, y, backward=lambda loss: None)
    assert not gradients(model)


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_stepping_as_you_go_equals_stepping_after_the_pass_bit_for_bit(coupling: lg.MAN | None) -> None:
    """Each average reads blocks further down, which have not stepped yet, either way."""
    model = local(coupling)
    going = copy.deepcopy(model)
    whole = sgd(lg.param_groups(model, weight_decay=1e-3))
    each = [sgd(going.members(k)) for k in range(4)]
    for _ in range(3):
        x, y = batch()
        out, theirs = lg.local_backward(model, x, y), list[Tensor]()
        going.move_averages(stepped=True)
        for done in lg.block_steps(going, x, y):
            going.move_averages(done.block)
            each[done.block].step()
            each[done.block].zero_grad()
            theirs.append(done.loss)
        whole.step()
        whole.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(out.losses, theirs, strict=True))
        assert_same(model.state_dict(), going.state_dict())
    assert not any(p.grad is not None for p in going.parameters())


@pytest.mark.parametrize("coupling", [lg.MAN(0.5), lg.DeepMAN(0.5)], ids=str)
def test_a_loop_that_ends_early_leaves_later_blocks_and_their_averages(coupling: lg.MAN) -> None:
    model = local(coupling)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.1)  # so that a move shows
    averages = of_averages(state(model.auxiliaries))
    for done in lg.block_steps(model, *batch()):
        if done.block == 1:
            break
        model.move_averages(done.block)
    has = [[p.grad is not None for p in model.members(k)] for k in range(4)]
    assert [all(h) for h in has] == [any(h) for h in has] == [True, True, False, False]
    moved = {k.split(".")[0] for k, v in averages.items() if not torch.equal(v, model.auxiliaries.state_dict()[k])}
    assert moved == {"0"}


def test_a_blocks_tensors_are_gone_before_the_next_block_runs() -> None:
    x, y = batch()
    model = lg.localize(resnet(20), blocks=4, method=lg.infopro(), coupling=lg.MAN(), example=x)
    made: list[Any] = []
    for module in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]:
        module.register_forward_hook(lambda m, args, out: made.append(ref(out)))
    alive = [sum(tensor() is not None for tensor in made) for _ in lg.block_steps(model, x, y)]
    assert len(made) > 40
    assert alive == [0, 0, 0, 0]


class Halves(TorchDispatchMode):
    """The bfloat16 storages of a weight's size."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.seen = sizes, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.bfloat16 and out.numel() in self.sizes:
            self.seen.append(ref(out.untyped_storage()))
        return out


def live_halves(model: lg.LocalModel, x: Tensor, y: Tensor) -> tuple[list[int], int]:
    """Cast weights alive after each block, and how many were made."""
    with Halves({p.numel() for p in model.parameters() if p.ndim == 4}) as halves:
        steps = lg.block_steps(model, x, y, autocast=torch.bfloat16)
        alive = [sum(storage() is not None for storage in halves.seen) for _ in steps]
    return alive, len(halves.seen)


def test_autocast_leaves_no_cast_weights_behind() -> None:
    x, y = batch(3)  # of three, so that no activation has the size of a weight
    model = local()
    alive, made = live_halves(model, x, y)
    assert made > 20
    assert alive == [0] * 4
    with torch.autocast("cpu", torch.bfloat16):  # around the whole step, its cache holds on to them
        assert live_halves(model, x, y)[0][-1] > 20


@pytest.mark.parametrize("method", [lg.dgl(), lg.infopro(), lg.infopro(contrast=True), lg.predsim()])
def test_autocast_losses_are_float32_and_close(method: lg.Method) -> None:
    x, y = batch(8, 16)
    y[1] = y[0]
    model = lg.localize(resnet(20), blocks=4, method=method, coupling=lg.MAN(), example=x)
    exact = lg.local_backward(copy.deepcopy(model), x, y)
    out = lg.local_backward(model, x, y, autocast=torch.bfloat16)
    assert out.logits.dtype == torch.bfloat16
    assert {loss.dtype for loss in out.losses} == {torch.float32}
    assert {v.dtype for part in out.parts for v in part.values()} <= {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    for got, wanted in zip(out.losses, exact.losses, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(out.losses, exact.losses, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_cuda(dtype: torch.dtype) -> None:
    x, y = (t.to("cuda") for t in batch(8, 16))
    model = lg.localize(resnet(20).to("cuda"), blocks=4, method=lg.infopro(), coupling=lg.MAN(), example=x)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    exact = lg.local_backward(copy.deepcopy(model), x, y)
    out = lg.local_backward(model, x, y, autocast=dtype, scale=torch.tensor(2.0, device="cuda"))
    for got, wanted in zip(out.losses, exact.losses, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
