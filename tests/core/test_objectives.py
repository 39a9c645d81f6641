"""Local losses against loops over samples, written from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from localgrad.core.methods import infopro_weights
from localgrad.core.objectives import ramp, reconstruction, similarity_matching, supervised_contrastive


def naive_contrastive(features: Tensor, targets: Tensor, temperature: float) -> float:
    rows = [[float(v) for v in row] for row in features]
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]
    count, total = len(rows), 0.0

    def similar(i: int, j: int) -> float:
        return math.exp(sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) / temperature)

    for i in range(count):
        positives = [p for p in range(count) if p != i and targets[p] == targets[i]]
        others = sum(similar(i, a) for a in range(count) if a != i)
        if positives:
            total -= sum(math.log(similar(i, p) / others) for p in positives) / len(positives)
    return total / count


def naive_matching(features: Tensor, targets: Tensor, classes: int) -> float:
    """Each sample: the standard deviation of each channel over the map, or the channels themselves."""

    def centred(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        row = [v - mean for v in row]
        length = math.sqrt(sum(v * v for v in row))
        return [v / length for v in row]

    samples = []
    for sample in features:
        if sample.ndim == 3 and sample[0].numel() > 1:
            samples.append([math.sqrt(float(((c - c.mean()) ** 2).sum()) / (c.numel() - 1)) for c in sample])
        else:
            samples.append([float(v) for v in sample.flatten()])
    labels = [[float(c == int(t)) for c in range(classes)] for t in targets]
    total, count = 0.0, len(samples)
    for i in range(count):
        for j in range(count):
            ours, theirs = (
                sum(a * b for a, b in zip(centred(rows[i]), centred(rows[j]), strict=True))
                for rows in (samples, labels)
            )
            total += (ours - theirs) ** 2
    return total / count**2


TARGETS = torch.tensor([0, 1, 0, 2, 1, 0])  # the fourth has no other of its class


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_supervised_contrastive_is_its_formula(temperature: float) -> None:
    features = torch.randn(6, 5, dtype=torch.float64)
    got = float(supervised_contrastive(features, TARGETS, temperature=temperature))
    assert got == pytest.approx(naive_contrastive(features, TARGETS, temperature), rel=1e-12)
    assert float(supervised_contrastive(3 * features, TARGETS, temperature=temperature)) == pytest.approx(got)


@pytest.mark.parametrize("count", [4, 1])
def test_a_batch_without_any_positive_counts_nothing(count: int) -> None:
    features = torch.randn(count, 3, requires_grad=True)
    loss = supervised_contrastive(features, torch.arange(count))
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert bool((features.grad == 0).all())


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 4, 1, 1), (6, 4)])
def test_similarity_matching_is_its_formula(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64)
    got = float(similarity_matching(features, TARGETS, classes=5))
    assert got == pytest.approx(naive_matching(features, TARGETS, 5), rel=1e-10)


def test_similarity_matching_survives_a_dead_channel() -> None:
    features = torch.randn(6, 4, 3, 3)
    features[:, 2] = 0
    features.requires_grad_()
    similarity_matching(features, TARGETS, classes=3).backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


def test_reconstruction_is_the_mean_binary_cross_entropy() -> None:
    logits, images = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    total = 0.0
    for z, v in zip(logits.flatten().tolist(), images.flatten().tolist(), strict=True):
        q = 1 / (1 + math.exp(-z))
        total -= v * math.log(q) + (1 - v) * math.log(1 - q)
    assert float(reconstruction(logits, images)) == pytest.approx(total / logits.numel(), rel=1e-12)


@pytest.mark.parametrize(
    ("objective", "shape"),
    [
        (lambda z: supervised_contrastive(z, TARGETS, temperature=0.5), (6, 3)),
        (lambda z: similarity_matching(z, TARGETS, classes=3), (6, 3, 2, 2)),
        (lambda z: similarity_matching(z, TARGETS, classes=3), (6, 4)),
        (lambda z: reconstruction(z, torch.linspace(0, 1, 12, dtype=torch.float64).view(1, 3, 2, 2)), (1, 3, 2, 2)),
    ],
)
def test_gradients_are_right(objective: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(objective, (torch.randn(shape, dtype=torch.float64, requires_grad=True),))


@given(first=st.floats(-10, 10), last=st.floats(-10, 10), count=st.integers(2, 60))
def test_a_ramp_is_linear_between_its_ends(first: float, last: float, count: int) -> None:
    values = [ramp(first, last, i, count) for i in range(count)]
    assert values[0] == ramp(first, last, 0, 1) == first
    assert values[-1] == pytest.approx(last, abs=1e-12)
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([(last - first) / (count - 1)] * (count - 1), abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 15, 54])
def test_infopros_weights_fall_from_the_papers_to_nothing_and_are_never_negative(count: int) -> None:
    weights = [infopro_weights(i, count) for i in range(count)]
    assert weights[0] == (5, 0.5)
    assert weights[-1] == (0, 0)
    assert weights == sorted(weights, reverse=True)
    assert all(a == pytest.approx(10 * b) and b >= 0 for a, b in weights)
