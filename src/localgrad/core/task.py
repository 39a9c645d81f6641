"""The task of a network: its criterion, metrics, check of targets, and the last layer of a head.

Image classification is the default. `AnyLoss` is the task of a criterion that a user gives. A user's own task is any
object with the methods of `Task`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from localgrad.core.boundary import Named
from localgrad.core.errors import UserError

ROUNDING = 0.02  # By so much the shares of the classes may add up to something else than 1: they may be bfloat16.


class Task(Protocol):
    """What the engine, the heads and the planner ask of a task. A task of your own is an object with these methods.

    Its targets are a tensor, or a tuple, list or dictionary of tensors, each with the batch as its first dimension.
    `lg.predsim()` also reads its `classes`, the number of classes, if it has any.
    """

    def criterion(self, output: Any, targets: Any, /) -> Tensor:
        """The loss, a scalar.

        Args:
            output: The output of the network as it is, such as a dictionary, or that of a head. Its tensors are in
                float32 or wider.
            targets: The targets as they are given to the step.
        """
        ...

    def metrics(self, output: Any, targets: Any, /) -> dict[str, Tensor]:
        """Sums over the batch by name. `localgrad train` shows them, and a step of your own loop does not ask."""
        ...

    def check_targets(self, targets: Any, /) -> None:
        """Raises UserError if the targets are not of the kind that the criterion takes."""
        ...

    def output(self, features: int, /) -> nn.Module:
        """The last layer of a head: [B, features] -> what the criterion reads, such as [B, classes]."""
        ...


@dataclass(frozen=True, eq=False)
class AnyLoss:
    """The task of a criterion that a user gives, which reads the outputs of heads as it reads the network's.

    Attributes:
        loss: Called as `loss(output, targets)`. It returns a scalar.
        gives: The shapes of one sample of what the network returns, in the structure in which it returns them.
    """

    loss: Callable[[Any, Any], Tensor]
    gives: Any

    @property
    def classes(self) -> int | None:
        """The length of the vector that the network gives for a sample, or None if it gives something else."""
        match self._shape:
            case (int() as count,):
                return count
        return None

    @property
    def dense(self) -> tuple[int, ...] | None:
        """The shape of one sample if the network gives a vector for each position: [C, H, W], [C, D, H, W] or [L, C].
        Else None."""
        shape = self._shape
        numbers = isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)
        return shape if numbers and 2 <= len(shape) <= 4 else None

    @property
    def _shape(self) -> Any:
        """What the network gives, without the dictionary around a single tensor."""
        single = isinstance(self.gives, dict) and len(self.gives) == 1
        return next(iter(self.gives.values())) if single else self.gives

    def as_network_gives(self, head: nn.Module) -> nn.Module:
        """A head whose output lies in a dictionary, if that of the network does."""
        if not isinstance(self.gives, dict):
            return head
        return nn.Sequential(head, Named(type(self.gives), next(iter(self.gives))))

    def criterion(self, output: Any, targets: Any) -> Tensor:
        """The loss of the network's output or of a head's."""
        return self.loss(output, targets)

    def metrics(self, output: Any, targets: Any) -> dict[str, Tensor]:
        """The loss, times the number of samples."""
        return {"loss": self.loss(output, targets) * len(tree_leaves(output)[0])}

    def check_targets(self, targets: Any) -> None:
        """Raises UserError unless targets are a tensor, or a tree of tensors and of numbers for the whole batch."""
        leaves = tree_leaves(targets)
        wrong = [leaf for leaf in leaves if not isinstance(leaf, Tensor | Real | None)]
        if wrong or not any(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
            kind = type(wrong[0] if wrong else targets).__name__
            raise UserError(
                "targets take a tensor with the batch first, or a tuple, list or dictionary of such tensors, not a "
                f"{kind}"
            )

    def output(self, features: int) -> nn.Module:
        """The last layer of a head: [B, features] -> [B, n], or [B] where the network gives one number a sample.

        Raises:
            UserError: The network gives something else.
        """
        match self._shape:
            case (int() as count,):
                return self.as_network_gives(nn.Linear(features, count))
            case ():
                return self.as_network_gives(nn.Sequential(nn.Linear(features, 1), nn.Flatten(0)))
        raise UserError(
            f"the backbone gives {self.gives}, and a head can give a number or a vector of numbers a sample, or a "
            "vector for each position: train it in one block, by lg.bp(), or pass a task of your own"
        )


@dataclass(frozen=True)
class Classification:
    """Image classification by cross-entropy, for the network and for its auxiliaries.

    Attributes:
        classes: The number of classes, at least 2.
        label_smoothing: From 0 to below 1. Default: 0.

    Raises:
        UserError: A number is out of its range.
    """

    classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UserError(
                f"classification takes at least 2 classes, not {self.classes}: the cross-entropy of one is always 0; a "
                "network of one output takes a criterion of its own"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"classification takes a label smoothing from 0 to below 1, not {self.label_smoothing}")

    def criterion(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, mean over the batch, of logits [B, classes] in float32 or wider and int64 targets [B].

        Targets may also be the share of each class, floats [B, classes].
        """
        return F.cross_entropy(output, targets, label_smoothing=self.label_smoothing)

    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, so that batches of any size add up.

        Returns:
            "top1" and "top5": the number of samples whose class is the first, or among the first five.
            "loss": the cross-entropy without label smoothing.
        """
        ranked = output.topk(min(5, self.classes), dim=1).indices
        hits = ranked == targets[:, None]
        loss = F.cross_entropy(output.float(), targets, reduction="sum")
        return {"top1": hits[:, :1].sum(), "top5": hits.sum(), "loss": loss}

    def check_targets(self, targets: Tensor) -> None:
        """Raises UserError unless targets are int64 classes [B], or the share of each class, floats [B, classes].

        Values are compared on the CPU only, because reading them from another device would make it wait.
        """
        other = "; other targets take a criterion of your own (localize(..., criterion=...))"
        here = isinstance(targets, Tensor) and targets.device.type == "cpu" and targets.numel() > 0
        if not isinstance(targets, Tensor):
            kind = type(targets).__name__
            raise UserError(f"targets must be a tensor of one int64 class a sample, not a {kind}{other}")
        if targets.is_floating_point() and targets.ndim == 2 and targets.shape[1] == self.classes:
            if not here or (targets.min() >= 0 and (targets.double().sum(1) - 1).abs().max() <= ROUNDING):
                return
            raise UserError(
                "targets of floats [B, classes] are the share of each class, from 0 to 1 with a sum of 1 a sample, and "
                f"these are not{other}"
            )
        if targets.ndim != 1 or targets.dtype != torch.int64:
            found = f"{tuple(targets.shape)} {targets.dtype}"
            raise UserError(f"targets must be one int64 class a sample, not {found}{other}")
        if here and not 0 <= int(targets.min()) <= int(targets.max()) < self.classes:
            low, high = int(targets.min()), int(targets.max())
            ignored = "; to ignore a class, pass criterion=nn.CrossEntropyLoss(ignore_index=...)" if low < 0 else ""
            raise UserError(f"targets run from {low} to {high}, but the network has {self.classes} classes{ignored}")

    def output(self, features: int) -> nn.Module:
        """The last layer of a head: [B, features] -> [B, classes]."""
        return nn.Linear(features, self.classes)
