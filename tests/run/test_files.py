"""Files and folders on disk: whole or as they were, in an order of system calls that a power cut cannot undo, and one
process a folder."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from localgrad.core.errors import RunError, UserError
from localgrad.run.checkpoint import save_checkpoint, save_weights
from localgrad.run.files import LOCK, check_folder, flush, locked, part_of, replacing, write_text

Figure = Callable[[str, int, int], None]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Seen from inside


class Seen:
    """What os.open, os.fsync and os.replace were asked, and what a power cut could then not undo.

    on_disk: a file's bytes, or a folder's names, as they were when they were flushed. early: what was renamed before
    all of it was so.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.on_disk: dict[Path, bytes | list[str]] = {}
        self.early: list[Path] = []
        self._plain = {name: getattr(os, name) for name in ("open", "fsync", "replace")}
        self._paths: dict[int, Path] = {}
        for name in self._plain:
            patch.setattr(os, name, getattr(self, name))

    def open(self, path: str | Path, *rest: Any, **named: Any) -> int:
        handle = self._plain["open"](path, *rest, **named)
        self._paths[handle] = Path(path)
        return handle

    def fsync(self, handle: int) -> None:
        path = self._paths[handle]
        self.calls.append(f"flush {path.name}")
        self.on_disk[path] = content(path)
        self._plain["fsync"](handle)

    def replace(self, old: Path, new: Path) -> None:
        assert old.parent == new.parent  # a rename is only within one file system
        self.calls.append(f"rename {old.name} {new.name}")
        if not self.is_on_disk(old):
            self.early.append(new)
        moved = {path: new / path.relative_to(old) for path in self.on_disk if path.is_relative_to(old)}
        self.on_disk = {moved.get(path, path): kept for path, kept in self.on_disk.items()}
        self._plain["replace"](old, new)

    def is_on_disk(self, path: Path) -> bool:
        return all(self.on_disk.get(each) == content(each) for each in (path, *path.rglob("*")))


def content(path: Path) -> bytes | list[str]:
    return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize(
    "write", [lambda path: write_text(path, "new"), lambda path: save_weights(path, {"w": torch.ones(3000)})]
)
def test_a_file_is_flushed_then_renamed_then_its_folder_flushed(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    write(tmp_path / "a")
    assert seen.calls == ["flush a.part", "rename a.part a", f"flush {tmp_path.name}"]
    assert not seen.early
    assert seen.is_on_disk(tmp_path)


# Whole, or as it was


def test_the_new_bytes_take_the_place_of_the_old(tmp_path: Path) -> None:
    place = tmp_path / "a"
    for text in ("old", "new: \N{LATIN SMALL LETTER E WITH ACUTE}\n", ""):
        write_text(place, text)
        assert place.read_bytes() == text.encode()
        assert os.listdir(tmp_path) == ["a"]


def test_a_reader_never_sees_a_part_of_a_file(tmp_path: Path) -> None:
    place = tmp_path / "a"
    write_text(place, "old")
    with replacing(place) as part:
        for piece in ("n", "ne", "new"):
            part.write_text(piece)
            assert place.read_text() == "old"
    assert place.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), FULL])
