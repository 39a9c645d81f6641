"""A LocalModel is saved whole, and what is loaded trains on as the original does, bit for bit."""

from __future__ import annotations

import copy
import io
import multiprocessing
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from small import ALL_COUPLINGS, FunctionalDropout, Net, assert_same, batch, chain, composite, resnet, sgd, vgg
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg

METHODS = [
    lg.bp(), lg.dgl(), lg.predsim(), lg.infopro(contrast=True), lg.infopro(weights=[(1.0, 1.0)] * 2), lg.auglocal(),
]  # fmt: skip


def steps_of_many_kinds(net: Net, h: Tensor, x: Tensor) -> Tensor:
    """Functions, tables, constants, a write in place, and dropout by the mode."""
    h = h + torch.arange(8, device=h.device) * net.get_buffer("mean").view(6, 1, 1) * net.table
    h = F.max_pool2d(h, 3, 1, 1).clone()
    h[:, :2] = 0.5
    return F.dropout(h, 0.3, net.training)


def transformer() -> nn.Module:
    return timm.create_model("beit_base_patch16_224", img_size=32, num_classes=10, depth=3, embed_dim=48, num_heads=4)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (resnet, 8),
    "vgg": (vgg, 8),
    "begins in place": (composite, 8),
    "by mode": (FunctionalDropout, 8),
    "between": (partial(Net, steps_of_many_kinds), 8),
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
    h = chain(model.eval(), x)  # pyright: ignore[reportArgumentType]
    assert torch.equal(h, chain(twin.eval(), x))  # pyright: ignore[reportArgumentType]
    assert torch.equal(h, model(x))
    twin.train().double()  # Nothing has become a constant of one dtype, or belongs to one model alone.
    lg.local_backward(copy.deepcopy(twin), x.double(), y)


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
    assert [b.ranges for b in twin.blocks] == [b.ranges for b in model.blocks]
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


@pytest.mark.slow
def test_a_model_goes_to_another_process(tmp_path: Path) -> None:
    model = lg.localize(vgg(), blocks=3, method=lg.infopro(), coupling=lg.DeepMAN(), example=batch()[0])
    here, there = str(tmp_path / "here.pt"), str(tmp_path / "there.pt")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=step, args=(copy.deepcopy(model), there))
    process.start()
    step(model, here)
    process.join(120)
    assert process.exitcode == 0
    losses = (torch.load(path, weights_only=True) for path in (here, there))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
