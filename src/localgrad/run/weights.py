"""Reads weights that other programs have written, and fits them into a network."""

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

# Programs save a state_dict under these names, among other things. The first name that is there is used.
_UNDER = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "net")
_WRAPPER = re.compile(r"(?:module|backbone|model)\.")
# Names of these kinds get no stand-in, because PyTorch itself decides which of them are safe.
_KNOWN = re.compile(r"(torch\.(_utils\.)?|(collections|_codecs|__builtin__)\.)\w+")
# It finds the class that an error of PyTorch names.
_REFUSED = re.compile(r"(?:GLOBAL|a call of|weights_only=True`` with) ([\w.]+)")
# PyTorch raises these for an object that no stand-in can replace.
_ODD = (pickle.UnpicklingError, TypeError, ValueError, AttributeError)
# A file may call what begins with these, because it makes values.
_VALUES = ("argparse.", "datetime.", "numpy.", "pathlib.", "types.Simple")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, the index of a sharded checkpoint, or a `torch.save` file.

    A `torch.save` file is read with weights_only=True. It may hold a state_dict, or a dictionary that has one under a
    usual name, such as "state_dict" or "model". Other objects are left out, and their classes are not imported.

    Raises:
        UserError: There is no such file, or it holds something other than weights.
        RunError: The file cannot be read.
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
    except Exception as error:  # PyTorch may raise any error for a damaged file.
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
    """Loads the weights of a file into a network, and returns sentences for the user about those that were not used.

    Prefixes of wrappers (`module.`, `_orig_mod.`, `backbone.`, `model.`, or several of them) are removed if the names
    fit without them. The network keeps its dtypes.

    Args:
        resized: Builds the same network for another number of classes. If it is given, the classifier may differ or be
            missing. Then `network` keeps its own.

    Raises:
        UserError: A tensor does not fit. The first one is named, and nothing is loaded.
    """
    own, notes = network.state_dict(), []
    tensors, unused = _unwrapped(state, own)
    if unused:
        count = "1 tensor" if len(unused) == 1 else f"{len(unused)} tensors"
        notes.append(f"left out of {path}: {count} beside the backbone's, '{unused[0]}' first")
    _add_missing(tensors, own)
    wrong = [n for n in own if n not in tensors] + [n for n in tensors if n not in own]
    wrong += [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if wrong and resized is not None:
        classifier = _classifier(own, tensors, resized)
        wrong = [n for n in wrong if n not in classifier]
        if not wrong:
            notes.append(_about(path, {n: own[n] for n in classifier}, tensors))
            kept = {n: t for n, t in tensors.items() if n not in classifier}
            tensors = kept | {n: own[n] for n in classifier}
    if wrong:
        count = "1 tensor differs" if len(wrong) == 1 else f"{len(wrong)} tensors differ"
        raise UserError(f"{path} does not fit this backbone: {count}, {_difference(wrong[0], own, tensors)}")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} holds tensors of a kind that cannot be copied, such as quantized ones") from error
    return notes


def _add_missing(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Adds tensors that some programs do not save: the twins of a tied tensor, and batch norm's counters, which PyTorch
    has had since version 0.4.1."""
    tied = {t.data_ptr(): n for n, t in own.items() if n in tensors}
    for name in own.keys() - tensors.keys():
        twin = tied.get(own[name].data_ptr())
        if twin is not None and own[twin].shape == own[name].shape:
            tensors[name] = tensors[twin]
        elif name.endswith("num_batches_tracked"):
            tensors[name] = own[name]


def _shards(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in several files. `path` is their index."""
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of a sharded checkpoint: it has no weight_map") from error
    return {name: tensor for file in files for name, tensor in read_weights(path.parent / str(file)).items()}


class _Named(type):
    """The class of the stand-in classes. It allows a file to call those that make values."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.__name__.startswith(_VALUES):
            raise pickle.UnpicklingError(f"a call of {cls.__name__}")
        return object.__new__(cls)


class _StandIn(metaclass=_Named):
    """Takes the place of an object that is no tensor. Its code is not imported, and its values are dropped."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()  # The object may be a dictionary, and PyTorch can fill only its own kinds of those.

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickled(path: Path, others: list[str]) -> Any:
    """The content of a `torch.save` file, with stand-ins for objects of the classes `others`."""
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
    """The classes and functions that a `torch.save` file names, without those that make tensors."""
    names = {str(argument).replace(" ", ".") for code, argument in _codes(path) if code in ("GLOBAL", "INST")}
    return sorted(name for name in names if not _KNOWN.fullmatch(name))


def _codes(path: Path) -> Iterator[tuple[str, Any]]:
    """The instructions of the pickles in a `torch.save` file. None of them is executed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith("/data.pkl"):
                    yield from ((code.name, argument) for code, argument, _ in pickletools.genops(archive.read(entry)))
    else:
        with path.open("rb") as file:  # Before version 1.6, PyTorch wrote four pickles. The last one is the object.
            for _ in range(4):
                yield from ((code.name, argument) for code, argument, _ in pickletools.genops(file))


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Finds the prefix with which most names fit the network. Returns the tensors that have it, by their names without
    it, and the names of the other tensors."""
    # torch.compile can wrap any part of a network, so its prefix may be anywhere in a name.
    renamed = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    prefixes = {""}
    for name in renamed:
        end = 0
        while found := _WRAPPER.match(name, end):
            end = found.end()
            prefixes.add(name[:end])
    best = max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in renamed for name in own))
    under = {name[len(best) :]: tensor for name, tensor in renamed.items() if name.startswith(best)}
    return under, [name for name in renamed if not name.startswith(best)]


def _classifier(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], resized: Callable[[], nn.Module]
) -> dict[str, Tensor]:
    """The network's tensors whose shapes follow the number of classes; none if those of `state` differ in more."""
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
    """A sentence about the file's classifier, which is left out, and the network's own."""
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
