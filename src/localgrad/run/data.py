"""Data sets: images and labels, what is known about them, and the batches of an epoch.

Batches are uint8, a quarter of the bytes of float32, and are normalised on the device (`normalize`). A set that fits
in memory is held as tensors. The files of an image folder are decoded by worker processes. The order of an epoch and
each random draw of the augmentation depend on seed, epoch and index only, so a resumed run needs no loader state.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localgrad.core.errors import RunError, UserError, unknown
from localgrad.run import readers
from localgrad.run.augment import SUBSET, crop_flip, permutation
from localgrad.run.image_folder import Files, listed, printable, read_folder
from localgrad.run.readers import Batches, OnBad

IMAGE_FOLDER_SIZE = 224  # This is the usual crop of ImageNet, in pixels.


@dataclass(frozen=True)
class DataInfo:
    """What is known about a data set before it is read.

    Attributes:
        name: Its name in `DATASETS`.
        classes: How many classes it has. An image folder has 0 until it is read.
        channels: How many channels its images have.
        size: The side of its square images in pixels.
        mean: The mean of each channel over the training images, with pixels in [0, 1].
        std: The standard deviation of each channel, likewise.
        pad: The pixels by which an image is padded before a random crop. An image folder is cropped by area instead.
        flip: Whether half of the training images are mirrored.
    """

    name: str
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    @property
    def input(self) -> dict[str, Any]:
        """What a program must know to make an input of the network from an image."""
        return {"channels": self.channels, "size": self.size, "mean": list(self.mean), "std": list(self.std)}


DATASETS: dict[str, DataInfo] = {
    info.name: info
    for info in (
        # A digit fills most of its eight pixels, so it is shifted by one at most. Mirrored, it is no digit any more.
        DataInfo("digits", 10, 1, 8, (0.3054,), (0.3760,), pad=1, flip=False),
        DataInfo("fashion-mnist", 10, 1, 28, (0.2860,), (0.3530,), pad=2, flip=True),
        DataInfo("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True),
        DataInfo("cifar100", 100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), pad=4, flip=True),
        DataInfo("svhn", 10, 3, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), pad=2, flip=False),
        DataInfo("stl10", 10, 3, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), pad=4, flip=True),
        # All published ImageNet recipes use this mean and standard deviation.
        DataInfo("image-folder", 0, 3, IMAGE_FOLDER_SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0, True),
    )
}


@dataclass(frozen=True, eq=False)
class Images:
    """A split in memory: images uint8 [N, C, H, W], labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Images:
        """The samples at these indices, in their order."""
        return Images(self.images[torch.from_numpy(indices)], self.labels[torch.from_numpy(indices)])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set that has been read. Its splits have the same type, and `names` are those of its classes, by label."""

    info: DataInfo
    train: Images | Files
    test: Images | Files
    names: tuple[str, ...] = ()


def load(
    name: str,
    *,
    data_dir: str | None = None,
    download: bool = False,
    limit_train: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    only_test: bool = False,
) -> Data:
    """Reads a data set.

    Args:
        name: The name of the set, as in `DATASETS`.
        data_dir: The folder that holds it, "data" by default. Fashion-MNIST is also found where Debian's package
            installs it.
        download: Whether to fetch it into that folder if it is missing.
        limit_train: How many training samples to keep, balanced over the classes. By default all.
        seed: It determines which samples `limit_train` keeps.
        image_size: The side of an image folder's crops in pixels, 224 by default.
        only_test: Whether to leave the training split empty. Its files may be missing then.

    Returns:
        The data set.

    Raises:
        UserError: The name is unknown, the set is missing or has only one class, or the limit or size is impossible.
        RunError: A file is damaged, or the download failed.
    """
    info = _info(name)
    _check_size(info, image_size)
    folder = Path() if name == "digits" else _locate(name, data_dir, download, only_test)
    if name == "image-folder":
        names, train, test = read_folder(folder, only_val=only_test)
        info = replace(info, classes=len(names), size=image_size or IMAGE_FOLDER_SIZE)
    else:
        names, train, test = _in_memory(info, folder, only_test)
    if limit_train is not None:
        train = _limited(train, limit_train, info.classes, seed)
    return Data(info, train, test, tuple(names))


def check_classes(data: Data, recorded: Sequence[str], whose: object) -> str | None:
    """Compares a set's classes with those that a run has recorded.

    Args:
        data: The set.
        recorded: The names that the run was trained with, in the order of its logits. Runs of older versions have none.
        whose: The run, as the error sentence calls it.

    Returns:
        A warning if the run has recorded no classes and they may have changed, else None.

    Raises:
        UserError: The classes differ, or their order.
    """
    if not recorded:
        if data.info.name != "image-folder":
            return None
        return f"{whose} has not recorded its classes: see that they were {listed(data.names)}, in this order"
    # Systems encode an accented letter in one of two ways: as one character, or as a letter followed by its accent.
    then, now = ([unicodedata.normalize("NFC", name) for name in names] for names in (recorded, data.names))
    if then == now:
        return None
    sides = (("without", Counter(then) - Counter(now)), ("with", Counter(now) - Counter(then)))
    changes = [how + " " + listed(f"'{name}'" for name in names.elements()) for how, names in sides if names]
    if not changes:
        k = next(k for k, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        changes = [f"in another order, class {k} is '{printable(now[k])}' instead of '{printable(then[k])}'"]
    raise UserError(
        f"the classes of {data.info.name} are other than those of {whose}: {' and '.join(changes)}; name the data that "
        "it was trained on with --data-dir, or give the classes their names back"
    )


def described(info: DataInfo, names: Sequence[str]) -> dict[str, str]:
    """What the metadata of a file of weights say about its data, as JSON: `classes` lists the names in the order of the
    logits, and `input` has the channels, the side in pixels, and the mean and std of pixels in [0, 1]."""
    return {"classes": json.dumps(list(names)), "input": json.dumps(info.input)} if names else {}


def find(name: str, data_dir: str | None = None, *, download: bool = False) -> DataInfo:
    """Returns what is known about a set that is present or can be fetched, else raises UserError. No file is opened."""
    info = _info(name)
    if name != "digits" and not (download and name != "image-folder"):
        _locate(name, data_dir, download=False)
    return info


def present(name: str, data_dir: str | None = None) -> str | None:
    """Returns where a data set was found, else None. No file is opened."""
    _info(name)
    if name == "digits":
        return "scikit-learn"
    folder = readers.find(name, _root(data_dir))
    return None if folder is None else str(folder)


def steps_per_epoch(data: Data, batch_size: int) -> int:
    """Returns how many batches `train_batches` yields in an epoch."""
    _check_loading(batch_size)
    return max(1, len(data.train) // batch_size)


def train_batches(
    data: Data,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    on_bad: OnBad | None = None,
) -> Batches:
    """Yields the augmented training batches of one epoch: images uint8 [B, C, H, W] and labels int64 [B].

    The last, incomplete batch is dropped, because batch norm would give its few samples the weight of a full batch.
    A set that is smaller than one batch is one batch.

    Args:
        data: The data set.
        batch_size: Images of a batch, over all ranks.
        seed: It determines the order and the augmentation, together with the epoch.
        epoch: The number of the epoch.
        start: The number of the first batch to yield.
        shard: (i, n) for the i-th of n equal parts of each batch, for rank i of n.
        workers: How many processes decode an image folder. Sets in memory ignore it.
        on_bad: Called with the path of an image that cannot be decoded and the reason. Another sample, which seed and
            index determine, takes its place. Without it, such an image raises RunError.
    """
    _check_loading(batch_size, workers)
    chunks = [_part(chunk, shard) for chunk in _train_chunks(data, batch_size, seed, epoch)[start:]]
    if isinstance(data.train, Files):
        how = {"seed": seed, "epoch": epoch, "workers": workers, "on_bad": on_bad}
        return readers.decoded(data.train, data.info.size, chunks, **how)
    return _augmented(data.train, data.info, chunks, seed, epoch)


def train_labels(data: Data, *, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
    """Yields only the labels int64 [B] of the batches of `train_batches`."""
    for chunk in _train_chunks(data, batch_size, seed, epoch)[start:]:
        yield data.train.labels[torch.from_numpy(chunk)]


def eval_batches(
    data: Data, *, batch_size: int, shard: tuple[int, int] = (0, 1), workers: int = 0, on_bad: OnBad | None = None
) -> Batches:
    """Yields the test split in order, not augmented: images uint8 [B, C, H, W] and labels int64 [B].

    The last batch may be smaller. `shard` is (i, n) for every n-th batch from number i on. The other arguments are
    those of `train_batches`, but no sample takes the place of an unreadable image.
    """
    _check_loading(batch_size, workers)
    split, mine = data.test, slice(shard[0], None, shard[1])
    if isinstance(split, Files):
        chunks = _chunks(np.arange(len(split)), batch_size)[mine]
        return readers.decoded(split, data.info.size, chunks, workers=workers, on_bad=on_bad)
    pairs = zip(split.images.split(batch_size)[mine], split.labels.split(batch_size)[mine], strict=True)
    return (pair for pair in pairs)


def normalize(images: Tensor, info: DataInfo) -> Tensor:
    """Returns (images / 255 - mean) / std by channel, in float32. images: uint8 [B, C, H, W] on any device."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (info.mean, info.std))
    return (images.float() / 255 - mean) / std


