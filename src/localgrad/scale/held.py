"""Which tensors of a model a rank of a pipeline holds. The others are on the "meta" device and take no memory."""

from __future__ import annotations

import contextlib
import hashlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import swap_tensors
from torch.utils._pytree import tree_leaves

from localgrad.core.auxiliary import Auxiliary
from localgrad.core.checks import StepChecks
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel, localized
from localgrad.core.rebuild import FrozenReference, TensorReference
from localgrad.core.sharded import shard_of, whole
from localgrad.scale.deferred import META, Deferred
from localgrad.scale.groups import Grid

IN_USE = (
    "weights that this rank does not train cannot be freed, because a tensor that was computed from them has a graph "
    "for backward: compute it within torch.no_grad(), and for weight norm take that of torch.nn.utils.parametrizations"
)


class Held:
    """A model of which this rank holds the tensors that it needs.

    Args:
        model: The result of `localize`, or a function that returns it. The function is called so that no large tensor
            has memory. If the network cannot be built so, it warns, and builds it as usual.

    Attributes:
        model: The model.
        drawn: A hash of PyTorch's random generator after the function was called, "" if there was none.
    """

    def __init__(self, model: LocalModel | Callable[[], LocalModel]) -> None:
        self._deferred, self.drawn = None, ""
        if callable(model) and not isinstance(model, nn.Module | type):
            model, self._deferred = _built(model)
            self.drawn = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        self.model = localized(model, "Stage")
        if self.model.peers is not None:
            raise UserError(
                "the model of a stage has the weights of its own blocks alone, so no other stage can be made of it: "
                "give lg.Stage the function that makes the model"
            )
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                # Weights that have weak references cannot be swapped.
                module._flat_weight_refs = [None] * len(module._flat_weight_refs)

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

    def keep(self, grid: Grid, owners: Sequence[int]) -> None:
        """Gives this rank what it needs, and frees the rest.

        Args:
            grid: The ranks.
            owners: For each block, the number in a column of the ranks that train it.
        """
        model = self.model
        self._ranks, self._row, self._owners = grid.column, grid.row, tuple(owners)
        mine = [k for k, owner in enumerate(owners) if owner == self._ranks.rank]
        needed = {id(t): t for t in self._needed(mine)}
        needed |= {id(t): t for t, owner in self._owned() if owner == self._ranks.rank}
        self._fill(needed.values())
        self._deferred = None
        _empty(t for t in self._all() if id(t) not in needed)
        model.checks = StepChecks()  # The versions of the tensors have changed.
        model.checks.copies.note(model)
        for module in (model, model.backbone):
            module.register_forward_pre_hook(_refuse_to_run)
            module.register_state_dict_post_hook(_warn_of_state)
        model.watch.renew()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which each rank has the whole model, as one process would have it."""
        owned = self._owned()
        others = [t for t, _ in owned if t.is_meta]
        with torch.no_grad():
            for tensor in others:
                _swap(tensor, _empty_like(tensor, self.device))
            for tensor, owner in owned:
                self._ranks.broadcast([tensor], owner)
        try:
            yield
        except BaseException:  # Its traceback may keep a graph. What stays whole only takes memory.
            _empty(others, strict=False)
            raise
        _empty(others)

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of a module of the model, on the CPU of the first rank. It travels tensor by tensor."""
        state = module.state_dict(keep_vars=True)
        ranks, owners = self._ranks, self._owner_by_id()
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                continue
            owner = owners.get(id(tensor), 0)
            value = whole(tensor).detach() if owner == ranks.rank else tensor  # All ranks of a row call this.
            if not self._row.first:
                continue
            if owner == ranks.rank != 0:
                dist.send(value.contiguous(), group_dst=0, group=ranks.group)
            elif owner != 0 and ranks.first:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                dist.recv(value, group_src=owner, group=ranks.group)
            if ranks.first:
                state[name] = value.to("cpu", copy=owner == 0)  # What this rank itself trains will change.
        return state if ranks.first and self._row.first else {}

    def load_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Loads what this rank holds of a whole state, which each rank has."""
        own = {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        parts = {n: t if t.is_meta else shard_of(state[n], t) for n, t in own.items() if n in state}
        module.load_state_dict({**state, **parts})

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

    def _owned(self) -> list[tuple[Tensor, int]]:
        """All tensors of the model, each with the number in a column of the ranks that have its right values."""
        owners = self._owner_by_id()
        return [(tensor, owners.get(id(tensor), 0)) for tensor in self._all()]

    def _owner_by_id(self) -> dict[int, int]:
        """The same, by the id of a tensor. What no block trains is not in it, and belongs to the first ranks."""
        found: dict[int, int] = {}
        for k, owner in enumerate(self._owners):  # The last block that changes a statistic has the right one.
            tensors = [*(p for part in self.model.parts(k) for p in part.parameters()), *self.model.statistics(k)]
            found.update((id(t), owner) for t in tensors)
        return found

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
            model = make()
        deferred.check()
        return model, deferred
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


def _lacks(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def _refuse_to_run(module: nn.Module, args: tuple) -> None:
    """Raises UserError before a network without some of its weights runs."""
    given = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    if _lacks(module) and not any(t.is_meta for t in given):
        raise UserError(
            "this rank holds the weights of its own blocks alone: train with stage.block_steps, and evaluate with "
            "stage.forward or within `with stage.gathered():`"
        )


def _warn_of_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Warns a user of the state of a network without some of its weights. What asks with `keep_vars` knows."""
    if not prefix and _lacks(module) and not any(isinstance(t, nn.Parameter) for t in state.values()):
        warnings.warn(
            "this state lacks the weights that other ranks train: take stage.state_dict(module), or "
            "module.state_dict() within `with stage.gathered():`",
            stacklevel=3,
        )


def _swap(tensor: Tensor, value: Tensor) -> Tensor:
    """Gives a tensor other values, or none, on any device. Returns a tensor that is as this one was."""
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, tensor.requires_grad)
    try:
        swap_tensors(tensor, value)
    except RuntimeError as error:
        raise UserError(IN_USE) from error
    return value


def _empty(tensors: Iterable[Tensor], *, strict: bool = True) -> None:
    """Frees the memory of tensors. If autograd needs some, it frees the others, and raises UserError if strict."""
    left = 0
    for t in tensors:
        try:
            _swap(t, _empty_like(t, META))
        except UserError:
            left += 1
    if left and strict:
        raise UserError(IN_USE)


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
