"""A batch is taken in parts only where no sample sees another one, and nothing moves once a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import localgrad as lg
from localgrad.scale.apart import treats_samples_apart


class OwnNorm(nn.Module):
    """Subtracts the mean over the batch: statistics that no layer of PyTorch shows."""

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0, keepdim=True)


class Detached(nn.Module):
    """Divides by an average of the batches so far, through which no gradient goes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        self.scale = 0.9 * self.scale + 0.1 * h.detach().std()
        return h / self.scale


class Scaled(nn.Module):
    """A branch that begins at zero."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.gain = branch, nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gain * self.branch(h)


def network(layer: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    units = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), layer()) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))


CASES = [
    (lambda: nn.GroupNorm(2, 8), True),
    (lambda: nn.Dropout(0.5), True),
    (lambda: nn.ReLU(inplace=True), True),
    (lambda: nn.BatchNorm2d(8).eval(), True),
    (lambda: nn.InstanceNorm2d(8), True),
    (lambda: Scaled(nn.Conv2d(8, 8, 1)), True),
    (lambda: nn.BatchNorm2d(8), False),
    (lambda: nn.InstanceNorm2d(8, track_running_stats=True), False),
    (spectral, False),
    (OwnNorm, False),
    (Detached, False),
    (lambda: Scaled(OwnNorm()), False),
]


@pytest.mark.parametrize(("layer", "apart"), CASES)
def test_a_network_treats_samples_apart_or_not(layer: Callable[[], nn.Module], apart: bool) -> None:
    backbone = network(layer)
    before, state = [t.clone() for t in backbone.state_dict().values()], torch.get_rng_state()
    assert treats_samples_apart(backbone, torch.zeros(4, 3, 8, 8)) is apart
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.state_dict().values(), strict=True))


@pytest.mark.parametrize("layer", [lambda: nn.GELU(), OwnNorm, Detached])
def test_what_fit_makes_has_the_gradients_of_the_whole_batch(layer: Callable[[], nn.Module]) -> None:
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    backbone = network(layer)
    twin = copy.deepcopy(backbone)
    quick = lg.Speed(call=0.0)  # Parts of a batch cost no time then, so they are taken first.
    budget = int(0.85 * lg.Planner(backbone, x, method=lg.bp()).bp.peak)
    fit = lg.fit(backbone, x, budget, exact=True, speed=quick)
    assert (fit.plan.accumulate > 1) == (layer not in (OwnNorm, Detached))
    lg.local_backward(fit.model, x, y)
    nn.functional.cross_entropy(twin(x), y).backward()
    for one, other in zip(backbone.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_network_without_values_is_watched_as_far_as_can_be() -> None:
    example = torch.zeros(4, 3, 8, 8, device="meta")
    assert not treats_samples_apart(network(lambda: nn.BatchNorm2d(8)).to("meta"), example)
    assert treats_samples_apart(network(lambda: nn.GroupNorm(2, 8)).to("meta"), example)
