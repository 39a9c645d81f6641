"""Detection as a task of one's own: the example, and the benchmark with its average precision."""

from __future__ import annotations

import re
import runpy
import sys
from typing import Any

import detection_scenes as bench
import numpy as np
import pytest
import torch
from torch import Tensor

import localgrad as lg
from localgrad.run import data as datasets
from localgrad.run.data import DATASETS, Data
from localgrad.run.scenes import Scenes

# Ten white squares, one of each class, in pictures that are black elsewhere.
SQUARES = np.pad(np.full((10, 12, 12), 255, np.uint8), ((0, 0), (8, 8), (8, 8)))
CLASSES = np.arange(10, dtype=np.uint8)
Detection: Any = bench.EXAMPLE["Detection"]


def scenes(count: int, seed: int = 0) -> Scenes:
    return Scenes(SQUARES, CLASSES, seed, np.arange(count))


def some(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    split = scenes(count)
    return datasets.normalize(split.images, DATASETS["fashion-scenes"]), split.objects


@pytest.fixture(scope="module")
def task() -> Any:
    return Detection(bench.EXAMPLE["Detector"]())


def test_anchors_follow_what_is_compared_with_them_to_its_device(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device takes the place of another one. It has no values, so what reads values is left out."""
    seen: list[Any] = []
    meta = {"cls_logits": torch.empty(1, sum(map(len, task.maps)), 11, device="meta")}
    monkeypatch.setattr(task, "objects", lambda targets: [targets])
    loss = lambda objects, output, anchors: seen.extend(anchors) or {"loss": torch.zeros(())}  # noqa: E731
    monkeypatch.setattr(task.network, "compute_loss", loss)
    monkeypatch.setattr(task.network, "postprocess_detections", lambda split, maps, sizes: seen.extend(maps[0]))
    task.criterion(meta, {"boxes": torch.empty(1, 1, 4, device="meta")})
    task.detections(meta)
    assert [anchors.device.type for anchors in seen] == ["meta"] * 6


def test_the_example_trains_both_ways(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = Data(DATASETS["fashion-scenes"], scenes(20), scenes(3, seed=1))
    monkeypatch.setattr(datasets, "load", lambda name: data)
    monkeypatch.setattr(sys, "argv", ["detection.py", "--steps", "1"])
    runpy.run_path(str(bench.ROOT / "examples" / "detection.py"), run_name="__main__")
    told = re.findall(r"blocks: (\d), garments found: ([\d.]+)%", capsys.readouterr().out)
    assert [blocks for blocks, _ in told] == ["1", "4"]
    assert all(0 <= float(found) <= 100 for _, found in told)


@pytest.mark.parametrize("way", bench.WAYS)
def test_every_parameter_gets_its_gradient_from_its_own_block(way: str) -> None:
    """The maps that enter the pyramid are detached: the last block changes no gradient of an earlier one."""
    model = bench.localized(way, 0, 2)
    assert len(model.blocks) == (1 if way == "bp" else 4)
    seen: set[torch.nn.Parameter] = set()
    for done in lg.block_steps(model, *some(2)):
        assert done.loss.isfinite()
        got = {p for p in model.parameters() if p.grad is not None and p.grad.any()} - seen
        assert got == set(model.members(done.block))
        seen |= got
    assert seen == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("way", "anchors"), [("dgl", [1296, 1296, 324]), ("dgl+man++", [1296, 324, 9 * (9 + 4 + 1)])])
def test_heads_read_the_levels_of_the_paper(way: str, anchors: list[int]) -> None:
    """P3, P4, and P5 to P7. Without the copies P3, P3 and P4, and the first map is halved for it."""
    model = bench.localized(way, 0, 1)
    h, found = torch.randn(1, 3, 96, 96), []
    with torch.no_grad():
        for block, auxiliary in model.eval().isolated:
            h = block(h)
            found.append(auxiliary(h)["classifier"]["cls_logits"].shape[1])
    assert found == anchors


def test_rows_without_a_box_count_for_nothing(task: Any) -> None:
    _, objects = some(3)
    generator = torch.Generator().manual_seed(0)
    output = {
        name: torch.randn(3, 1746, size, generator=generator)
        for name, size in (("cls_logits", 11), ("bbox_regression", 4))
    }
    more = {"boxes": torch.cat([objects["boxes"], torch.zeros(3, 2, 4)], 1),
            "labels": torch.cat([objects["labels"], torch.full((3, 2), -1)], 1)}  # fmt: skip
    assert torch.equal(task.criterion(output, objects), task.criterion(output, more))
    none = {"boxes": torch.zeros(3, 0, 4), "labels": torch.zeros(3, 0, dtype=torch.int64)}
    task.check_targets(none)
    share = output["cls_logits"].sigmoid()  # All anchors are background: focal loss with alpha 1/4 and gamma 2.
    focal = -(0.75 * share**2 * (1 - share).log()).sum((1, 2)).mean()
    assert task.criterion(output, none) == pytest.approx(float(focal), rel=1e-4)
    assert task.metrics(output, none) == {"found": 0, "count": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": torch.tensor([[[8.0, 2, 8, 9]]])},
        {"boxes": torch.tensor([[[8.0, 9, 9, 2]]])},
        {"boxes": torch.zeros(1, 1, 5)},
        {"labels": torch.tensor([[11]])},
    ],
)
def test_wrong_boxes_are_refused(task: Any, change: dict[str, Tensor]) -> None:
    targets = {"boxes": torch.tensor([[[1.0, 2, 8, 9]]]), "labels": torch.tensor([[1]])}
    task.check_targets(targets)
    with pytest.raises(lg.UserError, match="left < right, top < bottom"):
        task.check_targets(targets | change)


def test_what_is_found_is_counted(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, objects = some(2)
    truth = task.objects(objects)
    count = sum(len(image["labels"]) for image in truth)
    for change, expected in ((0, count), (1, 0)):
        monkeypatch.setattr(
            type(task),
            "detections",
            lambda *_, c=change: [{**t, "labels": (t["labels"] - 1 + c) % 10 + 1} for t in truth],
        )
        assert task.metrics({}, objects) == {"found": expected, "count": count}


# The benchmark


def found(*rows: tuple[float, int, list[float]]) -> dict[str, Tensor]:
    """Objects from their scores, labels and boxes, the best first."""
    scores, labels, boxes = zip(*rows, strict=True)
    return {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}


def test_average_precision_is_that_of_a_case_by_hand() -> None:
    """Class 1 has three true boxes. Of the boxes found the first is right, the second lies elsewhere, the third has an
    overlap of 0.625, and the fourth is the first once more. Class 2 is found at once, and class 3 is not."""
    near, far, last = [0.0, 0, 10, 10], [50.0, 50, 60, 60], [20.0, 20, 30, 30]
    first = found((0.9, 1, near), (0.8, 1, far), (0.4, 1, near), (0.3, 4, near))
    second = found((0.9, 2, far), (0.7, 1, [0.0, 0, 16, 10]), (0.1, 3, near))
    truth = [found((1, 1, near), (1, 1, last)), found((1, 2, far), (1, 1, near), (1, 3, last))]
    precisions = bench.average_precisions([first, second], truth)
    assert precisions.shape == (3, 10)
    both = (34 * 1 + 33 * 2 / 3) / 101  # Recalls up to 1/3 have a precision of 1, and up to 2/3 one of 2/3.
    assert precisions[0, :3].tolist() == pytest.approx([both] * 3)
    assert precisions[0, 3:].tolist() == pytest.approx([34 / 101] * 7)
    assert precisions[1].tolist() == pytest.approx([1.0] * 10)
    assert precisions[2].tolist() == [0.0] * 10


def test_a_true_box_is_taken_once_and_by_the_box_that_fits_it() -> None:
    left, right = [0.0, 0, 10, 10], [4.0, 0, 14, 10]
    truth = [found((1, 1, left), (1, 1, right))]
    assert bench.average_precisions([found((0.9, 1, right), (0.8, 1, left))], truth)[0, 9] == pytest.approx(1)
    twice = bench.average_precisions([found((0.9, 1, left), (0.8, 1, left))], truth)
    assert twice[0].tolist() == pytest.approx([51 / 101] * 10)
    empty = {name: tensor[:0] for name, tensor in truth[0].items()}
    assert bench.average_precisions([empty], truth).tolist() == [[0.0] * 10]
    assert bench.average_precisions([truth[0], truth[0]], [empty, *truth])[0, 0] == pytest.approx(1 / 2, abs=0.01)


def test_a_scene_is_mirrored_with_its_boxes() -> None:
    images, boxes = torch.zeros(1, 3, 96, 96), torch.tensor([[[10.0, 20, 40, 50], [0, 0, 0, 0]]])
    images[0, :, 20:50, 10:40] = 1
    objects = {"boxes": boxes, "labels": torch.tensor([[3, -1]])}
    x, y = bench.batch(images, objects, 16, torch.Generator().manual_seed(0))
    lefts = set()
    for image, box in zip(x, y["boxes"][:, 0].int().tolist(), strict=True):
        left, top, right, bottom = box
        assert image[:, top:bottom, left:right].min() == 1
        assert image.sum() == 3 * 30 * 30
        lefts.add(left)
    assert lefts == {10, 56}


def test_a_run_is_tested_by_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    test = scenes(3, seed=1)
    data = Data(DATASETS["fashion-scenes"], scenes(4), test)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: data)
    truth = [{**t, "scores": torch.ones(len(t["labels"]))} for t in Detection.objects(None, test.objects)][:2]
    settings = bench.Settings(batch_size=2, limit_test=2)
    for known, expected in ((truth, "100.00"), (truth[::-1], "0.00")):
        monkeypatch.setattr(Detection, "detections", lambda *_, known=known: known)
        row = bench.trained(settings, "bp", 1, 0)
        assert float(row.pop("seconds")) >= 0
        assert row == dict.fromkeys(("map", "ap50", "ap75"), expected)
