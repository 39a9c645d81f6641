"""Tries the criterion and the objectives of a model on targets, before a step or a plan begins.

A loss that a user gives is a black box, so it is called once for each kind of targets, on outputs of the right shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from localgrad.core.copies import undisturbed, without_values
from localgrad.core.errors import UserError, is_out_of_memory
from localgrad.core.task import Classification
from localgrad.core.trace import input_dtype

if TYPE_CHECKING:
    from localgrad.core.auxiliary import Auxiliary
    from localgrad.core.model import LocalModel

BATCH = 2  # A batch norm takes at least two samples.
Piece = tuple[str, Callable[[Any, Any], Any], Any]  # what it is, the loss, and what the loss reads


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
        for what, loss, output in self._pieces:
            _try(what, loss, tree_map_only(Tensor, lambda t: _with_values(t, count, device), output), targets)
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
            h: Any = torch.empty(
                BATCH, *copied.image, dtype=input_dtype(copied.backbone, copied.blocks[0].entering.dtype)
            )
            for k, block in enumerate(copied.blocks):
                h = block(h)
                for auxiliary in cast("list[Auxiliary]", copied.auxiliaries[k : k + 1]):
                    outputs = auxiliary(h)
                    found += [
                        (f"the objective of the head '{name}' of block {k}", term.objective, outputs[name])
                        for name, term in auxiliary.terms.items()
                        if term.against == "targets"
                    ]
    except Exception:  # A network may fail without values in many ways. Then the step shows what does not fit.
        return []
    return [("the criterion", copied.task.criterion, h), *found]


def _with_values(like: Tensor, count: int, device: torch.device) -> Tensor:
    """An output of `count` samples, with values that logits, probabilities and positive numbers may have."""
    shape = (count, *like.shape[1:]) if like.ndim and len(like) == BATCH else tuple(like.shape)
    value = 1 / max(1, shape[1]) if len(shape) > 1 else 0.5
    if not like.is_floating_point():
        return torch.zeros(shape, dtype=like.dtype, device=device)
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    return torch.full(shape, value, dtype=dtype, device=device, requires_grad=True)


def _try(what: str, loss: Callable[[Any, Any], Any], output: Any, targets: Any) -> None:
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
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(
                f"{what} does not take an output of {_said(output)} with targets of {_said(targets)}: {reason}"
            ) from error
    if not scalar:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"{what} returns {found} and not a scalar tensor: let it return a mean, as .mean() does")
    if leaves and not value.requires_grad:
        raise UserError(f"{what} returns a number that does not follow from the output: nothing can be trained by it")


def _said(tree: Any) -> str:
    """The shapes and dtypes in a tree, for a person."""
    if isinstance(tree, Tensor):
        return f"shape {tuple(tree.shape)} in {str(tree.dtype).removeprefix('torch.')}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {_said(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        return "(" + ", ".join(map(_said, tree)) + ")"
    return str(tree)
