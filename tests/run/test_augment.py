"""What seeded draws decide: crops against a naive per-sample reference, order, batches, subsets."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import write_tree
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from localgrad.core.errors import UserError
from localgrad.run import data as datasets
from localgrad.run.augment import crop_flip, draws, permutation, resized_crop_box, splitmix64

MASK = 2**64 - 1
RNG = np.random.default_rng(0)


def naive_splitmix64(state: int) -> Iterator[int]:
    """S. Vigna's splitmix64.c, in Python's unbounded integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def output(state: int, number: int) -> int:
    stream = naive_splitmix64(state)
    for _ in range(number):
        next(stream)
    return next(stream)


def naive_draws(seed: int, epoch: int, index: int, count: int, stream: int = 0) -> list[int]:
    key = output(output(seed, stream), epoch)
    own = naive_splitmix64(output(key, index))
    return [next(own) for _ in range(count)]


def pictures(count: int = 40, channels: int = 3, height: int = 12, width: int = 12) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8))


def gathered(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def small(count: int = 25, name: str = "cifar10") -> datasets.Data:
    info = datasets.DATASETS[name]
    images = torch.from_numpy(RNG.integers(0, 256, (count, info.channels, info.size, info.size), dtype=np.uint8))
    split = datasets.Images(images, torch.arange(count))
    return datasets.Data(info, split, split)


def test_splitmix64_gives_the_published_numbers_of_seed_1234567() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(np.array([1234567], np.uint64), np.arange(4, dtype=np.uint64)).tolist() == published


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 7), (2**64 - 1, 2)])
def test_draws_are_the_nested_streams_that_the_docstring_says(seed: int, epoch: int) -> None:
    for stream in (0, 1):
        got = draws(seed, epoch, np.array([5, 0, 31]), 4, stream)
        assert got.tolist() == [naive_draws(seed, epoch, i, 4, stream) for i in (5, 0, 31)]


def test_a_negative_seed_is_a_seed_of_its_own() -> None:
    assert draws(-1, 0, np.arange(3), 2).tolist() == draws(2**64 - 1, 0, np.arange(3), 2).tolist()
    assert draws(-1, 0, np.arange(3), 2).tolist() != draws(1, 0, np.arange(3), 2).tolist()


