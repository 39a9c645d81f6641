"""A LocalModel is saved whole, and what is loaded trains on as the original does, bit for bit."""

from __future__ import annotations

import copy
import io
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from small import ALL_COUPLINGS, FunctionalDropout, assert_same, batch, composite, resnet, sgd, vgg
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg

METHODS = [
    lg.bp(),
    lg.dgl(),
    lg.predsim(),
    lg.infopro(contrast=True),
    lg.infopro(weights=[(1.0, 1.0)] * 2),
    lg.auglocal(),
]


class Between(nn.Module):
    """Does between its units what needs steps of many kinds: functions, tables, constants, writes."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)) for c in (3, 6, 6, 6)]
        )
        self.fc = nn.Linear(6, 10)
        self.register_buffer("table", torch.randn(6, 1, 1))
        self.factor = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.units[0](x), 2)
        h = h + torch.arange(6, device=h.device).view(6, 1, 1) * self.table * self.factor
        h = self.units[1](h).clone()
        h[:, :2] = 0.5
        h = F.dropout(self.units[2](h), 0.3, self.training)
        h = self.units[3](h * self.factor)
        return self.fc(F.adaptive_max_pool2d(h, 1).flatten(1))


def transformer() -> nn.Module:
    return timm.create_model("beit_base_patch16_224", img_size=32, num_classes=10, depth=3, embed_dim=48, num_heads=4)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (resnet, 8),
    "vgg": (vgg, 8),
    "begins in place": (composite, 8),
    "by mode": (FunctionalDropout, 8),
    "between": (Between, 8),
    "transformer": (transformer, 32),
}


def sent(model: lg.LocalModel) -> lg.LocalModel:
    """What arrives where `model` is sent to a process, with memory of its own."""
    here, there = multiprocessing.Pipe()
    sender = threading.Thread(target=here.send, args=(model,))
    sender.start()
    arrived = there.recv()
    sender.join()
    assert names(arrived) == names(model)
    return copy.deepcopy(arrived)  # PyTorch shares the memory between processes


def names(model: lg.LocalModel) -> list[list[str | None]]:
    """What the modules and parameters of each block are called in the backbone."""
    modules = {id(m): name for name, m in model.backbone.named_modules()}
    parameters = {id(p): name for name, p in model.named_parameters()}
    held = [
        [*(modules.get(id(m)) for m in b.modules()), *(parameters[id(p)] for p in b.parameters())] for b in model.blocks
    ]
    sources = [a.coupling.sources for _, a in model.isolated if a.coupling is not None]
    return held + [[modules.get(id(m)) for unit in units for m in unit.module.modules()] for units in sources]


def assert_twins(model: lg.LocalModel, twin: lg.LocalModel, size: int) -> None:
    x, y = batch(size=size)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert names(twin) == names(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    for _ in range(2):
        results = []
        for m in (model, twin):
            torch.manual_seed(1)
            results.append(lg.local_backward(m, x, y))
            optimizer = sgd(lg.param_groups(m))
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(results[0].losses, results[1].losses, strict=True))
        assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    for m in (model, twin):
        m.eval()
    h, g = x, x
    for a, b in zip(model.blocks, twin.blocks, strict=True):
        h, g = a(h), b(g)
    assert torch.equal(h, g)
    assert torch.equal(h, model(x))
    assert_mobile(twin, x, y)


def assert_mobile(model: lg.LocalModel, x: Tensor, y: Tensor) -> None:
    """Nothing in it has become a constant of one dtype, or one model's alone."""
    model.train().double()
    lg.local_backward(copy.deepcopy(model), x.double(), y)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_goes_on_as_it_was(name: str) -> None:
    make, size = NETWORKS[name]
    x, y = batch(size=size)
    model = lg.localize(make(), blocks=2, method=lg.dgl("1c1f"), coupling=lg.MAN(0.5), example=x)
    lg.recompute(model, units=[model.blocks[0].names[0]], couplings=True)
    lg.local_backward(model, x, y)
    model.zero_grad()
    torch.save(model, io.BytesIO())
    twin = sent(model)
    assert [b.calls for b in twin.blocks] == [b.calls for b in model.blocks]
    assert_twins(model, sent(twin), size)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("coupling", [*ALL_COUPLINGS, lg.MAN(0.5, lag=2, learnable_units=2)], ids=str)
def test_every_method_and_coupling_goes_on_as_it_was(method: lg.Method, coupling: lg.MAN | None) -> None:
    if method.terms is None and coupling is not None:
        return
    x, _ = batch()
    model = lg.localize(vgg(), blocks=None if method.terms is None else 3, method=method, coupling=coupling, example=x)
    twin = sent(model)
    assert str(twin) == str(model)
    assert_twins(model, twin, 8)


def step(model: lg.LocalModel, path: str) -> None:
    x = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8)
    torch.save(lg.local_backward(model, x, torch.arange(4)).losses, path)


def test_a_model_goes_to_another_process(tmp_path: Path) -> None:
    model = lg.localize(vgg(), blocks=3, method=lg.infopro(), coupling=lg.DeepMAN(), example=batch()[0])
    here, there = str(tmp_path / "here.pt"), str(tmp_path / "there.pt")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=step, args=(copy.deepcopy(model), there))
    process.start()
    step(model, here)
    process.join(120)
    assert process.exitcode == 0
    assert all(
        torch.equal(a, b) for a, b in zip(*(torch.load(p, weights_only=True) for p in (here, there)), strict=True)
    )
