"""Weights and runs on disk: whole or not there, and nothing is read that is not what was written.

A checkpoint is a folder `step-N`: backbone and auxiliaries as safetensors, the rest of the run's state as a
`torch.save` file of plain values, and a manifest with each file's size and SHA-256 and a hash of itself. It is written
as `step-N.part`, flushed to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localgrad.core.errors import RunError, UserError
from localgrad.run.files import PART, flush, part_of, replacing

FORMAT = 1
MODEL, AUXILIARIES, STATE, MANIFEST = "model.safetensors", "auxiliaries.safetensors", "state.pt", "manifest.json"
DAMAGED = ".damaged"  # a checkpoint that was set aside
_MANIFEST_LIMIT = 2**20  # bytes; ours have about a thousand


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read. state: plain values and tensors. environment: what its bits depend on beside the recipe."""

    path: Path
    model: dict[str, Tensor]
    auxiliaries: dict[str, Tensor]
    state: dict[str, Any]
    environment: dict[str, str]


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors, contiguous and on the CPU: equal weights give equal bytes. RunError if the disk
    does not take them; then nothing is left of them."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    try:
        with replacing(path) as part:
            save_file(tensors, part, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {_reason(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a `torch.save` file (read with weights_only=True) that holds them as they
    are or under "state_dict" or "model". Raises UserError if there is no such file, RunError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RunError(f"{path} is damaged or no checkpoint of plain tensors") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} holds no state_dict of tensors")
    return state


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Loads a checkpoint of the backbone strictly. Raises UserError naming the first key that does not fit."""
    state, own = read_weights(path), backbone.state_dict()
    wrong = [k for k in own if k not in state] + [k for k in state if k not in own]
    wrong += [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"{path} does not fit this backbone: {len(wrong)} tensors differ, '{wrong[0]}' first")
    backbone.load_state_dict(state)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    auxiliaries: Mapping[str, Tensor],
    state: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Path:
    """Writes `folder/step-N`. RunError if the disk does not take it; then nothing is left of it, and the checkpoints
    that were there are as they were."""
    place = folder / f"step-{step}"
    part = part_of(place)
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            flush(folder.parent)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_weights(part / MODEL, model)
        save_weights(part / AUXILIARIES, auxiliaries)
        with (part / STATE).open("wb") as file:  # given a path, PyTorch would not say why a write failed
            torch.save(dict(state), file)
        flush(part / STATE)
        files = {name: _fingerprint(part / name) for name in (MODEL, AUXILIARIES, STATE)}
        content = {"format": FORMAT, "step": step, "environment": dict(environment), "files": files}
        (part / MANIFEST).write_bytes(_rendered(content))
        flush(part / MANIFEST)
        flush(part)
        os.replace(part, place)
        flush(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError) and not isinstance(error, RunError):
            raise RunError(f"cannot write {place}: {_reason(error)}") from error
        raise
    return place


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after comparing every file with its hash. Raises RunError saying what is wrong with it, and
    UserError if a later version of localgrad wrote it."""
    manifest = _read_manifest(path)
    for name, wanted in manifest["files"].items():
        file = path / name
        try:
            same = not file.is_symlink() and _fingerprint(file) == wanted
        except OSError as error:
            raise RunError(f"{path} is damaged: {name} cannot be read ({_reason(error)})") from error
        if not same:
            raise RunError(f"{path} is damaged: {name} is not what was written")
    try:
        state = _read_state(path / STATE)
        return Checkpoint(path, load_file(path / MODEL), load_file(path / AUXILIARIES), state, manifest["environment"])
    except Exception as error:  # hashes agree, so somebody made this file, and may have made it raise anything
        raise RunError(f"{path} is refused: it holds more than tensors and plain values ({_reason(error)})") from error


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint, or None. Each damaged one is named through `say` and set aside."""
    for path in reversed(saved(folder)):
        try:
            return read_checkpoint(path)
        except RunError as error:
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            say(f"{error}; set aside as {aside.name}")
    return None


def saved(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. Those that were set aside or never finished are not among them."""
    found = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    whole = [p for p, step in found.items() if step.isdecimal() and p.is_dir() and not p.is_symlink()]
    return sorted(whole, key=lambda path: int(found[path]))


def prune(folder: Path, count: int, best: int | None) -> None:
    """Removes all but the newest `count` checkpoints and the one of step `best`, to which the link `best` then leads,
    and what a killed process has left. What cannot be removed stays."""
    target, link = folder / f"step-{best}", folder / "best"
    with contextlib.suppress(OSError):  # some file systems have no links
        if target.is_dir() and not (link.is_symlink() and os.readlink(link) == target.name):
            part_of(link).unlink(missing_ok=True)
            part_of(link).symlink_to(target.name, target_is_directory=True)
            os.replace(part_of(link), link)
    for old in saved(folder)[:-count]:
        if old != target:
            with contextlib.suppress(OSError):
                os.replace(old, part_of(old))  # first, so that a checkpoint that has its name is whole
    for rest in folder.glob(f"*{PART}"):
        shutil.rmtree(rest, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """The global random generators, as plain values: PyTorch's of every device, numpy's and Python's."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (it is the global one's state that is meant)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = [name, np.asarray(keys).tolist(), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        if file.is_symlink() or file.stat().st_size > _MANIFEST_LIMIT:
            raise ValueError("not a manifest of ours")
        written = file.read_bytes()
        content = json.loads(written)
        del content["sha256"]
        # Every byte counts: another spelling of the same content is damage too.
        if _rendered(content) != written:
            raise ValueError("its hash is another")
    except FileNotFoundError:
        raise RunError(f"{path} is damaged: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {MANIFEST} is not what was written") from error
    if content.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of localgrad (format {content.get('format')})")
    files, environment = content.get("files"), content.get("environment")
    if not isinstance(files, dict) or set(files) != {MODEL, AUXILIARIES, STATE} or not isinstance(environment, dict):
        raise RunError(f"{path} is refused: its {MANIFEST} lists other files than a checkpoint has")
    return content


def _rendered(content: Mapping[str, Any]) -> bytes:
    """A manifest's bytes: the content with a hash of itself."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _read_state(file: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:  # torch.save stores, so more than the file's bytes is a bomb
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise ValueError("its archive announces more than it holds")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError("it is no dictionary")
    return state


def _reason(error: BaseException) -> str:
    """The system's words, where it was the system that refused."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
