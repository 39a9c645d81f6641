"""Damaged checkpoints, and checkpoints that somebody made to do harm: the first are told from sound ones whatever has
happened to them, the second are refused with a sentence, and neither is obeyed or believed."""

from __future__ import annotations

import collections
import contextlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from localgrad.core.errors import RunError
from localgrad.run import checkpoint as checkpoints
from localgrad.run.checkpoint import (
    AUXILIARIES,
    MANIFEST,
    MODEL,
    STATE,
    STATE_TENSORS,
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
)
from localgrad.run.recipe import Recipe, Saving
from localgrad.run.signals import Stopped
from localgrad.run.state import to_json
from localgrad.run.step import Stepper, StepRecord
from localgrad.run.train import Run, train

Figure = Callable[[str, int, int], None]
Change = Callable[[bytes, int, random.Random], bytes]
TINY = Recipe(model="resnet20", limit_train=64, batch_size=16, epochs=2, precision="float32", head="1c2f", lr=0.02)
FILES = (*checkpoints.FILES, MANIFEST)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(TINY, folder)
    return folder


def small(folder: Path, step: int = 4) -> Path:
    weights, state = {"w": torch.full((9,), float(step))}, {"x": torch.arange(step), "step": step}
    return checkpoints.save_checkpoint(folder, step, model=weights, auxiliaries=weights, state=state, environment={})


@pytest.fixture
def two(whole_run: Path, tmp_path: Path) -> Path:
    """A small checkpoint, and a real one that is newer."""
    small(tmp_path)
    shutil.copytree(whole_run / "checkpoints" / "step-8", tmp_path / "step-8")
    return tmp_path


def is_the_small_one(found: Checkpoint | None) -> bool:
    if found is None or found.path.name != "step-4" or list(found.model) + list(found.auxiliaries) != ["w", "w"]:
        return False
    right = all(torch.equal(part["w"], torch.full((9,), 4.0)) for part in (found.model, found.auxiliaries))
    return right and torch.equal(found.state["x"], torch.arange(4)) and found.state["step"] == 4


def falls_back(folder: Path) -> bool:
    """Whether the newest checkpoint is told to be damaged, named, set aside, and the older one taken."""
    newest, said = folder / "step-8", list[str]()
    with pytest.raises(RunError, match=f"^{re.escape(str(newest))} is damaged: ") as told:
        read_checkpoint(newest)
    found = newest_checkpoint(folder, said.append)
    named = said == [f"{told.value}; set aside as step-8.damaged"]
    return named and is_the_small_one(found) and sorted(os.listdir(folder)) == ["step-4", "step-8.damaged"]


# What time and disks do


def flipped(old: bytes, at: int, chance: random.Random) -> bytes:
    return old[:at] + bytes([old[at] ^ 1 << chance.randrange(8)]) + old[at + 1 :]


def cut(old: bytes, at: int, chance: random.Random) -> bytes:
    return old[:at]


