"""A network -> the steps of its forward pass, as an fx graph.

`trace` runs the forward pass on tensors without values and notes each call as a step. It follows the forward only of
modules that hold repeated units; every other module is one step. A network `stem -> layers (a, b) -> mean -> fc` gives

    x -> stem -> layers.0 -> layers.1 -> mean -> fc -> output

where "mean" is a function of the network's own forward, and the others are its modules.

Each step carries what it returned for two batch sizes. So Python's `if` over shapes goes as it does for the example,
and sizes that follow the batch can be told from others. The network is traced in training mode, and once more in
evaluation mode: if both have the same steps, each step carries its arguments of both, such as a dropout's `training`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from localgrad.core.copies import duplicate, without_values
from localgrad.core.errors import UserError
from localgrad.core.hooks import FORWARD, is_of_torch
from localgrad.core.inputs import main_input, resized
from localgrad.core.opened import opened_modules
from localgrad.core.pairs import BATCHES, paired
from localgrad.core.recorder import ON_VALUES, Stopped, recorded
from localgrad.core.steps import EVALUATION, Recording
from localgrad.core.threads import one_trace

NO_VALUES = "meta tensors"  # PyTorch's errors name them where values are asked for.


@dataclass(frozen=True)
class Trace:
    """What `trace` has found.

    Attributes:
        graph: The steps.
        closed: Modules that had to be one step each because their forward cannot be followed, with the reason.
        kind: The class of dictionaries that the network returns, such as one of transformers. None for a plain one or
            something else.
        runs: Tells of a hook whether it ran during the trace, and so is in the steps.
        written: Attributes that the forward changes itself, as (name of the module, name of the attribute).
        evaluates: Whether the network takes the same steps in evaluation mode.
    """

    graph: fx.Graph
    closed: dict[str, str]
    kind: Callable[..., Any] | None
    runs: Callable[[Callable], bool]
    written: set[tuple[str, str]]
    evaluates: bool


def trace(backbone: nn.Module, example: Any) -> Trace:
    """Follows the forward pass of a network.

    Nothing runs on real tensors, and no hooks run but PyTorch's own. If the network cannot be followed so, it is tried
    with all hooks: one may unpack what a module returns, such as the pair of an nn.GRU.

    Args:
        backbone: The network. A copy of it is traced.
        example: An input batch, of which the shapes and dtypes count.

    Raises:
        UserError: The network's own forward cannot be followed. The sentence names the module that stopped it.
    """
    with one_trace():
        try:
            return _trace(backbone, example, is_of_torch)
        except UserError:
            hooks = [hook for m in backbone.modules() for kind in FORWARD for hook in getattr(m, kind).values()]
            if not all(map(is_of_torch, hooks)):
                with contextlib.suppress(UserError):
                    return _trace(backbone, example, lambda hook: True)
            raise


def _trace(backbone: nn.Module, example: Any, runs: Callable[[Callable], bool]) -> Trace:
    try:
        shapes = without_values(backbone, "meta", hooks=runs)
    except Exception as error:  # What a network holds may refuse to be copied in its own way.
        raise UserError(f"{type(backbone).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    _switch_caches_off(shapes)
    opened = opened_modules(shapes)
    closed: dict[str, str] = {}
    few, many = (resized(example, size, partial(_without_values, backbone)) for size in BATCHES)
    compiled = contextlib.nullcontext
    while True:
        try:
            with torch.enable_grad(), compiled():
                first = recorded(shapes.train(), opened, few)
                kind = type(first.output) if isinstance(first.output, dict) and type(first.output) is not dict else None
                graph = _graph(shapes, opened, few, many, first)
                evaluates = any(EVALUATION in node.meta for node in graph.nodes)
                return Trace(graph, closed, kind, runs, first.written, evaluates)
        except Stopped as error:  # A forward cannot be followed in as many ways as Python has control flow.
            # A module that is one step runs out of values with a message of PyTorch's.
            if (str(error) == ON_VALUES or NO_VALUES in str(error)) and compiled is not as_compiled:
                compiled = as_compiled
                continue
            if error.module == "" or error.module not in opened:
                raise _cannot_be_cut(backbone, example, error.module, str(error), error.module in opened) from error
            opened.discard(error.module)  # It becomes one step, and so do the modules within it.
            closed[error.module] = str(error)


@contextlib.contextmanager
def as_compiled() -> Iterator[None]:
    """Lets `torch.compiler.is_compiling()` be true. Then many networks compute something that is right for all values,
    such as the mask of a text, where they would ask for values to save it."""
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


def _switch_caches_off(network: nn.Module) -> None:
    """Networks of transformers keep keys and values of earlier tokens in a cache, which training has no use for."""
    for config in (vars(module).get("config") for module in network.modules()):
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False


def _without_values(network: nn.Module, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=input_dtype(network, tensor.dtype), device="meta")


def _double(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _graph(shapes: nn.Module, opened: set[str], few: Any, many: Any, first: Recording) -> fx.Graph:
    """The steps of a network, from a recording of it in training mode and from others of what may differ.

    Args:
        shapes: The network, without values, in training mode.
        opened: The names of the modules whose forward is followed.
        few: An input batch of the first of BATCHES, without values.
        many: One of the second.
        first: The recording for the first of BATCHES.
    """
    other = recorded(shapes, opened, many)
    evaluation = wide = None
    with contextlib.suppress(Stopped):  # A network that fails in evaluation mode can still be trained.
        evaluation = recorded(shapes.eval(), opened, few)
    if any(isinstance(leaf, torch.dtype) for step in first.steps for leaf in tree_leaves((step.args, step.kwargs))):
        with contextlib.suppress(Stopped):  # It may take no other dtype.
            wide = recorded(duplicate(shapes).train().double(), opened, resized(few, BATCHES[0], _double))
    return paired(first, other, evaluation, wide)


def _cannot_be_cut(backbone: nn.Module, example: Any, stopped: str, reason: str, opened: bool) -> UserError:
    if opened:
        return UserError(
            f"{type(backbone).__name__} cannot be cut: its forward cannot be followed ({reason}); give its "
            "parts by hand, as nn.Sequential(part, part, ...)"
        )
    if NO_VALUES in reason:
        return UserError(
            f"{type(backbone).__name__} cannot be cut: '{stopped}' asks for the values of a tensor, and a "
            "network is cut without any; let it ask for shapes alone"
        )
    return UserError(f"an example of {tuple(main_input(example).shape)} does not pass '{stopped}': {reason}")


def input_dtype(network: nn.Module, example: torch.dtype) -> torch.dtype:
    """The dtype of a network's input: that of the example, or the network's own where those are two float dtypes."""
    own = [p.dtype for p in network.parameters() if p.is_floating_point()]
    return example if not example.is_floating_point or example in own or not own else own[0]
