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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from localgrad.core.copies import without_values
from localgrad.core.errors import UserError
from localgrad.core.hooks import FORWARD, is_of_torch
from localgrad.core.opened import opened_modules
from localgrad.core.threads import one_trace
from localgrad.core.tracer import BATCHES, EVALUATION, Tracer
from localgrad.core.watch import changed_attributes, read_attributes


@dataclass(frozen=True)
class Trace:
    """What `trace` has found.

    Attributes:
        graph: The steps.
        closed: Modules that had to be one step each because their forward cannot be followed, with the reason.
        runs: Tells of a hook whether it ran during the trace, and so is in the steps.
        written: Attributes that the forward changes itself, as (name of the module, name of the attribute).
    """

    graph: fx.Graph
    closed: dict[str, str]
    runs: Callable[[Callable], bool]
    written: set[tuple[str, str]]


def trace(backbone: nn.Module, example: Tensor) -> Trace:
    """Follows the forward pass of a network.

    Nothing runs on real tensors, and no hooks run but PyTorch's own. If the network cannot be followed so, it is tried
    with all hooks: one may unpack what a module returns, such as the pair of an nn.GRU.

    Args:
        backbone: The network. A copy of it is traced.
        example: An input batch [B, ...], of which the shape and dtype count.

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


def _trace(backbone: nn.Module, example: Tensor, runs: Callable[[Callable], bool]) -> Trace:
    try:
        shapes = without_values(backbone, "meta", hooks=runs)
    except Exception as error:  # What a network holds may refuse to be copied in its own way.
        raise UserError(f"{type(backbone).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    sample = example.shape[1:], input_dtype(backbone, example.dtype)
    opened = opened_modules(shapes)
    attributes = {name: (m, read_attributes(m)) for name, m in shapes.named_modules() if name in opened}
    closed: dict[str, str] = {}
    while True:
        tracer = Tracer(opened, sample)
        try:
            with torch.enable_grad(), tracer.functions_as_steps():
                graph = tracer.steps(shapes.train())
                with contextlib.suppress(Exception):  # A network that fails in evaluation mode can still be trained.
                    _note_evaluation(graph, Tracer(opened, sample, BATCHES[:1]).steps(shapes.eval()))
        except Exception as error:  # Symbolic tracing fails in as many ways as Python has control flow.
            stopped = tracer.stopped or ""
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if stopped == "" or stopped not in opened:
                raise _cannot_be_cut(backbone, example, stopped, reason, stopped in opened) from error
            opened.discard(stopped)  # It becomes one step, and so do the modules within it.
            closed[stopped] = reason
        else:
            written = {(name, key) for name, now in attributes.items() for key in changed_attributes(*now)}
            return Trace(graph, closed, runs, written)


def _cannot_be_cut(backbone: nn.Module, example: Tensor, stopped: str, reason: str, opened: bool) -> UserError:
    if opened:
        return UserError(
            f"{type(backbone).__name__} cannot be cut: its forward cannot be followed ({reason}); give its "
            "parts by hand, as nn.Sequential(part, part, ...)"
        )
    if "meta tensors" in reason:
        return UserError(
            f"{type(backbone).__name__} cannot be cut: '{stopped}' asks for the values of a tensor, and a "
            "network is cut without any; let it ask for shapes alone"
        )
    return UserError(f"an example of {tuple(example.shape)} does not pass '{stopped}': {reason}")


def _note_evaluation(graph: fx.Graph, evaluation: fx.Graph) -> None:
    """Adds to each step its arguments in evaluation mode, if both modes have the same steps."""
    pairs = list(zip(graph.nodes, evaluation.nodes, strict=False))
    if len(graph.nodes) == len(evaluation.nodes) and all((a.op, a.target) == (b.op, b.target) for a, b in pairs):
        twins = {b: a for a, b in pairs}
        for a, b in pairs:
            a.meta[EVALUATION] = map_arg((b.args, b.kwargs), twins.__getitem__)


def input_dtype(network: nn.Module, example: torch.dtype) -> torch.dtype:
    """The dtype of a network's input: that of the example, or the network's own where those are two float dtypes."""
    own = [p.dtype for p in network.parameters() if p.is_floating_point()]
    return example if not example.is_floating_point or example in own or not own else own[0]
