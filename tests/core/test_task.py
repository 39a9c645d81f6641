"""Classification and segmentation: criterion, metrics as sums, check of targets, the last layers of a head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.task import Classification, Segmentation


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


MASKS = torch.tensor([[[0, 1], [2, 255]], [[1, 1], [0, 2]]])


def test_segmentation_means_over_the_pixels_that_count() -> None:
    logits = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    logp = logits - logits.exp().sum(1, keepdim=True).log()
    each = [-float(logp[b, k, i, j]) for (b, i, j), k in at(MASKS) if k != 255]
    task = Segmentation(3)
    assert float(task.criterion(logits, MASKS)) == pytest.approx(sum(each) / 7, rel=1e-12)
    assert float(task.criterion({"out": logits}, MASKS)) == pytest.approx(sum(each) / 7, rel=1e-12)
    assert float(task.criterion(logits, torch.full_like(MASKS, 255))) == 0


def at(masks: torch.Tensor) -> list[tuple[tuple[int, ...], int]]:
    """The place and the value of each pixel."""
    return [(tuple(place), int(masks[tuple(place)])) for place in masks.ge(0).nonzero().tolist()]


def test_logits_are_resized_to_the_masks() -> None:
    logits = torch.randn(2, 3, 4, 4)
    masks = torch.randint(0, 3, (2, 8, 6))
    resized = nn.functional.interpolate(logits, (8, 6), mode="bilinear")
    torch.testing.assert_close(Segmentation(3).criterion(logits, masks), nn.functional.cross_entropy(resized, masks))


def test_miou_and_pixel_accuracy_follow_from_sums_over_all_batches() -> None:
    task, masks = Segmentation(4), torch.randint(0, 3, (6, 5, 5))  # No mask has class 3.
    masks[0, 0] = 255
    logits = torch.randn(6, 4, 5, 5)
    logits[:, 3] = -9  # It is never predicted.
    sums = {"confusion": torch.zeros(4, 4), "loss": torch.zeros(())}
    for a, b in ((0, 1), (1, 6)):
        sums = {name: sums[name] + value for name, value in task.metrics(logits[a:b], masks[a:b]).items()}
    found, counted = logits.argmax(1), masks != 255
    ious = []
    for k in range(3):
        both = ((found == k) & (masks == k)).sum().item()
        ious.append(both / (((found == k) & counted) | (masks == k)).sum().item())
    scores = task.scores(sums)
    assert scores["miou"] == pytest.approx(100 * sum(ious) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * float((found == masks)[counted].float().mean()))
    assert scores["loss"] == pytest.approx(float(task.criterion(logits, masks)), rel=1e-5)
    assert list(scores)[1] == task.score


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            torch.full((1, 2, 2), 3),
            "the masks have the value 3, but the classes are 0 to 2, and 255 is a pixel",
        ),
        (torch.full((1, 2, 2), -1), "the masks have the value -1"),
        (torch.zeros(2, dtype=torch.int64), r"int64 masks \[B, height, width\], a class for each pixel, not \(2,\)"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), "not .*uint8"),
        ([MASKS], "not a list"),
    ],
)
def test_targets_that_are_no_masks_are_refused(masks: torch.Tensor, message: str) -> None:
    Segmentation(3).check_targets(MASKS)
    with pytest.raises(UserError, match=message):
        Segmentation(3).check_targets(masks)


def test_segmentation_takes_numbers_in_their_ranges() -> None:
    for arguments, message in (
        ({"classes": 1}, "at least 2 classes"),
        ({"classes": 3, "ignore_index": 2}, "a value that is no class, and 2 is one of 3"),
        ({"classes": 3, "label_smoothing": 1.0}, "label smoothing"),
    ):
        with pytest.raises(UserError, match=message):
            Segmentation(**arguments)


class Pixels(nn.Module):
    """Four units with a skip from the first to the last, [B, 3, H, W] -> {"out": [B, 3, H, W]}."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ((3, 4, 1), (4, 6, 2), (6, 6, 1), (10, 4, 1))
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, s, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b, s in pairs
        )
        self.readout = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        skip = self.units[0](x)
        h = self.units[2](self.units[1](skip))
        h = torch.cat([nn.functional.interpolate(h, x.shape[2:]), skip], 1)
        return {"out": self.readout(self.units[3](h))}


