"""Finds, downloads and reads the files of data sets."""

from __future__ import annotations

import errno
import gzip
import http.client
import math
import os
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localgrad.core.errors import RunError, is_out_of_memory
from localgrad.run.augment import REPLACE, draws, resized_crop_box
from localgrad.run.image_folder import Files, printable
from localgrad.run.signals import held_back, outlive_signals

Batches = Generator[tuple[Tensor, Tensor]]  # Closing it ends its worker processes.
OnBad = Callable[[str, str], None]  # It is called with the path of an unusable file and the reason.
MAX_ASPECT_RATIO = 100
MAX_REPLACEMENTS = 20

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist puts it there.
DEFAULT_ROOT = Path("data")
# The files of each set below the data folder, laid out as by torchvision. A set is present if all of them exist. The
# 2.6 GB of unlabelled images of STL-10 are not needed.
FILES: dict[str, tuple[str, ...]] = {
    "fashion-mnist": tuple(f"{s}-{k}-ubyte" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1")),
    "cifar10": tuple(
        f"cifar-10-batches-py/{n}" for n in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    ),
    "cifar100": tuple(f"cifar-100-python/{n}" for n in ("train", "test", "meta")),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
    "stl10": tuple(f"stl10_binary/{n}.bin" for n in ("train_X", "train_y", "test_X", "test_y")),
    "image-folder": ("train", "val"),
    "mask-folder": ("images/train", "images/val", "masks/train", "masks/val", "classes.txt"),
}
# The names of the classes, for sets whose files do not hold them. The classes of other sets are numbers.
NAMES: dict[str, tuple[str, ...]] = {
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
}  # fmt: skip


class Raw(NamedTuple):
    """One split as it was read: images uint8 [N, C, H, W], labels [N], the file that an error about them names, and the
    names of the classes if the set's files have them."""

    images: NDArray[Any]
    labels: NDArray[Any]
    file: Path
    names: tuple[str, ...] = ()


def folders_of(name: str, root: Path) -> list[Path]:
    """The folders that may hold a set, in the order of search. Debian's is among them for the default root only."""
    if name != "fashion-mnist":
        return [root]
    return [root, root / "FashionMNIST" / "raw", *([DEBIAN_FASHION] if root == DEFAULT_ROOT else [])]


def files_of(name: str, *, only_test: bool = False) -> tuple[str, ...]:
    """The files of a set, or of its test split alone."""
    return tuple(f for f in FILES[name] if not (only_test and Path(f).name.startswith(("train", "data_batch"))))


def find(name: str, root: Path, *, only_test: bool = False) -> Path | None:
    """The first of `folders_of` that has all of the set's files, else None. No file is opened."""
    zipped = ("", ".gz") if name == "fashion-mnist" else ("",)
    for folder in folders_of(name, root):
        files = files_of(name, only_test=only_test)
        if all(any((folder / (file + end)).exists() for end in zipped) for file in files):
            return folder
    return None


def read(name: str, folder: Path, *, only_test: bool = False) -> list[Raw]:
    """Reads the train and test split of a set that fits in memory, or its test split alone.

    Raises:
        RunError: A file is damaged. The sentence names it.
    """
    if name == "digits":
        return _digits()[only_test:]
    if name == "fashion-mnist":
        files = [_idx_path(folder, file) for file in files_of(name, only_test=only_test)]
        return [_idx_split(*pair) for pair in zip(files[::2], files[1::2], strict=True)]
    return _torchvision_splits(name, folder, only_test)


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """Reads an idx file of bytes with this many axes, gzipped or not (the format of yann.lecun.com/exdb/mnist)."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != bytes([0, 0, 8, axes]):
        raise RunError(f"{path} is not an idx file of bytes with {axes} axes: it begins with 0x{content[:4].hex()}")
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, axes + 1)]
    expected = math.prod(shape)
    if len(content) - start != expected:
        raise RunError(f"{path} holds {len(content) - start} bytes of data where its header announces {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def decoded(
    split: Files,
    size: int,
    chunks: list[NDArray[np.int64]],
    *,
    seed: int | None = None,
    epoch: int = 0,
    workers: int = 0,
    on_bad: OnBad | None = None,
    whole: bool = False,
) -> Batches:
    """Decodes the batches `chunks` of a split: images uint8 [B, 3, size, size] and labels int64 [B].

    Args:
        split: The split.
        size: The side of the crops in pixels.
        chunks: The indices of the samples of each batch.
        seed: With a seed, crops are random by area and half of them are mirrored. Without one, images are resized and
            cropped at the centre, as a test split is.
        epoch: It determines the crops, together with the seed.
        workers: How many processes decode.
        on_bad: Called with an unreadable file and the reason, each time that it is drawn. With a seed, another sample
            takes its place.
        whole: Without a seed, whether a crop has the whole shorter side of its image, and not 224/256 of it.

    Raises:
        RunError: A file is no readable image and there is no `on_bad`, or no replacement can be read either.
    """
    loader = DataLoader(
        _Decoder(split, size, seed, on_bad is not None, whole),
        batch_sampler=_Batches(chunks, epoch),  # pyright: ignore[reportArgumentType]  (Any iterable of batches works.)
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(0),  # Without it the loader would draw from the global generator.
        worker_init_fn=outlive_signals,
    )
    with held_back():
        batches = iter(loader)
    try:
        for chunk, (images, labels, bad) in zip(chunks, batches, strict=True):
            _report_bad(bad, split.root, on_bad)
            if seed is not None and len(labels) < len(chunk):
                others = "and others tried in its place are no readable images: look at the data"
                raise RunError(f"{split.root / bad[-1].path} {others}")
            if len(labels):
                yield images, labels
    finally:
        # An error's traceback would keep the workers alive until it is gone, and the process could not end.
        getattr(batches, "_shutdown_workers", lambda: None)()


def fetch(name: str, root: Path) -> None:
    """Downloads a set through torchvision into `root`.

    The files are moved there once torchvision has verified their md5 sums, so a failed download leaves nothing behind.

    Raises:
        RunError: The download failed.
    """
    failures = (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException, tarfile.TarError, zlib.error)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            for _ in _torchvision_sets(name, Path(folder), ("train", "test"), download=True):
                pass
            raw, end = ("FashionMNIST/raw/", ".gz") if name == "fashion-mnist" else ("", "")
            for file in FILES[name]:
                (root / raw / file).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / raw / (file + end)).replace(root / raw / (file + end))
    except failures as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{name} could not be downloaded into {root}: {reason}") from error


def _idx_path(folder: Path, file: str) -> Path:
    # torchvision unpacks beside the .gz. An interrupted unpacking leaves a truncated file, so the .gz is preferred.
    zipped = folder / f"{file}.gz"
    return zipped if zipped.exists() else folder / file


def _idx_split(images: Path, labels: Path) -> Raw:
    return Raw(read_idx(images, 3)[:, None], read_idx(labels, 1), labels)


def _digits() -> list[Raw]:
    """scikit-learn's 1,797 digits with values 0 .. 16, split 80/20 within each class, equally for all seeds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[:, None]
    parts = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    return [Raw(images[np.sort(part)], digits.target[np.sort(part)], Path("scikit-learn")) for part in parts]


def _torchvision_sets(name: str, root: Path, splits: Sequence[str], *, download: bool = False) -> Iterator[Any]:
    """Yields torchvision's data set of each of these splits."""
    for split in splits:
        which = {"split": split} if name in ("svhn", "stl10") else {"train": split == "train"}
        yield _torchvision_class(name, splits)(str(root), download=download, **which)


def _torchvision_class(name: str, splits: Sequence[str]) -> Any:
    """torchvision's class of a set, changed so that it needs the files of these splits only."""
    from torchvision import datasets

    kinds = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "svhn": datasets.SVHN, "stl10": datasets.STL10}
    kind: Any = (kinds | {"fashion-mnist": datasets.FashionMNIST})[name]
    if not hasattr(kind, "train_list"):
        return kind
    training = kind.train_list[: 2 if name == "stl10" else None]  # The third file of STL-10 is unlabelled.
    return type(kind.__name__, (kind,), {"train_list": training if "train" in splits else []})


