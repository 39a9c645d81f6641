"""Image folders: finds the classes and files of train/CLASS/* and val/CLASS/*, and decodes none of them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localgrad.core.errors import UserError

# torchvision's ImageFolder has the same list, so both find the same images in a folder.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# macOS, Windows, Synology, QNAP, Linux and Python create these, in lower case here, and others that begin with a dot.
SYSTEM_FOLDERS = {
    "__macosx", "$recycle.bin", "recycler", "system volume information", "@eadir", "#recycle", "#snapshot", "@recycle",
    "@recently-snapshot", "@__thumb", "lost+found", "__pycache__",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
HIDDEN = "hidden, or made by a system or a tool: rename what is a class of yours"
MAX_NAMES = 10  # An error sentence lists at most this many names.


@dataclass(frozen=True, eq=False)
class Files:
    """A split on disk: the paths of its files below `root` as encoded bytes [N], and labels int64 [N]."""

    root: Path
    paths: NDArray[np.bytes_]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Files:
        """The samples at these indices, in their order."""
        return Files(self.root, self.paths[indices], self.labels[torch.from_numpy(indices)])


@dataclass
class _Found:
    """What a split holds. `hidden` are the folders that are left out, `left_out` counts such files by their ending."""

    classes: list[str] = field(default_factory=list)
    paths: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_folder(path: Path, *, only_val: bool = False) -> tuple[list[str], Files, Files]:
    """Finds the classes and files of an image folder, and warns of what is left out.

    Args:
        path: The folder, with train/CLASS/* and val/CLASS/*.
        only_val: Whether to ignore train/, which may be missing then. The first split is empty then.

    Returns:
        The names of the classes, the split of train/ and the split of val/.

    Raises:
        UserError: A split has fewer than two classes or an empty one, or the splits have different classes.
    """
    try:
        splits = {name: _found(path, name) for name in (["val"] if only_val else ["train", "val"])}
    except OSError as error:
        raise UserError(f"{path} is no image folder: {error}") from error
    val = splits["val"]
    train = splits.get("train", _Found(val.classes))
    if odd := set(train.classes) ^ set(val.classes):
        raise UserError(
            f"{path / 'train'} and {path / 'val'} must hold the same classes, but only one has {printable(min(odd))}"
        )
    if hidden := [folder for found in splits.values() for folder in found.hidden]:
        warnings.warn(f"left out {_count(len(hidden), 'folder')}: {listed(hidden)} ({HIDDEN})", stacklevel=2)
    if counts := [f"{name}: left out {_counted(found.left_out)}" for name, found in splits.items() if found.left_out]:
        warnings.warn(f"{'; '.join(counts)} (what is read ends in {', '.join(ENDINGS)})", stacklevel=2)
    # A run compares these names with recorded ones, so they are UTF-8 under every locale.
    names = [os.fsencode(name).decode("utf-8", "surrogateescape") for name in val.classes]
    return names, _files(path, train), _files(path, val)


def printable(text: str) -> str:
    """Escapes what a terminal cannot show on one line, such as a line break or bytes that are no text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Iterable[str]) -> str:
    """Names on one line. Of many names only the first ones and the last are shown."""
    shown = [printable(name) for name in names]
    return ", ".join(shown if len(shown) <= MAX_NAMES else [*shown[: MAX_NAMES - 2], "...", shown[-1]])


def _files(path: Path, found: _Found) -> Files:
    # One array, because worker processes would copy a shared list of strings when they count references.
    return Files(path, np.array(found.paths, np.bytes_), torch.tensor(found.labels, dtype=torch.int64))


def _found(path: Path, split: str) -> _Found:
    """Finds the classes and files of path/split, sorted by name like those of torchvision's ImageFolder."""
    found, top = _Found(), path / split
    for entry in sorted(os.scandir(top), key=lambda entry: entry.name):
        if not entry.is_dir():
            _leave_out(found, entry.name, " beside the classes")
        elif _is_hidden(entry.name):
            found.hidden.append(os.path.join(split, entry.name))
        else:
            found.classes.append(entry.name)
    if len(found.classes) < 2:
        raise UserError(_too_few(top, found))
    for label, name in enumerate(found.classes):
        for folder, below, files in sorted(_walk(top / name)):
            inner = os.path.relpath(folder, path)
            found.hidden += [os.path.join(inner, other) for other in below if _is_hidden(other)]
            for file in sorted(files):
                if file.lower().endswith(ENDINGS):
                    found.paths.append(os.fsencode(os.path.join(inner, file)))
                    found.labels.append(label)
                else:
                    _leave_out(found, file)
    if empty := set(range(len(found.classes))) - set(found.labels):
        names = listed(found.classes[label] for label in sorted(empty))
        raise UserError(f"{top} has no valid file for the classes {names}: what is read ends in {', '.join(ENDINGS)}")
    return found


def _walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Like os.walk, but it skips hidden folders, and raises OSError for a folder that it may not read."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    for folder, below, files in os.walk(top, onerror=refuse, followlinks=True):
        yield folder, sorted(below), files
        below[:] = [name for name in below if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _leave_out(found: _Found, file: str, where: str = "") -> None:
    """Counts a file that is not read, unless a system has put it there."""
    if not (file.startswith(".") or file.lower() in SYSTEM_FILES or file.endswith(":Zone.Identifier")):
        found.left_out[(os.path.splitext(file)[1].lower() or "without an ending") + where] += 1


def _counted(files: Counter[str]) -> str:
    """Such as "6 files: 3 .gif, 3 .avif"."""
    return f"{_count(files.total(), 'file')}: {listed(f'{count:,} {kind}' for kind, count in files.most_common())}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _too_few(top: Path, found: _Found) -> str:
    """The error sentence for a split that has one class or none."""
    left_out = f"; left out: {listed(found.hidden)} ({HIDDEN})" if found.hidden else ""
    if not found.classes:
        return f"{top} holds no folder of a class, but {top}/CLASS/*.jpg is wanted{left_out}"
    (name,) = found.classes
    below = sorted(entry.name for entry in os.scandir(top / name) if entry.is_dir() and not _is_hidden(entry.name))
    advice = "put a folder beside it for each class that is to be told from it"
    if below:
        advice = f"below it lie the folders {listed(below)}, and if these are the classes, move them up into {top}"
    return f"{top} holds one class alone, {printable(name)}, and of one nothing can be learned: {advice}{left_out}"
