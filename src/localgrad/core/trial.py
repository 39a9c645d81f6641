"""Tries the criterion and the objectives of a model on targets, before a step or a plan begins.

A loss that a user gives is a black box, so it is called for each kind of targets, on outputs of the right shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only

from localgrad.core.copies import duplicate, undisturbed, without_values
from localgrad.core.errors import UserError, is_out_of_memory
from localgrad.core.hooks import without_hooks
from localgrad.core.task import Classification
from localgrad.core.trace import input_dtype

if TYPE_CHECKING:
    from localgrad.core.auxiliary import Auxiliary
    from localgrad.core.model import LocalModel

BATCH = 2  # A batch norm takes at least two samples.
DRAWS = 10  # With random signs of its parameters, a linear layer of one output gives no negative number once in 1000.
CPU = torch.device("cpu")
Loss = Callable[[Any, Any], Any]


class Piece(NamedTuple):
    """A loss of a model.

    Attributes:
        what: What it is, for a person.
        loss: A copy of the loss.
        output: What the loss reads, without values.
        block: The number of its block.
        head: The name of the head that it belongs to, or None for the network's own loss.
    """

    what: str
    loss: Loss
    output: Any
    block: int
    head: str | None


class Trial:
    """Tries the losses of one model, and remembers for which kinds of targets it has done so.

    Attributes:
        _task: The task that was tried.
        _pieces: Copies of its losses, each with an output without values. None before the first trial.
        _kinds: The kinds of targets that were tried.
    """

    def __init__(self) -> None:
        self._task: Any = None
        self._pieces: list[Piece] | None = None
        self._kinds: set[Hashable] = set()

    def check(self, model: LocalModel, targets: Any, device: torch.device) -> None:
        """Raises UserError if a loss of the model does not take such targets or returns no scalar.

        Args:
            model: The model.
            targets: The targets of a batch, which the task has checked.
            device: Where the outputs are.
        """
        tensors = [leaf for leaf in tree_leaves(targets) if isinstance(leaf, Tensor)]
        if type(model.task) is Classification or any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
            return  # Classification knows its targets, and a criterion may need values.
        if self._task is not model.task:
            self._task, self._pieces = model.task, None
            self._kinds.clear()
        kind = _kind(targets, device)
        if kind in self._kinds:
            return
        if self._pieces is None:
            self._pieces = _pieces(model)
        count = next((len(t) for t in tensors if t.ndim), BATCH)
        for piece in self._pieces:
            output = tree_map_only(Tensor, lambda t: _with_values(t, count, device), piece.output)
            _try(piece.what, piece.loss, output, targets)
            _try_numbers(model, piece, targets, min(count, BATCH))
        self._kinds.add(kind)


def _kind(targets: Any, device: torch.device) -> Hashable:
    """What tells targets from others that a loss may treat in another way.

    Whether there are negative integers is compared on the CPU only, because another device would make it wait. They are
    the usual sign of what is ignored, which objectives that compare classes cannot read.
    """
    leaves, structure = tree_flatten(targets)
    kinds: list[Hashable] = [str(structure), str(device)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            integer = not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)
            negative = integer and leaf.device.type == "cpu" and leaf.numel() > 0 and int(leaf.min()) < 0
            kinds.append((leaf.dtype, tuple(leaf.shape[1:]), leaf.ndim, str(leaf.device), negative))
        else:
            kinds.append(type(leaf))
    return tuple(kinds)


def _pieces(model: LocalModel) -> list[Piece]:
    """Runs a copy of the model without values: each loss of targets, with what it reads. Nothing if that fails."""
    found: list[Piece] = []
    try:
        copied = without_values(model, "meta")
        with undisturbed(torch.device("cpu")), torch.device("meta"):
            entering = copied.blocks[0].entering
            h = entering.random(BATCH, torch.device("meta"), input_dtype(copied.backbone, entering.dtype))
            for k, block in enumerate(copied.blocks):
                h = block(h)
                for auxiliary in cast("list[Auxiliary]", copied.auxiliaries[k : k + 1]):
                    outputs = auxiliary(h)
                    what = f"the objective of the head '{{}}' of block {k}"
                    found += [
                        Piece(what.format(name), term.objective, outputs[name], k, name)
                        for name, term in auxiliary.terms.items()
                        if term.against == "targets"
                    ]
    except Exception:  # A network may fail without values in many ways. Then the step shows what does not fit.
        return []
    return [Piece("the criterion", copied.task.criterion, h, len(copied.blocks) - 1, None), *found]


def _with_values(like: Tensor, count: int, device: torch.device) -> Tensor:
    """An output of `count` samples, with values that logits, probabilities and positive numbers may have."""
    shape = (count, *like.shape[1:]) if like.ndim and len(like) == BATCH else tuple(like.shape)
    value = 1 / max(1, shape[1]) if len(shape) > 1 else 0.5
    if not like.is_floating_point():
        return torch.zeros(shape, dtype=like.dtype, device=device)
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    return torch.full(shape, value, dtype=dtype, device=device, requires_grad=True)


def _try(what: str, loss: Loss, output: Any, targets: Any) -> None:
    """Raises UserError unless `loss(output, targets)` is a scalar with a gradient."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    device = leaves[0].device if leaves else torch.device("cpu")
    with undisturbed(device), torch.enable_grad():
        read = tree_map_only(Tensor, lambda t: t * 1 if t.requires_grad else t, output)  # It may be changed in place.
        try:
            value = loss(read, targets)
            scalar = isinstance(value, Tensor) and value.ndim == 0
            if scalar and value.requires_grad:
                torch.autograd.grad(value, leaves, allow_unused=True)
        except UserError:
            raise
        except Exception as error:  # A loss of a user fails in its own way.
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{what} does not take an output of {_said(output)} with targets of {_said(targets)}: {_reason(error)}"
            ) from error
    if not scalar:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"{what} returns {found} and not a scalar tensor: let it return a mean, as .mean() does")
    if leaves and not value.requires_grad:
        raise UserError(f"{what} returns a number that does not follow from the output: nothing can be trained by it")


