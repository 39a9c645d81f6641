"""Builds a network without memory for its weights, and later gives some of its tensors the values that they would have.

Within `Deferred`, large new tensors are on the "meta" device, and each operation on them is noted. `values` repeats the
operations that some tensors depend on, and no others. Random numbers are drawn in the order in which the network asks
for them, also for tensors whose values nobody will want, so each tensor gets the numbers that it would get otherwise.
Of these draws only the states of the generator are kept.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

SMALL = 1024  # Tensors with fewer numbers have values at once.
CPU, META = torch.device("cpu"), torch.device("meta")
ATEN = torch.ops.aten
EMPTY = {ATEN.empty.memory_format, ATEN.empty_strided.default, ATEN.empty_like.default, ATEN.new_empty.default}
EMPTY |= {ATEN.new_empty_strided.default}
FACTORIES = EMPTY | {ATEN.zeros.default, ATEN.ones.default, ATEN.full.default, ATEN.rand.default, ATEN.randn.default}
FACTORIES |= {ATEN.rand.generator, ATEN.randn.generator, ATEN.normal.float_float}
IS_META, DEVICE = (vars(torch._C.TensorBase)[name].__get__ for name in ("is_meta", "device"))
GIVE_VALUES = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.new_tensor}
# Their schemas do not tell that they write into their arguments 3 and 4, the statistics.
NORMS = {ATEN.native_batch_norm.default, ATEN.cudnn_batch_norm.default, ATEN.miopen_batch_norm.default}
# These fill a tensor without reading what was there.
FILLS = {"uniform_", "normal_", "exponential_", "random_", "bernoulli_", "fill_", "zero_", "copy_"}


@dataclass(frozen=True)
class Place:
    """A tensor without values: the part of a storage that it is.

    Attributes:
        key: The number of the storage.
        whole: Whether it is all of it.
    """

    key: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    whole: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        whole = tensor.numel() * tensor.element_size() == _storage(tensor).nbytes()
        offset = int(tensor.storage_offset())
        return cls(_key(tensor), tuple(tensor.shape), tensor.stride(), offset, tensor.dtype, whole)

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor on a real storage."""
        tensor: Any = torch.empty(0, dtype=self.dtype, device=storage.device)
        return tensor.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Constant:
    """A real tensor that an operation has read.

    Attributes:
        version: How often it had been changed by then.
        digest: A checksum of its memory if others than PyTorch may write there, as into an array of numpy. Else None.
    """

    tensor: Tensor
    version: int
    digest: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> Constant:
        if tensor.is_meta:
            raise RuntimeError("a tensor without values was made elsewhere")
        own = tensor.clone() if tensor.numel() < SMALL else tensor
        return cls(own, own._version, _digest(own))

    def value(self) -> Tensor:
        if self.tensor._version != self.version or _digest(self.tensor) != self.digest:
            raise RuntimeError("a tensor was changed in place after another one was computed from it")
        return self.tensor


@dataclass(frozen=True)
class Call:
    """An operation that was noted.

    Attributes:
        args: Its arguments. A tensor is a `Place` or a `Constant` there.
        made: The places of new tensors that it returned.
        written: The places that it wrote into.
        drawn: For one that drew random numbers, the generator, or None for that of a device; this device; and the state
            of the generator before.
    """

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    made: tuple[Place, ...]
    written: tuple[Place, ...]
    drawn: tuple[torch.Generator | None, torch.device, Tensor] | None

    @cached_property
    def changes(self) -> set[int]:
        """The storages that have other values afterwards."""
        return {place.key for place in (*self.made, *self.written)}

    @cached_property
    def renews(self) -> set[int]:
        """The storages of whose earlier values nothing is left."""
        filled = self.written if self.func._schema.name.removeprefix("aten::") in FILLS else ()
        return {place.key for place in self.made} | {place.key for place in filled if place.whole}

    @cached_property
    def reads(self) -> set[int]:
        """The storages whose values it needs."""
        return {p.key for p in tree_leaves((self.args, self.kwargs)) if isinstance(p, Place)} - self.renews


