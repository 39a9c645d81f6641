"""A LocalModel is a module like others: copied, saved, averaged, compiled, and given to the tools around PyTorch."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import ALL_COUPLINGS, assert_same, batch, local, sgd, state
from timm.optim._optim_factory import create_optimizer_v2
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import localgrad as lg

LOADS = """
import sys, torch, localgrad as lg
model = torch.load(sys.argv[1], weights_only=False)
x = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8)
torch.save(lg.local_backward(model, x, torch.arange(4)).losses, sys.argv[2])
"""


def trained(model: lg.LocalModel, steps: int, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The losses of some steps on the same batches."""
    optimizer = optimizer or sgd(lg.param_groups(model))
    torch.manual_seed(7)
    losses = []
    for _ in range(steps):
        losses += [float(loss) for loss in lg.local_backward(model, *batch()).losses]
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("coupling", [*ALL_COUPLINGS, lg.MAN(0.5, lag=2)], ids=str)
def test_its_state_in_a_new_model_trains_on_to_the_same_bits(coupling: lg.MAN | None) -> None:
    model = local(coupling)
    optimizer = sgd(lg.param_groups(model))
    trained(model, 3, optimizer)
    other = local(coupling)
    assert other.load_state_dict(model.state_dict(), strict=True) == ([], [])
    resumed = sgd(lg.param_groups(other))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert trained(model, 2, optimizer) == trained(other, 2, resumed)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_its_names_are_unique_and_those_of_the_backbone() -> None:
    model = local(lg.DeepMAN())
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})
    own = {name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
    assert own == dict(model.backbone.named_parameters()).keys()
    assert all(name.startswith(("backbone.", "auxiliaries.")) for name in model.state_dict())


def test_a_file_of_the_whole_model_is_loaded_elsewhere(tmp_path: Path) -> None:
    model = local(lg.MAN())
    trained(model, 1)
    torch.save(model, tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", LOADS, tmp_path / "model.pt", tmp_path / "losses.pt"], check=True)
    x = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8)
    losses = lg.local_backward(model, x, torch.arange(4)).losses
    assert losses == torch.load(tmp_path / "losses.pt", weights_only=True)


def averaged(decay: float, models: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    mean = {name: value.double() for name, value in models[0].items()}
    for model in models[1:]:
        mean = {name: decay * value + (1 - decay) * model[name].double() for name, value in mean.items()}
    return mean


@pytest.mark.parametrize(
    "make",
    [
        lambda model: ModelEmaV3(model, decay=0.5),
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    ],
    ids=["ModelEmaV3", "AveragedModel"],
)
def test_averages_of_the_whole_model(make: Callable[[lg.LocalModel], Any]) -> None:
    model = local(lg.MAN())
    average = make(model)
    states = [state(model)]
    for step in range(3):
        trained(model, 1)
        average.update(model) if isinstance(average, ModelEmaV3) else average.update_parameters(model)
        if isinstance(average, ModelEmaV3) or step:  # The first update of an AveragedModel copies.
            states.append(state(model))
        else:
            states = [state(model)]
    found = average.module
    assert isinstance(found, lg.LocalModel)
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    for name, value in averaged(0.5, [{n: s[n] for n in names} for s in states]).items():
        torch.testing.assert_close(found.state_dict()[name].double(), value, rtol=1e-5, atol=1e-6)
    x = batch()[0]
    with torch.no_grad():
        assert torch.equal(average.eval()(x), found.backbone(x))
    assert not {id(p) for p in found.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_optimizers_of_timm_take_the_groups(name: str) -> None:
    model = local(lg.MAN())
    groups = lg.param_groups(model, auxiliary_lr=0.05, by_name={"layer1": {"lr": 0.01}})
    optimizer = create_optimizer_v2(groups, opt=name, lr=0.1, weight_decay=0.02)  # pyright: ignore[reportArgumentType]
    assert {g["lr"] for g in optimizer.param_groups} == {0.1, 0.05, 0.01}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.02}
    before = state(model)
    trained(model, 1, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {name for name, p in model.named_parameters() if p.requires_grad}


def losses_of(model: lg.LocalModel, compile_it: Callable[[lg.LocalModel], object] | None) -> list[float]:
    twin = copy.deepcopy(model)
    if compile_it is not None:
        compile_it(twin)
    return trained(twin, 2)


def by_block(backend: str) -> Callable[[lg.LocalModel], object]:
    return lambda model: [block.compile(backend=backend) for block in model.blocks]


def with_auxiliaries(backend: str) -> Callable[[lg.LocalModel], object]:
    return lambda model: [m.compile(backend=backend) for m in (*model.blocks, *model.auxiliaries)]  # pyright: ignore


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler looks for it itself.
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", [by_block, with_auxiliaries])
def test_compiled_blocks_train_to_the_same_losses(backend: str, way: Callable) -> None:
    torch._dynamo.reset()
    model = local(lg.MAN(), blocks=2, backbone=lg.CifarResNet(8))
    plain, compiled = losses_of(model, None), losses_of(model, way(backend))
    torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-5)


def test_a_compiled_backbone_and_a_compiled_model_give_the_networks_output() -> None:
    torch._dynamo.reset()
    model, x = local(lg.MAN(), blocks=2).eval(), batch()[0]
    wanted = model.backbone(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), wanted)
    model.backbone.compile(backend="eager")
    torch.testing.assert_close(model(x), wanted)
    model.train()
    assert len(lg.local_backward(model, *batch()).losses) == 2


def test_a_compiled_model_is_copied_and_saved(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = local(lg.MAN(), blocks=2)
    by_block("eager")(model)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    assert trained(twin, 1) == trained(model, 1)


@pytest.mark.parametrize("clip", [0.1])
def test_each_block_is_clipped_by_its_own_norm(clip: float) -> None:
    model = local(lg.MAN())
    for done in lg.block_steps(model, *batch()):
        nn.utils.clip_grad_norm_(model.members(done.block), clip)
    for k in range(4):
        norm = nn.utils.get_total_norm([p.grad for p in model.members(k) if p.grad is not None])
        assert norm <= clip * (1 + 1e-4)