def _torchvision_splits(name: str, root: Path, only_test: bool) -> list[Raw]:
    # The files of CIFAR are pickles, which are safe to load only because torchvision compares their md5 sums first.
    splits = ("train", "test")[only_test:]
    try:
        return [_raw(name, root, *pair) for pair in zip(_torchvision_sets(name, root, splits), splits, strict=True)]
    except (OSError, RuntimeError) as error:
        if damaged := _damaged(name, root, splits):
            problem = f"{damaged} is damaged (its md5 sum is not the published one): delete it and fetch the set again"
        else:
            problem = f"{root} cannot be read as {name}: {error}"
        raise RunError(problem) from error


def _damaged(name: str, root: Path, splits: Sequence[str]) -> Path | None:
    """The first file of these splits whose md5 sum differs from the one that torchvision expects."""
    from torchvision.datasets.utils import check_integrity

    kind = _torchvision_class(name, splits)
    if name == "svhn":
        known = [tuple(kind.split_list[split][1:]) for split in splits]
    else:
        known = [(f"{kind.base_folder}/{file}", md5) for file, md5 in (*kind.train_list, *kind.test_list)]
    if name.startswith("cifar"):
        known.append((f"{kind.base_folder}/{kind.meta['filename']}", kind.meta["md5"]))
    return next((root / file for file, md5 in known if not check_integrity(root / file, md5)), None)


def _raw(name: str, root: Path, split: Any, part: str) -> Raw:
    if name.startswith("cifar"):
        # The training labels of CIFAR-10 are in five files, so an error names their folder.
        images, labels = split.data.transpose(0, 3, 1, 2), np.asarray(split.targets)
        return Raw(images, labels, root / split.base_folder, tuple(map(str, split.classes)))
    file = f"{part}_32x32.mat" if name == "svhn" else f"stl10_binary/{part}_y.bin"
    return Raw(split.data, np.asarray(split.labels), root / file)


