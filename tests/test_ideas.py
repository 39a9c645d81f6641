"""Steps of benchmarks/ideas.py and cosines of benchmarks/cosines.py, against their formulas written naively."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cosines import Compared
from ideas import feedback, leap, sgr, window
from torch import Tensor

import localgrad as lg
from localgrad.core.model import LocalModel

X = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4
WEIGHT = 0.7


def made(coupling: lg.MAN | None = None) -> LocalModel:
    torch.manual_seed(3)
    backbone = lg.build("resnet20", classes=4).double()
    return lg.localize(backbone, blocks=3, method=lg.dgl("1c1f@2"), coupling=coupling, example=X)


def loss_of(model: LocalModel, k: int, h: Tensor) -> Tensor:
    if k == 2:
        return model.task.criterion(h, Y)
    auxiliary: Any = model.auxiliaries[k]
    return auxiliary.total(auxiliary.losses(auxiliary(h), Y, None))


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def check(model: LocalModel, expected: list[list[Tensor]]) -> None:
    for k in range(3):
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.members(k)]
        torch.testing.assert_close(found, expected[k], rtol=1e-9, atol=1e-11)


def inputs(model: LocalModel) -> list[Tensor]:
    """The input of each block, a leaf."""
    h, found = X, []
    for block in model.blocks:
        found.append(h.detach().requires_grad_())
        h = block(h)
    return found


def windows(model: LocalModel) -> list[list[Tensor]]:
    """The gradients that each block gets in a window."""
    expected = []
    for k, z in enumerate(inputs(model)):
        h = model.blocks[k](z)
        loss = loss_of(model, k, h)
        grads = gradients(loss, model.members(k))
        if k < 2:
            block = {id(p) for p in model.blocks[k].parameters()}
            further = gradients(loss_of(model, k + 1, model.blocks[k + 1](h)), model.members(k))
            pairs = zip(model.members(k), grads, further, strict=True)
            grads = [g + (WEIGHT * f if id(p) in block else 0) for p, g, f in pairs]
        expected.append(grads)
    return expected


def test_a_window_adds_the_gradient_of_the_next_loss() -> None:
    model = made()
    expected = windows(model)
    window(model, X, Y, None, WEIGHT)
    check(model, expected)


def test_a_leap_is_a_window_along_a_path_whose_first_unit_alone_has_an_average() -> None:
    model = made(lg.DeepMAN(0.9))
    coupling: Any = model.auxiliaries[0].coupling
    averaged, source = coupling.links[0].ema, coupling.sources[0].module
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    moved = [0.9 * a + 0.1 * s for a, s in zip(averaged.parameters(), source.parameters(), strict=True)]
    leap(model, X, Y, None, WEIGHT)
    assert len(coupling.links) > 1
    assert [link.ema is averaged for link in coupling.links] == [True, *(len(coupling.links) - 1) * [False]]
    torch.testing.assert_close(list(averaged.parameters()), moved)
    check(model, windows(model))


def test_cosines_compare_the_gradients_of_a_step_with_those_of_the_network_s_loss() -> None:
    model, plain, expected = made(), made(), []
    loss = plain.task.criterion(plain.backbone(X), Y)
    true = [torch.cat([g.flatten() for g in gradients(loss, list(block.parameters()))]) for block in plain.blocks]
    plain = made()  # with buffers that have seen no batch
    lg.local_backward(plain, X, Y)
    for block, whole in zip(plain.blocks, true, strict=True):
        local = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
        expected.append((float(local @ whole / local.norm() / whole.norm()), float(local.norm() / whole.norm())))
    assert expected[0][0] < 0.99
    step = Compared(steps=1, epochs=1)
    step(model, X, Y, None)
    torch.testing.assert_close(step.found, {0: [expected]}, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)


def test_feedback_trains_the_auxiliary_alone_towards_the_next_gradient() -> None:
    model, expected, arrived = made(), [], []
    for k, z in enumerate(inputs(model)):
        loss = loss_of(model, k, model.blocks[k](z))
        expected.append(gradients(loss, model.members(k)))
        arrived.append(torch.autograd.grad(loss, z)[0])
    for k, z in enumerate(inputs(model)[1:]):
        (own,) = torch.autograd.grad(loss_of(model, k, z), z, create_graph=True)
        cosine = (own * arrived[k + 1]).sum() / (own.norm() * arrived[k + 1].norm())
        more = gradients(WEIGHT * (1 - cosine), model.members(k))
        expected[k] = [a + b for a, b in zip(expected[k], more, strict=True)]
    feedback(model, X, Y, None, WEIGHT)
    check(model, expected)


def test_sgr_draws_the_input_gradient_to_the_gradient_before() -> None:
    model, expected, before = made(), [], None
    for k, z in enumerate(inputs(model)):
        h = model.blocks[k](z)
        loss = loss_of(model, k, h)
        total = loss
        if before is not None:
            (own,) = torch.autograd.grad(loss, z, create_graph=True)
            total = loss + WEIGHT * (own - before).square().sum() / before.square().sum()
        expected.append(gradients(total, model.members(k)))
        before = torch.autograd.grad(loss, h, retain_graph=True)[0]
    sgr(model, X, Y, None, WEIGHT)
    check(model, expected)
