"""Records one forward pass, for `core/trace.py`.

The network runs on tensors without values (on the "meta" device). Meanwhile PyTorch tells the recorder of each call of
a function of tensors (`TorchFunctionMode`), and the modules of the network, a copy, tell it of their calls. Each call
becomes a step, and a tensor that it returned stands for that step wherever a later call is given it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

from localgrad.core.copies import duplicate
from localgrad.core.hooks import call_with
from localgrad.core.inputs import arguments, tensors_of
from localgrad.core.steps import (
    BORN,
    CHECKPOINT,
    CONSTANT,
    NO_GRAD,
    PACKED,
    REENTRANT,
    WRITES,
    Recording,
    Ref,
    ShapesOfNorms,
    Step,
    draws,
    has_tensor,
    put,
)
from localgrad.core.threads import Draws, alone
from localgrad.core.watch import changed_attributes, read_attributes

ASKS = frozenset(
    ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__")
)
METHODS = {member: name for name, member in vars(Tensor).items() if callable(member)}
METHODS |= {member: name for name, member in vars(torch._C.TensorBase).items() if callable(member)}
TRIES = 8  # If random numbers were drawn at the same step in so many passes, another thread has not drawn them all.
ON_VALUES = "it depends on the values of a tensor"
DRAWN = "it draws random numbers that do not follow its input"


class Stopped(Exception):
    """A forward cannot be followed.

    Attributes:
        module: The name of the innermost module that could not be followed.
    """

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(reason)
        self.module = module


def recorded(network: nn.Module, opened: set[str], batch: Any) -> Recording:
    """Records one forward pass of a copy of a network.

    Random numbers that a forward draws by itself would be drawn only once and become constants. To tell its draws from
    those of other threads, it is recorded again while there are others.

    Args:
        network: A network without values.
        opened: The names of the modules whose forward is followed. Every other module is one step.
        batch: Its inputs, without values.

    Raises:
        Stopped: The network cannot be followed.
    """
    drawn: set[tuple[int, str]] | None = None
    for _ in range(TRIES):
        copied = duplicate(network)
        attributes = {name: (m, read_attributes(m)) for name, m in copied.named_modules() if name in opened}
        recorder = Recorder(copied, opened)
        output = recorder.record(batch)
        drawn = recorder.draws.moved if drawn is None else drawn & recorder.draws.moved
        if not drawn:
            written = {(name, key) for name, now in attributes.items() for key in changed_attributes(*now)}
            if written:
                _check_repeats(recorder.steps, copied, opened, batch)
            return Recording(recorder.steps, output, written)
        if alone():
            break
    assert drawn
    raise Stopped(min(drawn)[1], DRAWN)


def _check_repeats(steps: list[Step], network: nn.Module, opened: set[str], batch: Any) -> None:
    """Raises Stopped if a forward that changes its own attributes computes with other numbers in the next pass.

    Args:
        steps: The steps of the first pass.
        network: The network that has made it.
        opened: As for `recorded`.
        batch: As for `recorded`.
    """
    again = Recorder(network, opened)
    with contextlib.suppress(Stopped):
        again.record(batch)
    for step, other in zip(steps, again.steps, strict=False):
        if step.target != other.target:
            return  # It keeps something, and what it makes in the first pass is right.
        pairs = zip(*(tree_leaves((one.args, one.kwargs)) for one in (step, other)), strict=False)
        if any(isinstance(a, int | float) and a != b for a, b in pairs):
            raise Stopped(step.inside, "it computes with a number that it changes itself, which could be a buffer")


class Recorder(TorchFunctionMode):
    """Records one forward pass of a network.

    Args:
        network: A copy of the network, whose tensors have no values.
        opened: The names of the modules whose forward is followed. Every other module is one step.

    Attributes:
        steps: The steps.
        draws: Where random numbers were drawn: (the number of the next step, the module whose forward drew them).
    """

    def __init__(self, network: nn.Module, opened: set[str]) -> None:
        super().__init__()
        self.network, self.opened = network, opened
        self.steps: list[Step] = []
        self.draws = Draws()
        named = list(_named_tensors(network))
        self._names = {id(tensor): name for name, tensor in named}
        self._refs: dict[int, Ref] = {}
        self._kept: list[Any] = [named]  # While a tensor lives, no other one has its id.
        self._running = [""]
        self._in_step = self._reentered = False
        self._thread = threading.get_ident()
        self._outer_hooks = _hooks_on_saved_tensors()  # These are not the network's, but the caller's.
        self._checkpoints: dict[Any, int] = {}

    def record(self, batch: Any) -> Any:
        """Runs the network.

        Args:
            batch: Its inputs, without values.

        Returns:
            What the network returned, with a `Ref` in the place of each tensor.

        Raises:
            Stopped: The network cannot be followed.
        """
        args, kwargs = arguments(batch)
        for name, tensor in tensors_of(batch).items():
            self._note(Step("placeholder", name, (), {}, "", tensor, {}))
        modules = list(self.network.named_modules())
        own = [vars(module).get("_compiled_call_impl") for _, module in modules]
        for name, module in modules:  # `nn.Module.__call__` runs this instead of the module's forward and hooks.
            vars(module)["_compiled_call_impl"] = partial(self._call, name, module)
        try:
            with self, self._functions_as_steps(), self.draws.lock:
                return self._symbolic(self.network(*args, **kwargs))
        except Stopped:
            raise
        except Exception as error:
            raise self._stopped("", error) from error
        finally:
            for (_, module), before in zip(modules, own, strict=True):
                vars(module)["_compiled_call_impl"] = before

    def _stopped(self, module: str, error: Exception) -> Stopped:
        return Stopped(module, (str(error) or type(error).__name__).splitlines()[0])

    def _call(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            raise TypeError("it runs its parts in threads of their own")
        if self._in_step:
            return call_with(module, module.forward, args, kwargs)
        try:
            if name in self.opened:
                return self._followed(name, module, args, kwargs)
            return self._step("call_module", name, args, kwargs, module)
        except Stopped:
            raise
        except Exception as error:
            raise self._stopped(name, error) from error

    def _followed(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs a module whose calls become steps."""
        self._look()
        buffers = dict(module._buffers)
        self._running.append(name)
        try:
            given = call_with(module, module.forward, args, kwargs)
            self._look()
        finally:
            self._running.pop()
        replaced = [now for key, now in module._buffers.items() if now is not buffers.get(key)]
        if any(id(now) in self._refs for now in replaced):
            raise TypeError("it puts a new tensor in the place of a buffer, which could be changed by copy_")
        return given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._in_step or name == "_set_grad_enabled":
            with ShapesOfNorms() if func is batch_norm else contextlib.nullcontext():
                return func(*args, **kwargs)
        if name == "__get__":  # It asks for an attribute, such as x.shape or x.T.
            value = func(*args, **kwargs)
            attribute = (args[0], func.__self__.__name__)
            return self._step("call_function", getattr, attribute, {}, getattr) if has_tensor(value) else value
        if name == "__setitem__":
            self._step("call_function", put, args, kwargs, put)
            return None
        if name in ASKS and isinstance(args[0], Tensor) and args[0].is_meta:
            return func(self._with_values(self._ref(args[0])), *args[1:], **kwargs)
        if func in METHODS:
            return self._step("call_method", METHODS[func], args, kwargs, func)
        return self._step("call_function", func, args, kwargs, func)

    def _step(self, op: str, target: Any, args: Any, kwargs: Any, called: Callable) -> Any:
        """Calls a function, method or module, and notes it as a step if it returns a tensor."""
        self._in_step, self._reentered = True, False
        try:
            meta = self._surroundings(called if isinstance(called, nn.Module) else None)
            given = tree_map(_without_value, (args, kwargs))
            read = [(leaf, leaf._version) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            symbols = self._symbolic((args, dict(kwargs)))
            # What was drawn before the step is noted before it.
            with self.draws.allowed(self._position()), torch.no_grad():
                value = tree_map(partial(_without_value, drawn=draws(target)), _called(called, *given))
            if has_tensor(value):
                meta |= {REENTRANT: self._reentered, WRITES: [t for t, before in read if t._version != before]}
                self._note(Step(op, target, symbols[0], symbols[1], self._running[-1], value, meta))
            return value
        finally:
            self._in_step = False

    def _note(self, step: Step) -> None:
        """Adds a step. The tensors that it returned stand for it from now on."""
        number = len(self.steps)
        defaults = {NO_GRAD: False, CHECKPOINT: None, PACKED: False, REENTRANT: False, WRITES: []}
        step.meta = {**defaults, **step.meta, BORN: step.value._version if isinstance(step.value, Tensor) else 0}
        self.steps.append(step)
        self._kept.append(step.value)
        if isinstance(step.value, Tensor):
            found = [(step.value, Ref(number))]
        else:
            found = [(leaf, Ref(number, i)) for i, leaf in enumerate(tree_leaves(step.value))]
        for leaf, ref in found:
            if isinstance(leaf, Tensor) and id(leaf) not in self._names:
                self._refs[id(leaf)] = ref

    def _symbolic(self, value: Any) -> Any:
        """A structure with a `Ref` in the place of each tensor."""
        return tree_map(lambda leaf: self._ref(leaf) if isinstance(leaf, Tensor) else leaf, value)

    def _ref(self, tensor: Tensor) -> Ref:
        if id(tensor) not in self._refs:
            name = self._names.get(id(tensor))
            if name is None and tensor.is_meta:
                raise TypeError("it gets a tensor from a call that cannot be followed")
            if name is None:
                name = f"{CONSTANT}{sum(step.op == 'get_attr' for step in self.steps)}"
            self._refs[id(tensor)] = Ref(len(self.steps))
            self._note(Step("get_attr", name, (), {}, self._running[-1], tensor, {}))
        return self._refs[id(tensor)]

    def _with_values(self, ref: Ref) -> Tensor:
        """Computes a tensor that follows from constants alone, such as the positions of tokens.

        Raises:
            TypeError: It follows from the network's input, from its parameters or buffers, or from random numbers.
        """
        step = self.steps[ref.step]
        if step.op == "get_attr" and not step.value.is_meta:
            return step.value
        if step.op in ("placeholder", "get_attr", "call_module") or step.meta[WRITES]:
            raise TypeError(ON_VALUES)
        if draws(step.target):
            raise TypeError(DRAWN)

        def real(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return self._with_values(leaf) if isinstance(leaf, Ref) else leaf

        args, kwargs = tree_map(real, (step.args, step.kwargs))
        called = step.op == "call_method"
        value = getattr(args[0], step.target)(*args[1:], **kwargs) if called else step.target(*args, **kwargs)
        return value if ref.leaf is None else tree_leaves(value)[ref.leaf]

    def _surroundings(self, module: nn.Module | None) -> dict[str, Any]:
        hooks = zip(_hooks_on_saved_tensors(), self._outer_hooks, strict=True)
        own, others = (None if now is outer else now for now, outer in hooks)
        own = own and _innermost(module)
        number = None if own is None else self._checkpoints.setdefault(own, len(self._checkpoints))
        return {NO_GRAD: not torch.is_grad_enabled(), CHECKPOINT: number, PACKED: others is not None}

    def _look(self) -> None:
        self._in_step = True
        self.draws.look(self._position())
        self._in_step = False

    def _position(self) -> tuple[int, str]:
        """The number of the next step, and the module that is running."""
        return len(self.steps), self._running[-1]

    @contextlib.contextmanager
    def _functions_as_steps(self) -> Iterator[None]:
        """Makes one step of each `autograd.Function`, because its forward cannot be followed: it has no gradients.

        A reentrant checkpoint is such a function, too. It runs as the other kind of checkpoint, which can be followed.
        """
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
            if self._in_step or kind.__module__ == checkpoint.__name__ or not has_tensor((args, kwargs)):
                return own.__get__(None, kind)(*args, **kwargs)

            def applied(*args: Any, **kwargs: Any) -> Any:
                return kind.apply(*args, **kwargs)

            return self._step("call_function", applied, args, kwargs, applied)

        base.apply = classmethod(apply)
        try:
            yield
        finally:
            base.apply = own


def _called(called: Callable, args: Any, kwargs: Any) -> Any:
    try:
        return called(*args, **kwargs)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        with torch.device("meta"):  # A module makes a tensor on the default device.
            return called(*args, **kwargs)


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the modules of a network hold, by name, the parameters last."""
    for prefix, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}".removeprefix("."), value
    for named in (network.named_buffers(), network.named_parameters()):
        yield from named


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


def _without_value(value: Any, drawn: bool = False) -> Any:
    """A tensor that a forward makes itself, or holds beside its buffers, still has values."""
    real = isinstance(value, Tensor) and not value.is_meta
    return value.to("meta") if real and (value.ndim or drawn) else value