class Deferred(TorchDispatchMode):
    """A context in which large new tensors have no values. See the module's description.

    An operation that asks for values, such as `tensor.item()`, gets those of the tensors that it needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._storages: dict[int, torch.UntypedStorage] = {}  # They are kept, so that no other one gets their number.
        self._devices: dict[int, torch.device] = {}

    def __enter__(self) -> Deferred:
        self._asked = _Asked(self)
        self._asked.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._asked.__exit__(*error)

    @torch.no_grad()
    def values(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The values of tensors that were made in this context. Those with a common storage have one again."""
        places = [Place.of(t) for t in tensors]
        with _disable_current_modes():
            storages = self._repeated({place.key for place in places})
            return [place.on(storages[place.key]) for place in places]

    def check(self) -> None:
        """Raises RuntimeError if a real tensor that an operation has read is no longer as it was."""
        for call in self.calls:
            for value in tree_leaves((call.args, call.kwargs)):
                if isinstance(value, Constant):
                    value.value()

    def knows(self, tensor: Any) -> bool:
        """Whether it was made in this context, and has no values."""
        with torch._C.DisableTorchFunction():
            return isinstance(tensor, Tensor) and tensor.is_meta and _key(tensor) in self._storages

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        known = [t for t in tree_leaves((args, kwargs)) if self.knows(t)]
        if not known and not _begins(func, args, kwargs):
            return func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        gives = any("Tensor" in str(given.type) for given in func._schema.returns)
        if not gives or any(not self.knows(t) for t in written):  # It asks for values, or writes them somewhere.
            if any(self.knows(t) for t in written):
                raise RuntimeError(f"{func} writes into tensors that it does not return")
            return func(*self.real(args), **self.real(kwargs))
        device = torch.device(kwargs.get("device") or (self.device(known[0]) if known else CPU))
        if device == META:  # PyTorch itself names the device that it finds.
            device = kwargs["device"] = self.device(known[0])
        drawn = self._drawn(func, args, kwargs, device)
        shapes = tree_map_only(Tensor, lambda t: t if self.knows(t) else _shape(t), (args, kwargs))
        out = func(*shapes[0], **shapes[1] | _on_meta(func, kwargs))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and _key(t) not in self._storages]
        for tensor in made:
            self._storages[_key(tensor)] = _storage(tensor)
            self._devices[_key(tensor)] = device
        if made or written:  # Else it gives a view, which shows its storage itself.
            new, changed = (tuple(map(Place.of, tensors)) for tensors in (made, written))
            self.calls.append(Call(func, self._noted(args), self._noted(kwargs), new, changed, drawn))
        return out

    def device(self, tensor: Tensor) -> torch.device:
        """Where a tensor would be that was made in this context."""
        return self._devices[_key(tensor)]

    def _drawn(self, func: Any, args: tuple, kwargs: dict, device: torch.device) -> Any:
        """Draws the random numbers of an operation without a use for them. Returns `Call.drawn`."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        generator = kwargs.get("generator")
        state = generator.get_state() if generator is not None else _default_state(device)
        filled = {id(t) for t in _written(func, args, kwargs)}

        def real(tensor: Tensor) -> Tensor:
            if id(tensor) in filled:
                return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            return self.real(tensor)

        func(*tree_map_only(Tensor, real, args), **tree_map_only(Tensor, real, kwargs))
        return generator, device, state

    def _noted(self, tree: Any) -> Any:
        return tree_map_only(Tensor, lambda t: Place.of(t) if self.knows(t) else Constant.of(t), tree)

    def real(self, tree: Any) -> Any:
        """The same with the values of all tensors in it."""
        return tree_map_only(Tensor, lambda t: self.values([t])[0] if self.knows(t) else t, tree)

    def _repeated(self, wanted: set[int]) -> dict[int, torch.UntypedStorage]:
        """Repeats the calls that some storages depend on, and returns these storages with their values."""
        needed, chosen = set(wanted), list[Call]()
        for call in reversed(self.calls):
            if not call.changes.isdisjoint(needed):
                chosen.append(call)
                needed = (needed - call.renews) | call.reads
        chosen.reverse()
        last = {key: i for i, call in enumerate(chosen) for key in call.changes | call.reads}
        storages: dict[int, torch.UntypedStorage] = {}
        for i, call in enumerate(chosen):
            if call.func not in EMPTY:
                self._repeat(call, storages)
            for key in [key for key in storages if last[key] == i and key not in wanted]:
                del storages[key]
        return {key: self._storage(storages, key) for key in wanted}

    def _repeat(self, call: Call, storages: dict[int, torch.UntypedStorage]) -> None:
        """Repeats one call, with the random numbers that it drew."""

        def real(value: Any) -> Any:
            if isinstance(value, Place):
                return value.on(self._storage(storages, value.key))
            return value.value() if isinstance(value, Constant) else value

        args, kwargs = tree_map(real, (call.args, call.kwargs))
        with _as_drawn(call):
            out = call.func(*args, **kwargs)
        returned = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor, place in zip(returned, call.made, strict=False):  # One that writes makes nothing new.
            if (tensor.stride(), tensor.storage_offset()) == (place.stride, place.offset):
                storages[place.key] = tensor.untyped_storage()
            else:
                place.on(self._storage(storages, place.key)).copy_(tensor)

    def _storage(self, storages: dict[int, torch.UntypedStorage], key: int) -> torch.UntypedStorage:
        """A storage that is there, or a new one."""
        if key not in storages:
            size, device = self._storages[key].nbytes(), self._devices[key]
            storages[key] = torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
        return storages[key]


class _Asked(TorchFunctionMode):
    """Answers what Python asks tensors without values, so that code goes on as if they had some."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self.deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if args and self.deferred.knows(args[0]):
            if func == IS_META:
                return False
            if func == DEVICE:
                return self.deferred.device(args[0])
            if func == Tensor.untyped_storage:  # To be saved or pickled, for instance.
                raise RuntimeError("the memory of a tensor is asked for")
            if func in GIVE_VALUES:
                with _disable_current_modes():
                    values = func(*self.deferred.real(args), **(kwargs or {}))
                if isinstance(values, np.ndarray):
                    values.setflags(write=False)  # What is written into this copy would be lost.
                return values
            if func is Tensor.__setitem__ and isinstance(args[2], int | float):
                args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))  # PyTorch's own would be on "meta".
        return func(*args, **(kwargs or {}))


