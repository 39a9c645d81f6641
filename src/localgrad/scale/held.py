"""Which tensors of a model a rank of a pipeline holds. The others are on the "meta" device and take no memory."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import swap_tensors

from localgrad.core.auxiliary import Auxiliary
from localgrad.core.checks import StepChecks
from localgrad.core.model import LocalModel, localized
from localgrad.core.rebuild import FrozenReference, TensorReference
from localgrad.scale.deferred import META, Deferred
from localgrad.scale.replicas import Ranks


class Held:
    """A model of which this rank holds the tensors that it needs.

    Args:
        model: The result of `localize`, or a function that returns it. The function is called so that no large tensor
            has memory. If the network cannot be built so, it warns, and builds it as usual.

    Attributes:
        model: The model.
    """

    def __init__(self, model: LocalModel | Callable[[], LocalModel]) -> None:
        self._deferred = None
        if not isinstance(model, nn.Module):
            model, self._deferred = _built(model)
        self.model = localized(model, "Stage")
        self._owners: dict[int, int] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors of this rank are, or will be."""
        tensors = [t for k in range(len(self.model.blocks)) for t in self._needed([k])]
        real = next((t.device for t in tensors if not t.is_meta), None)
        return real or cast(Deferred, self._deferred).device(tensors[0])

    @contextlib.contextmanager
    def lent(self, k: int) -> Iterator[None]:
        """A context in which block k and its auxiliary have their values, before `keep` is called."""
        filled = self._fill(self._needed([k]))
        try:
            yield
        finally:
            for tensor, without in filled:
                swap_tensors(tensor, without)

    def keep(self, ranks: Ranks, owners: Sequence[int]) -> None:
        """Gives this rank what it needs, and frees the rest.

        Args:
            ranks: The ranks.
            owners: The rank that trains each block.
        """
        model = self.model
        self._ranks = ranks
        for k, owner in enumerate(owners):  # The last block that changes a statistic has the right one.
            tensors = [*(p for part in model.parts(k) for p in part.parameters()), *model.statistics(k)]
            self._owners.update((id(t), owner) for t in tensors)
        mine = [k for k, owner in enumerate(owners) if owner == ranks.rank]
        needed = {id(t): t for t in self._needed(mine)}
        needed |= {id(t): t for t in self._all() if self._owner(t) == ranks.rank}
        self._fill(needed.values())
        self._deferred = None
        self._others = [t for t in self._all() if id(t) not in needed]
        _empty(self._others)
        model.checks = StepChecks()  # The versions of the tensors have changed.
        model.checks.copies.note(model)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which each rank has the whole model, as one process would have it."""
        with torch.no_grad():
            for tensor in self._others:
                _swap(
                    tensor, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
                )
            for tensor in self._all():
                self._ranks.broadcast([tensor], self._owner(tensor))
        try:
            yield
        finally:
            _empty(self._others)

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of a module of the model, on the CPU of the first rank. It travels tensor by tensor."""
        state = module.state_dict(keep_vars=True)
        ranks = self._ranks
        for name, tensor in state.items():
            owner = self._owner(tensor) if isinstance(tensor, Tensor) else 0
            if owner == ranks.rank != 0:
                dist.send(tensor.detach().contiguous(), 0)
            elif owner != 0 and ranks.first:
                state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                dist.recv(state[name], owner)
            if ranks.first and isinstance(tensor, Tensor):
                state[name] = state[name].detach().cpu()
        return state if ranks.first else {}

    def load_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Loads what this rank holds of a whole state, which each rank has."""
        own = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor) and t.is_meta}
        module.load_state_dict({name: own.get(name, value) for name, value in state.items()})

    def _all(self) -> list[Tensor]:
        """All tensors of the model, in an order that is the same on all ranks."""
        modules = (m for part in (self.model, *self.model.blocks) for m in part.modules())
        found = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        return list({id(t): t for t in found}.values())

    def _needed(self, blocks: Iterable[int]) -> list[Tensor]:
        """The tensors that are read where some blocks are trained, the sources of averages among them."""
        modules = [m for k in blocks for part in self.model.parts(k) for m in part.modules()]
        for module in list(modules):
            if isinstance(module, FrozenReference):
                modules += module.reference[0].modules()
            elif isinstance(module, Auxiliary) and module.coupling is not None:
                modules += [m for source in module.coupling.sources for m in source.module.modules()]
        found = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        found += [t for m in modules if isinstance(m, TensorReference) and isinstance(t := m(), Tensor)]
        return list({id(t): t for t in found}.values())

    def _owner(self, tensor: Tensor) -> int:
        """The rank that has the right values of a tensor. What no block trains is on the first one."""
        return self._owners.get(id(tensor), 0)

    def _fill(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Gives tensors without values theirs, and returns them, each with one that is without values instead."""
        lacking = [t for t in tensors if t.is_meta]
        values = cast(Deferred, self._deferred).values(lacking) if lacking else []
        return [(tensor, _swap(tensor, value)) for tensor, value in zip(lacking, values, strict=True)]


def _built(make: Callable[[], LocalModel]) -> tuple[LocalModel, Deferred | None]:
    """Calls a function that makes a model, without memory if it can be."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    deferred = Deferred()
    try:
        with deferred:
            return make(), deferred
    except Exception as error:  # If it is the user's own, it is raised again below.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    model = make()
    warnings.warn(
        f"the network cannot be built without values ({reason}), so each rank builds all of it and then frees what it "
        "does not train",
        stacklevel=4,
    )
    return model, None


def _swap(tensor: Tensor, value: Tensor) -> Tensor:
    """Gives a tensor other values, or none, on any device. Returns a tensor that is as this one was."""
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, tensor.requires_grad)
    swap_tensors(tensor, value)
    return value


def _empty(tensors: Iterable[Tensor]) -> None:
    """Frees the memory of tensors."""
    for t in tensors:
        _swap(t, _empty_like(t, META))


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
