"""Which hooks run while a network is cut, and how a module is called then.

Only PyTorch's own hooks run, such as those of `weight_norm` and `prune`, because they compute the weights. A person's
hook may keep, print or read the values of what it is given, so it does not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

FORWARD = ("_forward_pre_hooks", "_forward_hooks")  # A module keeps its hooks in these attributes.
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")


def is_of_torch(hook: Callable) -> bool:
    """Whether a hook is PyTorch's own: a function of PyTorch, or an object of one of its classes or of a subclass."""
    kinds = [kind for kind in type(hook).__mro__ if kind is not nn.Module]  # A person's own module may be a hook.
    return any(str(getattr(owner, "__module__", "")).partition(".")[0] == "torch" for owner in (hook, *kinds))


def without_hooks(module: nn.Module) -> nn.Module:
    """`module`, a copy, without the hooks of its user, which must not see what the copy is tried with."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if not is_of_torch(hook)]:
                del hooks[number]
    return module


def call_with(module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """Calls `forward` as `module` would: with the module's own hooks around it, but without those for all modules.

    A hook that fails, because it asks for values, counts as one that changes nothing.
    """
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
