"""Runs a part of a network again in its backward pass, instead of keeping its tensors: activation checkpointing.

The second run begins with the state that the first run found: buffers, plain attributes of modules, random generators.
It works on copies, so the state that the first run left stays as it is. PyTorch's own checkpointing begins with the
state that the first run left, and changes it a second time (pytorch issue 96136).
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from localgrad.core.copies import RESULT, copied_state
from localgrad.core.rebuild import FrozenReference, TensorReference

OF_MODULES = frozenset(vars(nn.Module())) - {"training"}  # These attributes of a module are PyTorch's own.


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


def repeats(module: nn.Module, h: Any) -> bool:
    """Whether a second run of `module` gives the result of the first one, as recomputation needs it.

    Args:
        module: A part of the network, or a copy of it: its state moves by one run.
        h: Its input, which is not changed.
    """
    before = _Before(module)
    devices = {t.device for t in tree_leaves(h) if t.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices):
        first = module(tree_map_only(Tensor, Tensor.clone, h))
    with torch.no_grad(), torch.random.fork_rng(devices), before:
        second = module(tree_map_only(Tensor, Tensor.clone, h))
    _set_random_states(before.drawn)
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, equal_nan=True) for a, b in pairs if isinstance(a, Tensor))


class _Before:
    """The state that a module and the random generators have now, to be entered later.

    Inside the context, the module has copies of this state. After it, the module has again the same objects that it
    had when the context was entered. A context can be entered several times: a graph may be used twice.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = _parts(module)
        own = [vars(part) for part in self.parts if not _changes_buffers_alone(part)]
        self.places = [*own, *(part._buffers for part in self.parts)]
        self.kept = copied_state([_state(place) for place in self.places], {})
        self.drawn = _random_states()

    def __enter__(self) -> None:
        self.left = [_state(place) for place in self.places]
        self.drawn_since = _random_states()
        # Setting a state takes longer than comparing it, and most units draw nothing there.
        self.drew = not _same_random_states(self.drawn, self.drawn_since)
        for place, left, own in zip(self.places, self.left, copied_state(self.kept, {}), strict=True):
            _put(place, {name: left.get(name) if value is RESULT else value for name, value in own.items()})
        if self.drew:
            _set_random_states(self.drawn)

    def __exit__(self, *exc_info: object) -> None:
        for place, left in zip(self.places, self.left, strict=True):
            _put(place, left)
        if self.drew:
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


def _changes_buffers_alone(part: nn.Module) -> bool:
    """Whether this is a layer of PyTorch without hooks: its forward pass leaves its attributes as they are."""
    return type(part).__module__.startswith("torch.nn.modules.") and not (
        part._forward_pre_hooks or part._forward_hooks
    )


def _state(place: Any) -> dict[str, Any]:
    """What a module's dictionary of attributes or of buffers holds, without PyTorch's own attributes."""
    return {name: value for name, value in place.items() if name not in OF_MODULES}


def _put(place: Any, state: dict[str, Any]) -> None:
    """Makes `state` what `_state(place)` returns."""
    for name in _state(place).keys() - state.keys():
        del place[name]
    for name, value in state.items():
        place[name] = value


def _random_states() -> tuple[Any, Any]:
    """The states of Python's and numpy's random generators. `checkpoint` takes care of PyTorch's."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def _same_random_states(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    (_, keys, *rest), (_, other_keys, *others) = one[1], other[1]
    return one[0] == other[0] and rest == others and np.array_equal(keys, other_keys)


def _set_random_states(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
