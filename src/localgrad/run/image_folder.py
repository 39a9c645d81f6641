"""Image folders: the classes and files of train/CLASS/* and val/CLASS/*, and what is left out. Nothing is decoded."""

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

# The files that count as images: torchvision's ImageFolder has the same list, so that the same folder is the same set.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What macOS, Windows, Synology, QNAP, Linux and Python make beside what begins with a dot; in small letters.
SYSTEM_FOLDERS = {
    "__macosx", "$recycle.bin", "recycler", "system volume information", "@eadir", "#recycle", "#snapshot", "@recycle",
    "@recently-snapshot", "@__thumb", "lost+found", "__pycache__",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
HIDDEN = "hidden, or made by a system or a tool: rename what is a class of yours"
MOST = 10  # names that a sentence lists


@dataclass(frozen=True, eq=False)
class Files:
    """A split on disk: paths of image files below `root`, encoded bytes [N], labels int64 [N]."""

    root: Path
    paths: NDArray[np.bytes_]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class _Found:
    """What lies in a split. hidden: the folders that are left out, by their paths; left_out: how many files of which
    ending."""

    classes: list[str] = field(default_factory=list)
    paths: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_folder(path: Path, *, only_val: bool = False) -> tuple[list[str], Files, Files]:
    """Reads which classes and files an image folder has, and warns of what is left out.

    Args:
        path: The folder, with train/CLASS/* and val/CLASS/*.
        only_val: Whether train/ is not looked at and need not be there; then the first split is empty.

    Returns:
        The names of the classes, then train and val. The paths of a split are one array of bytes: workers that share
        a list of strings copy it whole, by counting references.

    Raises:
        UserError: If a split has fewer than two classes or an empty one, or if the splits have different classes.
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
    # Names are UTF-8 whatever the locale says, so that a run knows them again under another one.
    names = [os.fsencode(name).decode("utf-8", "surrogateescape") for name in val.classes]
    return names, _files(path, train), _files(path, val)


def printable(text: str) -> str:
    """A name on one line: what cannot be shown is escaped, such as a line's end or bytes that are no text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Iterable[str]) -> str:
    """Names on one line; of many the first ones and the last."""
    shown = [printable(name) for name in names]
    return ", ".join(shown if len(shown) <= MOST else [*shown[: MOST - 2], "...", shown[-1]])


def _files(path: Path, found: _Found) -> Files:
    return Files(path, np.array(found.paths, np.bytes_), torch.tensor(found.labels, dtype=torch.int64))


def _found(path: Path, split: str) -> _Found:
    """What lies in path/split, in the order of torchvision's ImageFolder: by the names, as text."""
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
    """As os.walk, but not into hidden folders, and it raises OSError for what may not be read."""

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
    """As in "6 files: 3 .gif, 3 .avif"."""
    return f"{_count(files.total(), 'file')}: {listed(f'{count:,} {kind}' for kind, count in files.most_common())}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _too_few(top: Path, found: _Found) -> str:
    """The sentence about a split of one class or none."""
    left_out = f"; left out: {listed(found.hidden)} ({HIDDEN})" if found.hidden else ""
    if not found.classes:
        return f"{top} holds no folder of a class, but {top}/CLASS/*.jpg is wanted{left_out}"
    (name,) = found.classes
    below = sorted(entry.name for entry in os.scandir(top / name) if entry.is_dir() and not _is_hidden(entry.name))
    advice = "put a folder beside it for each class that is to be told from it"
    if below:
        advice = f"below it lie the folders {listed(below)}, and if these are the classes, move them up into {top}"
    return f"{top} holds one class alone, {printable(name)}, and of one nothing can be learned: {advice}{left_out}"
