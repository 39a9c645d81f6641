"""What a cut was made of: the blocks call modules and read parameters that the network had when it was cut, so a later
change to what lies between them, or to what their forward reads, would never reach them."""

from __future__ import annotations

import copy
import dis
import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from localgrad.core.errors import UserError, callers_level
from localgrad.core.hooks import BACKWARD, FORWARD, PLAIN, touches_nothing
from localgrad.core.opened import CONTAINERS

AGAIN = "call localize again"
MISSING = inspect.Parameter.empty
READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "LOAD_CONST")  # a constant may be what `getattr` is given
FILLS = {"add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
PUTS = ("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR")


@dataclass(frozen=True, eq=False)
class Part:
    """A module whose forward was followed, with what the cut took from it.

    name: in the network, "" for the network itself. size: how many modules it held, where all of them run. attributes:
    plain ones that its forward may read. hooks: their numbers, and whether each has become a part of the blocks.
    """

    name: str
    owner: nn.Module
    size: int | None
    modules: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, dict[int, bool]] = field(default_factory=dict)

    def changed(self) -> str | None:
        """What was replaced, taken away or added since, if anything was."""
        for was, now in ((self.modules, self.owner._modules), (self.parameters, self.owner._parameters)):
            for key, value in was.items():
                if now.get(key) is not value:
                    return f"'{self._path(key)}' was {'replaced' if now.get(key) is not None else 'taken away'}"
        if self.size is not None and len(self.owner._modules) != self.size:
            return f"the number of modules in '{self.name}' was changed from {self.size} to {len(self.owner._modules)}"
        return None

    def ignored(self) -> Iterator[tuple[str, str]]:
        """What has no effect on the blocks: attributes and hooks that were changed since, and how."""
        for key, was in self.attributes.items():
            now = _attribute(self.owner, key)
            if now is not was and not (_is_plain(now) and now == was):
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
    """Of one network: whether it is still what it was when it was cut."""

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        """names: of the modules and parameters that the cut took."""
        self.network, self.told = network, set[str]()
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
                    taken = held.get(key)  # maybe by another name than the forward uses
                    mine.update((k, v) for k, v in held.items() if v is taken is not None)
        for part in parts.values():
            part.attributes.update(_read(part.owner))
            for kind in (*FORWARD, *BACKWARD):
                hooks = getattr(part.owner, kind).items()
                part.hooks[kind] = {number: kind in FORWARD and touches_nothing(hook) for number, hook in hooks}
        self.parts = list(parts.values())

    def copies(self, unit: str, module: nn.Module) -> None:
        """Tells that a coupling follows the parameters of a unit, one by one."""
        parts = [(m, list(m._parameters), list(m._modules.values())) for m in module.modules()]
        self.copied.append((unit, module, _parameters(module), parts))

    def check(self, backbone: nn.Module) -> None:
        """Raises UserError where a module or parameter of the network is not that of the blocks. Warns, once for each,
        of what else was changed and has no effect on them."""
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
                if key not in self.told:
                    self.told.add(key)
                    warnings.warn(f"{what}, which local_backward does not see: {AGAIN}", stacklevel=callers_level())

    def silent(self) -> list[str]:
        """The modules that have hooks which local_backward does not call, because it calls their parts alone."""
        return [p.title for p in self.parts if not all(all(hooks.values()) for hooks in p.hooks.values())]


def _parameters(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p.shape) for name, p in module.named_parameters()]


def _read(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that its forward may read, and does not write itself; MISSING for its methods,
    so that one put in their place is seen. A list or dictionary that the forward may fill is left out."""
    waiting, known, written, filled = ["forward"], {"forward"}, {"training"}, set[str]()
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    while waiting:
        name = waiting.pop()
        for code in (c for holder in (module, *kinds) for c in _codes(_code(vars(holder).get(name)))):
            steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
            written.update(value for opname, value in steps if opname == "STORE_ATTR")
            read = {v for opname, v in steps if opname.startswith(READS) and isinstance(v, str) and v.isidentifier()}
            filled.update(a for (_, a), (_, b) in pairwise(steps) if isinstance(a, str) and b in FILLS)
            filled.update(read if any(opname in PUTS for opname, _ in steps) else ())
            waiting += read - known
            known |= read
    methods = {name for name in known if any(_code(vars(kind).get(name)) for kind in kinds)}
    found = {name: _attribute(module, name) for name in known - written}
    return {
        name: value
        for name, value in found.items()
        if (_is_plain(value) and not (name in filled and isinstance(vars(module).get(name), list | dict)))
        or (value is MISSING and name in methods)
    }


def _code(member: Any) -> CodeType | None:
    """What a function, method or property runs."""
    if isinstance(member, staticmethod | classmethod | MethodType):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    return inspect.unwrap(member).__code__ if isinstance(member, FunctionType) else None


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """Itself, and the functions and comprehensions within it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _attribute(module: nn.Module, name: str) -> Any:
    """Of the module itself, or a constant of its class; of a list or dictionary a copy, since it may be changed where
    it is."""
    value: Any = vars(module).get(name, module._modules.get(name, MISSING))
    if value is MISSING and isinstance(constant := getattr(type(module), name, MISSING), (*PLAIN, tuple, list, dict)):
        value = constant
    return copy.copy(value) if isinstance(value, list | dict) else value


def _said(value: Any) -> str:
    if value is MISSING:
        return "that of its class"
    if isinstance(value, (*PLAIN, tuple, list, dict)) and _is_plain(value):
        return repr(value)
    return getattr(value, "__name__", f"a {type(value).__name__}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (*PLAIN, FunctionType, BuiltinFunctionType))
