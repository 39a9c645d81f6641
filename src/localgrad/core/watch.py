"""Whether a network is still the one that was cut.

The blocks call the modules and read the parameters that the network had when it was cut. A later change to what lies
between them, such as a replaced module or an attribute that a forward reads, would never reach the blocks. So each step
refuses the one and warns of the other.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, NoneType
from typing import Any

import torch
from torch import nn

from localgrad.core.errors import UserError, callers_level
from localgrad.core.hooks import BACKWARD, FORWARD
from localgrad.core.opened import CONTAINERS

AGAIN = "call localize again"
MISSING = inspect.Parameter.empty
CONSTANTS = (NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.device)
FUNCTIONS = (FunctionType, BuiltinFunctionType)


@dataclass(frozen=True, eq=False)
class Part:
    """A module whose forward was followed, with what the cut took from it.

    Attributes:
        name: Its name in the network, "" for the network itself.
        owner: The module.
        size: How many modules it held, for a container, which runs all of them. Else None.
        modules: The modules that the cut took, by name.
        parameters: The parameters that the cut took, by name.
        attributes: Plain attributes that its forward may read, with their values.
        hooks: For each kind of hook, the number of each hook and whether it has become a part of the blocks.
    """

    name: str
    owner: nn.Module
    size: int | None
    modules: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, dict[int, bool]] = field(default_factory=dict)

    def changed(self) -> str | None:
        """Says which module or parameter was replaced, taken away or added since the cut, if one was."""
        for was, now in ((self.modules, self.owner._modules), (self.parameters, self.owner._parameters)):
            for key, value in was.items():
                if now.get(key) is not value:
                    return f"'{self._path(key)}' was {'replaced' if now.get(key) is not None else 'taken away'}"
        if self.size is not None and len(self.owner._modules) != self.size:
            return f"the number of modules in '{self.name}' was changed from {self.size} to {len(self.owner._modules)}"
        return None

    def ignored(self) -> Iterator[tuple[str, str]]:
        """Yields the attributes and hooks that were changed without effect on the blocks, each with a sentence."""
        for key, was in self.attributes.items():
            now = _attribute(self.owner, key)
            if _differ(was, now):
                path = self._path(key)
                yield path, f"'{path}' was {_said(was)} as the network was cut, and is {_said(now)}"
        for kind, was in self.hooks.items():
            now = getattr(self.owner, kind)
            if any(number not in was for number in now) or any(within and n not in now for n, within in was.items()):
                yield self._path(kind), f"the hooks of {self.title} were changed after the network was cut"

    @property
    def title(self) -> str:
        return f"'{self.name}'" if self.name else "the network itself"

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


class Watch:
    """Compares a network with what it was when it was cut.

    Args:
        network: The network.
        names: The modules and parameters that the cut took.
        written: The attributes that a forward changes itself, as (name of the module, name of the attribute).
        runs: Tells of a hook whether it ran during the cut, and so is in the blocks.
    """

    def __init__(
        self, network: nn.Module, names: Iterable[str], written: set[tuple[str, str]], runs: Callable[[Callable], bool]
    ) -> None:
        self.network, self.warned = network, set[str]()
        self.copied: list[tuple[str, nn.Module, list[tuple[str, Any]], list[tuple[nn.Module, list, list]]]] = []
        parts: dict[str, Part] = {}
        for name in names:
            path = name.split(".")
            for i, key in enumerate(path):
                owner_name = ".".join(path[:i])
                owner = network.get_submodule(owner_name)
                size = len(owner._modules) if isinstance(owner, CONTAINERS) else None
                part = parts.setdefault(owner_name, Part(owner_name, owner, size))
                for held, mine in ((owner._modules, part.modules), (owner._parameters, part.parameters)):
                    taken = held.get(key)  # The network may hold it by a second name, and run it by that one.
                    mine.update((k, v) for k, v in held.items() if v is taken is not None)
        for part in parts.values():
            read = read_attributes(part.owner).items()
            part.attributes.update((key, value) for key, value in read if (part.name, key) not in written)
            for kind in (*FORWARD, *BACKWARD):
                hooks = getattr(part.owner, kind).items()
                part.hooks[kind] = {number: kind in FORWARD and runs(hook) for number, hook in hooks}
        self.parts = list(parts.values())

    def copies(self, unit: str, module: nn.Module) -> None:
        """Notes that a coupling follows the parameters of `module`, the unit of this name, one by one."""
        parts = [(m, list(m._parameters), list(m._modules.values())) for m in module.modules()]
        self.copied.append((unit, module, _parameters(module), parts))

    def check(self, backbone: nn.Module) -> None:
        """Compares the network with what was cut. Warns once for each change that has no effect on the blocks.

        Args:
            backbone: The model's backbone, which should be the network that was cut.

        Raises:
            UserError: A module or parameter of the network is not the one that the blocks have.
        """
        if backbone is not self.network and all(m is not self.network for m in backbone.modules()):
            raise UserError(f"the model's backbone was replaced, but its blocks are those of the old one: {AGAIN}")
        for part in self.parts:
            if (what := part.changed()) is not None:
                raise UserError(f"{what} after the network was cut, and its blocks would go on as before: {AGAIN}")
        for unit, module, was, parts in self.copied:
            same = all(list(m._parameters) == names and list(m._modules.values()) == held for m, names, held in parts)
            if not same and _parameters(module) != was:
                raise UserError(f"a coupling has copied '{unit}', whose parameters are others since then: {AGAIN}")
        for part in self.parts:
            for key, what in part.ignored():
                if key not in self.warned:
                    self.warned.add(key)
                    warnings.warn(f"{what}, which local_backward does not see: {AGAIN}", stacklevel=callers_level())

    def renew(self) -> None:
        """Takes the parameters, and the hooks of the network itself, as they are now for those of the cut."""
        for part in self.parts:
            part.parameters.update((key, part.owner._parameters.get(key)) for key in part.parameters)
            for kind, was in part.hooks.items() if part.owner is self.network else ():
                was.update((number, False) for number in getattr(part.owner, kind) if number not in was)

    def silent(self) -> list[str]:
        """The modules that have hooks which local_backward does not call, because it calls their parts alone."""
        return [p.title for p in self.parts if not all(all(hooks.values()) for hooks in p.hooks.values())]


def _parameters(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p.shape) for name, p in module.named_parameters()]


def read_attributes(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that its forward may read: those that any method of its classes mentions.

    A method is `MISSING` among them, because the module itself does not hold it until one is put in its place.
    """
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    methods = [(name, code) for kind in kinds for name, member in vars(kind).items() if (code := _code(member))]
    own = {name for name, _ in methods} - {"__init__"}
    names = own.union(*(_mentioned(code) for name, code in methods if name in own)) - {"training"}
    found = {name: _attribute(module, name) for name in names}
    return {name: value for name, value in found.items() if _is_plain(value) or (value is MISSING and name in own)}


