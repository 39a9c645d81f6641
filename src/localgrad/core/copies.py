"""Copies of modules: with their values, without values, and with weights drawn anew; and copies of a module's state.

Weights may be computed from other parameters: by `nn.utils.parametrizations`, or before each call by the older
functions `nn.utils.weight_norm`, `nn.utils.spectral_norm` and `nn.utils.prune`.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from localgrad.core.hooks import BACKWARD, FORWARD, is_of_torch

Module = TypeVar("Module", bound=nn.Module)
SETTLE = 15  # PyTorch takes as many passes of the power iteration when it registers spectral norm.
UNCHANGED = frozenset((bool, int, float, str, type(None)))  # No forward pass changes such a value in place.
COLLECTIONS = frozenset((list, deque, dict, OrderedDict, defaultdict, Counter))
COPIED_DEEPLY = frozenset((random.Random, np.random.Generator, np.random.RandomState, np.ndarray))
RESULT = object()  # It stands in a copied state where a result of an earlier forward pass was.


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Puts the random generators back at the end."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors of a module and of its parts: parameters, buffers and attributes, also those in lists."""
    for part in module.modules():
        yield from (leaf for leaf in tree_leaves(list(vars(part).values())) if isinstance(leaf, Tensor))


def computed(module: nn.Module, memo: Mapping[int, Any] | None = None) -> dict[int, Any]:
    """A memo for `copy.deepcopy`, which refuses tensors that have a graph.

    Args:
        module: The module to copy.
        memo: The memo until now.

    Returns:
        The values of the tensors that have a graph and are not in `memo`.
    """
    found = {id(t): t for t in held_tensors(module) if t.grad_fn is not None}
    return {key: t.detach().clone() for key, t in found.items() if key not in (memo or {})}


def duplicate(module: Module) -> Module:
    """A deep copy. A tensor that is computed at each call keeps its value until the next call."""
    return copy.deepcopy(module, computed(module))


