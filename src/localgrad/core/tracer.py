"""Traces one forward pass, for `core/trace.py`: PyTorch's `fx.Tracer`, whose steps carry what they return.

While it traces, the network's forward gets proxies in the place of tensors. Each call on a proxy becomes a step, and
the step is computed at once on tensors without values (on the "meta" device). So a proxy knows its shape and dtype.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

from localgrad.core.hooks import call_with
from localgrad.core.threads import Draws, alone

BATCHES = (5, 7)  # These two sizes have no common factor.
TRIES = 8  # If random numbers were drawn at the same step in so many traces, another thread has not drawn them all.

# These are the keys of a step's `meta`, with what the step carries there.
VALUE = "value"  # What it returned, once for each of BATCHES.
BORN = "born"  # The version of the tensor that it returned, when it was made.
EVALUATION = "evaluation"  # Its arguments in evaluation mode.
NO_GRAD = "no_grad"  # Whether it ran without gradients.
WRITES = "writes"  # The tensors that it has changed in place.
CHECKPOINT = "checkpoint"  # The number of the network's own activation checkpoint that it runs in, or None.
REENTRANT = "reentrant"  # Whether its module enters reentrant checkpoints.
PACKED = "packed"  # Whether other hooks of the network would keep what it saves for its backward pass.


class _Whole(nn.Module):
    """Calls the network with its first input only, so that its other arguments have their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any) -> Any:
        return self.network(x)


def put(tensor: Tensor, key: Any, value: Any) -> Tensor:
    """`tensor[key] = value` as a step that returns a tensor."""
    tensor[key] = value
    return tensor


