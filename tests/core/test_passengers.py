"""Cuts where several tensors cross: U-Nets, pyramids, and what skips over units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import said
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.blocks import trace_units
from localgrad.core.boundary import MAIN, main_of
from localgrad.scale.memory import measure_peak, training_step


class Conv(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.Conv2d(after, after, 1)
        )


class UNet(nn.Module):
    """[B, 3, 16, 16] -> [B, 4, 16, 16], a number for each class and position."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Conv(3, 8), Conv(8, 12), Conv(12, 16)])
        self.middle = Conv(16, 16)
        self.up = nn.ModuleList([Conv(32, 12), Conv(24, 8), Conv(16, 8)])
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for unit in self.down:
            skips.append(x := unit(x))
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for unit in self.up:
            x = unit(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.last(x)


class Pyramid(nn.Module):
    """What parts.1 makes of an early map is read only at the end, as in a feature pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Conv(3, 8), Conv(8, 8), Conv(8, 8), Conv(8, 8)])
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, side, second, third = self.parts
        early = first(x)
        beside = side(early)
        return self.last((third(second(early)) + beside).mean((2, 3)))


class Overwriting(nn.Module):
    """The output of `a` skips over `b` and `c`, and is changed in place before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        later = self.c(self.b(h))
        return self.d(later + h.mul_(2)).mean((2, 3))


LOSS = nn.CrossEntropyLoss()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 16, 16), torch.randint(0, 4, (4, 16, 16))


def cut(network: nn.Module, blocks: Any, **settings: Any) -> lg.LocalModel:
    x, y = data()
    own = {"criterion": LOSS, "targets": y} if isinstance(network, UNet) else {}
    return lg.localize(network, blocks=blocks, example=x, **{"method": lg.dgl(), **own, **settings})


def test_blocks_of_a_u_net_equal_the_network_bit_for_bit() -> None:
    x, _ = data()
    network = UNet()
    other = copy.deepcopy(network)
    for training in (True, False):
        model = cut(network, 4).train(training)
        h: Any = x
        for block in model.blocks:
            h = block(h)
        assert torch.equal(h, other.train(training)(x))
    for own, its in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(own, its)


def test_what_crosses_is_handed_on_until_its_last_reader() -> None:
    crossing = {u.name: [p.made_by for p in u.output.passengers] for u in trace_units(UNet(), data()[0]).units}
    assert crossing == {
        "down.0": [], "down.1": ["down.0"], "down.2": ["down.0", "down.1"], "middle": ["down.0", "down.1"],
        "up.0": ["down.0"], "up.1": [], "up.2": [],
    }  # fmt: skip


@pytest.mark.parametrize("coupling", [None, lg.MAN(), lg.MANPlusPlus(), lg.DeepMAN()])
@pytest.mark.parametrize("method", [lg.dgl(), lg.auglocal()])
@pytest.mark.parametrize("blocks", [2, 4, ["down.0", "middle", "up.0"]])
def test_every_parameter_gets_a_gradient_and_no_other_block_gives_it_one(
    method: lg.Method, coupling: lg.MAN | None, blocks: Any
) -> None:
    x, y = data()
    model = cut(UNet(), blocks, method=method, coupling=coupling)
    for done in lg.block_steps(model, x, y):
        own = {id(p) for p in model.members(done.block)}
        got = {id(p) for p in model.parameters() if p.grad is not None}
        assert got == own
        model.zero_grad()


def test_a_step_of_one_block_is_backpropagation() -> None:
    x, y = data()
    network = UNet().double()
    other = copy.deepcopy(network)
    lg.local_backward(cut(network, 1, method=lg.bp(), targets=None), x.double(), y)
    LOSS(other(x.double()), y).backward()
    for own, its in zip(network.parameters(), other.parameters(), strict=True):
        assert own.grad is not None
        assert its.grad is not None
        torch.testing.assert_close(own.grad, its.grad, rtol=0, atol=1e-12)


def test_a_passenger_that_no_loss_of_its_block_reaches_gets_a_head() -> None:
    x, y = data()[0], torch.tensor([0, 1, 2, 3])
    model = cut(Pyramid(), ["parts.2", "parts.3"])
    terms = model.isolated[0][1].terms
    (beside,) = [term.reads for term in terms.values() if term.reads != MAIN]
    assert beside == model.blocks[0].boundary.passengers[0].name
    lg.local_backward(model, x, y)
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_main_tensor_is_the_last_one_that_parameters_have_made() -> None:
    model = cut(UNet(), ["down.1"])
    x, _ = data()
    crossing = model.blocks[0](x)
    assert next(iter(crossing)) == MAIN
    assert main_of(crossing).shape == (4, 12, 8, 8)
    assert [tuple(h.shape) for h in crossing.values()] == [(4, 12, 8, 8), (4, 8, 16, 16)]


@pytest.mark.parametrize("coupling", [None, lg.MAN(), lg.DeepMAN()])
def test_the_predicted_peak_is_the_measured_one(coupling: lg.MAN | None) -> None:
    x, y = data()
    model = cut(UNet(), 4, coupling=coupling)

    def optimizers(made: lg.LocalModel) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(lg.param_groups(made), lr=0.01, momentum=0.9)]

    own = optimizers(model)
    training_step(model, own, x, y)
    measured = measure_peak(lambda: training_step(model, own, x, y), model=model, optimizers=own).total
    assert lg.predict_peak(model, len(x), optimizers, targets=y).total == pytest.approx(measured, rel=1e-3)


def test_a_u_net_is_fitted_into_a_budget() -> None:
    x, y = data()
    x, y = x.repeat(1, 1, 4, 4), y.repeat(1, 4, 4)
    fit = lg.fit(UNet(), x, "6MiB", exact=True, criterion=LOSS, targets=y)
    own = [torch.optim.SGD(lg.param_groups(fit.model), lr=0.01)]
    training_step(fit.model, own, x, y)
    assert fit.model.blocks[0].ranges
    assert measure_peak(lambda: training_step(fit.model, own, x, y)).total <= 6 * 2**20


def test_a_passenger_that_is_changed_in_place_later_is_refused() -> None:
    text = "no cut behind 'b': the tensor of 'a' is read later, and 'mul_' changes it in place before that"
    assert said(cut, Overwriting(), ["b"]) == f"{text}; the nearest is behind 'a'"


class Noisy(nn.Module):
    """What it draws once is read by all units. It is made on no named device."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), 8)
        for part in self.parts:
            x = part(x) + noise
        return self.last(x)


def test_a_passenger_may_be_made_on_no_named_device() -> None:
    x, y = torch.randn(4, 8), torch.arange(4) % 3
    model = lg.localize(Noisy(), blocks=3, method=lg.dgl(), coupling=lg.MAN(), example=x)
    torch.manual_seed(0)
    logits = lg.local_backward(model, x, y).logits
    torch.manual_seed(0)
    assert torch.equal(logits, model.backbone(x))


@pytest.mark.parametrize("coupling", [None, lg.MAN()])
def test_a_batch_of_one_sample_is_refused_where_passengers_cross(coupling: lg.MAN | None) -> None:
    model = lg.localize(Noisy(), blocks=3, method=lg.dgl(), coupling=coupling, example=torch.randn(4, 8))
    text = said(lg.local_backward, model, torch.randn(1, 8), torch.tensor([0]))
    assert text.startswith("a batch of one sample cannot train the head 'classifier' of the auxiliary of block 0")