def test_draws_are_uniform_and_their_columns_independent() -> None:
    draw = draws(0, 0, np.arange(90_000), 3)
    for column in draw.T:
        counts = np.bincount((column % np.uint64(9)).astype(int), minlength=9)
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 26.1  # chi-square, 8 degrees of freedom, p = 0.001
    unit = draw / 2.0**64
    assert np.abs(np.corrcoef(unit.T) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize(("pad", "flip"), [(4, True), (2, False), (1, True), (0, True), (0, False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_flip_equals_padding_and_slicing_one_sample_at_a_time(pad: int, flip: bool, channels: int) -> None:
    images = pictures(channels=channels, height=12, width=9)
    indices = np.random.default_rng(1).permutation(40)[:25]
    got = crop_flip(images, indices, pad=pad, flip=flip, seed=3, epoch=4)
    for image, index in zip(got.numpy(), indices, strict=True):
        top, left, mirror = naive_draws(3, 4, int(index), 3)
        top, left = top % (2 * pad + 1), left % (2 * pad + 1)
        padded = np.pad(images[int(index)].numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        wanted = padded[:, top : top + 12, left : left + 9]
        if flip and mirror % 2:
            wanted = wanted[:, :, ::-1]
        np.testing.assert_array_equal(image, wanted)
    assert got.dtype == torch.uint8
    assert got.is_contiguous()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10_000),
    batch=st.lists(st.integers(0, 39), min_size=1, max_size=20, unique=True),
)
def test_a_sample_does_not_depend_on_the_batch_it_comes_in(seed: int, epoch: int, batch: list[int]) -> None:
    images, chosen = pictures(), np.array(batch)
    together = crop_flip(images, chosen, pad=4, flip=True, seed=seed, epoch=epoch)
    for image, index in zip(together, batch, strict=True):
        alone = crop_flip(images, np.array([index]), pad=4, flip=True, seed=seed, epoch=epoch)[0]
        assert torch.equal(image, alone)


def test_crops_change_with_seed_and_epoch_and_index() -> None:
    # The same picture 40 times, so that nothing but the draw can make a difference.
    images = pictures()[:1].repeat(40, 1, 1, 1)
    first, again, seeded, later = (
        crop_flip(images, np.arange(40), pad=4, flip=True, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, seeded)
    assert not torch.equal(first, later)
    assert len(first.flatten(1).unique(dim=0)) > 20


def test_every_offset_is_equally_frequent_and_half_are_mirrored() -> None:
    # Pixel (row, column) of the picture has the value 7 * row + column: the centre tells the offset.
    ramp = torch.arange(49, dtype=torch.uint8).reshape(1, 1, 7, 7).repeat(9000, 1, 1, 1)
    got = crop_flip(ramp, np.arange(9000), pad=1, flip=True, seed=0, epoch=0)
    centre = got[:, 0, 3, 3]
    values, counts = centre.unique(return_counts=True)
    assert values.tolist() == [7 * r + c for r in (2, 3, 4) for c in (2, 3, 4)]
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1
    mirrored = (got[:, 0, 3, 4] < centre).sum().item()
    assert abs(mirrored - 4500) < 4 * math.sqrt(9000 / 4)


def test_crop_flip_leaves_the_data_set_as_it_was() -> None:
    images = pictures()
    before = images.clone()
    crop_flip(images, np.arange(40), pad=0, flip=True, seed=0, epoch=0).zero_()
    assert torch.equal(images, before)


def test_permutation_is_one_and_differs_by_seed_epoch_and_stream() -> None:
    orders = [permutation(100, s, e, k).tolist() for s, e, k in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(100, 0, 0, 1).tolist() == orders[0]


def test_resized_crop_stays_inside_and_keeps_the_published_ranges() -> None:
    for index in range(300):
        (top, left, height, width), _ = resized_crop_box(120, 90, seed=0, epoch=0, index=index)
        assert 0 <= top <= top + height <= 120
        assert 0 <= left <= left + width <= 90
        # Sides are rounded to pixels, so the ranges hold up to half a pixel a side.
        assert (height + 0.5) * (width + 0.5) >= 0.08 * 120 * 90
        assert (width + 0.5) / (height - 0.5) >= 3 / 4
        assert (width - 0.5) / (height + 0.5) <= 4 / 3


def test_resized_crop_has_torchvisions_distribution() -> None:
    boxes = np.array([resized_crop_box(100, 140, seed=0, epoch=0, index=i)[0] for i in range(3000)])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        image = torch.empty(3, 100, 140)
        theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    for ours, reference in zip(boxes.T, theirs.T, strict=True):
        error = math.sqrt((ours.var() + reference.var()) / 3000)
        assert abs(ours.mean() - reference.mean()) < 4 * error
        assert abs(ours.std() / reference.std() - 1) < 0.08


@pytest.mark.parametrize(("height", "width"), [(4, 400), (400, 4), (1, 1)])
def test_resized_crop_falls_back_to_torchvisions_central_crop(height: int, width: int) -> None:
    (top, left, rows, columns), _ = resized_crop_box(height, width, seed=0, epoch=0, index=0)
    wanted = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3])
    assert (top, left, rows, columns) == tuple(wanted)


def test_resized_crops_are_mirrored_half_the_time_and_differ_by_epoch() -> None:
    first, later = ([resized_crop_box(64, 64, seed=0, epoch=e, index=i) for i in range(1000)] for e in (0, 1))
    assert abs(sum(mirrored for _, mirrored in first) - 500) < 4 * math.sqrt(250)
    assert sum(a == b for a, b in zip(first, later, strict=True)) < 20
    assert first[:5] == [resized_crop_box(64, 64, seed=0, epoch=0, index=i) for i in range(5)]


# Batches


@pytest.mark.parametrize(("batch_size", "sizes"), [(10, [10, 10]), (25, [25]), (7, [7, 7, 7]), (64, [25])])
def test_training_drops_the_last_incomplete_batch_only(batch_size: int, sizes: list[int]) -> None:
    data = small()
    batches = list(datasets.train_batches(data, batch_size=batch_size, seed=0, epoch=0))
    assert [len(labels) for _, labels in batches] == sizes
    assert datasets.steps_per_epoch(data, batch_size) == len(sizes)
    labels = torch.cat([labels for _, labels in batches])
    assert len(labels.unique()) == len(labels)
    assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, 32, 32) and y.dtype == torch.int64 for x, y in batches)


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    data = small()
    runs = [
        gathered(datasets.train_batches(data, batch_size=5, seed=s, epoch=e))
        for s, e in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    orders = {tuple(labels.tolist()) for _, labels in runs}
    assert len(orders) == 3
    assert tuple(range(25)) not in orders


def test_a_sample_is_the_same_in_batches_of_any_size() -> None:
    data = small()
    images, labels = gathered(datasets.train_batches(data, batch_size=25, seed=2, epoch=3))
    others, same = gathered(datasets.train_batches(data, batch_size=4, seed=2, epoch=3))
    assert labels[:24].tolist() == same.tolist()
    assert torch.equal(images[:24], others)


def test_training_batches_are_augmented_by_the_sets_own_rule() -> None:
    for name in ("cifar10", "svhn", "digits"):
        data = small(name=name)
        assert isinstance(data.train, datasets.Images)
        for images, labels in datasets.train_batches(data, batch_size=5, seed=1, epoch=2):
            # In `small`, a label is its sample's index.
            kind = {"cifar10": (4, True), "svhn": (2, False), "digits": (1, False)}[name]
            wanted = crop_flip(data.train.images, labels.numpy(), pad=kind[0], flip=kind[1], seed=1, epoch=2)
            assert torch.equal(images, wanted)
            assert not torch.equal(images, data.train.images[labels])


def test_test_batches_are_everything_in_order() -> None:
    data = small()
    batches = list(datasets.eval_batches(data, batch_size=10))
    assert [len(labels) for _, labels in batches] == [10, 10, 5]
    images, labels = gathered(batches)
    assert isinstance(data.test, datasets.Images)
    assert torch.equal(images, data.test.images)
    assert torch.equal(labels, data.test.labels)


def test_impossible_loading_is_refused_at_the_call() -> None:
    data = small()
    with pytest.raises(UserError, match="batch size must be at least 1, not 0"):
        datasets.train_batches(data, batch_size=0, seed=0, epoch=0)
    with pytest.raises(UserError, match="batch size must be at least 1, not -3"):
        datasets.eval_batches(data, batch_size=-3)
    with pytest.raises(UserError, match="batch size"):
        datasets.steps_per_epoch(data, 0)
    with pytest.raises(UserError, match="workers must be 0 or more, not -1"):
        datasets.train_batches(data, batch_size=1, seed=0, epoch=0, workers=-1)


def test_image_folder_batches_are_the_same_with_and_without_workers(tmp_path: Path) -> None:
    data = datasets.load("image-folder", data_dir=str(write_tree(tmp_path)), image_size=24)
    alone, helped = (list(datasets.train_batches(data, batch_size=4, seed=0, epoch=1, workers=w)) for w in (0, 2))
    assert [tuple(x.shape) for x, _ in alone] == [(4, 3, 24, 24)] * 3
    for (x, y), (u, v) in zip(alone, helped, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    tested, shared = (list(datasets.eval_batches(data, batch_size=4, workers=w)) for w in (0, 2))
    assert [len(y) for _, y in tested] == [4, 4, 4, 3]
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(tested, shared, strict=True))


def test_image_folder_samples_depend_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    data = datasets.load("image-folder", data_dir=str(write_tree(tmp_path)), image_size=24)
    data = datasets.Data(data.info, replace(data.train, labels=torch.arange(15)), data.test)  # label = index

    def samples(batch_size: int, seed: int, epoch: int) -> tuple[list[int], dict[int, Tensor]]:
        images, labels = gathered(datasets.train_batches(data, batch_size=batch_size, seed=seed, epoch=epoch))
        return labels.tolist(), dict(zip(labels.tolist(), images, strict=True))

    order, first = samples(5, 0, 0)
    _, other_batches = samples(3, 0, 0)
    later_order, later = samples(5, 0, 1)
    seeded_order, seeded = samples(5, 1, 0)
    assert all(torch.equal(first[i], other_batches[i]) for i in range(15))
    assert order != later_order
    assert order != seeded_order
    assert not any(torch.equal(first[i], later[i]) or torch.equal(first[i], seeded[i]) for i in range(15))


def test_image_folder_crops_as_the_box_says(tmp_path: Path) -> None:
    data = datasets.load("image-folder", data_dir=str(write_tree(tmp_path)), image_size=24)
    data = datasets.Data(data.info, replace(data.train, labels=torch.arange(15)), data.test)
    assert isinstance(data.train, datasets.Files)
    images, labels = gathered(datasets.train_batches(data, batch_size=15, seed=4, epoch=2))
    flips = 0
    for image, index in zip(images, labels.tolist(), strict=True):
        picture = Image.open(data.train.root / os.fsdecode(bytes(data.train.paths[index]))).convert("RGB")
        (top, left, height, width), mirrored = resized_crop_box(
            picture.height, picture.width, seed=4, epoch=2, index=index
        )
        crop = F.resized_crop(picture, top, left, height, width, [24, 24])  # pyright: ignore[reportArgumentType]
        wanted = F.pil_to_tensor(crop)
        assert torch.equal(image, wanted.flip(2) if mirrored else wanted)
        flips += mirrored
    assert 0 < flips < 15


def test_image_folder_test_images_are_resized_and_cropped_centrally(tmp_path: Path) -> None:
    data = datasets.load("image-folder", data_dir=str(write_tree(tmp_path)), image_size=28)
    images, labels = gathered(datasets.eval_batches(data, batch_size=4))
    rule = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.PILToTensor()])
    files = sorted((tmp_path / "val").rglob("*.*"))
    assert labels.tolist() == data.test.labels.tolist()
    for image, file in zip(images, files, strict=True):
        wanted = torch.as_tensor(rule(Image.open(file).convert("RGB")))
        assert torch.equal(image, wanted)


