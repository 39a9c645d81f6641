"""Writes files so that they are complete or not there: under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from localgrad.core.errors import UserError

MODEL = "model.safetensors"  # The trained backbone. A run whose folder has it is finished.
PART = ".part"  # The ending of a file that is being written. The next process removes what a killed one has left.
LOCK = ".lock"


def part_of(path: Path) -> Path:
    """The name of a file or folder while it is being written."""
    return path.with_name(path.name + PART)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to. It is renamed to `path` when the context ends, or removed if the context fails."""
    part = part_of(path)
    remove(part)
    try:
        yield part
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    except BaseException:
        remove(part)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file by this text. If that fails, the old file stays."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_folder(path: Path, *, make: bool = False) -> None:
    """Raises UserError unless a file can be written at `path`. With `make`, its folder is made if it is missing."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file with --out")
    try:
        if make:
            path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write to {path.parent}: choose another --out")


def check_system() -> None:
    """Raises UserError on a system that does not have the locks which `locked` uses, such as Windows."""
    try:
        import fcntl  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise UserError("localgrad's training runs need Linux or macOS; the library itself does not") from None


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with its content. It may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder if it is missing, and waits until it is on the disk."""
    if not path.is_dir():
        path.mkdir(parents=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some network file systems raise this for every folder.
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run folder, which is made if it is missing. Raises UserError if another process has locked it.

    The system removes the lock when the process ends, however it ends. Forked children do not hold it.
    """
    check_system()
    import fcntl

    try:
        make_folder(folder)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # Other errors mean that the file system has no locks.
                text = f"another process is training in {folder}: wait for it, or choose another --out"
                raise UserError(text) from error
        yield
