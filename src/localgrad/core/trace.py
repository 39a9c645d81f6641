"""Backbone -> the steps of its forward pass: a symbolic trace that opens only what holds repeated units.

Each step carries what it gave for two batch sizes on tensors without values, so that Python's own control flow over
shapes goes the way that it goes for the example, and sizes that follow the batch can be told from those that do not.
The trace is taken in training mode, and once more in evaluation: where both have the same steps, each carries the
arguments that it has there. Other steps in evaluation, as `if self.training` beside the units can bring, are not kept.
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

from localgrad.core.copies import without_values
from localgrad.core.errors import UserError
from localgrad.core.hooks import FORWARD, call_with, touches_nothing
from localgrad.core.opened import opened_modules
from localgrad.core.threads import RandomState, alone, numpy_lock, one_trace

BATCHES = (5, 7)  # two sizes without a common share
VALUE = "value"  # of a step for each of BATCHES, in its `meta`
BORN = "born"  # the version of a step's tensor as it was made
EVALUATION = "evaluation"  # a step's arguments in evaluation
NO_GRAD = "no_grad"  # whether a step ran without gradients
WRITES = "writes"  # which tensors a step has changed in place
CHECKPOINT = "checkpoint"  # which of the network's own activation checkpoints a step runs in, by number
REENTRANT = "reentrant"  # whether a module enters reentrant checkpoints
PACKED = "packed"  # whether other hooks of the network would keep what a step saves for its backward pass


TRIES = 8  # until a step at which the random state has moved each time must have moved it itself


def trace(backbone: nn.Module, example: Tensor) -> tuple[fx.Graph, dict[str, str]]:
    """The steps of `backbone` on a batch like `example` [B, ...], and the modules that had to be one step each because
    their forward cannot be followed, with the reason; nothing is run on real tensors, and no hooks but those that
    touch nothing else. Other threads go on meanwhile, and their traces wait.

    Raises UserError for a network whose own forward cannot be followed, naming the module that stopped it.
    """
    with one_trace():
        try:
            return _trace(backbone, example, touches_nothing)
        except UserError:
            hooks = [hook for m in backbone.modules() for kind in FORWARD for hook in getattr(m, kind).values()]
            if not all(map(touches_nothing, hooks)):  # one may unpack what a module gives, as of an nn.GRU
                with contextlib.suppress(UserError):
                    return _trace(backbone, example, lambda hook: True)
            raise


def _trace(backbone: nn.Module, example: Tensor, runs: Callable[[Callable], bool]) -> tuple[fx.Graph, dict[str, str]]:
    """`trace`, with those of the units' hooks that `runs` chooses."""
    try:
        shapes = without_values(backbone, "meta", hooks=runs)
    except Exception as error:  # what a network holds may refuse to be copied in its own way
        raise UserError(f"{type(backbone).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    opened = opened_modules(shapes)
    closed: dict[str, str] = {}
    while True:
        tracer = _Tracer(opened, example)
        try:
            with torch.enable_grad(), tracer.functions_as_steps():
                graph = tracer.steps(shapes.train())
                with contextlib.suppress(Exception):  # what cannot be followed in evaluation has no part in training
                    _note_evaluation(graph, _Tracer(opened, example, BATCHES[:1]).steps(shapes.eval()))
            return graph, closed
        except Exception as error:  # symbolic tracing fails in as many ways as Python has control flow
            stopped = tracer.stopped or ""
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if stopped not in opened and "meta tensors" in reason:
                raise UserError(
                    f"{type(backbone).__name__} cannot be cut: '{stopped}' asks for the values of a tensor, and a "
                    "network is cut without any; let it ask for shapes alone"
                ) from error
            if stopped not in opened:
                raise UserError(f"an example of {tuple(example.shape)} does not pass '{stopped}': {reason}") from error
            if stopped == "":
                raise UserError(
                    f"{type(backbone).__name__} cannot be cut: its forward cannot be followed ({reason}); give its "
                    "parts by hand, as nn.Sequential(part, part, ...)"
                ) from error
            opened.discard(stopped)  # it becomes one step; so do those within it
            closed[stopped] = reason


def _note_evaluation(graph: fx.Graph, evaluation: fx.Graph) -> None:
    pairs = list(zip(graph.nodes, evaluation.nodes, strict=False))
    if len(graph.nodes) == len(evaluation.nodes) and all((a.op, a.target) == (b.op, b.target) for a, b in pairs):
        twins = {b: a for a, b in pairs}
        for a, b in pairs:
            a.meta[EVALUATION] = map_arg((b.args, b.kwargs), twins.__getitem__)


class _Whole(nn.Module):
    """Calls the network with its first input only, so that its other arguments have their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any) -> Any:
        return self.network(x)


def put(tensor: Tensor, key: Any, value: Any) -> Tensor:
    """`tensor[key] = value` as a step that gives a tensor."""
    tensor[key] = value
    return tensor


class _Proxy(fx.Proxy):
    """A proxy that knows what it stands for, as far as that is no tensor."""

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


class _Tracer(fx.Tracer):
    """opened: names of the modules whose forward is followed. batches: sizes to try. stopped: the innermost module that
    could not be followed. moved: the number of the step before which the state of a random generator had moved, and the
    module whose forward it was in."""

    proxy_buffer_attributes = True

    def __init__(self, opened: set[str], example: Tensor, batches: tuple[int, ...] = BATCHES) -> None:
        super().__init__()
        self.opened, self.example, self.batches = opened, example, batches
        self.stopped: str | None = None
        self.moved: set[tuple[int, str]] = set()
        self._running = False
        self._packing = _hooks()  # of whoever asks for the trace
        self._checkpoints: dict[Any, int] = {}
        self._reentered = False
        self._thread: int | None = None
        self._left: RandomState | None = None
        self.lock = numpy_lock()

    def steps(self, network: nn.Module) -> fx.Graph:
        """The steps of `network`, in whose forward nothing is drawn that does not follow its input. Another thread may
        draw at any moment, but hardly each time before the same step."""
        again: list[_Tracer] = [self]
        self._thread = threading.get_ident()
        try:
            with self.lock:
                graph = self.trace(_Whole(network))
                while (drawn := set.intersection(*(t.moved for t in again))) and not alone() and len(again) < TRIES:
                    again.append(_Tracer(self.opened, self.example, self.batches))
                    again[-1]._thread = self._thread
                    again[-1].trace(_Whole(network))
        finally:
            self.stopped = again[-1].stopped
            for tracer in again:  # what PyTorch was made to call may outlive it, where another thread traces too
                tracer._thread = None
        if drawn:
            self.stopped = min(drawn)[1]
            raise TypeError("it draws random numbers that do not follow its input")
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _name(module_qualified_name) not in self.opened

    def call_module(self, m: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                raise TypeError("it runs its parts in threads of their own")
            return forward(*args, **kwargs)

        def followed(*args: Any, **kwargs: Any) -> Any:
            given = call_with(m, m.forward, args, kwargs)
            self._look()
            return given

        if self._running:
            return call_with(m, m.forward, args, kwargs)
        self._look()
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
        foreign = self._running or threading.get_ident() != self._thread
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
            node.meta[NO_GRAD] = not torch.is_grad_enabled()
            own, others = (None if a is b else a for a, b in zip(_hooks(), self._packing, strict=True))
            own = own and _innermost(_attribute(self.root, str(node.target)) if node.op == "call_module" else None)
            node.meta[CHECKPOINT] = None if own is None else self._checkpoints.setdefault(own, len(self._checkpoints))
            node.meta[PACKED] = others is not None
            self._reentered = False
            read = [v for n in node.all_input_nodes if isinstance(v := n.meta[VALUE][0], Tensor)]
            versions = [v._version for v in read]
            with self._run():
                node.meta[VALUE] = tuple(self._value(node, i) for i in range(len(self.batches)))
            node.meta[REENTRANT] = self._reentered
            node.meta[WRITES] = [v for v, before in zip(read, versions, strict=True) if v._version != before]
            value = node.meta[VALUE][0]
            node.meta[BORN] = value._version if isinstance(value, Tensor) else 0
        return node

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        """Modules called inside are run, not traced; what they draw is put back, where no other thread draws."""
        self._look()
        before, self._running = self._left, True
        self.lock.release()
        try:
            with torch.no_grad():
                yield
        finally:
            self.lock.acquire()
            self._running = False
            self._left = RandomState()
            if before is not None and self._left.state != before.state and alone():
                before.put_back()
                self._left = before

    def _look(self) -> None:
        """Notes whether random numbers were drawn since the last step."""
        now = RandomState()
        if self._left is not None and now.state != self._left.state:
            inside = next(reversed(self.module_stack.values()), ("",))[0]
            self.moved.add((len(self.graph.nodes), _name(inside)))
        self._left = now

    @contextlib.contextmanager
    def functions_as_steps(self) -> Iterator[None]:
        """Makes one step of what an `autograd.Function` does, as its forward runs without gradients. A reentrant
        checkpoint is such a function too, and runs as the others do."""
        base: Any = torch.autograd.Function
        own = vars(base)["apply"]

        def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
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
            size = (self.batches[which], *self.example.shape[1:])
            return torch.empty(size, dtype=input_dtype(self.root, self.example.dtype), device="meta")
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
                with torch.device("meta"):  # a tensor that it makes itself, on no device in particular
                    return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def _hooks() -> tuple[Any, Any]:
    """What keeps tensors for the backward pass now: the innermost checkpoint, and the innermost other hook."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if top is None:
        return None, None
    if top[0].__module__ != checkpoint.__name__:
        return None, top[0]
    around = getattr(top[0], "_user_hooks", None)
    return top[0], around and around[0]


def _innermost(module: nn.Module | None) -> FrameType | None:
    """The call that runs the innermost checkpoint, but for what the call of `module` enters by itself: that it does
    whenever it is called."""
    frame, found = sys._getframe(), None
    while frame is not None:
        if found is None and frame.f_globals.get("__name__") == checkpoint.__name__:
            found = frame
        elif found is not None and module is not None and frame.f_locals.get("self") is module:
            found = None
        frame = frame.f_back
    return found


def input_dtype(network: nn.Module, example: torch.dtype) -> torch.dtype:
    """The dtype of a network's input: an example's, if it is none of real numbers or if parameters have it too, or else
    that of the first parameter of real numbers."""
    own = [p.dtype for p in network.parameters() if p.is_floating_point()]
    return example if not example.is_floating_point or example in own or not own else own[0]


def _name(path: str) -> str:
    """A module's name in the network, of its path below `_Whole`."""
    return path.removeprefix("network").removeprefix(".")


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _without_value(value: Any) -> Any:
    """Tensors that a forward makes itself, or holds beside its buffers, have values."""
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta and value.ndim else value


def has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