@dataclass(frozen=True)
class _Batches:
    """The batch sampler of an image folder. It yields (epoch, index) pairs, because a random crop depends on both."""

    chunks: list[NDArray[np.int64]]
    epoch: int

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(self.epoch, int(index)) for index in chunk] for chunk in self.chunks)


class _Bad(NamedTuple):
    """A file that cannot be used: its printable path in the data folder, the reason, and whether it may work later."""

    path: str
    reason: str
    temporary: bool = False


def _report_bad(bad: list[_Bad], root: Path, on_bad: OnBad | None) -> None:
    """Reports files to `on_bad`. Raises RunError without it, and for a file that may be readable later."""
    for path, reason, temporary in bad:
        if temporary:
            raise RunError(f"{root / path} cannot be read now: {reason}")
        if on_bad is None:
            raise RunError(f"{root / path} is not a readable image: {reason}")
        on_bad(path, reason)


class _Item(NamedTuple):
    """A decoded sample, or None if there is none, and the unusable files that were tried for it."""

    image: Tensor | None
    label: int
    bad: list[_Bad]


class _Decoder(Dataset):
    """Maps (epoch, index) to an `_Item` whose image is uint8 [3, size, size].

    Errors are returned as values. Raised in a worker, they would arrive wrapped in the worker's traceback.

    With `replace`, another sample takes the place of an unreadable training image.
    """

    def __init__(self, split: Files, size: int, seed: int | None, replace: bool, whole: bool) -> None:
        self.split, self.size, self.seed, self.replace, self.whole = split, size, seed, replace, whole

    def __getitem__(self, pair: tuple[int, int]) -> _Item:
        epoch, index = pair
        bad: list[_Bad] = []
        for at in self._candidates(index):
            path = os.fsdecode(self.split.paths[at])
            shown = printable(path)
            try:
                image = decode(self.split.root / path)
                return _Item(self._cropped(image, epoch, index), int(self.split.labels[at]), bad)
            except Exception as error:  # Each image format raises other kinds of errors for damaged files.
                temporary = is_out_of_memory(error) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
                bad.append(_Bad(shown, " ".join(str(error).split()) or type(error).__name__, temporary))
                if temporary:
                    break
        return _Item(None, -1, bad)

    def _candidates(self, index: int) -> Iterator[int]:
        """Yields the index of the sample, then those of its possible replacements."""
        yield index
        if self.replace and self.seed is not None:
            others = draws(self.seed, 0, np.array([index]), MAX_REPLACEMENTS, REPLACE)[0]
            yield from (int(other) for other in others % np.uint64(len(self.split)))

    def _cropped(self, image: Any, epoch: int, index: int) -> Tensor:
        from torchvision.transforms import functional as F

        if self.seed is None:
            # As in torchvision's evaluation: a crop of 224 pixels is cut from an image whose short side is 256.
            side = self.size if self.whole else round(self.size * 256 / 224)
            image = F.center_crop(F.resize(image, [side]), [self.size])
        else:
            box, mirrored = resized_crop_box(image.height, image.width, seed=self.seed, epoch=epoch, index=index)
            image = F.resized_crop(image, *box, size=[self.size, self.size])
            image = F.hflip(image) if mirrored else image
        return F.pil_to_tensor(image)


def _collate(items: Sequence[_Item]) -> tuple[Tensor, Tensor, list[_Bad]]:
    good = [(item.image, item.label) for item in items if item.image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [one for item in items for one in item.bad]


def decode(path: Path) -> Any:
    """Reads the image at `path` as PIL's RGB image, turned as its EXIF data say. A bad file may raise any exception."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # After a mere warning it would be decoded.
        with Image.open(path) as image:
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):  # Resized by its short side, it would be huge.
                raise ValueError(f"one side is more than {MAX_ASPECT_RATIO} times the other")
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
                raise ValueError("its pixels are 32-bit numbers, whose range is not known")
            image = _upright(image)
            if image.mode.startswith("I"):  # It has 16 bits, and PIL would clip values above 255.
                return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


def _upright(image: Any) -> Any:
    """Turns an image as its EXIF data say: a camera that was held sideways records that, and does not turn pixels."""
    from PIL import ExifTags, Image

    turns = Image.Transpose
    if image.format == "TIFF":  # With a file name, Pillow would map a grey image as if it had been turned already.
        image.filename = ""
    image.load()  # Damaged pixels raise here. Damaged EXIF data, below, are ignored.
    try:
        turn = {
            2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
            6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
        }.get(image.getexif().get(ExifTags.Base.Orientation))  # fmt: skip
    except Exception as error:  # Damaged EXIF data raise various kinds of errors.
        if is_out_of_memory(error):
            raise
        return image
    return image if turn is None else image.transpose(turn)