def test_the_global_generators_are_left_alone(tmp_path: Path) -> None:
    import random

    write_tree(tmp_path)
    datasets.load("digits")  # scikit-learn draws as it is imported
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    sets = [
        datasets.load("digits", limit_train=50),
        datasets.load("image-folder", data_dir=str(tmp_path), image_size=16),
    ]
    for data in sets:
        for workers in (0, 1):
            list(datasets.train_batches(data, batch_size=8, seed=0, epoch=0, workers=workers))
            list(datasets.eval_batches(data, batch_size=8, workers=workers))
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


# Subsets


def test_limit_train_is_balanced_seeded_and_leaves_the_test_split() -> None:
    data = datasets.load("digits", limit_train=107, seed=1)
    counts = data.train.labels.bincount(minlength=10)
    assert counts.sum() == 107
    assert sorted(counts.tolist()) == [10, 10, 10] + [11] * 7
    assert len(data.test) == 360
    assert isinstance(data.train, datasets.Images)
    again, other = (datasets.load("digits", limit_train=107, seed=s).train for s in (1, 2))
    assert torch.equal(data.train.images, again.images)  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.equal(data.train.images, other.images)  # pyright: ignore[reportAttributeAccessIssue]
    assert counts.tolist() != other.labels.bincount(minlength=10).tolist()  # the seed also deals the remainder


