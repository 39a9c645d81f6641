"""The task of a network: its criterion, metrics, check of targets, and the last layer of a head.

Image classification is the only task here. Another task is another class with the methods of `Task`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.core.errors import UserError


class Task(Protocol):
    """What the engine, the heads and the training loop need of a task. `Classification` says what each method does."""

    @property
    def classes(self) -> int: ...

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor: ...

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]: ...

    def check_targets(self, targets: Tensor) -> None: ...

    def output(self, features: int) -> nn.Module: ...


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
                "network of one output takes a task of its own"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"classification takes a label smoothing from 0 to below 1, not {self.label_smoothing}")

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, mean over the batch, of logits [B, classes] in float32 or wider and int64 targets [B].

        Targets may also be the share of each class, floats [B, classes].
        """
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, so that batches of any size add up.

        Returns:
            "top1" and "top5": the number of samples whose class is the first, or among the first five.
            "loss": the cross-entropy without label smoothing.
        """
        ranked = logits.topk(min(5, self.classes), dim=1).indices
        hits = ranked == targets[:, None]
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return {"top1": hits[:, :1].sum(), "top5": hits.sum(), "loss": loss}

    def check_targets(self, targets: Tensor) -> None:
        """Raises UserError unless targets are int64 classes [B], or the share of each class, floats [B, classes].

        Values are compared on the CPU only, because reading them from another device would make it wait.
        """
        if not isinstance(targets, Tensor):
            raise UserError(f"targets must be a tensor of one int64 class a sample, not a {type(targets).__name__}")
        if targets.is_floating_point() and targets.ndim == 2 and targets.shape[1] == self.classes:
            return
        if targets.ndim != 1 or targets.dtype != torch.int64:
            raise UserError(f"targets must be one int64 class a sample, not {tuple(targets.shape)} {targets.dtype}")
        if (
            targets.device.type == "cpu"
            and targets.numel()
            and not 0 <= int(targets.min()) <= int(targets.max()) < self.classes
        ):
            low, high = int(targets.min()), int(targets.max())
            raise UserError(f"targets run from {low} to {high}, but the network has {self.classes} classes")

    def output(self, features: int) -> nn.Module:
        """The last layer of a head: [B, features] -> [B, classes]."""
        return nn.Linear(features, self.classes)
