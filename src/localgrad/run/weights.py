"""Weights from elsewhere: what a file of another program holds, and how that fits a network."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from localgrad.core.errors import RunError, UserError, is_out_of_memory

# Where programs put a state_dict among other things, the one that is taken first in front.
_UNDER = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "net")
_WRAPPER = re.compile(r"(?:module|backbone|model)\.")
_KNOWN = re.compile(r"(torch\.(_utils\.)?|(collections|_codecs|__builtin__)\.)\w+")  # PyTorch knows the safe ones
_REFUSED = re.compile(r"(?:GLOBAL|a call of|weights_only=True`` with) ([\w.]+)")  # what an error of PyTorch's names
_ODD = (pickle.UnpicklingError, TypeError, ValueError, AttributeError)  # raised for objects that no stand-in can be
_VALUES = ("argparse.", "datetime.", "numpy.", "pathlib.", "types.Simple")  # what is made of values by a call


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, the index of a sharded checkpoint, or a `torch.save` file.

    A `torch.save` file is read with weights_only=True. It may hold a state_dict as it is or under a usual name, such as
    "state_dict" or "model". Objects beside it are left out: none of their classes is imported.

    Args:
        path: the file.

    Raises:
        UserError: there is no such file, or it holds something other than weights.
        RunError: it cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file of weights in it, such as model.safetensors")
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    if path.name.endswith(".index.json"):
        return _shards(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        others = _other_names(path)
        state = _unpickled(path, others)
    except Exception as error:  # a damaged file makes PyTorch raise almost anything
        if is_out_of_memory(error):
            raise RunError(f"there is not enough memory to read {path}") from error
        if isinstance(error, UserError):
            raise
        if isinstance(error, PermissionError):
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        raise RunError(f"{path} is damaged or no checkpoint of plain tensors") from error
    while isinstance(state, dict) and (key := next((k for k in _UNDER if isinstance(state.get(k), dict)), None)):
        state = state[key]
    pairs = state.items() if isinstance(state, dict) else ()
    if not pairs or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in pairs):
        instead = f", but {', '.join(others[:3])}" if others else ""
        raise UserError(f"{path} holds no state_dict of tensors{instead}: save model.state_dict() alone")
    return state


def fill(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, resized: Callable[[], nn.Module] | None = None
) -> list[str]:
    """Loads `state` into `network` and returns what a person should know of it, as sentences.

    Prefixes of wrappers (`module.`, `_orig_mod.`, `backbone.`, `model.`, also several) are left away where the names
    fit without them. Nothing is loaded where anything else differs.

    Args:
        network: it is filled in place, and keeps its dtypes.
        state: tensors by name, as `read_weights` gives them.
        path: where they come from, for sentences.
        resized: builds the same network for another number of classes. With it, the classifier may differ or be
            missing; that of `network` then stays as it is.

    Raises:
        UserError: names the first tensor that does not fit.
    """
    own, said = network.state_dict(), []
    state, beside = _unwrapped(state, own)
    if beside:
        count = "1 tensor" if len(beside) == 1 else f"{len(beside)} tensors"
        said.append(f"left out of {path}: {count} beside the backbone's, '{beside[0]}' first")
    tied = {t.data_ptr(): n for n, t in own.items() if n in state}  # of tied tensors, some programs save one
    for name in own.keys() - state.keys():
        twin = tied.get(own[name].data_ptr())
        if twin is not None and own[twin].shape == own[name].shape:
            state[name] = state[twin]
        elif name.endswith("num_batches_tracked"):  # which PyTorch did not count before its version 0.4.1
            state[name] = own[name]
    wrong = [n for n in own if n not in state] + [n for n in state if n not in own]
    wrong += [n for n in own if n in state and own[n].shape != state[n].shape]
    if wrong and resized is not None:
        head = _classifier(own, state, resized)
        rest = [n for n in wrong if n not in head]
        if not rest:
            said.append(_about(path, {n: own[n] for n in head}, state))
            state = {n: t for n, t in state.items() if n not in head} | {n: own[n] for n in head}
        wrong = rest
    if wrong:
        count = "1 tensor differs" if len(wrong) == 1 else f"{len(wrong)} tensors differ"
        raise UserError(f"{path} does not fit this backbone: {count}, {_difference(wrong[0], own, state)}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} holds tensors of a kind that cannot be copied, such as quantized ones") from error
    return said


def _shards(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in several files, of which `path` is the index."""
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of a sharded checkpoint: it has no weight_map") from error
    return {name: tensor for file in files for name, tensor in read_weights(path.parent / str(file)).items()}


