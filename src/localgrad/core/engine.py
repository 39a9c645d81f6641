"""The training step: K isolated backward passes, each of which frees its graph before the next block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from localgrad.core.auxiliary import Auxiliary
from localgrad.core.blocks import Block
from localgrad.core.boundary import detached, full_precision, main_of
from localgrad.core.checks import check_call
from localgrad.core.copies import undisturbed
from localgrad.core.errors import UserError
from localgrad.core.inputs import main_input, targets_of
from localgrad.core.model import LocalModel, localized


@dataclass(frozen=True)
class BlockResult:
    """The result of one block in a step. All tensors are detached.

    Attributes:
        block: The number of the block, from 0.
        loss: The weighted sum of the block's objectives, a scalar. It is 0 for a wholly frozen block, which has none.
        parts: The value of each objective by name, unweighted. It is empty for the last block.
        output: The input of the next block: [B, *boundary.shape], or where several tensors cross a dictionary of them.
            For the last block, the output of the network.
    """

    block: int
    loss: Tensor
    parts: dict[str, Tensor]
    output: Any


@dataclass(frozen=True, repr=False)
class StepResult:
    """The result of all blocks in a step. All tensors are detached.

    Attributes:
        losses: The loss of each block, a scalar: the weighted sum of its objectives. It is 0 for a wholly frozen block.
        parts: For each block the value of each objective by name, unweighted. It is empty for the last block.
        logits: The output of the network, such as [B, classes].
    """

    losses: list[Tensor]
    parts: list[dict[str, Tensor]]
    logits: Any

    def __repr__(self) -> str:
        """A line for each block, with its loss and the objectives that it is made of."""
        lines = []
        for k, (loss, parts) in enumerate(zip(self.losses, self.parts, strict=True)):
            made = ", ".join(f"{name} {float(value):.4g}" for name, value in parts.items())
            lines.append(f"block {k}  loss {float(loss):.4g}" + (f" ({made})" if made else ""))
        return "\n".join(lines)


def block_steps(
    model: LocalModel,
    x: Any,
    y: Any = None,
    *,
    images: Tensor | None = None,
    scale: float | Tensor = 1.0,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], object] | None = None,
) -> Iterator[BlockResult]:
    """Takes a step block by block, and yields when block k has its gradients and its graph is freed.

        h = x
        for k in 0 .. K-2:
            h = block[k](h)                                # graph of this block only
            loss_k = sum_i weight[k][i] * objective_i(auxiliary[k](h), targets, images)
            backward(loss_k)                               # this block + its auxiliary; its graph is freed here
            h = h.detach()
        loss = criterion(block[K-1](h), targets); backward(loss)

    The caller steps, clips, exchanges or drops the gradients of block k before it asks for the next block. It also
    moves the averages of couplings, and shared readouts, once per optimizer step and before it:

        for done in block_steps(model, x, y):
            model.move_averages(done.block)
            optimizers[done.block].step()
            optimizers[done.block].zero_grad()

    Args:
        model: The result of `localize`.
        x: Normalised inputs, [B, C, H, W]. Where the network's forward takes several tensors, a tuple of them, or a
            dictionary by name, like the example of `localize`.
        y: Targets, [B], or what the criterion takes: a tensor or a tuple, list or dictionary of tensors, each with the
            batch as its first dimension. A number in it belongs to the whole batch. Default: the `labels` of the
            dictionary x.
        images: The images that decoders reconstruct, [B, C, H, W] in [0, 1]. Default: x, un-normalised with the
            method's mean and std.
        scale: A factor for every loss before its backward pass, such as 1 / n to accumulate the gradients of n
            batches. Default: 1. With a gradient scaler, give `scaler.scale(torch.ones(()))` on the model's device.
            Its `get_scale()` is not enough, because a scaler only steps after its `scale` was called.
        autocast: The dtype of each block's forward pass. Default: the model's own.
        backward: The function that runs the backward pass of a loss, such as `accelerator.backward`. Default:
            `loss.backward()`.

    Returns:
        An iterator over a `BlockResult` for each block, in order.

    Raises:
        UserError: An argument is wrong or does not fit the model. It is raised at once, before any block runs.
    """
    model = localized(model, "block_steps", sharded=True, whole=True)
    blocks = range(len(model.blocks))
    h, y = model.inputs.crossing(x), targets_of(x, y)
    check_step(model, blocks, h, y, images=images, scale=scale, autocast=autocast, backward=backward)
    if images is None and model.needs_images(blocks):
        images = model.checks.images(model, main_of(h))
    return run_blocks(model, blocks, h, y, images=images, scale=scale, autocast=autocast, backward=backward)


def local_backward(
    model: LocalModel,
    x: Any,
    y: Any = None,
    *,
    images: Tensor | None = None,
    scale: float | Tensor = 1.0,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], object] | None = None,
    move_averages: bool = True,
) -> StepResult:
    """Runs K isolated backward passes, which add the gradients of every block and auxiliary to `.grad`.

    It loops over `block_steps` and moves the averages of couplings, and shared readouts. Call it once before each
    optimizer step. To accumulate gradients over several batches, give `move_averages=False`, and call
    `model.move_averages()` once before the optimizer steps. If `model.accumulate` is n, it takes the batch in n parts,
    one after another, so that only the activations of one part are in memory. The gradients are those of the mean loss
    over the batch, if the criterion is a mean over samples.

    Args:
        model: The result of `localize`.
        x: Normalised inputs, [B, C, H, W], or a tuple or dictionary of several, as in `block_steps`.
        y: Targets, [B], or what the criterion takes, as in `block_steps`.
        images: As in `block_steps`, like the following arguments.
        scale: A factor for every loss before its backward pass. Default: 1.
        autocast: The dtype of each block's forward pass. Default: the model's own.
        backward: The function that runs the backward pass of a loss. Default: `loss.backward()`.
        move_averages: Whether to move the averages of couplings and to count a step of shared readouts. Default: True.

    Returns:
        The losses of all blocks and the output of the network.

    Raises:
        UserError: An argument is wrong or does not fit the model.
    """
    model = localized(model, "local_backward", sharded=True, whole=True)
    y = targets_of(x, y)
    check_call(x, y, scale, autocast, backward)
    if not isinstance(move_averages, bool):
        raise UserError(f"move_averages takes True or False, not {move_averages!r}")
    results: list[StepResult] = []
    shares: list[float] = []
    size = len(main_input(x))
    count = max(1, min(model.accumulate, size))
    for part in range(count):
        own_rows = slice(part * size // count, (part + 1) * size // count)
        own = {"images": None if images is None else images[own_rows], "autocast": autocast, "backward": backward}
        share = 1.0 if count == 1 else (own_rows.stop - own_rows.start) / size
        losses, parts, output = [], [], None
        own_y = tree_map_only(Tensor, lambda t, rows=own_rows: t[rows] if t.ndim else t, y)
        own_x = model.inputs.rows(x, own_rows)
        steps = block_steps(model, own_x, own_y, scale=scale if count == 1 else scale * share, **own)
        if move_averages and part == 0:  # The arguments are checked by now.
            model.move_averages(stepped=True)
        for done in steps:
            if move_averages and part == count - 1:
                model.move_averages(done.block)
            losses.append(done.loss)
            parts.append(done.parts)
            output = done.output
        results.append(StepResult(losses, parts, output))
        shares.append(share)
    return results[0] if count == 1 else _mean(results, shares)


def _mean(results: Sequence[StepResult], shares: Sequence[float]) -> StepResult:
    """The result of a batch from those of its parts: losses weighted by `shares`, and the outputs in a row."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()

    blocks = range(len(results[0].losses))
    losses = [mean(result.losses[k] for result in results) for k in blocks]
    parts = [{name: mean(r.parts[k][name] for r in results) for name in results[0].parts[k]} for k in blocks]
    return StepResult(losses, parts, tree_map(_joined, *(result.logits for result in results)))


