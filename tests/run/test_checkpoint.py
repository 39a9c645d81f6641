"""Weights and runs on disk: what is read is what was written, to the bit; a save that fails leaves nothing; and at no
instant is there less than one sound checkpoint."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_files import Seen, all_calls, full_disk
from torch import Tensor, nn

from localgrad.core.backbones import build
from localgrad.core.errors import RunError, UserError
from localgrad.run import checkpoint as checkpoints
from localgrad.run.checkpoint import newest_checkpoint, prune, read_checkpoint, read_weights, save_checkpoint, saved

Figure = Callable[[str, int, int], None]
FILES = ["auxiliaries.safetensors", "manifest.json", "model.safetensors", "state.json", "state.safetensors"]
ENVIRONMENT = {"torch": "2", "machine": "\N{GREEK SMALL LETTER ALPHA}"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the disk, which would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def save(folder: Path, step: int) -> Path:
    """A small checkpoint, whose tensors tell its step."""
    weights = {"w": torch.full((40,), float(step))}
    state = {"step": step, "buffers": [torch.arange(step + 3)]}
    return save_checkpoint(folder, step, model=weights, auxiliaries=weights, state=state, environment=ENVIRONMENT)


def sound(path: Path) -> bool:
    """Whether it reads, and as what was saved as this step."""
    try:
        found = read_checkpoint(path)
    except RunError:
        return False
    step = int(path.name.removeprefix("step-"))
    right = all(torch.equal(part["w"], torch.full((40,), float(step))) for part in (found.model, found.auxiliaries))
    return right and found.state["step"] == step and torch.equal(found.state["buffers"][0], torch.arange(step + 3))


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Every file's bytes, every link's target, every folder."""
    paths = {path: str(path.relative_to(folder)) for path in folder.rglob("*")}
    links = {name: os.readlink(path) for path, name in paths.items() if path.is_symlink()}
    return {name: path.read_bytes() if path.is_file() else None for path, name in paths.items()} | links


# Weights


