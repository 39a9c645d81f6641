"""Scenes of garments: a function of seed and index, whose masks and boxes say what the image shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localgrad.core.errors import UserError
from localgrad.run import data as datasets
from localgrad.run import readers, scenes

RNG = np.random.default_rng(0)
# Ten white squares, one of each class, in pictures that are black elsewhere.
SQUARES = np.pad(np.full((10, 12, 12), 255, np.uint8), ((0, 0), (8, 8), (8, 8)))
CLASSES = np.arange(10, dtype=np.uint8)
needs_fashion = pytest.mark.skipif(
    not readers.DEBIAN_FASHION.is_dir(), reason="package dataset-fashion-mnist is not installed"
)


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    first, again = (scenes.scene(SQUARES, CLASSES, 0, 5) for _ in range(2))
    for name in ("image", "mask", "boxes", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    others = [scenes.scene(SQUARES, CLASSES, seed, index) for seed, index in ((1, 5), (0, 6))]
    assert not any(torch.equal(first.mask, other.mask) for other in others)
    several = scenes.Scenes(SQUARES, CLASSES, 0, np.arange(8)).take(np.array([5, 2]))
    assert torch.equal(several.images[0], first.image)
    assert torch.equal(several.labels[0], first.mask)
    boxes, labels, count = several.objects["boxes"], several.objects["labels"], len(first.labels)
    assert boxes.shape == (2, 6, 4)
    assert torch.equal(boxes[0, :count].long(), first.boxes)
    assert torch.equal(labels[0, :count], first.labels)
    assert not boxes[0, count:].any()
    assert (labels[0, count:] == -1).all()


def test_boxes_lie_around_what_the_mask_shows() -> None:
    hidden = 0
    for index in range(60):
        drawn = scenes.scene(SQUARES, CLASSES, 0, index)
        assert drawn.image.shape == (3, 96, 96)
        assert drawn.image.dtype == drawn.mask.dtype == torch.uint8
        assert len(drawn.boxes) == len(drawn.labels) <= 6
        assert set(drawn.labels.tolist()) <= set(drawn.mask.unique().tolist()) - {0}
        hidden += len(drawn.labels) < 3
        for (left, top, right, bottom), label in zip(drawn.boxes.tolist(), drawn.labels, strict=True):
            inside = drawn.mask[top:bottom, left:right] == label
            assert inside.any(1)[[0, -1]].all()  # The box is tight.
            assert inside.any(0)[[0, -1]].all()
    assert hidden < 10


def test_the_last_garment_lies_over_the_others() -> None:
    drawn = [scenes.scene(SQUARES, CLASSES, 3, index) for index in range(20)]
    for one in drawn:
        left, top, right, bottom = one.boxes[-1].tolist()
        assert (one.mask[top + 2 : bottom - 2, left + 2 : right - 2] == one.labels[-1]).all()  # Corners are round.


@needs_fashion
def test_the_splits_are_made_of_different_garments_and_the_limit_draws_by_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scenes, "TRAIN", 40)
    monkeypatch.setattr(scenes, "TEST", 3)
    data = datasets.load("fashion-scenes", limit_train=20)
    other = datasets.load("fashion-scenes", limit_train=20, seed=1)
    assert isinstance(data.train, scenes.Scenes)
    assert isinstance(other.train, scenes.Scenes)
    assert isinstance(data.test, scenes.Scenes)
    assert data.names[:2] == ("background", "T-shirt/top")
    assert len(data.names) == data.info.classes == 11
    assert (len(data.train.garments), len(data.test.garments)) == (60000, 10000)
    assert (len(data.train), len(data.test)) == (20, 3)
    assert data.train.indices.tolist() != other.train.indices.tolist()
    assert len(datasets.load("fashion-scenes", only_test=True).train) == 0
    with pytest.raises(UserError, match="limit_train must be between 11"):
        datasets.load("fashion-scenes", limit_train=41)


@needs_fashion
def test_masks_are_cropped_and_mirrored_with_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "TRAIN", 12)
    data = datasets.load("fashion-scenes")
    shown = datasets.Images(data.train.labels[:, None].expand(-1, 3, -1, -1), data.train.labels)
    data = datasets.Data(data.info, shown, shown, data.names)
    batches = list(datasets.train_batches(data, batch_size=4, seed=0, epoch=1))
    labels = list(datasets.train_labels(data, batch_size=4, seed=0, epoch=1))
    assert len(batches) == len(labels) == 3
    for (images, masks), alone in zip(batches, labels, strict=True):
        assert masks.dtype == torch.int64
        assert torch.equal(images[:, 0].long(), masks)
        assert torch.equal(masks, alone)
    assert not torch.equal(torch.cat(labels).sort(0).values, data.train.labels.long().sort(0).values)