def overwritten(old: bytes, at: int, chance: random.Random) -> bytes:
    size = min(chance.randint(1, 4096), len(old) - at)
    return old[:at] + (bytes(size) if chance.random() < 0.5 else chance.randbytes(size)) + old[at + size :]


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flipped, cut, overwritten])
def test_damage_anywhere_is_seen(damage: Change, count: int, two: Path, figure: Figure) -> None:
    """Every other one anywhere in all the bytes, the rest in one file after the other."""
    chance, hits, passed = random.Random(f"{damage.__name__} {count}"), collections.Counter[str](), 0
    sound = {name: (two / "step-8" / name).read_bytes() for name in FILES}
    for number in range(count):
        name, damaged = FILES[number // 2 % len(FILES)], None
        if number % 2:
            name = chance.choices(FILES, [len(sound[name]) for name in FILES])[0]
        while damaged is None or damaged == sound[name]:  # as zeros over zeros are
            damaged = damage(sound[name], chance.randrange(len(sound[name])), chance)
        (two / "step-8" / name).write_bytes(damaged)
        with contextlib.suppress(pytest.fail.Exception):
            passed += falls_back(two) and (two / "step-8.damaged" / name).read_bytes() == damaged
        if (two / "step-8.damaged").exists():
            os.replace(two / "step-8.damaged", two / "step-8")
        (two / "step-8" / name).write_bytes(sound[name])
        hits[name] += 1
    figure(f"a checkpoint's bytes {damage.__name__}", count, passed)
    assert passed == count
    assert min(hits[name] for name in FILES) >= count // 10


def test_every_byte_of_a_manifest_counts(tmp_path: Path, figure: Figure) -> None:
    file = small(tmp_path) / MANIFEST
    old = file.read_bytes()
    changed = [old[:at] for at in range(len(old))] + [old + more for more in (b"\n", b" ", b"\0", old)]
    changed += [old[:at] + bytes([old[at] ^ 1 << at % 8]) + old[at + 1 :] for at in range(len(old))]
    passed = 0
    for damaged in changed:
        file.write_bytes(damaged)
        try:
            read_checkpoint(file.parent)
        except RunError as error:
            passed += "is damaged: manifest.json is not what was written" in str(error)
    figure("a manifest's every byte and length", len(changed), passed)
    assert passed == len(changed)


REPLACED: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "a folder": lambda file: file.unlink() or file.mkdir(),
    "a link to what was written": lambda file: file.rename(file.with_name("kept")) and file.symlink_to("kept"),
    "an older one": lambda file: shutil.copy(file.parent.parent / "step-4" / file.name, file),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("by", REPLACED)
def test_a_file_that_is_not_what_was_written(by: str, name: str, two: Path) -> None:
    REPLACED[by](two / "step-8" / name)
    assert falls_back(two)


def test_an_empty_folder_is_damaged_and_makes_room_among_what_was_set_aside(two: Path) -> None:
    os.replace(two / "step-8", two / "step-8.damaged")
    (two / "step-8").mkdir()
    assert falls_back(two)
    assert not os.listdir(two / "step-8.damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_damage(name: str, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.open

    def refusing(self: Path, *rest: Any, **named: Any) -> Any:
        if self == two / "step-8" / name:
            raise OSError(5, "Input/output error")
        return plain(self, *rest, **named)

    monkeypatch.setattr(Path, "open", refusing)
    assert falls_back(two)


def test_where_all_are_damaged_there_is_none(two: Path) -> None:
    said: list[str] = []
    for step in (4, 8):
        (two / f"step-{step}" / STATE).write_bytes(b"")
    assert newest_checkpoint(two, said.append) is None
    assert [sentence.rpartition(" as ")[2] for sentence in said] == ["step-8.damaged", "step-4.damaged"]
    assert sorted(os.listdir(two)) == ["step-4.damaged", "step-8.damaged"]


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_had_not_been(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Stepper.__call__

    def stopped(self: Stepper, *rest: Any) -> StepRecord:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *rest)

    folder, kept = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", stopped)
        with pytest.raises(Stopped, match=r"stopped at step 6 of 8, saved as .*step-6"):
            train(TINY, folder)
    (kept / "step-6" / STATE).write_bytes(flipped((kept / "step-6" / STATE).read_bytes(), 999, random.Random(0)))
    train(TINY, folder)
    told = capsys.readouterr().out
    assert f"{kept / 'step-6'} is damaged: {STATE} is not what was written; set aside as step-6.damaged\n" in told
    assert f"going on from {kept / 'step-4'}, at step 4 of 8\n" in told
    assert (folder / MODEL).read_bytes() == (whole_run / MODEL).read_bytes()


# What somebody may do, who also makes the hashes right


def header(shape: list[int], end: int, length: int | None = None) -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(4)


def state(value: Any) -> bytes:
    return json.dumps({"dict": [["x", value]]}).encode()


NINE = {"tensor": 0, "stride": [1]}  # The tensor of `small`, as its state names it.

FORGED: dict[str, tuple[str, bytes]] = {
    "no text": (STATE, b"\x80\x04\x95"),
    "no JSON": (STATE, b"{"),
    "no dictionary": (STATE, b'{"list": [1]}'),
    "a plain value": (STATE, b"1"),
    "a list that is not marked": (STATE, state([1])),
    "a container of an unknown kind": (STATE, state({"set": [1]})),
    "a container of two kinds": (STATE, state({"list": [1], "tuple": [1]})),
    "a dictionary that is not pairs": (STATE, state({"dict": [1]})),
    "a key that cannot be one": (STATE, state({"dict": [[{"list": []}, 1]]})),
    "a tensor that is not there": (STATE, state({"tensor": 1, "stride": [1]})),
    "a tensor twice": (STATE, state({"list": [NINE, NINE]})),
    "a tensor without a stride": (STATE, state({"tensor": 0})),
    "a stride of more dimensions": (STATE, state({"tensor": 0, "stride": [1, 1]})),
    "a stride that is text": (STATE, state({"tensor": 0, "stride": ["1"]})),
    "deep text": (STATE, b'{"list":[' * 10**5),
    "a number beyond all numbers": (STATE, b"9" * 10**5),
    "a header of terabytes": (MODEL, header([1], 4, 2**42)),
    "a tensor of terabytes": (AUXILIARIES, header([2**40], 2**42)),
    "a tensor beyond all numbers": (STATE_TENSORS, header([2**40, 2**40], 4)),
    "a deep header": (MODEL, struct.pack("<Q", 50_005) + b'{"w":' + b"[" * 50_000),
    "tensors that are no safetensors": (STATE_TENSORS, b"PK\5\6" + bytes(18)),
}


def forge(path: Path, **changed: Any) -> None:
    """Makes the manifest agree with the files, but for what is changed."""
    files = {name: checkpoints._fingerprint(path / name) for name in checkpoints.FILES}
    content = {
        "format": checkpoints.FORMAT,
        "step": int(path.name.removeprefix("step-")),
        "environment": {},
        "files": files,
    } | changed
    (path / MANIFEST).write_bytes(checkpoints._rendered(content))


@contextlib.contextmanager
def little_memory(limit: int = 2**26) -> Iterator[None]:
    """Fails where the process has meanwhile held more than `limit` bytes beyond what it holds now (on Linux)."""
    status = Path("/proc/self/status")

    def most() -> int:
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 if status.exists() else 0

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = most()
    yield
    assert most() - before < limit


def refusal(path: Path, kind: type[Exception] = RunError) -> str:
    with little_memory(), pytest.raises(kind) as told:
        read_checkpoint(path)
    return str(told.value)


def test_memory_is_seen() -> None:
    with pytest.raises(AssertionError), little_memory(), mmap.mmap(-1, 2**27) as fresh:  # never what was freed before
        fresh.write(bytes(2**27))


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    path, (file, content) = small(tmp_path), FORGED[name]
    (path / file).write_bytes(content)
    forge(path)
    said = refusal(path)
    assert said.startswith(f"{path} is refused: ")
    assert len(said) < 400 + len(str(path))
    assert said.isprintable()
    assert newest_checkpoint(tmp_path, lambda said: None) is None


def test_a_stride_with_gaps_asks_for_no_memory(tmp_path: Path) -> None:
    """The tensor is taken as it lies in the file."""
    (path := small(tmp_path)).joinpath(STATE).write_bytes(state({"tensor": 0, "stride": [2**40]}))
    forge(path)
    with little_memory():
        assert torch.equal(read_checkpoint(path).state["x"], torch.arange(4))


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no rows": lambda state: state.pop("rows"),
    "no optimizer": lambda state: state["stepper"].update(optimizers=[]),
    "no random numbers": lambda state: state.update(random=[]),
    "no list of rows": lambda state: state.update(rows=5),
    "no time": lambda state: state.update(spent="x"),
    "random numbers out of range": lambda state: state["random"][0].update(python=(3, (2**70,) * 625, None)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_refuses_a_forged_state(name: str, whole_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(whole_run / "checkpoints" / "step-8", tmp_path / "checkpoints" / "step-8")
    CHANGES[name](changed := read_checkpoint(path).state)
    text, tensors = to_json(changed)
    (path / STATE).write_text(text)
    checkpoints.save_weights(path / STATE_TENSORS, tensors)
    forge(path)
    with pytest.raises(RunError, match=r"step-8 (does not fit this run: remove it|is refused: )"):
        _ = read_checkpoint(path), Run(TINY, tmp_path, Saving()).resume()
    assert os.listdir(tmp_path) == ["checkpoints"]


@pytest.mark.timeout(2)
@pytest.mark.parametrize("change", [os.mkfifo, lambda file: file.touch() or os.truncate(file, 2**40)])
def test_a_file_without_an_end_is_not_waited_for(change: Callable[[Path], None], tmp_path: Path) -> None:
    (small(tmp_path) / MODEL).unlink()
    change(tmp_path / "step-4" / MODEL)
    assert "is damaged" in refusal(tmp_path / "step-4")