def _try_numbers(model: LocalModel, piece: Piece, targets: Any, count: int) -> None:
    """Raises UserError if a loss refuses numbers that its output may have, as `nn.BCELoss()` refuses negative ones.

    All is tried on `count` samples, and on the CPU, because a GPU may fail for good after a number that is refused.
    """
    targets = tree_map_only(Tensor, lambda t: t[:count].cpu() if t.ndim else t.cpu(), targets)
    output = tree_map_only(Tensor, lambda t: _with_values(t, count, CPU), piece.output)
    signed = tree_map_only(Tensor, lambda t: _signed(t) if t.requires_grad else t, output)
    if _fault(piece.loss, output, targets) or not _fault(piece.loss, signed, targets):
        return
    try:
        given = tree_map_only(Tensor, lambda t: _farthest(t, count), _numbers(model, piece))
        numbers = torch.cat([leaf.flatten() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)])
    except Exception:  # What cannot be run here is shown by the step.
        return
    if reason := _fault(piece.loss, given, targets):
        whose = "the network" if piece.head is None else "that head"
        raise UserError(
            f"{piece.what} does not take numbers from {numbers.min():.2g} to {numbers.max():.2g}, which {whose} may "
            f"give: {reason}; let the network give logits, and take a criterion for them, as nn.BCEWithLogitsLoss()"
        )


def _signed(t: Tensor) -> Tensor:
    """Numbers of both signs, of the shape and dtype of t."""
    return torch.linspace(-2, 2, t.numel(), dtype=t.dtype).view_as(t)


def _fault(loss: Loss, output: Any, targets: Any) -> str | None:
    """The reason why a loss makes no finite number of an output, or None if it does."""
    with undisturbed(CPU):
        try:
            value = loss(output, targets)
        except Exception as error:  # A loss of a user fails in its own way.
            return _reason(error)
    return None if bool(torch.as_tensor(value).isfinite().all()) else f"the result is {float(value)}"


def _numbers(model: LocalModel, piece: Piece) -> Any:
    """Outputs of a head, or of the network, on random inputs. A copy of it runs, with random signs of its parameters.

    So its last layer gives numbers of both signs, unless a function such as a sigmoid follows it.
    """
    block = model.blocks[piece.block]
    part, before = (block, block.entering) if piece.head is None else (model.auxiliaries[piece.block], block.boundary)
    copied = without_hooks(duplicate(part))
    device, dtype = next(copied.parameters()).device, input_dtype(copied, before.dtype)
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    found = []
    with undisturbed(device):
        for _ in range(DRAWS):
            for parameter in copied.parameters():
                parameter.mul_(draw(parameter.shape).sign())
            output = copied(draw((BATCH, *before.shape)).to(dtype))
            found.append(output if piece.head is None else output[piece.head])
    return tree_map(lambda *outputs: torch.cat(outputs).cpu(), *found)


def _farthest(t: Tensor, count: int) -> Tensor:
    """As many samples of t, by turns the one with the least number and the one with the largest, in full precision."""
    rows = t.reshape(len(t), -1)
    picked = torch.stack([rows.amin(1).argmin(), rows.amax(1).argmax()])[torch.arange(count) % 2]
    return t[picked].to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t[picked]


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _said(tree: Any) -> str:
    """The shapes and dtypes in a tree, for a person."""
    if isinstance(tree, Tensor):
        return f"shape {tuple(tree.shape)} in {str(tree.dtype).removeprefix('torch.')}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {_said(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        return "(" + ", ".join(map(_said, tree)) + ")"
    return str(tree)
