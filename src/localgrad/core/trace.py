"""Backbone -> the steps of its forward pass: a symbolic trace that opens only what holds repeated units.

Each step carries what it gave for two batch sizes on tensors without values, so that Python's own control flow over
shapes goes the way that it goes for the example, and sizes that follow the batch can be told from those that do not.
The trace is taken in training mode, and once more in evaluation: where both have the same steps, each carries the
arguments that it has there. Other steps in evaluation, as `if self.training` beside the units can bring, are not kept.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

from localgrad.core.errors import UserError

BATCHES = (5, 7)  # two sizes without a common share
VALUE = "value"  # of a step for each of BATCHES, in its `meta`
Module = TypeVar("Module", bound=nn.Module)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
BORN = "born"  # the version of a step's tensor as it was made
EVALUATION = "evaluation"  # a step's arguments in evaluation
NO_GRAD = "no_grad"  # whether a step ran without gradients
WRITES = "writes"  # which tensors a step has changed in place
AGAIN = "again"  # which of the network's own activation checkpoints a step runs in, by number
REENTRANT = "reentrant"  # whether a module enters reentrant checkpoints
PACKED = "packed"  # whether other hooks of the network would keep what a step saves for its backward pass


def trace(backbone: nn.Module, example: Tensor) -> tuple[fx.Graph, dict[str, str]]:
    """The steps of `backbone` on a batch like `example` [B, ...], and the modules that had to be one step each because
    their forward cannot be followed, with the reason; nothing is run on real tensors.

    Raises UserError for a network whose own forward cannot be followed, naming the module that stopped it.
    """
    try:
        shapes = without_values(backbone, "meta")
    except Exception as error:  # what a network holds may refuse to be copied in its own way
        raise UserError(f"{type(backbone).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    opened = _opened(shapes)
    closed: dict[str, str] = {}
    while True:
        tracer = _Tracer(opened, example)
        try:
            with torch.enable_grad(), tracer.functions_as_steps():
                graph = tracer.trace(_Whole(shapes.train()))
                with contextlib.suppress(Exception):  # what cannot be followed in evaluation has no part in training
                    _note_evaluation(graph, _Tracer(opened, example, BATCHES[:1]).trace(_Whole(shapes.eval())))
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


def weighted_layers(module: nn.Module) -> int:
    """How many weights with two dimensions or more: a residual unit has several, a convolution with its norm one."""
    return sum(p.ndim > 1 for p in module.parameters())


def is_unit(module: nn.Module) -> bool:
    """Whether a module is worth being a unit of its own."""
    return next(module.children(), None) is not None and weighted_layers(module) > 1


def is_stage(module: nn.Module) -> bool:
    """What holds several units and little else: a container, such as a ResNet's layer1 or a transformer's blocks, or a
    module of parts of one class that are numbered, such as the b1, b2, ... of a stage of timm's RegNets."""
    if not isinstance(module, CONTAINERS):
        parts = {(type(m), name.rstrip("0123456789")) for name, m in module.named_children()}
        if len(parts) != 1 or any(not name[-1].isdigit() for name, _ in module.named_children()):
            return False
    return sum(is_unit(m) or is_stage(m) for m in module.children()) > 1


def _opened(network: nn.Module) -> set[str]:
    """Modules whose forward is followed: those with a stage within them; where there is none, plain containers, but not
    those that stand as one layer in another."""
    found = {name for name, module in network.named_modules() if any(map(is_stage, module.modules()))} | {""}
    if len(found) > 1 or is_stage(network):
        return found
    modules = dict(network.named_modules())
    for name, module in modules.items():  # parents come before their children
        parent = name.rpartition(".")[0]
        weighted = [m for m in module.children() if weighted_layers(m)]
        layer = isinstance(modules[parent], CONTAINERS) and any(next(m.children(), None) is None for m in weighted)
        if isinstance(module, CONTAINERS) and parent in found and not layer:
            found.add(name)
    return found


def without_values(module: Module, device: str | None = None) -> Module:
    """A copy whose tensors have the shapes and formats of `module`'s and no values; on `device`, or where they are, the
    CPU standing in for the meta device."""
    memo: dict[int, Any] = {}
    attributes = [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    for tensor in (*module.parameters(), *module.buffers(), *attributes):
        place = device or ("cpu" if tensor.is_meta else tensor.device)
        other = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
        memo[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
    return copy.deepcopy(module, memo)


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
    could not be followed."""

    proxy_buffer_attributes = True

    def __init__(self, opened: set[str], example: Tensor, batches: tuple[int, ...] = BATCHES) -> None:
        super().__init__()
        self.opened, self.example, self.batches = opened, example, batches
        self.stopped: str | None = None
        self._running = False
        self._packing = _hooks()  # of whoever asks for the trace
        self._checkpoints: dict[Any, int] = {}
        self._reentered = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name.removeprefix("network").removeprefix(".") not in self.opened

    def call_module(self, m: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        drawn, buffers = _random_state(), dict(m._buffers.items())
        try:
            given = super().call_module(m, forward, args, kwargs)
            if any(isinstance(buffer, fx.Proxy) for buffer in m._buffers.values()):
                m._buffers.update(buffers)
                raise TypeError("it puts a new tensor in the place of a buffer, which could be changed by copy_")
            if _random_state() != drawn:
                raise TypeError("it draws random numbers that do not follow its input")
            return given
        except Exception:
            if self.stopped is None:
                self.stopped = self.path_of_module(m).removeprefix("network").removeprefix(".")
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

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
            node.meta[AGAIN] = None if own is None else self._checkpoints.setdefault(own, len(self._checkpoints))
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
        """Modules called inside are run, not traced; what they draw is put back."""
        self._running = True
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            self._running = False

    @contextlib.contextmanager
    def functions_as_steps(self) -> Iterator[None]:
        """Makes one step of what an `autograd.Function` does, as its forward runs without gradients. A reentrant
        checkpoint is such a function too, and runs as the others do."""
        base: Any = torch.autograd.Function
        own = vars(base)["apply"]

        def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
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
            like = next(self.root.parameters(), self.example) if self.example.is_floating_point() else self.example
            return torch.empty(size, dtype=like.dtype, device="meta")
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


def _random_state() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  # pyright: ignore
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), numpy["pos"], numpy["key"].tobytes()


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _without_value(value: Any) -> Any:
    """Tensors that a forward makes itself, or holds beside its buffers, have values."""
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta and value.ndim else value


def has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
