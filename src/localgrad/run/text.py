"""Text as tokens: Python's standard library, a file, or a folder of files, in a part to train on and a part to test on.

A token is a byte, so the vocabulary is 256 and any text fits. A context is a function of seed and index, as all random
draws of this library are, so there is no state of a loader to save.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localgrad.core.errors import UserError
from localgrad.run.augment import draws

STDLIB = "stdlib"
TENTH = 10  # One file of so many, or one byte of so many of a single file, is to test on.
# Not every installation of Python has its own tests, and the settings of its build differ.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, eq=False)
class Text:
    """A text and the contexts in it.

    Attributes:
        tokens: The bytes of the text, uint8 [N].
        context: The number of tokens that a network reads at once, L.

    Raises:
        UserError: The context is below 1, or the text is too short for one.
    """

    tokens: Tensor
    context: int

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UserError(f"a context has 1 token or more, not {self.context}")
        if len(self.tokens) <= self.context:
            raise UserError(
                f"the text has {len(self.tokens)} bytes, and a context of {self.context} takes {self.context + 1} or "
                "more: give a longer text, or a shorter context"
            )

    def batch(self, indices: Sequence[int] | range, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Contexts at random places, and the token behind each of their tokens: int64 [B, L] and int64 [B, L].

        Args:
            indices: The numbers of the contexts, B of them. Each has its place by seed and number, whatever the batch.
            seed: The seed of the run. Default: 0.
        """
        places = draws(seed, 0, np.asarray(indices), 1)[:, 0] % np.uint64(len(self.tokens) - self.context)
        return self._at(torch.from_numpy(places.astype(np.int64)))

    def windows(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All contexts of the text, one behind the other, in batches. What is left at the end is left out."""
        starts = torch.arange(0, len(self.tokens) - self.context, self.context)
        yield from (self._at(part) for part in starts.split(batch_size))

    def _at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        found = self.tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def read_text(source: str | Path, *, context: int) -> tuple[Text, Text]:
    """Reads a text, and divides it into a part to train on and a part to test on.

    Whole files go to one part or the other, one of ten to the second, by the hash of their path in the folder. So a new
    file moves no other one. A single file is cut after nine tenths, and so are a few files, one behind the other, if
    a part would be shorter than a context.

    Args:
        source: "stdlib" for the source of Python's standard library, 12 MB that every machine has, or the path of a
            file or of a folder, whose hidden files are left out. The library differs between versions of Python.
        context: The number of tokens that a network reads at once.

    Raises:
        UserError: There is no such file, the folder is empty, or a part is shorter than a context.
    """
    root = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
    if root.is_file():
        parts = _cut(root.read_bytes())
    elif root.is_dir():
        files = _python(root) if source == STDLIB else _visible(root, set())
        parts = _divided(root, files)
        if min(map(len, parts)) <= context:
            parts = _cut(b"\n".join(path.read_bytes() for path in files))
    else:
        raise UserError(f"there is no text '{source}': give the path of a file or a folder, or '{STDLIB}'")
    train, test = (Text(torch.from_numpy(np.frombuffer(part, np.uint8).copy()), context) for part in parts)
    return train, test


def _python(root: Path) -> list[Path]:
    found = _visible(root, LEFT_OUT)
    return [path for path in found if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")]


def _visible(root: Path, left_out: set[str]) -> list[Path]:
    """The files in a folder and in its folders, in the order of their paths, without the folders of these names."""
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: _names(root, path))


def _names(root: Path, path: Path) -> tuple[str, ...]:
    return path.relative_to(root).parts


def _cut(whole: bytes) -> list[bytes]:
    """The first nine tenths of a text, and the rest."""
    cut = len(whole) * (TENTH - 1) // TENTH
    return [whole[:cut], whole[cut:]]


def _divided(root: Path, files: Sequence[Path]) -> list[bytes]:
    """The bytes of the files to train on and of those to test on, each in the order of their paths."""
    if not files:
        raise UserError(f"there is no file of text in '{root}'")
    parts: list[list[bytes]] = [[], []]
    for path in files:
        digest = hashlib.sha256("/".join(_names(root, path)).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % TENTH == 0].append(path.read_bytes())
    return [b"\n".join(part) for part in parts]
