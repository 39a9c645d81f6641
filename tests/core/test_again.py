"""A unit that is run again finds what its first run found, and leaves what that one left."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, spectral_norm

import localgrad as lg


class Adapting(nn.Module):
    """A convolution, then what a subclass makes of [B, 8, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(channels, 8, 3, padding=1)
        self.after = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.count, self.seen, self.chance = 0, deque(maxlen=3), random.Random(1)

    def forward(self, h: Tensor) -> Tensor:
        return self.after(self.adapt(self.before(h)).relu())

    def adapt(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class RunningMean(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        h = h - self.mean.view(-1, 1, 1)
        self.mean.lerp_(h.detach().mean((0, 2, 3)).to(self.mean.dtype) + 1, 0.3)
        return h


class BehindItsBack(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        self.mean.data.add_(0.3)
        return h + self.mean.view(-1, 1, 1)


class Replaced(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + h.detach().mean().to(self.mean.dtype) + 0.2
        return h * (1 + self.mean.view(-1, 1, 1))


class Lazy(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.register_buffer("first", h.detach().mean((0, 2, 3)).clone())
            return 2 * h
        return h - self.get_buffer("first").view(-1, 1, 1)


class Counter(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        self.steps += 1
        return h / self.steps


class InPython(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(self.count)
        return h * sum(self.seen)


class Draws(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        factor = random.random() + self.chance.random() + float(np.random.rand())  # noqa: NPY002
        return nn.functional.dropout(h * factor, 0.3, self.training)


class ReadsStatistics(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
        before = self.norm.running_mean.view(-1, 1, 1) + 1  # pyright: ignore
        return (self.norm(h) + h) * before - self.norm.running_var.view(-1, 1, 1)  # pyright: ignore


class Helped(Adapting):
    def adapt(self, h: Tensor) -> Tensor:
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


class Codebook(Adapting):
    """Vectors that follow the averages of what is nearest to them (van den Oord et al., NeurIPS 2017, appendix A)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("codes", torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("size", torch.zeros(6))
        self.register_buffer("sums", self.codes.clone())

    def adapt(self, h: Tensor) -> Tensor:
        flat = h.detach().permute(0, 2, 3, 1).reshape(-1, 8).to(self.codes.dtype)
        nearest = torch.cdist(flat, self.codes).argmin(1)
        chosen = self.codes[nearest].view(h.shape[0], *h.shape[2:], 8).permute(0, 3, 1, 2).to(h.dtype)
        if self.training:
            one = nn.functional.one_hot(nearest, 6).to(flat.dtype)
            self.size.data.mul_(0.5).add_(one.sum(0), alpha=0.5)
            self.sums.data.mul_(0.5).add_(one.T @ flat, alpha=0.5)
            self.codes.data.copy_(self.sums / self.size.clamp(min=0.1)[:, None])
        return h * chosen + (h - chosen)


class Old(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(
            spectral_norm(nn.Conv2d(channels, 8, 3, padding=1)), nn.ReLU(), spectral_norm(nn.Conv2d(8, 8, 1))
        )


class New(nn.Sequential):
    def __init__(self, channels: int) -> None:
        one = parametrizations.spectral_norm(nn.Conv2d(channels, 8, 3, padding=1))
        super().__init__(
            one, nn.ReLU(inplace=True), parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), nn.Dropout(0.1)
        )


class Fused(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.two(self.norm(self.one(h)).relu())


OWN = [RunningMean, BehindItsBack, Replaced, Counter, InPython, Draws, ReadsStatistics, Helped, Norms, Views, Codebook]
ALL = [*OWN, Lazy, New]


def network(unit: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
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
        seen += lg.local_backward(model, x, y, micro_batch=(n % 2, 2), **step).losses
        if n % 2:
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
def test_units_that_depend_on_what_they_update(unit: type[nn.Module]) -> None:
    assert_same(network(unit), MAN)
    assert_same(network(unit), {"method": lg.bp()}, autocast=torch.bfloat16)
    assert_same(network(unit).double(), {"method": lg.bp()})


def test_hooks_that_make_a_weight() -> None:  # such a unit cannot be copied, so it has no coupling
    assert_same(network(Old), {"method": lg.dgl("0c1f"), "blocks": 2})
