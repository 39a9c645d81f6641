"""Pipelines of backpropagation that the race measures: on two processes they learn what one process learns for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from race_ways import Stale
from spawned import on_ranks
from torch import Tensor, nn
from two_processes import SCHEDULES, Maker, Part, parts_of, sgd
from two_versions import TwoVersions

import localgrad as lg

STEPS, SIZE = 5, 8


def batches() -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(SIZE, 3, 8, 8, dtype=torch.float64, generator=source), source) for _ in range(STEPS)]
    return [(x.to(memory_format=torch.channels_last), torch.randint(4, (SIZE,), generator=g)) for x, g in drawn]


def network(blocks: int | list[str] = 1) -> lg.LocalModel:
    torch.manual_seed(3)
    backbone = lg.build("resnet20", classes=4).double()
    backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    method = lg.bp() if blocks == 1 else lg.dgl("0c1f")
    return lg.localize(backbone, blocks=blocks, method=method, example=batches()[0][0])


def quick(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def naive(micro: int) -> dict[str, Tensor]:
    """w(t + 1) = w(t) - step(mean over micro-batches of the gradient at w(t - 1)), with w(-1) = w(0)."""
    module = network().backbone.train()
    parameters = list(module.parameters())
    w = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer, before = quick(w), [p.detach().clone() for p in w]
    for x, y in batches():
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        parts = zip(x.chunk(micro), y.chunk(micro), strict=True)
        loss = torch.stack([nn.functional.cross_entropy(module(a), b) for a, b in parts]).mean()
        gradients = torch.autograd.grad(loss, parameters)
        before = [p.detach().clone() for p in w]
        for p, gradient in zip(w, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    with torch.no_grad():
        for p, newest in zip(parameters, w, strict=True):
            p.copy_(newest)
    return module.state_dict()


def state_of(model: lg.LocalModel, part: nn.Module) -> dict[str, Tensor]:
    """The state of a part, by the names of the whole network."""
    names = {id(t): name for name, t in model.backbone.state_dict(keep_vars=True).items()}
    return {names[id(t)]: t.detach() for t in part.state_dict(keep_vars=True).values()}


def asynchronous(micro: int, stop: int) -> dict[str, Any]:
    """This rank's half after the steps of the pipeline, which is emptied after `stop` of them."""
    model, every = network(["layer1.2"]), batches()
    half = Part(model.blocks, dist.get_rank(), every[0][0].chunk(micro)[0], None)
    pipeline = TwoVersions(half, micro, quick)
    for i, batch in enumerate(every):
        if i == stop:
            pipeline.finish()
        pipeline.step(*batch)
    pipeline.finish()
    return state_of(model, half.block)


@pytest.mark.parametrize(("micro", "stop"), [(1, 2), (4, 3)])
def test_the_asynchronous_pipeline_follows_its_rule(micro: int, stop: int, tmp_path: Path) -> None:
    first, last = on_ranks(asynchronous, tmp_path, micro, stop)
    torch.testing.assert_close(first | last, naive(micro), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("micro", [1, 4])
def test_one_process_follows_the_rule_too(micro: int) -> None:
    model, step = network(), Stale()
    model.accumulate = micro
    optimizer = quick(list(model.backbone.parameters()))
    for x, y in batches():
        step(model, x, y, None)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.backbone.state_dict(), naive(micro), rtol=1e-9, atol=1e-11)


def flushed(name: str, micro: int) -> dict[str, Any]:
    """This rank's parts after some steps of one of PyTorch's pipelines on one batch."""
    model = network(["layer1.2"] if parts_of(name) == 2 else ["layer1.0", "layer1.2", "layer2.1"])
    way = Maker(dist.get_rank(), *batches()[0]).rival(name, model, micro)
    for _ in range(3):
        way.step()
    return state_of(model, nn.ModuleList(model.blocks[i] for i in SCHEDULES[name][1][dist.get_rank()]))


@pytest.mark.parametrize(("name", "micro"), list(zip(SCHEDULES, (2, 4, 2, 4), strict=True)))
def test_pipelines_that_flush_learn_what_accumulation_learns(name: str, micro: int, tmp_path: Path) -> None:
    first, last = on_ranks(flushed, tmp_path, name, micro)
    model = network()
    model.accumulate = micro
    optimizer = sgd(list(model.backbone.parameters()))
    for _ in range(3):
        lg.local_backward(model, *batches()[0])
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(first | last, model.backbone.state_dict(), rtol=1e-9, atol=1e-11)