def without_values(
    module: Module,
    device: str | None = None,
    *,
    hooks: Callable[[Callable], bool] = is_of_torch,
    copies: Mapping[int, Any] | None = None,
) -> Module:
    """A copy whose tensors have the shapes, strides and dtypes of the module's, but no values.

    Args:
        module: The module to copy.
        device: Where the copy's tensors are. By default where the module's are, with the CPU for the meta device.
        hooks: Which of the hooks around forward passes the copy has, too.
        copies: By the id of an object, what the copy holds in its place. Default: nothing.
    """
    memo: dict[int, Any] = dict(copies or {})
    for tensor in held_tensors(module):
        at = device or ("cpu" if tensor.is_meta else tensor.device)
        other = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=at)
        memo[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
    tables = [getattr(m, kind) for m in module.modules() for kind in (*FORWARD, *BACKWARD)]
    memo.update((id(table), OrderedDict()) for table in tables)
    copied = copy.deepcopy(module, memo)
    for table in tables:  # All modules are copied by now, so a hook that is a method of one becomes that of its copy.
        memo[id(table)].update((number, copy.deepcopy(h, memo)) for number, h in table.items() if hooks(h))
    return copied


@torch.no_grad()
def copy_values(copied: nn.Module, source: nn.Module) -> None:
    """Gives a copy of `source` its present parameters and buffers, in place."""
    for mine, its in ((copied.parameters(), source.parameters()), (copied.buffers(), source.buffers())):
        for tensor, value in zip(mine, its, strict=True):
            tensor.copy_(value)


@torch.no_grad()
def draw_anew(module: nn.Module) -> None:
    """Draws the parameters of a module anew, each part by its `reset_parameters`. A bare parameter keeps its value.

    A weight that is computed is drawn as if it were a parameter. Then the parameters that it is computed from are set:
    by the `right_inverse` of its parametrizations, or as direction and norm of `weight_norm`, or as the original of
    `spectral_norm` and `prune`.
    """
    for part in list(module.modules()):
        reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
        if not callable(reset):
            continue
        names = _computed_names(part)
        if names:
            _draw_computed(part, names)
        else:
            _draw(part, reset)


def _draw(part: nn.Module, reset: Callable[[], object]) -> None:
    before = [(p, p._version, p.clone()) for p in part.parameters(recurse=False) if p.ndim > 1]
    reset()
    left = before and all(p._version == version and torch.equal(p, old) for p, version, old in before)
    if left and _has_computed_attribute(part):
        warnings.warn(
            f"a copy of {type(part).__name__} is not drawn anew and begins as its source: its reset_parameters writes "
            "into a tensor that is computed; compute it with torch.nn.utils.parametrizations instead",
            stacklevel=2,
        )


def _has_computed_attribute(part: nn.Module) -> bool:
    own = type(part).__mro__[: type(part).__mro__.index(nn.Module)]
    properties = any(isinstance(value, property) for kind in own for value in vars(kind).values())
    return properties or any(isinstance(value, Tensor) for value in vars(part).values())


def _computed_names(part: nn.Module) -> list[str]:
    """The names of the tensors of `part` that are computed from others, by parametrizations or the older functions."""
    names = list(part.parametrizations) if parametrize.is_parametrized(part) else []  # pyright: ignore
    return names + [n for n, value in vars(part).items() if isinstance(value, Tensor) and _older(part, n)]


def _older(part: nn.Module, name: str) -> list[str]:
    """The parameters from which the older functions compute `name`: the original, or norm and direction."""
    own = part._parameters
    return next((names for names in ([f"{name}_orig"], [f"{name}_g", f"{name}_v"]) if all(n in own for n in names)), [])


def _draw_computed(part: Any, names: list[str]) -> None:
    plain = _plain(part, names)
    getattr(plain, "reset_parameters", getattr(plain, "_reset_parameters", None))()  # pyright: ignore[reportOptionalCall]
    for name in names:
        drawn = getattr(plain, name).detach()
        if not parametrize.is_parametrized(part, name):
            _follow(part, name, drawn)
        elif not _through(part.parametrizations[name], drawn):
            warnings.warn(
                f"a copy of {type(part).__name__} begins with its source's {name}: what reset_parameters draws is "
                "nothing that its parametrization can give",
                stacklevel=2,
            )
    for hook in part._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(part, ())  # The hook computes the tensor, as it does before each call.


def _plain(part: Any, names: list[str]) -> nn.Module:
    """A twin of `part` with a parameter in the place of each tensor that it computes. The rest belongs to both."""
    plain: Any = object.__new__(parametrize.type_before_parametrizations(part))
    vars(plain).update({name: value for name, value in vars(part).items() if name not in names})
    inner = {origin for name in names for origin in _older(part, name)}
    drawn = {name: nn.Parameter(getattr(part, name).detach().clone()) for name in names}
    plain._parameters = {n: p for n, p in part._parameters.items() if n not in inner} | drawn
    plain._modules = {n: m for n, m in part._modules.items() if n != "parametrizations"}
    return plain


def _follow(part: Any, name: str, drawn: Tensor) -> None:
    """Sets the parameters that the older functions compute `name` from, so that its value becomes `drawn`."""
    first, *direction = (part._parameters[n] for n in _older(part, name))
    if direction:
        direction[0].copy_(drawn)
        over = [d for d in range(drawn.ndim) if first.ndim == 0 or first.shape[d] == 1]
        drawn = torch.linalg.vector_norm(drawn, dim=over, keepdim=first.ndim > 0) if over else drawn.abs()
    first.copy_(drawn)


def _through(steps: Any, drawn: Tensor) -> bool:
    """Gives a parametrized tensor the value `drawn`, if its steps can be inverted. Returns whether they could."""
    origins = [steps.original] if steps.is_tensor else [getattr(steps, f"original{i}") for i in range(steps.ntensors)]
    before = [origin.clone() for origin in origins]
    try:
        value: Any = drawn
        for step in reversed(steps):
            # A step without an inverse takes the value as it is, as when PyTorch registers such a step.
            with contextlib.suppress(NotImplementedError, AttributeError):
                value = step.right_inverse(value)
        for origin, new in zip(origins, [value] if steps.is_tensor else value, strict=True):
            origin.copy_(new)
        _settle(steps)
        value = steps()
        right = value.is_meta or bool(torch.isfinite(value).all())  # Without values, only the shapes count.
    except (RuntimeError, ValueError, TypeError):
        right = False
    if not right:
        for origin, old in zip(origins, before, strict=True):
            origin.copy_(old)
    return right


def _settle(steps: Any) -> None:
    """Lets spectral norm find the largest singular value of its new weight, which it does in training mode only."""
    iterated = [step for step in steps if hasattr(step, "n_power_iterations")]
    modes = [step.training for step in iterated]
    for step in iterated:
        step.train()
    for _ in range(SETTLE if iterated else 0):
        steps()
    for step, mode in zip(iterated, modes, strict=True):
        step.train(mode)


def copied_state(value: Any, memo: dict[int, Any]) -> Any:
    """Copies what a forward pass may change in place, and returns everything else as it is, such as modules.

    Args:
        value: What to copy. For a result of a forward pass it returns `RESULT`, so as not to keep that pass's memory.
        memo: The copies until now, by the id of the original or of its storage, so that what was shared stays shared.
    """
    kind = type(value)
    if kind in UNCHANGED:
        return value
    if isinstance(value, nn.Parameter) or id(value) in memo:
        return memo.get(id(value), value)
    if isinstance(value, Tensor):
        memo[id(value)] = RESULT if value.requires_grad else _copied_tensor(value, memo)
    elif kind in COLLECTIONS:
        other = memo[id(value)] = copy.copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            other[key] = copied_state(item, memo)
    elif kind is set:
        memo[id(value)] = set(value)
    elif isinstance(value, torch.Generator):
        memo[id(value)] = value.clone_state()
    elif kind in COPIED_DEEPLY:
        memo[id(value)] = copy.deepcopy(value)
    return memo.get(id(value), value)


def _copied_tensor(value: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copies a tensor with the whole storage that it is a view of, so that other views find the same copy in `memo`."""
    if value.layout is not torch.strided:
        return value.clone()
    storage = value.untyped_storage()
    if storage._cdata not in memo and value.is_contiguous() and storage.nbytes() == value.nbytes:
        memo[storage._cdata] = value.detach().clone()
        return memo[storage._cdata]
    if storage._cdata not in memo:
        whole = value.detach().as_strided((storage.nbytes() // value.element_size(),), (1,), 0)
        memo[storage._cdata] = whole.clone()
    whole = memo[storage._cdata].view(-1).view(value.dtype)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())
