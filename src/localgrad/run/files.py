"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from localgrad.core.errors import UserError

MODEL = "model.safetensors"  # The bare network: a run whose folder has it is finished.
PART = ".part"  # what is being written; the rest of a killed process, which the next one removes
LOCK = ".lock"


def part_of(path: Path) -> Path:
    return path.with_name(path.name + PART)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends, and goes when the block fails."""
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
    """Writes a whole file, or leaves what was there."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_folder(path: Path, *, make: bool = False) -> None:
    """Raises UserError if `path` is a folder, or the folder that it is in is not there or cannot be written. make: if
    it is not there."""
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
    """Raises UserError on a system that has no locks of the kind that a run's folder is kept with."""
    try:
        import fcntl  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise UserError("localgrad's training runs need Linux or macOS; the library itself does not") from None


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which some network file systems say of every folder
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps `folder` to this process, which makes it if need be. Raises UserError if another process has it.

    The lock is the system's and ends with the process, however that ends; children that fork from it do not hold it.
    """
    check_system()
    import fcntl

    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            flush(folder.parent)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others come from file systems that have no locks
                text = f"another process is training in {folder}: wait for it, or choose another --out"
                raise UserError(text) from error
        yield