class _Proxy(fx.Proxy):
    """Stands for what a step returns. Sizes, devices and other values that are no tensors can be asked for."""

    def _known(self) -> Any:
        value, *others = self.node.meta[VALUE]
        if isinstance(value, Tensor):
            raise TypeError("it depends on the values of a tensor")
        if any(value != other for other in others):
            raise TypeError("it depends on the size of the batch")
        return value

    def __getattr__(self, k: str) -> Any:
        if callable(getattr(self.node.meta[VALUE][0], k)):
            return super().__getattr__(k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def __len__(self) -> int:
        value, *others = map(len, self.node.meta[VALUE])
        if any(value != other for other in others):
            raise TypeError("it depends on the size of the batch: take x.shape[0], not len(x)")
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", put, (self, key, value), {})

    def __int__(self) -> int:
        return int(self._known())

    def __index__(self) -> int:
        return self._known().__index__()

    def __float__(self) -> float:
        return float(self._known())


class Tracer(fx.Tracer):
    """Traces a network once.

    Meanwhile PyTorch's `nn.Module` is changed for all threads (by `fx.Tracer.trace`). So calls of other threads are
    passed on as they are, and so are calls within a step that is being computed.

    Attributes:
        opened: The names of the modules whose forward is followed.
        sample: The shape of one sample of the input, and the dtype of the input.
        batches: The batch sizes to try.
        stopped: The name of the innermost module that could not be followed.
        draws: Where random numbers were drawn: (the number of the next step, the module whose forward drew them).
    """

    proxy_buffer_attributes = True

    def __init__(
        self, opened: set[str], sample: tuple[torch.Size, torch.dtype], batches: tuple[int, ...] = BATCHES
    ) -> None:
        super().__init__()
        self.opened, self.sample, self.batches = opened, sample, batches
        self.stopped: str | None = None
        self.draws = Draws()
        self._thread: int | None = None
        self._in_step = False
        self._outer_hooks = _hooks_on_saved_tensors()  # These are not the network's, but the caller's.
        self._checkpoints: dict[Any, int] = {}
        self._reentered = False

    def steps(self, network: nn.Module) -> fx.Graph:
        """The steps of `network`.

        Raises:
            TypeError: A forward draws random numbers, which would be drawn only once and become constants. To tell its
                draws from those of other threads, the network is traced again while there are others.
        """
        tracers: list[Tracer] = [self]
        try:
            graph = self._once(network)
            while (drawn := set.intersection(*(t.draws.moved for t in tracers))) and not alone():
                if len(tracers) == TRIES:
                    break
                tracers.append(Tracer(self.opened, self.sample, self.batches))
                tracers[-1]._once(network)
        finally:
            self.stopped = tracers[-1].stopped
        if drawn:
            self.stopped = min(drawn)[1]
            raise TypeError("it draws random numbers that do not follow its input")
        return graph

    def _once(self, network: nn.Module) -> fx.Graph:
        self._thread = threading.get_ident()
        try:
            with self.draws.lock:
                return self.trace(_Whole(network))
        finally:
            # If PyTorch traces in another thread meanwhile, it may leave our version of `nn.Module` behind. From now on
            # that version passes all calls on.
            self._thread = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _name(module_qualified_name) not in self.opened

    def call_module(self, m: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                raise TypeError("it runs its parts in threads of their own")
            return forward(*args, **kwargs)
        if self._in_step:
            return call_with(m, m.forward, args, kwargs)

        def followed(*args: Any, **kwargs: Any) -> Any:
            given = call_with(m, m.forward, args, kwargs)
            self.draws.look(self._position())
            return given

        self.draws.look(self._position())
        buffers = dict(m._buffers.items())
        try:
            given = super().call_module(m, followed, args, kwargs)
            if any(isinstance(buffer, fx.Proxy) for buffer in m._buffers.values()):
                m._buffers.update(buffers)
                raise TypeError("it puts a new tensor in the place of a buffer, which could be changed by copy_")
            return given
        except Exception:
            if self.stopped is None:
                self.stopped = _name(self.path_of_module(m))
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        foreign = self._in_step or threading.get_ident() != self._thread
        return attr_val if foreign else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(obj._known())  # pyright: ignore[reportAttributeAccessIssue]

    def iter(self, obj: fx.Proxy) -> Iterator:
        known: Any = obj
        return iter([known[i] for i in range(len(known))])

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if node.op != "output":
            self._note_surroundings(node)
            self._note_values(node)
        return node

    def _note_surroundings(self, node: fx.Node) -> None:
        node.meta[NO_GRAD] = not torch.is_grad_enabled()
        hooks = zip(_hooks_on_saved_tensors(), self._outer_hooks, strict=True)
        own, others = (None if now is outer else now for now, outer in hooks)
        own = own and _innermost(_attribute(self.root, str(node.target)) if node.op == "call_module" else None)
        node.meta[CHECKPOINT] = None if own is None else self._checkpoints.setdefault(own, len(self._checkpoints))
        node.meta[PACKED] = others is not None

    def _note_values(self, node: fx.Node) -> None:
        """Runs a step on tensors without values, once for each batch size."""
        self._reentered = False
        read = [v for n in node.all_input_nodes if isinstance(v := n.meta[VALUE][0], Tensor)]
        versions = [v._version for v in read]
        self._in_step = True
        try:
            # The step itself is in the graph already. What was drawn before it is noted before it.
            with self.draws.allowed(self._position(1)), torch.no_grad():
                node.meta[VALUE] = tuple(self._value(node, i) for i in range(len(self.batches)))
        finally:
            self._in_step = False
        node.meta[REENTRANT] = self._reentered
        node.meta[WRITES] = [v for v, before in zip(read, versions, strict=True) if v._version != before]
        value = node.meta[VALUE][0]
        node.meta[BORN] = value._version if isinstance(value, Tensor) else 0

    def _position(self, made: int = 0) -> tuple[int, str]:
        """The number of the next step, and the module that is running. `made` steps of the graph are not done yet."""
        inside = next(reversed(self.module_stack.values()), ("",))[0]
        return len(self.graph.nodes) - made, _name(inside)

    @contextlib.contextmanager
    def functions_as_steps(self) -> Iterator[None]:
        """Makes one step of each `autograd.Function`, because its forward cannot be followed: it has no gradients.

        A reentrant checkpoint is such a function, too. It runs as the other kind of checkpoint, which can be followed.
        """
        base: Any = torch.autograd.Function
        own = vars(base)["apply"]
        thread = threading.get_ident()

        def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return own.__get__(None, kind)(*args, **kwargs)
            if kind is checkpoint.CheckpointFunction:
                self._reentered = True
                function, keeps_random_state, *given = args
                return checkpoint.checkpoint(
                    function, *given, use_reentrant=False, preserve_rng_state=keeps_random_state
                )
            seen = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
            if not seen or kind.__module__ == checkpoint.__name__:
                return own.__get__(None, kind)(*args, **kwargs)

            def applied(*args: Any, **kwargs: Any) -> Any:
                return kind.apply(*args, **kwargs)

            return seen[0].tracer.create_proxy("call_function", applied, args, kwargs)

        base.apply = classmethod(apply)
        try:
            yield
        finally:
            base.apply = own

    def _value(self, node: fx.Node, which: int) -> Any:
        args, kwargs = tree_map(_without_value, map_arg((node.args, node.kwargs), lambda n: n.meta[VALUE][which]))
        target: Any = node.target
        if node.op == "placeholder":
            shape, dtype = self.sample
            return torch.empty((self.batches[which], *shape), dtype=dtype, device="meta")
        if node.op == "get_attr":
            return _attribute(self.root, target)
        return tree_map(_without_value, self._called(node, target, args, kwargs))

    def _called(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            module = self.root.get_submodule(target)
            try:
                return module(*args, **kwargs)
            except RuntimeError as error:
                if "meta" not in str(error):
                    raise
                with torch.device("meta"):  # The module makes a tensor on the default device.
                    return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def _hooks_on_saved_tensors() -> tuple[Any, Any]:
    """What keeps tensors for the backward pass now: the innermost checkpoint, and the innermost other hook."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if top is None:
        return None, None
    if top[0].__module__ != checkpoint.__name__:
        return None, top[0]
    around = getattr(top[0], "_user_hooks", None)
    return top[0], around and around[0]


def _innermost(module: nn.Module | None) -> FrameType | None:
    """The call that runs the innermost checkpoint. A checkpoint that the call of `module` enters by itself does not
    count, because the module enters it whenever it is called."""
    frame, found = sys._getframe(), None
    while frame is not None:
        if found is None and frame.f_globals.get("__name__") == checkpoint.__name__:
            found = frame
        elif found is not None and module is not None and frame.f_locals.get("self") is module:
            found = None
        frame = frame.f_back
    return found


def _name(path: str) -> str:
    """The name of a module in the network, from its path below `_Whole`."""
    return path.removeprefix("network").removeprefix(".")


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _without_value(value: Any) -> Any:
    """A tensor that a forward makes itself, or holds beside its buffers, still has values."""
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta and value.ndim else value


def has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
