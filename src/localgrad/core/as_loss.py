"""The K isolated backward passes as one loss, for trainers that call `loss.backward()` themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from localgrad.core.checks import check_call
from localgrad.core.engine import StepResult, local_backward
from localgrad.core.errors import UserError
from localgrad.core.inputs import main_input, resized, targets_of, tensors_of
from localgrad.core.model import LocalModel, localized


@dataclass(frozen=True)
class LossResult(StepResult):
    """The result of all blocks in a step, with a loss to call `backward()` on. All other tensors are detached.

    Attributes:
        loss: The sum of the losses of all blocks, a scalar. The loss of the network itself is `losses[-1]`.
    """

    loss: Tensor


def as_loss(
    model: LocalModel,
    x: Any,
    y: Any = None,
    *,
    images: Tensor | None = None,
    autocast: torch.dtype | None = None,
    move_averages: bool = True,
) -> LossResult:
    """Runs K isolated backward passes, and returns one loss whose `backward()` adds their gradients to `.grad`.

        out = as_loss(model, x, y)    # all gradients are computed here, and kept; no `.grad` has changed yet
        out.loss.backward()           # multiplies them by what comes in, and hands them on

    The gradients are those of `local_backward`. To PyTorch, the loss is a function of the parameters of the model, and
    of those that the criterion has. So scaling and averaging the loss, accumulation, clipping, gradient hooks and
    DistributedDataParallel work as ever. Two things need `local_backward` or `block_steps` instead: an optimizer that
    steps block k before block k+1 runs, because no gradient arrives before all are computed, and float16, whose losses
    must be scaled before the passes.

    To evaluate, call `model.backbone(x)`.

    Args:
        model: The result of `localize`, in training mode.
        x: Normalised inputs, [B, C, H, W]. If they require a gradient, they get that of the first block.
        y: Targets, [B], or what the criterion takes, as in `block_steps`.
        images: The images that decoders reconstruct, as in `block_steps`. Default: x, un-normalised.
        autocast: The dtype of each block's forward pass. Default: that of an enclosing `torch.autocast`, whose cache of
            cast weights is not used, or else the model's own.
        move_averages: Whether to move the averages of couplings and to count a step of shared readouts. That is right
            if the optimizer steps after each loss. To accumulate the gradients of several losses, give False, and call
            `model.move_averages()` before each step:
            `optimizer.register_step_pre_hook(lambda *_: model.move_averages())`. Default: True.

    Returns:
        The loss, and all that `local_backward` returns. The loss has one `backward()`, also with `retain_graph=True`.

    Raises:
        UserError: An argument is wrong or does not fit the model, which may be in evaluation mode.
    """
    model = _in_training(model)
    y = targets_of(x, y)
    check_call(x, y, 1.0, autocast)
    cast_to, without_cache = _autocast(x, autocast)
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    leaves = resized(x, len(main_input(x)), lambda t, _: t.detach().requires_grad_(t.requires_grad))
    asked, inputs = (
        [*parameters, *(t for t in tensors_of(batch).values() if t.requires_grad)] for batch in (leaves, x)
    )
    gradients: list[Tensor | None] = [None] * len(asked)

    def backward(loss: Tensor) -> None:
        for other in _others(loss, asked):
            asked.append(other)
            inputs.append(other)
            gradients.append(None)
        for i, gradient in enumerate(torch.autograd.grad(loss, asked, allow_unused=True)):
            if gradient is not None:
                before = gradients[i]
                gradients[i] = gradient if before is None else before + gradient

    with _unhooked(parameters), without_cache:
        out = local_backward(
            model, leaves, y, images=images, autocast=cast_to, backward=backward, move_averages=move_averages
        )
    loss = cast(Tensor, _HandOn.apply(out.losses, gradients, len(parameters), *inputs))
    return LossResult(out.losses, out.parts, out.logits, loss)


class _HandOn(torch.autograd.Function):
    """(parameters, maybe x) -> the sum of the losses. Its backward pass multiplies gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, losses: list[Tensor], gradients: list[Tensor | None], count: int, *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs[:count])  # PyTorch then notices if a parameter has changed before the backward.
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        gradients = ctx.gradients
        if gradients is None:
            raise UserError("the gradients of this loss were handed on already: call as_loss again for each backward()")
        ctx.gradients = None
        handed = []
        while gradients:  # Each is freed when its product is there.
            gradient = gradients.pop()
            handed.append(None if gradient is None else gradient * outer[0])
        return None, None, None, *reversed(handed)


def _others(loss: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of a loss's graph that are not known yet, such as the parameters of a criterion."""
    seen = {id(t) for t in known}
    found, nodes, visited = [], [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)  # Only the node that adds to a leaf's `.grad` has it.
        if leaf is not None and id(leaf) not in seen:
            seen.add(id(leaf))
            found.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return found


def _in_training(model: Any) -> LocalModel:
    """The model. Raises UserError if it is wrapped, no LocalModel, or in evaluation mode."""
    if isinstance(model, DistributedDataParallel):
        raise UserError(
            "DistributedDataParallel must wrap the call of as_loss: give it a module whose forward returns "
            "lg.as_loss(model, x, y).loss"
        )
    model = localized(model, "as_loss", whole=True)
    if not (model.training and model.backbone.training):
        raise UserError(
            "as_loss trains, and this model is in evaluation mode: call model.train() first, or evaluate "
            "model.backbone(x)"
        )
    return model


def _autocast(x: Any, dtype: torch.dtype | None) -> tuple[torch.dtype | None, contextlib.AbstractContextManager[Any]]:
    """The dtype of each block's forward pass, and a context in which no cast weight outlives its block.

    An enclosing autocast would keep all cast weights until it ends, and would also apply to the backward passes.
    """
    kind = main_input(x).device.type
    around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind) if dtype is None else dtype
        around = torch.autocast(kind, enabled=False, cache_enabled=False)
    if dtype == torch.float16:
        raise UserError(
            "as_loss computes gradients before a scaler can scale the loss, so small ones of float16 would become 0: "
            "take torch.bfloat16, or lg.local_backward(..., scale=scaler.scale(torch.ones(())))"
        )
    return dtype, around


@contextlib.contextmanager
def _unhooked(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Takes the hooks off the parameters for a while, because gradients pass them when they are handed on."""
    hooked = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks
