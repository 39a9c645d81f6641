"""A unit that is run again finds what its first run found, and leaves what that one left."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small import assert_memory_is_predicted, gradients
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, spectral_norm

import localgrad as lg
from localgrad.core import copies, recomputation
from localgrad.scale import memory


class Adapting(nn.Module):
    """A convolution, then what a subclass makes of [B, 8, H, W]."""

    mean: Tensor
    level: Tensor
    scale: Tensor
    steps: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(channels, 8, 3, padding=1)
        self.after = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        for name in ("mean", "level", "scale"):
            self.register_buffer(name, torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.count, self.seen, self.chance, self.jitters = 0, deque(maxlen=3), random.Random(1), [Jitter()]

    def forward(self, h: Tensor) -> Tensor:
        return self.after(self.adapt(self.before(h)).relu())

    def adapt(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Jitter:
    def __call__(self, h: Tensor) -> Tensor:
        return h * np.random.rand()  # noqa: NPY002


class Buffers(Adapting):
    """Changes buffers in place, behind autograd's back, and by a new tensor, and counts."""

    def adapt(self, h: Tensor) -> Tensor:
        h = h - self.mean.view(-1, 1, 1)
        self.mean.lerp_(h.detach().mean((0, 2, 3)).to(self.mean.dtype) + 1, 0.3)
        self.level.data.add_(0.3)
        self.scale = self.scale * 0.9 + h.detach().mean().to(self.scale.dtype) + 0.2
        self.steps += 1
        return h * (1 + self.scale.view(-1, 1, 1)) / self.steps + self.level.view(-1, 1, 1)


