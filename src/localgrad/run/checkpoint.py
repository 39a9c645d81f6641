"""Saves and loads weights and checkpoints. Each is complete or not there, and every byte is checked when it is read.

A checkpoint is a folder `step-N`: backbone and auxiliaries as safetensors, the rest of the run's state as JSON and
safetensors (see `state.py`), and a manifest with each file's size and SHA-256 and a hash of itself. It is written as
`step-N.part`, flushed to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from localgrad.core.errors import RunError, UserError, is_out_of_memory
from localgrad.run.files import MODEL, PART, flush, make_folder, part_of, remove, replacing
from localgrad.run.state import from_json, to_json
from localgrad.run.weights import fill, read_weights

FORMAT = 3
AUXILIARIES = "auxiliaries.safetensors"
STATE, STATE_TENSORS, MANIFEST = "state.json", "state.safetensors", "manifest.json"
FILES = (MODEL, AUXILIARIES, STATE, STATE_TENSORS)  # The files that the manifest lists.
DAMAGED = ".damaged"  # The ending of a damaged checkpoint, which is renamed and not read again.
_MANIFEST_LIMIT = 2**20  # Bytes. A manifest has about a thousand, and a larger file is not read.


class Damaged(RunError):
    """A checkpoint has changed since it was written, or holds something that no run writes."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        state: The run's state without the weights, as plain values and tensors.
        environment: The machine and the versions that wrote it.
    """

    path: Path
    model: dict[str, Tensor]
    auxiliaries: dict[str, Tensor]
    state: dict[str, Any]
    environment: dict[str, str]


def save_weights(path: Path, state: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, with `about` in the metadata. Equal weights give equal bytes. Raises RunError if
    the disk does not take the file. Then nothing is left of it."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    owners = {t.untyped_storage().data_ptr(): name for name, t in tensors.items()}
    # The format cannot express that tensors share memory, so each of them is written.
    separate = {n: t if owners[t.untyped_storage().data_ptr()] == n else t.clone() for n, t in tensors.items()}
    content = memoryview(serialize(separate, metadata={"format": "pt"}))
    start = 8 + int.from_bytes(content[:8], "little")  # The tensors begin after the header.
    try:
        with replacing(path) as part, part.open("wb") as file:
            file.write(_header(content[8:start], about or {}))
            file.write(content[start:])
    except OSError as error:
        raise RunError(f"cannot write {path}: {_reason(error)}") from error


def load_backbone(backbone: nn.Module, path: Path, *, resized: Callable[[], nn.Module] | None = None) -> list[str]:
    """Loads a file of weights into the backbone by `weights.fill`, and returns its sentences for the user."""
    return fill(backbone, read_weights(path), path, resized)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    auxiliaries: Mapping[str, Tensor],
    state: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Path:
    """Writes the checkpoint `folder/step-N` and returns its path. Raises RunError if the disk does not take it. Then
    nothing is left of it, and older checkpoints stay as they are."""
    path = folder / f"step-{step}"
    part = part_of(path)
    try:
        make_folder(folder)
        remove(part)
        part.mkdir()
        names = state.get("classes", ())
        save_weights(part / MODEL, model, {"classes": json.dumps(names)} if names else None)
        save_weights(part / AUXILIARIES, auxiliaries)
        text, tensors = to_json(dict(state))
        save_weights(part / STATE_TENSORS, tensors)
        (part / STATE).write_text(text)
        flush(part / STATE)
        files = {name: _fingerprint(part / name) for name in FILES}
        content = {"format": FORMAT, "step": step, "environment": dict(environment), "files": files}
        (part / MANIFEST).write_bytes(_rendered(content))
        flush(part / MANIFEST)
        flush(part)
        os.replace(part, path)
        flush(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError) and not isinstance(error, RunError):
            raise RunError(f"cannot write {path}: {_reason(error)}") from error
        raise
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, and compares every file with its hash before.

    Raises:
        Damaged: A file has changed, or holds something that no run writes.
        UserError: Another version of localgrad wrote it.
        RunError: It cannot be read now.
    """
    try:
        manifest = _read_manifest(path)
        for name, wanted in manifest["files"].items():
            if _size(path / name) != wanted["bytes"] or _fingerprint(path / name) != wanted:
                raise Damaged(f"{path} is damaged: {name} is not what was written")
        state = from_json((path / STATE).read_bytes(), load_file(path / STATE_TENSORS))
        if not isinstance(state, dict):
            raise TypeError("the state is no dictionary")
        return Checkpoint(path, load_file(path / MODEL), load_file(path / AUXILIARIES), state, manifest["environment"])
    except (UserError, RunError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO):
            raise Damaged(f"{path} is damaged: {_reason(error)}") from error
        raise RunError(f"{path} cannot be read: {_reason(error)}") from error
    except Exception as error:  # The hashes agree, so somebody forged this file. It may raise any error.
        if is_out_of_memory(error):
            raise RunError(f"there is not enough memory to read {path}") from error
        raise Damaged(f"{path} is refused: it holds other than tensors and plain values") from error


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest sound checkpoint. Damaged ones are renamed, and a sentence about each is passed to `say`."""
    for path in reversed(saved(folder)):
        try:
            return read_checkpoint(path)
        except Damaged as error:
            renamed = path.with_name(path.name + DAMAGED)
            remove(renamed)
            os.replace(path, renamed)
            say(f"{error}; set aside as {renamed.name}")
    return None


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, without damaged and unfinished ones."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    complete = [p for p, step in steps.items() if step.isdecimal() and p.is_dir() and not p.is_symlink()]
    return sorted(complete, key=lambda path: int(steps[path]))


def prune(folder: Path, count: int, best: int | None) -> None:
    """Removes all but the newest `count` checkpoints and the one of step `best`, to which the link `best` then leads.
    What a killed process has left is removed too. What cannot be removed stays."""
    target, link = folder / f"step-{best}", folder / "best"
    for rest in folder.glob(f"*{PART}"):
        with contextlib.suppress(OSError):
            remove(rest)
    with contextlib.suppress(OSError):  # Some file systems have no links.
        if target.is_dir() and not (link.is_symlink() and os.readlink(link) == target.name):
            part_of(link).symlink_to(target.name, target_is_directory=True)
            os.replace(part_of(link), link)
    keep = (target.name, os.readlink(link) if link.is_symlink() else None)
    for old in saved(folder)[:-count]:
        if old.name not in keep:
            with contextlib.suppress(OSError):
                os.replace(old, part_of(old))  # A folder that is removed in part must not look like a checkpoint.
                remove(part_of(old))


def random_state() -> dict[str, Any]:
    """The state of the global random generators: PyTorch's on every device, numpy's and Python's."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = [name, np.asarray(keys).tolist(), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what `random_state` gave. CUDA's generators stay as they are on another number of devices."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])


