"""Data sets: images and labels, what is known about them, and the batches of an epoch.

Batches are uint8, a quarter of the bytes of float32, and are normalised on the device (`normalize`). A set that fits
in memory is held as tensors. The files of an image folder are decoded by worker processes. The order of an epoch and
each random draw of the augmentation depend on seed, epoch and index only, so a resumed run needs no loader state.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localgrad.core.errors import RunError, UserError, unknown
from localgrad.run import readers
from localgrad.run.augment import SUBSET, crop_flip, permutation
from localgrad.run.image_folder import Files, listed, printable, read_folder
from localgrad.run.mask_folder import read_names, read_split
from localgrad.run.readers import Batches, OnBad
from localgrad.run.scenes import Scenes, split_of
from localgrad.run.sets import DATASETS, FOLDER_SIZE, DataInfo, described

__all__ = ["DATASETS", "DataInfo", "described"]


@dataclass(frozen=True, eq=False)
class Images:
    """A split in memory: images uint8 [N, C, H, W], and labels int64 [N] or masks uint8 [N, H, W]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Images:
        """The samples at these indices, in their order."""
        return Images(self.images[torch.from_numpy(indices)], self.labels[torch.from_numpy(indices)])


Split = Images | Files | Scenes


@dataclass(frozen=True, eq=False)
class Data:
    """A data set that has been read. Its splits have the same type, and `names` are those of its classes, by label."""

    info: DataInfo
    train: Split
    test: Split
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
        limit_train: How many training samples to keep, balanced over the classes unless they are masks. By default
            all.
        seed: It determines which samples `limit_train` keeps.
        image_size: The side of the crops of a folder of the user's own in pixels, 224 by default.
        only_test: Whether to leave the training split empty. Its files may be missing then.

    Returns:
        The data set.

    Raises:
        UserError: The name is unknown, the set is missing or has only one class, or the limit or size is impossible.
        RunError: A file is damaged, or the download failed.
    """
    info = _info(name)
    _check_size(info, image_size)
    folder = Path() if name == "digits" else _locate(info.files, data_dir, download, only_test)
    if name == "image-folder":
        names, train, test = read_folder(folder, only_val=only_test)
        info = replace(info, classes=len(names), size=image_size or FOLDER_SIZE)
    elif name == "mask-folder":
        info, names = _of_folder(info, folder), read_names(folder)
        info = replace(info, size=image_size or FOLDER_SIZE, pad=(image_size or FOLDER_SIZE) // 8)
        test = Images(*read_split(folder, "val", info.size, info.classes))
        train = test.take(np.arange(0)) if only_test else Images(*read_split(folder, "train", info.size, info.classes))
    elif name == "fashion-scenes":
        *_, raw = raws = readers.read(info.files, folder, only_test=only_test)
        names = ("background", *readers.NAMES[info.files])
        train = split_of(raws[0].images[:, 0], raws[0].labels, test=False, empty=only_test)
        test = split_of(raw.images[:, 0], raw.labels, test=True)
    else:
        names, train, test = _in_memory(info, folder, only_test)
    if limit_train is not None:
        train = _limited(train, limit_train, info, seed)
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


def find(name: str, data_dir: str | None = None, *, download: bool = False) -> DataInfo:
    """Returns what is known about a set that is present or can be fetched, else raises UserError. No image is read."""
    info = _info(name)
    if name != "digits" and not (download and info.classes):
        return _of_folder(info, _locate(info.files, data_dir, download=False))
    return info


def present(name: str, data_dir: str | None = None) -> str | None:
    """Returns where a data set was found, else None. No file is opened."""
    if name == "digits":
        return "scikit-learn"
    folder = readers.find(_info(name).files, _root(data_dir))
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
    """Yields the augmented training batches of one epoch: images uint8 [B, C, H, W], and labels int64 [B] or masks
    int64 [B, H, W].

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