def _info(name: str) -> DataInfo:
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name]


def _check_size(info: DataInfo, image_size: int | None) -> None:
    """Raises UserError unless a set can have images of this size. None is the default size."""
    if info.name == "image-folder":
        if image_size is not None and image_size < 1:
            raise UserError(f"image size must be at least 1 pixel, not {image_size}")
    elif image_size not in (None, info.size):
        raise UserError(f"the images of {info.name} are {info.size} pixels wide and are not resized to {image_size}")


def _in_memory(info: DataInfo, folder: Path, only_test: bool) -> tuple[Sequence[str], Images, Images]:
    """Reads the names of the classes, the training split and the test split of a set that fits in memory."""
    raws = readers.read(info.name, folder, only_test=only_test)
    *trains, test = (_checked(raw, info) for raw in raws)
    train = trains[0] if trains else Images(test.images[:0], test.labels[:0])
    names = _names(raws[-1], info)
    if len(alone := train.labels.unique()) == 1:
        what = f"one class alone, {printable(names[int(alone)])}, and of one nothing can be learned"
        raise UserError(f"{raws[0].file} holds {what}: take a set of two or more")
    return names, train, test


def _root(data_dir: str | None) -> Path:
    return readers.DEFAULT_ROOT if data_dir is None else Path(os.path.expanduser(data_dir))


