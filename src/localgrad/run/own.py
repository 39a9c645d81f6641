"""Networks of the user's own, which `--model PACKAGE.MODULE:FUNCTION` names."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch import nn

from localgrad.core.errors import UserError, unknown

LIBRARIES = ("timm", "torchvision")  # `core.backbones.build` makes the networks that have these words before the colon.


def is_own(name: str) -> bool:
    """Whether the name of a model is that of a function of the user's."""
    module, colon, _ = name.rpartition(":")
    return bool(colon) and module not in LIBRARIES


def build_own(name: str, *, classes: int, in_channels: int, **arguments: Any) -> nn.Module:
    """Calls the function that a model's name tells, as `function(classes=..., in_channels=..., **arguments)`.

    The module may lie in the current directory, as for `python -m`.

    Raises:
        UserError: There is no such module or function, one of them fails, or the function returns no network.
    """
    function = _function(name)
    try:
        network = function(classes=classes, in_channels=in_channels, **arguments)
    except Exception as error:  # It is the user's code, which may raise any error.
        values = {"classes": classes, "in_channels": in_channels, **arguments}
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        raise UserError(f"'{name}' failed when it was called with {given}: {_reason(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"'{name}' must return a network, an nn.Module, not {type(network).__name__}")
    return network


def _function(name: str) -> Callable[..., Any]:
    """Imports the function that a model's name tells."""
    module_name, _, function_name = name.rpartition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"'{module_name}' cannot be imported: {_reason(error)}") from error
        raise UserError(
            f"no module '{error.name}' for the model '{name}': it must lie in the current directory or be installed, "
            "and is named as import names it, PACKAGE.MODULE (networks of libraries: timm:NAME, torchvision:NAME)"
        ) from error
    except Exception as error:  # It is the user's code, which may raise any error.
        raise UserError(f"'{module_name}' cannot be imported: {_reason(error)}") from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not callable(getattr(module, function_name, None)):
        raise unknown(f"function of {module_name}", function_name, functions)
    return getattr(module, function_name)


def _reason(error: Exception) -> str:
    """The kind of an error, its first line, and the line of the user's code that raised it, if there is one."""
    first = (str(error).splitlines() or [""])[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if last.filename == __file__ else f" ({os.path.basename(last.filename)}, line {last.lineno})"
    return f"{type(error).__name__}: {first}{where}"
