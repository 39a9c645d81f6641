"""Runs a part of a network again in its backward pass, instead of keeping its tensors: activation checkpointing.

The second run begins with the state that the first run found: buffers, plain attributes of modules, random generators.
It works on copies, so the state that the first run left stays as it is. PyTorch's own checkpointing begins with the
state that the first run left, and changes it a second time (pytorch issue 96136).
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from localgrad.core.rebuild import FrozenReference, TensorReference

OF_MODULES = frozenset(vars(nn.Module())) - {"training"}  # These attributes of a module are PyTorch's own.
CONTAINERS = frozenset((list, deque, dict, OrderedDict, defaultdict, Counter))
WHOLE = frozenset((random.Random, np.random.Generator, np.random.RandomState, np.ndarray))
RESULT = object()  # It stands in a kept state where a result of an earlier forward pass was.


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]  # The compiler cannot follow `_Before`.
def recomputed(module: nn.Module, *given: Any) -> Any:
    """Computes `module(*given)` without its inner tensors, and computes it again in the backward pass.

    Args:
        module: The part of the network to run.
        given: Its arguments, which are kept until the backward pass.

    Returns:
        What `module` returns.
    """
    if not torch.is_grad_enabled():
        return module(*given)
    before = _Before(module)
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in before.parts)
    with set_checkpoint_early_stop(False) if scripted else contextlib.nullcontext():  # A script cannot be ended early.
        return checkpoint(module, *given, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), before))


class Recomputed(nn.Module):
    """A module that runs another one by `recomputed`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Any:
        return recomputed(self.module, *given)


def split_recomputed(whole: nn.Module, key: str) -> nn.Module:
    """Divides a module of traced steps where the value of `meta[key]` changes from one step to the next.

    Args:
        whole: The traced module.
        key: A step without this key belongs to the step before it.

    Returns:
        The divided module. A part whose value is not None is an `Recomputed`.
    """
    assert isinstance(whole, fx.GraphModule)
    parts: list[Any] = []
    places: dict[fx.Node, int] = {}
    for node in whole.graph.nodes:
        value = node.meta.get(key, parts[-1] if parts else None)
        if not parts or parts[-1] != value:
            parts.append(value)
        places[node] = len(parts) - 1
    divided = split_module(whole, whole, places.__getitem__, keep_original_order=True)
    for number, value in enumerate(parts):
        name = f"submod_{number}"
        if value is not None and hasattr(divided, name):
            setattr(divided, name, Recomputed(divided.get_submodule(name)))
    return divided


class _Before:
    """The state that a module and the random generators have now, to be entered later.

    Inside the context, the module has copies of this state. After it, the module has again the same objects that it
    had when the context was entered. A context can be entered several times: a graph may be used twice.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = _parts(module)
        self.places = [place for part in self.parts for place in (vars(part), part._buffers)]
        self.kept = _copied([_state(place) for place in self.places], {})
        self.drawn = _random_states()

    def __enter__(self) -> None:
        self.left = [_state(place) for place in self.places]
        self.drawn_since = _random_states()
        for place, left, own in zip(self.places, self.left, _copied(self.kept, {}), strict=True):
            _put(place, {name: left.get(name) if value is RESULT else value for name, value in own.items()})
        _set_random_states(self.drawn)

    def __exit__(self, *exc_info: object) -> None:
        for place, left in zip(self.places, self.left, strict=True):
            _put(place, left)
        _set_random_states(self.drawn_since)
        del self.left, self.drawn_since


def _parts(module: nn.Module) -> list[nn.Module]:
    """All modules whose state `module` may use: its own, and other blocks that it runs or reads a tensor of."""
    parts = list(module.modules())
    for part in parts:  # The list grows meanwhile.
        if isinstance(part, FrozenReference):
            parts += part.reference[0].modules()
        elif isinstance(part, TensorReference):
            parts.append(part.owner[0])
    return list(dict.fromkeys(parts))


def _state(place: Any) -> dict[str, Any]:
    """What a module's dictionary of attributes or of buffers holds, without PyTorch's own attributes."""
    return {name: value for name, value in place.items() if name not in OF_MODULES}


def _put(place: Any, state: dict[str, Any]) -> None:
    """Makes `state` what `_state(place)` returns."""
    for name in _state(place).keys() - state.keys():
        del place[name]
    for name, value in state.items():
        place[name] = value


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copies what a forward pass may change in place, and returns everything else as it is, such as modules.

    Args:
        value: What to copy. For a result of a forward pass it returns `RESULT`, so as not to keep that pass's memory.
        memo: The copies until now, by the id of the original or of its storage, so that what was shared stays shared.
    """
    kind = type(value)
    if isinstance(value, nn.Parameter) or id(value) in memo:
        return memo.get(id(value), value)
    if isinstance(value, Tensor):
        memo[id(value)] = RESULT if value.requires_grad else _copied_tensor(value, memo)
    elif kind in CONTAINERS:
        other = memo[id(value)] = copy.copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            other[key] = _copied(item, memo)
    elif kind is set:
        memo[id(value)] = set(value)
    elif isinstance(value, torch.Generator):
        memo[id(value)] = value.clone_state()
    elif kind in WHOLE:
        memo[id(value)] = copy.deepcopy(value)
    return memo.get(id(value), value)


def _copied_tensor(value: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copies a tensor with the whole storage that it is a view of, so that other views find the same copy in `memo`."""
    if value.layout is not torch.strided:
        return value.clone()
    storage = value.untyped_storage()
    if storage._cdata not in memo:
        whole = value.detach().as_strided((storage.nbytes() // value.element_size(),), (1,), 0)
        memo[storage._cdata] = whole.clone()
    whole = memo[storage._cdata].view(value.dtype)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _random_states() -> tuple[Any, Any]:
    """The states of Python's and numpy's random generators. `checkpoint` takes care of PyTorch's."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_random_states(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