def _read_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a checkpoint."""
    file = path / MANIFEST
    size = _size(file)
    try:
        if not 0 <= size <= _MANIFEST_LIMIT:
            raise ValueError("not a manifest of ours")
        written = file.read_bytes()
        content = json.loads(written)
        del content["sha256"]
        if _rendered(content) != written:
            raise ValueError("its bytes have changed")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {MANIFEST} is not what was written") from error
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        found = ascii(content.get("format"))[:20]
        raise UserError(f"{path} was written by another version of localgrad (format {found})")
    files = content.get("files")
    sound = isinstance(files, dict) and set(files) == set(FILES)
    sound = sound and all(isinstance(wanted, dict) and "bytes" in wanted for wanted in files.values())
    if not sound or not isinstance(content.get("environment"), dict):
        raise Damaged(f"{path} is refused: its {MANIFEST} lists other than what a checkpoint has")
    if path.name != f"step-{content.get('step')}":
        raise Damaged(f"{path} is damaged: its {MANIFEST} is that of another")
    return content


def _rendered(content: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, which has a hash of its content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _size(file: Path) -> int:
    """The size of a regular file; -1 for anything else, such as a pipe or a link."""
    status = file.lstat()
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _header(written: memoryview, about: Mapping[str, str]) -> bytes:
    """The header of a safetensors file, with its length before it and `about` in its metadata.

    It is not given to safetensors, because the order in which that writes several entries is not always the same.
    """
    header = bytes(written)
    if about:
        content = json.loads(header)
        content["__metadata__"].update(about)
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _reason(error: BaseException) -> str:
    """The first line of an error, or the system's words if an error of the system led to it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