def _joined(*found: Any) -> Any:
    """What the parts of a batch give, in a row. A parameter among the outputs is the same one for all parts."""
    first = found[0]
    if not isinstance(first, Tensor) or first.untyped_storage()._cdata == found[1].untyped_storage()._cdata:
        return first
    return torch.cat(found)


def check_step(
    model: LocalModel,
    blocks: Sequence[int],
    entering: Any,
    y: Any,
    *,
    images: Tensor | None,
    scale: float | Tensor,
    autocast: torch.dtype | None,
    backward: object = None,
) -> None:
    """Raises UserError unless neighbouring blocks can take a step. The first of them reads `entering`."""
    h = main_of(entering)
    check_call(entering, y, scale, autocast, backward)
    model.watch.check(model.backbone)
    shape = tuple(model.blocks[blocks[0] - 1].boundary.shape) if blocks[0] else model.image
    model.task.check_targets(y)
    if not blocks[0] and (check_inputs := getattr(model.task, "check_inputs", None)) is not None:
        check_inputs(h, y)
    counts = {len(leaf): None for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.ndim}
    if tuple(h.shape[1:]) != shape or any(count != len(h) for count in counts):
        expected = " x ".join(map(str, ("batch", *shape)))
        remedy = "" if tuple(h.shape[1:]) == shape else ": pad, crop or resize each batch to that"
        raise UserError(
            f"inputs of shape {tuple(h.shape)} for {' and '.join(map(str, counts))} targets: this model was localized "
            f"for {expected}, with a target for each sample{remedy}"
        )
    model.checks.check_step(model, blocks, entering, y, images, autocast)