def train_labels(
    data: Data, *, batch_size: int, seed: int, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)
) -> Iterator[Tensor]:
    """Yields only the labels or masks of the batches of `train_batches`."""
    for chunk in _train_chunks(data, batch_size, seed, epoch)[start:]:
        yield _targets(data.train.labels, data.info, _part(chunk, shard), seed, epoch)


def eval_batches(
    data: Data, *, batch_size: int, shard: tuple[int, int] = (0, 1), workers: int = 0, on_bad: OnBad | None = None
) -> Batches:
    """Yields the test split in order, not augmented: images uint8 [B, C, H, W], and labels or masks in int64.

    The last batch may be smaller. `shard` is (i, n) for every n-th batch from number i on. The other arguments are
    those of `train_batches`, but no sample takes the place of an unreadable image.
    """
    _check_loading(batch_size, workers)
    split, mine = data.test, slice(shard[0], None, shard[1])
    if isinstance(split, Files):
        chunks = _chunks(np.arange(len(split)), batch_size)[mine]
        return readers.decoded(split, data.info.size, chunks, workers=workers, on_bad=on_bad)
    pairs = zip(split.images.split(batch_size)[mine], split.labels.split(batch_size)[mine], strict=True)
    return ((images, labels.long()) for images, labels in pairs)


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
    if not info.classes:
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


def _of_folder(info: DataInfo, folder: Path) -> DataInfo:
    """What is known about a set that was found in a folder: a folder of masks says how many classes it has."""
    return replace(info, classes=len(read_names(folder))) if info.name == "mask-folder" else info


def _root(data_dir: str | None) -> Path:
    return readers.DEFAULT_ROOT if data_dir is None else Path(os.path.expanduser(data_dir))


def _locate(name: str, data_dir: str | None, download: bool, only_test: bool = False) -> Path:
    root = _root(data_dir)
    if download and _info(name).classes and readers.find(name, root) is None:
        readers.fetch(name, root)
    folder = readers.find(name, root, only_test=only_test)
    if folder is not None:
        return folder
    if name == "image-folder":
        need = "val/CLASS/*.jpg" if only_test else "train/CLASS/*.jpg and val/CLASS/*.jpg"
        need += ": name the folder that does with --data-dir"
        raise UserError(f"{root} does not hold {need} (an image folder cannot be downloaded)")
    if name == "mask-folder":
        need = ", ".join(readers.files_of(name, only_test=only_test))
        raise UserError(f"{root} does not hold all of {need}: name the folder that does with --data-dir")
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


def _limited(split: Split, count: int, info: DataInfo, seed: int) -> Split:
    """Keeps `count` samples of a split in their order, with class sizes as equal as it allows, except of masks."""
    if not info.classes <= count <= len(split):
        bounds = f"{info.classes} (the classes) and {len(split)} (the set)"
        raise UserError(f"limit_train must be between {bounds}, not {count}")
    shuffled = permutation(len(split), seed, 0, SUBSET)
    if info.masks:
        return split.take(np.sort(shuffled[:count]))
    labels = split.labels.numpy()
    # Samples are taken in rounds: the first of each class, then the second of each, and so on. A class that has no more
    # samples is passed over. The order of the classes, and of the samples within a class, is random by the seed.
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels, minlength=info.classes)
    rounds = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    class_order = permutation(info.classes, seed, 1, SUBSET)[labels[by_class]]
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


def _augmented(
    split: Images | Scenes, info: DataInfo, chunks: list[NDArray[np.int64]], seed: int, epoch: int
) -> Batches:
    for chunk in chunks:
        images = crop_flip(split.images, chunk, pad=info.pad, flip=info.flip, seed=seed, epoch=epoch)
        yield images, _targets(split.labels, info, chunk, seed, epoch)


def _targets(labels: Tensor, info: DataInfo, chunk: NDArray[np.int64], seed: int, epoch: int) -> Tensor:
    """The labels of a batch, or its masks, which are cropped and mirrored as their images are."""
    if not info.masks:
        return labels[torch.from_numpy(chunk)]
    return crop_flip(labels[:, None], chunk, pad=info.pad, flip=info.flip, seed=seed, epoch=epoch)[:, 0].long()
