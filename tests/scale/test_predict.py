"""The peak's split, the profiler as a second opinion, and the prediction that runs nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import localgrad as lg
from localgrad.scale.memory import KINDS, training_step

BATCH = 16


def sgd(model: lg.LocalModel) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(lg.param_groups(model), lr=0.1, momentum=0.9)]


def sgd_of_each_block(model: lg.LocalModel) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.members(k), lr=0.1, momentum=0.9) for k in range(len(model.blocks))]


def adamw(model: lg.LocalModel) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(lg.param_groups(model), lr=0.001)]


def local(
    name: str, blocks: int, coupling: lg.MAN | None, size: int = 32, method: lg.Method | None = None
) -> lg.LocalModel:
    chosen = lg.bp() if blocks == 1 else method or lg.dgl("1c2f")
    backbone = lg.build(name, classes=10).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    example = torch.zeros(2, 3, size, size)
    model = lg.localize(
        backbone, blocks=blocks, method=chosen, coupling=coupling if blocks > 1 else None, example=example
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def data(model: lg.LocalModel, size: int = BATCH) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, *model.image).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (size,))


def stepping(model: lg.LocalModel, optimizers: list[Any], **how: Any) -> Callable[[], None]:
    """A step, after one that has made the optimizers' state."""
    x, y = data(model)

    def step() -> None:
        training_step(model, optimizers, x, y, **how)

    step()
    return step


def measured(model: lg.LocalModel, make: Callable[[lg.LocalModel], list[Any]], **how: Any) -> lg.PeakBytes:
    optimizers = make(model)
    return lg.measure_peak(stepping(model, optimizers, **how), model=model, optimizers=optimizers)


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_split_adds_up_and_knows_whose_bytes_they_are() -> None:
    model = local("resnet20", 4, lg.MAN())
    found = measured(model, sgd)
    assert tuple(found.split) == KINDS
    assert sum(found.split.values()) == found.total
    trained = [p for p in model.parameters() if p.requires_grad]
    own = model.backbone.state_dict().values()
    assert found.split["parameters"] == bytes_of(own)
    assert found.split["optimizer"] == bytes_of(trained)
    assert found.split["auxiliaries"] == bytes_of(model.auxiliaries.state_dict().values())
    assert 0 < found.split["gradients"] <= bytes_of(trained)
    assert found.split["activations"] > found.total / 2
    assert found.rss > found.total


def test_all_gradients_are_there_when_the_optimizer_steps() -> None:
    model = local("resnet20", 4, lg.MAN())
    trained = [p for p in model.parameters() if p.requires_grad]
    x, y = data(model, 2)
    optimizers = sgd(model)
    training_step(model, optimizers, x, y)
    lg.local_backward(model, x, y)

    def update() -> None:
        optimizers[0].step()

    meter_sees = lg.measure_peak(update, model=model, optimizers=optimizers).split
    assert meter_sees["optimizer"] == bytes_of(trained)


@pytest.mark.parametrize(("name", "blocks"), [("resnet32", 1), ("resnet32", 4), ("torchvision:resnet18", 2)])
def test_the_profilers_allocations_agree_within_a_tenth(name: str, blocks: int) -> None:
    model = local(name, blocks, lg.MAN())
    optimizers = sgd(model)
    step = stepping(model, optimizers)
    found = lg.measure_peak(step, model=model, optimizers=optimizers)
    before = found.timeline[0][1]  # live as the step began
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = before + max(itertools.accumulate(size for _, size in memory))
    assert found.total == pytest.approx(peak, rel=0.1)  # kernels' own scratch memory is what is left


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet20", 32), ("resnet32", 32), ("resnet56", 32), ("torchvision:resnet18", 64), ("timm:resnet18", 64)],
)
def test_the_prediction_is_what_is_measured(name: str, size: int, blocks: int) -> None:
    model = local(name, blocks, lg.MAN(), size)
    assert lg.predict_peak(model, BATCH, sgd).total == pytest.approx(measured(model, sgd).total, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "name",
    ["resnet110", "timm:resnet26d", "timm:resnext26ts", "torchvision:resnet50", "torchvision:wide_resnet50_2",
     "torchvision:resnext50_32x4d", "timm:vit_tiny_patch16_224"],
)  # fmt: skip
def test_the_prediction_is_what_is_measured_on_larger_networks(name: str, blocks: int) -> None:
    model = local(name, blocks, lg.MAN(), {"resnet110": 32, "timm:vit_tiny_patch16_224": 224}.get(name, 96))
    assert lg.predict_peak(model, BATCH, sgd).total == pytest.approx(measured(model, sgd).total, rel=0.001)


@pytest.mark.parametrize(
    ("how", "make"),
    [({"autocast": torch.bfloat16}, sgd), ({"step_as_you_go": True}, sgd_of_each_block), ({}, adamw)],
    ids=["bf16", "as you go", "adamw"],
)
@pytest.mark.parametrize("coupling", [None, lg.DeepMAN(), lg.MANPlusPlus()], ids=str)
def test_the_prediction_knows_how_a_step_is_taken(how: Any, make: Any, coupling: lg.MAN | None) -> None:
    model = lg.recompute(local("resnet20", 4, coupling, method=lg.infopro()), units=["layer1.1"], couplings=True)
    assert lg.predict_peak(model, BATCH, make, **how).total == pytest.approx(
        measured(model, make, **how).total, rel=0.001
    )


def test_a_prediction_takes_no_memory_and_changes_nothing() -> None:
    model = local("resnet20", 4, lg.MAN())
    before = [t.clone() for t in model.state_dict().values()]
    found = lg.predict_peak(model, 100_000, sgd)  # tens of gigabytes, if it were run
    assert found.total > 2**34
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any("Fake" in type(t).__name__ for t in model.state_dict().values())