class Lazy(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.register_buffer("first", h.detach().mean((0, 2, 3)).clone())
            return 2 * h
        return h - self.get_buffer("first").view(-1, 1, 1)


class InPython(Adapting):
    """Counts in attributes, and draws from generators of its own, by objects that it holds and by helpers."""

    def adapt(self, h: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(self.count)
        factor = sum(self.seen) + random.random() + self.chance.random() + float(np.random.rand())  # noqa: NPY002
        return nn.functional.dropout(self.jitters[0](h) * factor * drawn(), 0.3, self.training)


def drawn() -> float:
    return 1 + random.random()


class ReadsStatistics(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        before = self.norm.running_mean.view(-1, 1, 1) + 1  # pyright: ignore
        h = (self.norm(h) + h) * before - self.norm.running_var.view(-1, 1, 1)  # pyright: ignore
        return centred(h, self.norm)


def centred(h: Tensor, norm: nn.Module) -> Tensor:
    return norm(h) * (1 + norm.running_mean.view(-1, 1, 1))  # pyright: ignore


class Renorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        assert self.running_var is not None
        factor = (self.running_var + self.eps).sqrt().clone().view(-1, 1, 1)
        return super().forward(input) * factor


class Norms(Adapting):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        norms = (Renorm(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False))
        self.norms = nn.Sequential(*norms, nn.BatchNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True))

    def adapt(self, h: Tensor) -> Tensor:
        return self.norms(h)


class Views(Adapting):
    """Two buffers in the memory of a third."""

    both: Tensor
    second: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("both", torch.zeros(2, 8))
        self.register_buffer("second", self.both[1])

    def adapt(self, h: Tensor) -> Tensor:
        self.second += 0.4
        return h * (1 + self.both[1].view(-1, 1, 1))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.second = self.both[1]
        return self


class Observed(Adapting):
    """A hook reads and moves what is not the module's own code's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm.register_forward_hook(lambda norm, _, out: out * (1 + norm.running_mean.sum()))  # pyright: ignore

    def adapt(self, h: Tensor) -> Tensor:
        return self.norm(h)


def normed(norm: Callable[[nn.Module], nn.Module], channels: int, *more: nn.Module) -> nn.Sequential:
    one, two = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
    return nn.Sequential(norm(one), nn.ReLU(inplace=True), norm(two), *more)


def parametrized(channels: int) -> nn.Sequential:
    return normed(parametrizations.spectral_norm, channels, nn.Dropout(0.1))


class Fused(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.norm, self.relu = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.two = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.two(self.relu(self.norm(self.one(h))))


class Switched(Adapting):
    """Plain batch norms, of which the network's own code changes one kind each time."""

    def adapt(self, h: Tensor) -> Tensor:
        self.norm.momentum = None if self.count % 2 else 0.1
        self.norm.eval() if self.count == 2 else self.norm.train()
        if h.device.type != "meta":  # where a network is traced, a norm without momentum asks for values
            self.count += 1
        return self.norm(h)


ALL = [Buffers, InPython, ReadsStatistics, Norms, Views, Lazy, parametrized, Switched, Observed]


def network(unit: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(unit(3), unit(8), unit(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def steps(backbone: nn.Module, again: bool, how: dict[str, Any], **step: Any) -> list[Any]:
    """Losses, gradients and all state of some steps, and where the random generators stand."""
    dtype = next(backbone.parameters()).dtype
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 12, 12, dtype=dtype), torch.arange(4)
    model = lg.localize(copy.deepcopy(backbone), example=x, **how)
    if again:
        lg.recompute(model, couplings=True)
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.01)
    seen: list[Any] = []
    for n in range(4):
        seen += [done.loss for done in lg.block_steps(model, x, y, **step)]
        if n % 2:
            model.move_averages()
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
    seen += [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    seen += [(m.count, list(m.seen), m.chance.random()) for m in model.modules() if isinstance(m, Adapting)]
    return [*seen, random.random(), float(np.random.rand())]  # noqa: NPY002


def assert_same(backbone: nn.Module, how: dict[str, Any], **step: Any) -> None:
    plain, again = (steps(backbone, again, how, **step) for again in (False, True))
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


MAN = {"method": lg.dgl("0c1f"), "blocks": 2, "coupling": lg.MAN(0.9)}


@pytest.mark.parametrize("unit", ALL)
def test_units_that_depend_on_what_they_update(unit: Callable[[int], nn.Module]) -> None:
    assert_same(network(unit), MAN)
    assert_same(network(unit), {"method": lg.bp()}, autocast=torch.bfloat16)
    assert_same(network(unit).double(), {"method": lg.bp()})


def test_hooks_that_make_a_weight() -> None:  # Such a unit cannot be copied, so it has no coupling.
    assert_same(network(partial(normed, spectral_norm)), {"method": lg.dgl("0c1f"), "blocks": 2})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_quantization_aware_training(fused: bool) -> None:
    backbone = network(Fused).train()
    backbone.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # pyright: ignore
    if fused:  # its convolution reads the statistics of a batch norm
        layers = [[f"{i}.one", f"{i}.norm", f"{i}.relu"] for i in range(3)]
        quantization.fuse_modules_qat(backbone, layers, inplace=True)
    assert_same(quantization.prepare_qat(backbone, inplace=True), MAN)


class Shared(nn.Module):
    """Units that read and move one buffer, in their code and in the network's own."""

    level: Tensor

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))
        self.units = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(c, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for c in (3, 8, 8)]
        )
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.head, self.other = nn.Linear(8, 10), other

    def forward(self, h: Tensor) -> Tensor:
        for unit in self.units:
            h = self.norm(unit(h)) * self.level.clone() if self.other else unit(h * self.level.clone())
            self.level.add_(0.5)
        return self.head(h.mean((2, 3)))


@pytest.mark.parametrize("other", [False, True])
def test_a_buffer_that_several_units_move(other: bool) -> None:
    assert_same(Shared(other), {"method": lg.bp()})


def test_a_state_that_is_shared_by_reference() -> None:
    memo: dict[int, Any] = {}
    base = torch.arange(6.0).view(2, 3).t()
    state = {"base": base, "row": base[1], "list": [base, deque([base[0]])], "none": None}
    state["twice"] = state["list"]
    other = {name: copies.copied_state(value, memo) for name, value in state.items()}
    other["row"] += 10
    assert other["base"].stride() == base.stride()
    assert torch.equal(other["base"][1], base[1] + 10)
    assert other["list"][0] is other["base"]
    assert other["twice"] is other["list"]
    assert torch.equal(base, torch.arange(6.0).view(2, 3).t())


def test_a_graph_may_be_used_twice() -> None:
    model = lg.recompute(lg.localize(network(Buffers), method=lg.bp(), example=torch.zeros(2, 3, 12, 12)))
    loss = model.blocks[0](torch.ones(2, 3, 12, 12)).square().sum()
    loss.backward(retain_graph=True)
    once = {name: 2 * gradient for name, gradient in gradients(model).items()}
    loss.backward()
    assert once
    assert all(torch.equal(once[name], gradient) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("unit", [Buffers, ReadsStatistics, parametrized, Norms])
def test_its_memory_is_predicted(unit: Callable[[int], nn.Module]) -> None:
    x, y = torch.randn(4, 3, 12, 12), torch.arange(4)
    assert_memory_is_predicted(lg.recompute(lg.localize(network(unit), example=x, **MAN), couplings=True), x, y)


@pytest.mark.parametrize("unit", [Buffers, parametrized])
def test_plans_count_what_is_kept(unit: Callable[[int], nn.Module]) -> None:
    backbone, x, y = network(unit), torch.randn(4, 3, 12, 12), torch.arange(4)
    planner = lg.Planner(backbone, x, method=lg.dgl("0c1f"), coupling=lg.MAN())
    for plan in (planner.checkpointing, planner.frontier()[-1]):
        coupling = lg.MAN() if len(plan.blocks) > 1 else None
        how = {"method": lg.dgl("0c1f"), "blocks": list(plan.blocks), "coupling": coupling}
        plain, model = (lg.localize(copy.deepcopy(backbone), example=x, **how) for _ in range(2))
        plan.apply(model)
        assert plan.units or plan.couplings or plan is not planner.checkpointing
        model.load_state_dict(plain.state_dict())
        made = memory.optimizers_for(
            lg.param_groups(model), partial(torch.optim.SGD, lr=0.1, momentum=0.9), as_you_go=plan.step_as_you_go
        )
        step = partial(memory.training_step, model, made, x, y, step_as_you_go=plan.step_as_you_go)
        step()
        assert lg.measure_peak(step, model=model, optimizers=made).total == planner.exactly(plan).peak


def test_statistics_are_kept_and_the_buffers_stay_the_same_objects() -> None:
    # A plain batch norm was once kept without its statistics. A copy of these few numbers needs no special case.
    for norm in (nn.BatchNorm2d(8), nn.BatchNorm2d(8).eval(), Renorm(8)):
        unit = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU())
        out = recomputation.recomputed(unit, torch.randn(2, 3, 4, 4))
        found, values = list(norm.buffers()), [b.clone() for b in norm.buffers()]
        out.sum().backward()
        assert all(a is b for a, b in zip(found, norm.buffers(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(values, found, strict=True))
        kept = recomputation._Before(unit).kept
        assert sum(isinstance(value, Tensor) for state in kept for value in state.values()) == 3
