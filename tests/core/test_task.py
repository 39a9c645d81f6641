"""Image classification: criterion, metrics as sums, check of targets, the last layer of a head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from localgrad.core.errors import UserError
from localgrad.core.task import Classification


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_criterion_is_smoothed_cross_entropy(smoothing: float) -> None:
    logits, targets = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    logp = logits - logits.exp().sum(1, keepdim=True).log()
    wanted = 0.0
    for row, target in zip(logp, targets, strict=True):
        wanted -= (1 - smoothing) * float(row[target]) + smoothing * float(row.mean())
    got = Classification(4, label_smoothing=smoothing).criterion(logits, targets)
    assert float(got) == pytest.approx(wanted / 5, rel=1e-12)


@pytest.mark.parametrize("classes", [3, 8])
def test_metrics_are_sums_that_add_up_over_batches(classes: int) -> None:
    task = Classification(classes, label_smoothing=0.3)
    logits, targets = torch.randn(12, classes), torch.arange(12) % classes
    whole = task.metrics(logits, targets)
    parts = [task.metrics(logits[a:b], targets[a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    for name, value in whole.items():
        assert float(value) == pytest.approx(sum(float(p[name]) for p in parts))
    ranks = [(row > row[t]).sum().item() for row, t in zip(logits, targets, strict=True)]
    assert int(whole["top1"]) == sum(rank == 0 for rank in ranks)
    assert int(whole["top5"]) == sum(rank < 5 for rank in ranks)
    assert float(whole["loss"]) == pytest.approx(12 * float(nn.functional.cross_entropy(logits, targets)), rel=1e-6)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 4]), "targets run from 0 to 4, but the network has 4 classes"),
        (torch.tensor([-1, 2]), "targets run from -1 to 2"),
        (torch.tensor([0.0, 1.0]), "one int64 class a sample"),
        (torch.tensor([0, 1], dtype=torch.int32), "one int64 class a sample"),
        (torch.zeros(2, 4, dtype=torch.int64), r"not \(2, 4\)"),
        (torch.tensor([[1.0, 0.0, 1.0, 0.0]]), "are the share of each class, from 0 to 1 with a sum of 1 a sample"),
        (torch.tensor([[2.0, -1.0, 0.0, 0.0]]), "are the share of each class, from 0 to 1 with a sum of 1 a sample"),
    ],
)
def test_targets_that_are_no_classes_are_refused(targets: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Classification(4).check_targets(targets)


def test_targets_in_range_pass() -> None:
    Classification(4).check_targets(torch.tensor([0, 3]))
    Classification(4).check_targets(torch.zeros(0, dtype=torch.int64))


def test_a_heads_output_gives_one_logit_a_class() -> None:
    assert Classification(4).output(6)(torch.zeros(2, 6)).shape == (2, 4)