def test_equal_weights_give_equal_bytes_in_any_memory_format(tmp_path: Path) -> None:
    backbone = build("resnet20", classes=10)
    checkpoints.save_weights(tmp_path / "a.safetensors", backbone.state_dict())
    backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    checkpoints.save_weights(tmp_path / "b.safetensors", dict(reversed(backbone.state_dict().items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_shared_weights_are_saved(tmp_path: Path) -> None:
    checkpoints.save_weights(tmp_path / "w.safetensors", dict.fromkeys("ab", torch.ones(3)))
    assert torch.equal(read_weights(tmp_path / "w.safetensors")["b"], torch.ones(3))


# There and back


def odd_tensors() -> dict[str, Tensor]:
    """Of every kind that a network or an optimizer may hold, with values that only bits can tell apart."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    quiet, loud = struct.unpack("<2i", struct.pack("<2I", 0x7FC00001, 0xFFA00002))
    tensors["nan"] = torch.tensor([quiet, loud], dtype=torch.int32).view(torch.float32)
    tensors["zero"] = torch.tensor([0.0, -0.0, torch.inf, 1e-45])
    return tensors | {"scalar": torch.tensor(3), "none": torch.empty(0, 4), "turned": torch.rand(4, 3).T}


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_what_is_read_is_what_was_saved_to_the_bit(tmp_path: Path) -> None:
    tensors = odd_tensors()
    plain = {"int": 2**70, "float": 0.1, "text": "\0\N{SNOWMAN}", "none": None, "flags": [True, (1, 2.5), {3: "x"}]}
    state, folder = {"deep": [{"t": tensors}], "plain": plain}, tmp_path / "a" / "b"
    path = save_checkpoint(folder, 12, model=tensors, auxiliaries={}, state=state, environment=ENVIRONMENT)
    assert path == tmp_path / "a" / "b" / "step-12"
    found = read_checkpoint(path)
    for read in (found.model, found.state["deep"][0]["t"]):
        assert {name: bits(t) for name, t in read.items()} == {name: bits(t) for name, t in tensors.items()}
    assert (found.path, found.auxiliaries, found.environment) == (path, {}, ENVIRONMENT)
    assert found.state["plain"] == plain
    assert sorted(os.listdir(path)) == FILES


def test_an_optimizers_memory_format_survives(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)).sum().backward()
    optimizer.step()
    before = optimizer.state[network.weight]["momentum_buffer"]
    save_checkpoint(tmp_path, 1, model={}, auxiliaries={}, state=optimizer.state_dict(), environment={})
    optimizer.load_state_dict(read_checkpoint(tmp_path / "step-1").state)
    after = optimizer.state[network.weight]["momentum_buffer"]
    assert after.stride() == before.stride() == (27, 1, 9, 3)
    assert bits(after) == bits(before)


def test_equal_runs_give_equal_checkpoints_and_none_is_written_over(tmp_path: Path) -> None:
    paths = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    with pytest.raises(RunError, match=r"cannot write .*step-3: "):
        checkpoints.save_checkpoint(tmp_path / "a", 3, model={}, auxiliaries={}, state={}, environment={})
    assert tree(paths[0]) == tree(paths[1])


def draws() -> list[float]:
    """An odd number of normal ones, of which two are made at a time."""
    return [float(torch.rand(())), np.random.rand(), np.random.randn(), random.gauss(0, 1)]  # noqa: NPY002


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    draws()
    save_checkpoint(tmp_path, 1, model={}, auxiliaries={}, state={"random": checkpoints.random_state()}, environment={})
    wanted = [*draws(), *draws()]
    checkpoints.set_random_state(read_checkpoint(tmp_path / "step-1").state["random"])
    assert [*draws(), *draws()] == wanted


# Saves


def test_a_folder_is_renamed_when_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    place = save(tmp_path / "checkpoints", 3)
    assert seen.calls[0] == f"flush {tmp_path.name}"  # which has the new folder's name
    assert seen.calls[-3:] == ["flush step-3.part", "rename step-3.part step-3", "flush checkpoints"]
    assert not seen.early
    assert sorted(os.listdir(place)) == FILES
    assert seen.is_on_disk(tmp_path / "checkpoints")


WRITES: dict[str, Callable[[Path], Any]] = {
    "a checkpoint": lambda folder: save(folder, 4),
    "weights": lambda folder: checkpoints.save_weights(folder / "w.safetensors", {"w": torch.ones(5)}),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_at_any_call_of_a_save(name: str, tmp_path: Path, figure: Figure) -> None:
    """Nothing half-written stays, and nothing that was there changes. Where only the very last flush fails, the new
    files are there already, and whole."""
    before, tried, passed, late = {}, 0, 0, 0
    for number in itertools.count():
        folder = tmp_path / str(number)
        save(folder, 3)
        checkpoints.save_weights(folder / "w.safetensors", {"w": torch.zeros(5)})
        if number == 0:
            before = tree(folder)
            WRITES[name](folder)
            whole = tree(folder)
            continue
        with full_disk(number):
            try:
                WRITES[name](folder)
                break
            except RunError as error:
                told = str(error)
        right = told.startswith(f"cannot write {folder}") and told.endswith(": No space left on device")
        tried += 1
        passed += right and tree(folder) in (before, whole)
        late += tree(folder) == whole
    figure(f"a disk that is full when it gets {name}", tried, passed)
    assert passed == tried > 5
    assert late <= 2
    assert tree(folder) == whole


# Manifests that somebody wrote, with a hash that is right


def forge(path: Path, content: Any) -> None:
    (path / "manifest.json").write_bytes(checkpoints._rendered(content))


MORE: list[Any] = [
    {"../../x": {"bytes": 1}},
    {"/x": {"bytes": 1}},
    {"state.json": None},
    {"state.json": {"bytes": 10**30}},
]


@pytest.mark.parametrize("changed", [*MORE, *({"files": files} for files in ({}, FILES, None)), {"environment": []}])
def test_a_manifest_of_other_files_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    content = json.loads((path / "manifest.json").read_bytes())
    del content["sha256"]
    forge(path, content | ({"files": content["files"] | changed} if changed in MORE else changed))
    with pytest.raises(RunError, match=r"step-3 is (damaged|refused): [^\n]{10,60}$"):
        read_checkpoint(path)


@pytest.mark.parametrize("number", [1, 2, 4, 0, -1, None, "1", [1], {}, 1.5])
def test_another_format_is_for_another_version_and_stays(number: Any, tmp_path: Path) -> None:
    forge(save(tmp_path, 3), {"format": number})
    with pytest.raises(UserError, match=r"step-3 was written by another version of localgrad \(format .*\)$"):
        newest_checkpoint(tmp_path, print)
    assert os.listdir(tmp_path) == ["step-3"]


@pytest.mark.parametrize("written", ["[" * 2**19, '{"a":' * 2**17, '{"sha256":' + "9" * 5000 + "}", "[]", "null", ""])
def test_what_is_no_manifest_is_damage(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path, 3) / "manifest.json"
    file.write_text(written)
    with pytest.raises(RunError, match=r"is damaged: manifest.json is not what was written$"):
        read_checkpoint(file.parent)
    os.truncate(file, 2**32)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("gigabytes are read"))
    with pytest.raises(RunError, match=r"is damaged: manifest.json is not what was written$"):
        read_checkpoint(file.parent)


# What stays


def test_keeps_the_newest_by_number_and_the_best(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        (tmp_path / f"step-{step}").mkdir()
    prune(tmp_path, 2, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-100", "step-20", "step-9"]
    assert (tmp_path / "best").resolve() == tmp_path / "step-9"
    prune(tmp_path, 2, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-100", "step-20"]
    assert (tmp_path / "best").resolve() == tmp_path / "step-20"


def test_what_counts_as_a_checkpoint(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-2.part", "step-3.damaged", "step-", "step-x", "step--1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-7").write_text("a file")
    (tmp_path / "step-8").symlink_to("step-9")
    assert [path.name for path in saved(tmp_path)] == ["step-9", "step-10"]
    assert saved(tmp_path / "none") == []


def test_there_is_a_sound_checkpoint_at_every_instant(tmp_path: Path) -> None:
    """Of 20 saves, as a run makes them. The best is the first, then the seventh, then the newest."""
    seen, busy, folder = [(False, False)], list[str](), tmp_path / "checkpoints"

    def look() -> None:
        assert all(sound(path) for path in saved(folder))
        seen.append((bool(saved(folder)), (folder / "best").is_dir()))
        assert all(before <= now for before, now in itertools.pairwise(seen)), "a checkpoint or the best one is gone"

    def meet(name: str, plain: Callable[[], Any]) -> Any:
        if busy or name in ("open", "write_bytes", "save", "rmtree"):  # of these only what they call can matter
            return plain()
        busy.append(name)
        look()
        done = plain()
        look()
        busy.clear()
        return done

    with pytest.MonkeyPatch.context() as patch:
        all_calls(patch, meet)
        for step in range(1, 21):
            save(folder, step)
            prune(folder, 2, 1 if step < 7 else 7 if step < 15 else step)
    assert len(seen) > 600
    assert sorted(os.listdir(folder)) == ["best", "step-19", "step-20"]
    assert os.readlink(folder / "best") == "step-20"


class Killed(BaseException):
    pass


def killed_at(folder: Path, number: int) -> bool:
    """Two saves and what they remove, by a process that ends at the call of this number and cleans up nothing. Whether
    there were so many calls."""
    calls: list[str] = []

    def meet(name: str, plain: Callable[[], Any]) -> Any:
        calls.append(name)
        if len(calls) >= number:
            raise Killed
        return plain()

    with pytest.MonkeyPatch.context() as patch:
        all_calls(patch, meet)
        try:
            for step in (4, 5):
                save(folder, step)
                prune(folder, 2, 2 if step < 5 else 5)
        except Killed:
            return True
    return False


def test_a_process_that_dies_at_any_call_costs_at_most_its_own_save(tmp_path: Path, figure: Figure) -> None:
    """The next one takes the newest checkpoint, saves, and leaves nothing of the dead one."""
    tried = passed = 0
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        save(folder, 2)
        save(folder, 3)
        if not killed_at(folder, number):
            break
        said: list[str] = []
        found = newest_checkpoint(folder, said.append)
        right = found is not None and sound(found.path) and not said and all(sound(path) for path in saved(folder))
        step = found.state["step"] if found is not None else 0
        save(folder, step + 1)
        prune(folder, 2, step + 1)
        left = {"best", f"step-{step}", f"step-{step + 1}"}
        tried += 1
        passed += right and step >= 3 and set(os.listdir(folder)) == left
    figure("a process that dies between two calls of a save", tried, passed)
    assert passed == tried > 80


def test_what_cannot_be_removed_stays_and_goes_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "step-9.part").mkdir()
    refused = Mock(side_effect=PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    for owner, names in ((os, ("replace", "unlink", "rmdir")), (Path, ("symlink_to",))):
        for name in names:
            monkeypatch.setattr(owner, name, refused)
    prune(tmp_path, 2, 5)
    assert [path.name for path in saved(tmp_path)] == [f"step-{step}" for step in range(1, 6)]
    assert all(sound(path) for path in saved(tmp_path))
    monkeypatch.undo()
    prune(tmp_path, 2, 5)
    assert sorted(os.listdir(tmp_path)) == ["best", "step-4", "step-5"]


def test_the_link_leads_nowhere_at_no_time(tmp_path: Path) -> None:
    for step in (1, 2, 4, 5):
        save(tmp_path, step)
        prune(tmp_path, 2, 1 if step < 3 else 3)  # whose save has failed
    assert not (tmp_path / "best").is_symlink() or (tmp_path / "best").exists()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))])
def test_want_of_memory_is_no_damage(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    monkeypatch.setattr(checkpoints, "load_file", Mock(side_effect=error))
    with contextlib.suppress(RunError, UserError, MemoryError, OSError):
        newest_checkpoint(tmp_path, print)
    assert os.listdir(tmp_path) == ["step-3"]
