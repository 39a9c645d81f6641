"""Runs a part of a network again in its backward pass, instead of keeping its tensors: activation checkpointing.

The second run begins with what the first one found: buffers, random states, and what modules note as plain attributes.
It has copies of them for itself, so what the first run left stays as it is. PyTorch's own checkpointing begins with
what the first run left, and updates it once more (pytorch issue 96136).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import CodeType, FunctionType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from localgrad.core.rebuild import Held, Reads

OF_MODULES = frozenset(vars(nn.Module())) - {"training"}  # attributes that PyTorch gives to every module
ATOMS = frozenset((bool, int, float, str, tuple, NoneType, torch.dtype, torch.device))
CONTAINERS = frozenset((list, deque, set, dict, OrderedDict, defaultdict, Counter))
COPIED = frozenset((random.Random, np.random.Generator, np.random.RandomState, np.ndarray))
OTHERS = "others"
WRAPPED = (FunctionType, staticmethod, classmethod, type(functools.cache(len)))
DRAWING = frozenset(("random", "numpy"))
RESULT = object()  # in place of one, in a state that is kept
STATISTICS = frozenset(
    ("running_mean", "running_var", "num_batches_tracked", "buffers", "named_buffers", "_buffers", "state_dict")
)


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]  # as `checkpoint` itself, where a compiler knows the plain one alone
def again(module: nn.Module, *given: Any) -> Any:
    """`module(*given)`, of which only `given` and the state of `module` before are kept; run again in the backward
    pass."""
    if not torch.is_grad_enabled():
        return module(*given)
    before = _Before(module)
    first = contextlib.nullcontext()
    with set_checkpoint_early_stop(False) if before.scripted else first:  # what ends a run early cannot pass a script
        return checkpoint(module, *given, use_reentrant=False, context_fn=lambda: (first, before))


class Again(nn.Module):
    """Runs a module in this way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Any:
        return again(self.module, *given)


def split_again(whole: nn.Module, key: str) -> nn.Module:
    """`whole`, a module of traced steps, with its runs of steps that have the same value other than None in their
    `meta[key]` as modules that are run again."""
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
            setattr(divided, name, Again(divided.get_submodule(name)))
    return divided


class _Before:
    """The state that a module has now: a context in which it has it once more, and after which it is as it was."""

    def __init__(self, module: nn.Module) -> None:
        places, self.norms, kinds = _places(module)
        memo: dict[Any, Any] = {OTHERS: set()}
        self.kept = [
            (place, only, {n: v if type(v) in ATOMS else _copied(v, memo) for n, v in _state(place, only).items()})
            for place, only in places
        ]
        self.scripted = any(issubclass(kind, torch.jit.ScriptModule) for kind in kinds)
        draws = not DRAWING.isdisjoint(_names(kinds | memo[OTHERS]))
        self.drawn = _random_states() if draws else None

    def __enter__(self) -> None:
        self.statistics = [(tensor, tensor.clone()) for norm in self.norms for tensor in norm.buffers()]
        self.drawn_now = _random_states() if self.drawn else None
        self.now = [_state(place, only) for place, only, _ in self.kept]
        memo: dict[Any, Any] = {OTHERS: set()}
        for (place, _, kept), now in zip(self.kept, self.now, strict=True):
            own = {
                n: v if type(v) in ATOMS else now.get(n) if v is RESULT else _copied(v, memo) for n, v in kept.items()
            }
            _put(place, now, own)
        _draw_from(self.drawn)

    def __exit__(self, *exc_info: object) -> None:
        for (place, only, _), now in zip(self.kept, self.now, strict=True):
            _put(place, _state(place, only), now)
        for tensor, value in self.statistics:
            tensor.data.copy_(value)  # nobody has to see that it was another: they are saved for the backward pass
        _draw_from(self.drawn_now)
        del self.now, self.statistics


def _places(module: nn.Module) -> tuple[list[tuple[Any, str | None]], list[nn.Module], frozenset[Any]]:
    """Where the state of a module lies: dictionaries, with the one name that counts there or None for all; the batch
    norms whose statistics matter only to what they become, so that nothing has to be kept of them; and the classes of
    its parts."""
    parts = list(module.modules())
    read: list[tuple[nn.Module, str]] = []
    hooked = False
    for part in parts:  # grows meanwhile
        hooked = hooked or bool(part._forward_hooks or part._forward_pre_hooks)
        if isinstance(part, Held):
            parts += part.held[0].modules()
        elif isinstance(part, Reads):
            read.append((part.owner[0], part.name))
    kinds = frozenset(map(type, parts))
    owners = {id(owner) for owner, _ in read}
    norms = [part for part in parts if _is_plain_norm(part) and id(part) not in owners]
    if norms and (hooked or STATISTICS & _names(frozenset(k for k in kinds if not issubclass(k, _NormBase)))):
        norms = []
    beside = {id(norm) for norm in norms}
    places: list[tuple[Any, str | None]]
    places = [((owner._buffers if name in owner._buffers else vars(owner)), name) for owner, name in read]
    places += [(vars(part), None) for part in parts]
    places += [(part._buffers, None) for part in parts if len(part._buffers) and id(part) not in beside]
    return places, norms, kinds | {_Hooked} if hooked else kinds


