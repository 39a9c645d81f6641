"""Weights on disk: safetensors, written beside their place and renamed, so that no file is ever half there."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localgrad.core.engine import LocalModel
from localgrad.core.errors import RunError, UserError


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors, contiguous and on the CPU: equal weights give equal bytes."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, path)


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
    folder: Path, name: str, model: LocalModel, optimizers: Sequence[torch.optim.Optimizer], position: Mapping[str, Any]
) -> None:
    """`folder/name/`: backbone and auxiliaries as safetensors; optimizers and `position` (plain values) in state.pt."""
    part, place = folder / f"{name}.part", folder / name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_weights(part / "model.safetensors", model.backbone.state_dict())
    save_weights(part / "auxiliaries.safetensors", model.auxiliaries.state_dict())
    torch.save({"optimizers": [o.state_dict() for o in optimizers], **position}, part / "state.pt")
    shutil.rmtree(place, ignore_errors=True)
    os.replace(part, place)


def keep_last(folder: Path, count: int) -> None:
    """Removes all but the newest `count` of `folder/step-N`."""
    steps = sorted(folder.glob("step-*[0-9]"), key=lambda p: int(p.name.removeprefix("step-")))
    for old in steps[:-count]:
        shutil.rmtree(old)