def run_blocks(
    model: LocalModel,
    blocks: Iterable[int],
    h: Any,
    y: Any,
    *,
    images: Tensor | None,
    scale: float | Tensor = 1.0,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], object] | None = None,
) -> Iterator[BlockResult]:
    """Does what `block_steps` does, for neighbouring blocks only and without checks.

    Args:
        model: The result of `localize`.
        blocks: The numbers of neighbouring blocks.
        h: The input of the first of these blocks, [B, *shape], or a dictionary of tensors. They have no graph.
        y: Targets, as in `block_steps`.
        images: The images that decoders reconstruct, or None if no block has a decoder.
        scale: As in `block_steps`, like the following arguments.
        autocast: The dtype of each block's forward pass.
        backward: The function that runs the backward pass of a loss.
    """
    for k in blocks:
        done = block_backward(model, k, h, y, images=images, scale=scale, autocast=autocast, backward=backward)
        h = done.output
        yield done


def block_backward(
    model: LocalModel,
    k: int,
    h: Any,
    y: Any,
    *,
    images: Tensor | None = None,
    scale: float | Tensor = 1.0,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], object] | None = None,
) -> BlockResult:
    """Runs the forward and backward pass of block k. The graph is freed when it returns.

    The arguments are those of `run_blocks`. h is the input of block k.
    """
    block = model.blocks[k]
    if k == len(model.blocks) - 1:
        with autocasting(h, autocast):
            output = block(h)
        loss = model.task.criterion(tree_map_only(Tensor, full_precision, output), y)
        _run_backward(loss, scale, backward)
        return BlockResult(k, loss.detach(), {}, tree_map_only(Tensor, Tensor.detach, output))
    auxiliary = cast(Auxiliary, model.auxiliaries[k])
    if auxiliary.empty:
        with torch.no_grad(), autocasting(h, autocast):
            h = block(h)
        block.check(h)
        return BlockResult(k, full_precision(main_of(h).new_zeros(())), {}, h)
    with autocasting(h, autocast):
        features = entering_features(block, h, first=k == 0) if auxiliary.needs("features") else None
        h = block(h)
        block.check(h)
        outputs = auxiliary(h)
    parts = auxiliary.losses(outputs, y, images, features)
    del outputs  # Otherwise they would stay in memory during the backward pass.
    loss = auxiliary.total(parts)
    _run_backward(loss, scale, backward)
    return BlockResult(k, loss.detach(), {name: value.detach() for name, value in parts.items()}, detached(h))


def entering_features(block: Block, h: Any, *, first: bool) -> Tensor:
    """The features that enter a block, without a graph.

    Args:
        block: The block.
        h: Its input.
        first: Whether it is the first block, which reads the input of the network. Its features are what its first unit
            makes of it. That unit runs once more, with the random draws that it finds again in the block.
    """
    if not first:
        return main_of(h).detach()
    if hasattr(block, "unshard"):  # A sharded block gathers its parameters, which it needs right after, too.
        cast(Any, block).unshard()
    buffers = {name: buffer.clone() for name, buffer in block[0].named_buffers()}
    with undisturbed(main_of(h).device):
        return main_of(functional_call(block[0], buffers, (h,)))


def _run_backward(loss: Tensor, scale: float | Tensor, backward: Callable[[Tensor], object] | None) -> None:
    if not loss.requires_grad:  # A block that is frozen, and whose auxiliary is frozen too, has nothing to learn.
        return
    scaled = loss if isinstance(scale, float) and scale == 1.0 else loss * scale
    scaled.backward() if backward is None else backward(scaled)


def autocasting(h: Any, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast for the forward pass of one block. Around a whole step, its cache would keep the cast weights alive."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(main_of(h).device.type, dtype)