def test_limit_train_keeps_each_image_with_its_label() -> None:
    whole, part = datasets.load("digits").train, datasets.load("digits", limit_train=50).train
    assert isinstance(whole, datasets.Images)
    assert isinstance(part, datasets.Images)
    known = {x.numpy().tobytes(): int(y) for x, y in zip(whole.images, whole.labels, strict=True)}
    assert all(known[x.numpy().tobytes()] == int(y) for x, y in zip(part.images, part.labels, strict=True))
    assert len({x.numpy().tobytes() for x in part.images}) == 50


def test_limit_train_fills_from_other_classes_what_a_small_class_lacks(tmp_path: Path) -> None:
    for place in (tmp_path / split / kind for split in ("train", "val") for kind in "abc"):
        place.mkdir(parents=True)
        for i in range({"a": 10, "b": 1, "c": 2}[place.name]):
            (place / f"{i}.png").touch()
    for count in (3, 4, 7, 13):
        split = datasets.load("image-folder", data_dir=str(tmp_path), limit_train=count).train
        some, one, two = split.labels.bincount(minlength=3).tolist()
        assert one == 1
        assert (some, two) in (
            [(2, 1), (1, 2)] if count == 4 else [(count - 1 - min(2, count // 3), min(2, count // 3))]
        )
        assert len(set(split.paths)) == count  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("count", [1438, 9, 0, -1])
def test_limit_train_out_of_range_says_the_range(count: int) -> None:
    with pytest.raises(UserError, match=rf"between 10 \(the classes\) and 1437 \(the set\), not {count}"):
        datasets.load("digits", limit_train=count)