@pytest.mark.parametrize("coupling", [None, lg.MAN(0.9), lg.MANPlusPlus(0.9), lg.DeepMAN(0.9)])
@pytest.mark.parametrize("method", [lg.dgl(), lg.infopro(), lg.auglocal()])
def test_pixels_are_trained_in_blocks_and_no_loss_reaches_another_block(
    method: lg.Method, coupling: lg.MAN | None
) -> None:
    x, masks = torch.rand(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    how = {"method": method, "coupling": coupling, "example": x, "task": Segmentation(3), "targets": masks}
    model = lg.localize(Pixels(), blocks=3, **how)
    members = [set(model.members(k)) for k in range(3)]
    for done in lg.block_steps(model, x, masks):
        assert done.loss > 0
        assert all(p.grad is not None for p in members[done.block])
        assert all(p.grad is None for later in members[done.block + 1 :] for p in later)
        for p in members[done.block]:
            p.grad = None
    assert all(p.grad is None for p in model.parameters())


def test_a_head_for_pixels_is_one_convolution() -> None:
    model = lg.localize(Pixels(), blocks=2, method=lg.dgl("1c2f"), example=torch.rand(2, 3, 8, 8), task=Segmentation(3))
    assert [type(m) for m in model.auxiliaries.modules() if not list(m.children())] == [nn.Conv2d]


class TwoOutputs(Pixels):
    """Pixels, with a second classifier on the logits of the first, as torchvision's pretrained networks have one."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = super().forward(x)["out"]
        return {"out": out, "aux": self.auxiliary(out)}


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_output_that_the_loss_does_not_read_is_warned_of(blocks: int) -> None:
    how = {"method": lg.dgl() if blocks > 1 else lg.bp(), "example": torch.rand(2, 3, 8, 8), "task": Segmentation(3)}
    backbone = TwoOutputs()
    with pytest.warns(UserWarning, match=r"so what only 'aux' needs is not trained: leave it out") as said:
        lg.localize(backbone, blocks=blocks, **how)
    assert len(said) == 1
    backbone.auxiliary.requires_grad_(False)
    lg.localize(backbone, blocks=blocks, **how)  # Nothing is lost, so nothing is said.


def test_what_does_not_fit_masks_is_refused() -> None:
    x, masks = torch.rand(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    for backbone, task, method, message in (
        (Pixels(), Segmentation(4), lg.dgl(), r"segmentation into 4 classes takes logits \[4, height, width\]"),
        (lg.build("resnet20", classes=3), Segmentation(3), lg.dgl(), r"gives \(3,\) for a sample, and segmentation"),
        (Pixels(), Segmentation(3), lg.predsim(), "similarity matching compares samples by their classes"),
        (Pixels(), Segmentation(3), lg.infopro(contrast=True), "leave contrast out"),
    ):
        with pytest.raises(UserError, match=message):
            lg.localize(backbone, blocks=2, method=method, example=x, task=task, targets=masks)


def test_the_peak_of_a_step_on_masks_is_predicted_and_a_plan_keeps_its_budget() -> None:
    x, masks = torch.rand(4, 3, 16, 16), torch.randint(0, 3, (4, 16, 16))
    how = {"method": lg.dgl(), "task": Segmentation(3), "targets": masks}
    model = lg.plan(Pixels(), x, "80%", **how).localize(Pixels(), x)

    def optimizers(own: lg.LocalModel) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(lg.param_groups(own), lr=0.1, momentum=0.9)]

    (made,) = optimizers(model)
    step(model, made, x, masks)
    peak = lg.measure_peak(lambda: step(model, made, x, masks), model=model, optimizers=[made])
    assert peak.total == lg.predict_peak(model, 4, optimizers, targets=masks).total


def step(model: lg.LocalModel, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    lg.local_backward(model, x, y)
    optimizer.step()
    optimizer.zero_grad()