def _begins(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation on real tensors makes one that has no values."""
    on_meta = kwargs.get("device") is not None and torch.device(kwargs["device"]) == META
    if func not in FACTORIES or on_meta or any(isinstance(t, Tensor) and t.is_meta for t in args):
        return False
    shape = func(*tree_map_only(Tensor, _shape, args), **kwargs | _on_meta(func, kwargs))
    return shape.dtype.is_floating_point and shape.numel() >= SMALL


def _on_meta(func: Any, kwargs: dict) -> dict[str, Any]:
    """What to change in an operation's arguments so that it computes only shapes."""
    device = {"device": META} if any(a.name == "device" for a in func._schema.arguments) else {}
    return device | ({"generator": None} if "generator" in kwargs else {})


def _written(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors that an operation writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(given) if isinstance(t, Tensor))
    if func in NORMS:
        yield from (t for t in args[3:5] if isinstance(t, Tensor))


def _digest(tensor: Tensor) -> int | None:
    """The value of `Constant.digest`. PyTorch's own memory can be resized, and that of other libraries cannot."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        if tensor.device != CPU or tensor.untyped_storage().resizable():
            return None
        return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _key(tensor: Tensor) -> int:
    return _storage(tensor)._cdata


def _default_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _as_drawn(call: Call) -> Iterator[None]:
    """Puts a generator into the state in which a call drew, and back."""
    if call.drawn is None:
        yield
        return
    generator, device, state = call.drawn
    if generator is not None:
        now, put = generator.get_state(), generator.set_state
    elif device.type == "cuda":
        now, put = torch.cuda.get_rng_state(device), lambda s: torch.cuda.set_rng_state(s, device)
    else:
        now, put = torch.get_rng_state(), torch.set_rng_state
    put(state)
    try:
        yield
    finally:
        put(now)