@pytest.mark.parametrize("written", [True, False])
def test_a_block_that_fails_leaves_what_was_there(error: BaseException, written: bool, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def failing() -> None:
        with replacing(tmp_path / "a") as part:
            if written:
                part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        failing()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def all_calls(patch: pytest.MonkeyPatch, meet: Callable[[str, Callable[[], Any]], Any]) -> None:
    """Lets `meet` decide on each call that changes the disk in a save or a removal: its name, and what it would do."""
    owners: list[tuple[Any, str]] = [(os, name) for name in ("open", "fsync", "replace", "unlink", "rmdir")]
    owners += [(Path, name) for name in ("open", "mkdir", "unlink", "symlink_to", "write_bytes")]
    owners += [(torch, "save"), (shutil, "rmtree")]

    def wrapped(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *rest, **named: meet(name, lambda: plain(*rest, **named))

    for owner, name in owners:
        patch.setattr(owner, name, wrapped(name, getattr(owner, name)))


@contextmanager
def full_disk(number: int) -> Iterator[list[str]]:
    """The call of this number fails as on a full disk; those before and after do not. Yields the calls so far."""
    calls: list[str] = []

    def meet(name: str, plain: Callable[[], Any]) -> Any:
        if name not in ("rmtree", "unlink", "rmdir"):  # which need no space
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain()

    with pytest.MonkeyPatch.context() as patch:
        all_calls(patch, meet)
        yield calls


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system itself refuses bytes beyond `size`."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("part", ["model", "auxiliaries", "state", "environment"])
def test_a_file_that_the_system_cuts_short_leaves_nothing(part: str, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"model": {}, "auxiliaries": {}, "state": {}, "environment": {}}
    parts[part] = {"x": "y" * 40_000 if part == "environment" else torch.rand(10_000)}
    with largest_file(20_000), pytest.raises(RunError, match=r"^cannot write .*/step-4.*: .*File too large"):
        save_checkpoint(tmp_path, 4, **parts)
    with largest_file(20_000), pytest.raises(RunError, match=r"^cannot write .*/w.safetensors: .*File too large"):
        save_weights(tmp_path / "w.safetensors", {"x": torch.rand(10_000)})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_any_call_leaves_the_old_file_or_the_whole_new_one(tmp_path: Path, figure: Figure) -> None:
    """The new one only where the rename has happened, and its folder could not be flushed."""
    place, tried, passed = tmp_path / "a", 0, 0
    while True:
        place.write_text("old")
        with full_disk(tried + 1) as calls:
            try:
                write_text(place, "new")
                break
            except OSError as error:
                right = error.errno == errno.ENOSPC and os.listdir(tmp_path) == ["a"]
        tried += 1
        passed += right and place.read_text() == ("new" if "replace" in calls[:-1] else "old")
    figure("a disk that is full when a file is written", tried, passed)
    assert passed == tried == 6  # to open and write; open and fsync; replace; open and fsync
    assert place.read_text() == "new"


def test_what_cannot_be_flushed_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "none")
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with full_disk(2), pytest.raises(OSError, match="No space left"):
        flush(tmp_path)
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before  # no handle was left open


def test_what_a_killed_process_has_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.part").write_text("half of something longer")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_the_part_lies_beside_its_place(tmp_path: Path) -> None:
    assert part_of(tmp_path / "step-3") == tmp_path / "step-3.part"
    assert part_of(tmp_path / "a.csv") == tmp_path / "a.csv.part"


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_is_no_place_for_a_file(make: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder: name a file with --out"):
        check_folder(tmp_path, make=make)
    with pytest.raises(UserError, match=r"cannot write to .*: choose another --out"):
        check_folder(tmp_path / "no" / "file")
    check_folder(tmp_path / "file")
    assert os.listdir(tmp_path) == []


# One process a folder

HOLDING = """
import sys
from pathlib import Path
from localgrad.run.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLDING, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_folder_has_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with holder(folder) as other:
        with pytest.raises(UserError, match=r"another process is training in .*: wait for it"), locked(folder):
            pass
        other.communicate("", timeout=60)
    with locked(folder):
        assert os.listdir(folder) == [LOCK]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=60)
        with locked(tmp_path):
            pass


def test_the_lock_goes_with_the_block_also_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), locked(tmp_path):
        raise ValueError("no")
    with holder(tmp_path):
        pass


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_place_that_cannot_be_a_folder_gets_a_sentence(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write to .*; choose another --out"), locked(tmp_path / "file" / below):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_of_somebody_else_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*rest: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refused)  # rights alone do not stop root
    with pytest.raises(UserError, match=r"cannot write to .*: Permission denied; choose"), locked(tmp_path):
        pass