def changed_attributes(module: nn.Module, before: dict[str, Any]) -> set[str]:
    """Which of the attributes that `read_attributes` has given before are others now."""
    return {name for name, value in before.items() if _differ(value, _attribute(module, name))}


def _code(member: Any) -> CodeType | None:
    """What a function, method or property runs."""
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    return inspect.unwrap(member).__code__ if isinstance(member, FunctionType) else None


def _mentioned(code: CodeType) -> Iterator[str]:
    """The names and strings in a function, and in the functions and comprehensions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):  # `getattr` may be given it.
            yield constant
        elif isinstance(constant, CodeType):
            yield from _mentioned(constant)


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute of the module itself, or a constant of its class. A list or dictionary is copied, because it may be
    changed in place."""
    value: Any = vars(module).get(name, MISSING)
    if name in module._modules:
        value = module._modules[name]
    constant = getattr(type(module), name, MISSING)
    if value is MISSING and isinstance(constant, (*CONSTANTS, tuple, list, dict)):
        value = constant
    return copy.copy(value) if isinstance(value, list | dict) else value


def _differ(was: Any, now: Any) -> bool:
    return now is not was and not (_is_plain(now) and now == was)


def _said(value: Any) -> str:
    if value is MISSING:
        return "that of its class"
    if not isinstance(value, FUNCTIONS) and _is_plain(value):
        return repr(value)
    return getattr(value, "__name__", f"a {type(value).__name__}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (*CONSTANTS, *FUNCTIONS))