class _Named(type):
    """The class of stand-ins, which decides what happens when a file calls one."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.__name__.startswith(_VALUES):
            raise pickle.UnpicklingError(f"a call of {cls.__name__}")
        return object.__new__(cls)


class _StandIn(metaclass=_Named):
    """Stands for an object that a file holds beside tensors: nothing of it is imported or run, and its values go."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()  # because the object may be a dictionary, and PyTorch fills none but its own kinds

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickled(path: Path, others: list[str]) -> Any:
    """What a `torch.save` file holds, with stand-ins for objects of the classes `others`."""
    stand_ins: list[Any] = [(_Named(name, (_StandIn,), {}), name) for name in others]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = _REFUSED.search(str(error))
        names = [found[1]] if found else others[:3] if isinstance(error, _ODD) else []
        if not names:
            raise
        text = f"{path} holds other than tensors and plain values ({', '.join(names)}): save model.state_dict() alone"
        raise UserError(text) from error


def _other_names(path: Path) -> list[str]:
    """The classes and functions that a `torch.save` file names, but those that tensors are made with."""
    names = {str(argument).replace(" ", ".") for code, argument in _codes(path) if code in ("GLOBAL", "INST")}
    return sorted(name for name in names if not _KNOWN.fullmatch(name))


def _codes(path: Path) -> Iterator[tuple[str, Any]]:
    """The instructions of a `torch.save` file's pickles, none of which is followed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith("/data.pkl"):
                    yield from ((code.name, argument) for code, argument, _ in pickletools.genops(archive.read(entry)))
    else:
        with path.open("rb") as file:  # as PyTorch wrote it before its version 1.6: the fourth pickle is the object
            for _ in range(4):
                yield from ((code.name, argument) for code, argument, _ in pickletools.genops(file))


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the prefix that most of the network's own are under, without it, and the names of the others.
    torch.compile wraps parts of a network too, so its prefix may stand anywhere."""
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    prefixes = {""}
    for name in plain:
        end = 0
        while found := _WRAPPER.match(name, end):
            end = found.end()
            prefixes.add(name[:end])
    best = max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in plain for name in own))
    under = {name[len(best) :]: tensor for name, tensor in plain.items() if name.startswith(best)}
    return under, [name for name in plain if not name.startswith(best)]


def _classifier(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], resized: Callable[[], nn.Module]
) -> dict[str, Tensor]:
    """The network's own tensors whose shapes follow the number of classes, where those of `state` are missing or differ
    in nothing but that number; else none."""
    with torch.random.fork_rng(devices=()):
        other = resized().state_dict()
    head = {name: t for name, t in own.items() if name in other and other[name].shape != t.shape}
    found = {name: state[name] for name in head if name in state}
    for name, tensor in found.items():
        sizes = zip(own[name].shape, other[name].shape, tensor.shape, strict=False)
        if tensor.ndim != own[name].ndim or any(a != c for a, b, c in sizes if a == b):
            return {}
    return head if len(found) in (0, len(head)) else {}


def _about(path: Path, head: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What is left out and what is new where a file's classifier is not the network's."""
    left = ", ".join(f"{name} {_shape(state[name])}" for name in head if name in state)
    new = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in head.items())
    first = f"the classifier of {path} is left out ({left})" if left else f"{path} holds no classifier"
    return f"{first}: the network has a new one for its own classes ({new})"


def _difference(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    if name not in state:
        return f"'{name}' first, which the file lacks" + (f" (its first is '{next(iter(state))}')" if state else "")
    if name not in own:
        return f"'{name}' first, which this network does not have"
    return f"'{name}' first, which is {_shape(own[name])} here and {_shape(state[name])} in the file"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
