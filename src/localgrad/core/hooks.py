"""Which hooks run while a network is cut, and how a module is called then.

Most of a person's hooks keep what they are given, print it or ask for its values, and have no part in the cut. Those
that touch nothing but their arguments change at most what passes through, which the cut has to know.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

FORWARD = ("_forward_pre_hooks", "_forward_hooks")  # where a module has its hooks
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
HARMLESS = {abs, all, any, bool, dict, enumerate, float, getattr, hasattr, int, isinstance, len, list, max, min, range}
HARMLESS |= {round, slice, sum, tuple, type, zip}
REACHES_OUT = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "IMPORT_NAME")
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def touches_nothing(hook: Callable) -> bool:
    """Whether a hook can reach nothing but its arguments and PyTorch: it is PyTorch's own, as that of `prune` is, or a
    function whose global names, free variables and defaults are constants and PyTorch's functions."""
    if any(kind.__module__.partition(".")[0] == "torch" for kind in type(hook).__mro__):
        return True
    function = hook.__func__ if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module) else hook
    if not isinstance(function, FunctionType):
        return False
    if function.__module__.partition(".")[0] == "torch":
        return True
    code = function.__code__
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        return False
    if any(step.opname in REACHES_OUT for step in dis.get_instructions(code)):
        return False
    found = inspect.getclosurevars(function)
    reached = [*found.nonlocals.values(), *found.globals.values(), *found.builtins.values()]
    reached += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return all(map(_is_harmless, reached))


def _is_harmless(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_harmless, value))
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in ("torch", "math")
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return value in HARMLESS or (value.__module__ or "").partition(".")[0] in ("torch", "math")
    return isinstance(value, PLAIN)


def call_with(module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """What `module` gives with its own hooks around `forward`, and none of those for all modules. A hook that fails,
    because it asks for values, counts as one that changes nothing."""
    with_kwargs = {*module._forward_pre_hooks_with_kwargs, *module._forward_hooks_with_kwargs}
    for number, hook in module._forward_pre_hooks.items():
        changed = None
        with contextlib.suppress(Exception):
            changed = hook(module, args, kwargs) if number in with_kwargs else hook(module, args)
        if changed is not None and number in with_kwargs:
            args, kwargs = changed
        elif changed is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    given = forward(*args, **kwargs)
    for number, hook in module._forward_hooks.items():
        changed = None
        with contextlib.suppress(Exception):
            changed = hook(module, args, kwargs, given) if number in with_kwargs else hook(module, args, given)
        given = given if changed is None else changed
    return given