def _state(place: Any, only: str | None) -> dict[str, Any]:
    if only is not None:
        return {only: place[only]} if only in place else {}
    return {name: value for name, value in place.items() if name not in OF_MODULES}


def _put(place: Any, present: dict[str, Any], state: dict[str, Any]) -> None:
    """Changes what is `present` there to `state`."""
    for name in present.keys() - state.keys():
        del place[name]
    for name, value in state.items():
        if present.get(name, present) is not value:
            place[name] = value


def _copied(value: Any, memo: dict[Any, Any]) -> Any:
    """A copy of what a forward pass may change; tensors that shared memory do so again. A result of a forward pass,
    which lasts until the next makes its own, is not held. memo[OTHERS]: gets what cannot be copied, or its class."""
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter):
            return value
        return RESULT if value.requires_grad else _copied_tensor(value, memo)
    kind = type(value)
    if kind in ATOMS or id(value) in memo:
        return memo.get(id(value), value)
    if kind is torch.Generator:
        memo[id(value)] = value.clone_state()
    elif kind in COPIED:
        memo[id(value)] = copy.deepcopy(value)
    elif kind in CONTAINERS:
        other = memo[id(value)] = copy.copy(value)
        for key, item in () if kind is set else list(other.items() if isinstance(other, dict) else enumerate(other)):
            other[key] = _copied(item, memo)
    else:
        value_of = value.func if kind is functools.partial else value
        memo[OTHERS].add(value_of if isinstance(value_of, FunctionType) else type(value_of))
    return memo.get(id(value), value)


def _copied_tensor(value: Tensor, memo: dict[Any, Any]) -> Tensor:
    if id(value) not in memo:
        if value.layout is not torch.strided:
            memo[id(value)] = value.clone()
        else:
            storage = value.untyped_storage()
            if storage._cdata not in memo:
                whole = value.detach().as_strided((storage.nbytes() // value.element_size(),), (1,), 0)
                memo[storage._cdata] = whole.clone()
            whole = memo[storage._cdata].view(value.dtype)
            memo[id(value)] = whole.as_strided(value.shape, value.stride(), value.storage_offset())
    return memo[id(value)]


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm whose output does not depend on the statistics that it moves."""
    if not isinstance(module, _BatchNorm) or not module.training or module.momentum is None:
        return False
    return type(module).forward is _BatchNorm.forward and "forward" not in vars(module)


class _Hooked:
    """Stands for hooks, which may do anything."""

    def __call__(self) -> None:
        random.random()


@functools.lru_cache(maxsize=1024)
def _names(kinds: frozenset[Any]) -> frozenset[str]:
    """What is named by the forward of modules, the call of other objects and functions, and by what these call: names,
    constants of text, and the packages of what the names stand for."""
    bases = [base for kind in kinds if isinstance(kind, type) for base in kind.__mro__]
    waiting = [*kinds, *(vars(base).get(name) for base in bases for name in ("forward", "__call__"))]
    seen: dict[CodeType, None] = {}
    named: set[str] = set()
    while waiting:
        function = waiting.pop()
        function = function.fget if isinstance(function, property) else function
        function = inspect.unwrap(function) if isinstance(function, WRAPPED) else function  # pyright: ignore[reportArgumentType]
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        if _package(function) == "torch" and _package(function, 2) != "torch.ao":
            continue
        codes = [function.__code__]
        for code in codes:  # grows meanwhile
            codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        seen |= dict.fromkeys(codes)
        names = {name for code in codes for name in code.co_names}
        named |= names | {c for code in codes for c in code.co_consts if isinstance(c, str)}
        found = [*inspect.getclosurevars(function).nonlocals.values()]
        found += [function.__globals__[name] for name in names if name in function.__globals__]
        named.update(_package(thing) for thing in found)
        owners = [*bases, *filter(inspect.ismodule, found)]
        waiting += found + [vars(owner)[name] for owner in owners for name in names if name in vars(owner)]
    return frozenset(named)


def _package(thing: Any, parts: int = 1) -> str:
    """The package of a module, of a function, or of the object that it is a method of."""
    of = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None)
    of = of or type(getattr(thing, "__self__", None)).__module__
    return ".".join(str(of).split(".")[:parts])


def _random_states() -> tuple[Any, Any]:
    """Those of Python and numpy; `checkpoint` takes care of PyTorch's."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def _draw_from(states: tuple[Any, Any] | None) -> None:
    if states is not None:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