def _locate(name: str, data_dir: str | None, download: bool, only_test: bool = False) -> Path:
    root = _root(data_dir)
    if download and name != "image-folder" and readers.find(name, root) is None:
        readers.fetch(name, root)
    folder = readers.find(name, root, only_test=only_test)
    if folder is not None:
        return folder
    if name == "image-folder":
        need = "val/CLASS/*.jpg" if only_test else "train/CLASS/*.jpg and val/CLASS/*.jpg"
        need += ": name the folder that does with --data-dir"
        raise UserError(f"{root} does not hold {need} (an image folder cannot be downloaded)")
    *most, last = (str(folder) for folder in readers.folders_of(name, root))
    where = f"{', '.join(most)} or {last}" if most else last
    debian = "install it (apt-get install dataset-fashion-mnist), " if name == "fashion-mnist" else ""
    files = ", ".join(readers.files_of(name, only_test=only_test))
    raise UserError(
        f"{name} was not found in {where} (its files are {files}): {debian}"
        "name the folder that holds it with --data-dir, or fetch it with --download"
    )


def _checked(raw: readers.Raw, info: DataInfo) -> Images:
    """Checks that images and labels can belong to the set, and makes tensors of them."""
    shape = (info.channels, info.size, info.size)
    if not len(raw.labels) or len(raw.images) != len(raw.labels):
        raise RunError(f"{raw.file} holds {len(raw.labels)} labels for {len(raw.images)} images")
    if raw.images.shape[1:] != shape or raw.images.dtype != np.uint8:
        found = f"{raw.images.dtype} {raw.images.shape[1:]}"
        raise RunError(f"the images beside {raw.file} are {found}, but those of {info.name} are uint8 {shape}")
    labels = raw.labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= info.classes:
        wrong = next(int(label) for label in labels if not 0 <= label < info.classes)
        raise RunError(f"{raw.file} holds the label {wrong}, but {info.name} has classes 0 to {info.classes - 1}")
    # Arrays that share a file's bytes are read-only, of which torch would warn, so the images are copied.
    return Images(torch.from_numpy(raw.images.copy(order="C")), torch.from_numpy(labels))


def _names(raw: readers.Raw, info: DataInfo) -> tuple[str, ...]:
    """The names of a set's classes, or their numbers where there are no names."""
    names = raw.names or readers.NAMES.get(info.name, ())
    return names if len(names) == info.classes else tuple(map(str, range(info.classes)))


def _limited(split: Images | Files, count: int, classes: int, seed: int) -> Images | Files:
    """Keeps `count` samples of a split in their order, with class sizes as equal as the split allows."""
    if not classes <= count <= len(split):
        raise UserError(f"limit_train must be between {classes} (the classes) and {len(split)} (the set), not {count}")
    labels = split.labels.numpy()
    # Samples are taken in rounds: the first of each class, then the second of each, and so on. A class that has no more
    # samples is passed over. The order of the classes, and of the samples within a class, is random by the seed.
    shuffled = permutation(len(labels), seed, 0, SUBSET)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels, minlength=classes)
    rounds = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    class_order = permutation(classes, seed, 1, SUBSET)[labels[by_class]]
    return split.take(np.sort(by_class[np.lexsort((class_order, rounds))[:count]]))


def _check_loading(batch_size: int, workers: int = 0) -> None:
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1, not {batch_size}")
    if workers < 0:
        raise UserError(f"workers must be 0 or more, not {workers}")


def _chunks(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _train_chunks(data: Data, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The indices of the images in each batch of an epoch."""
    steps = steps_per_epoch(data, batch_size)
    return _chunks(permutation(len(data.train), seed, epoch)[: steps * batch_size], batch_size)


def _part(chunk: NDArray[np.int64], shard: tuple[int, int]) -> NDArray[np.int64]:
    index, count = shard
    if len(chunk) % count:
        raise UserError(f"{count} ranks cannot share a batch of {len(chunk)} images: take a multiple of {count}")
    return chunk[index * len(chunk) // count : (index + 1) * len(chunk) // count]


def _augmented(split: Images, info: DataInfo, chunks: list[NDArray[np.int64]], seed: int, epoch: int) -> Batches:
    for chunk in chunks:
        images = crop_flip(split.images, chunk, pad=info.pad, flip=info.flip, seed=seed, epoch=epoch)
        yield images, split.labels[torch.from_numpy(chunk)]
