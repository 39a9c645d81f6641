"""The task of a network: its criterion, metrics, check of targets, and the last layers of a head.

Image classification is the default, and `Segmentation` gives each pixel a class. `AnyLoss` is the task of a criterion
that a user gives. A user's own task is any object with the methods of `Task`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from localgrad.core import heads
from localgrad.core.boundary import Boundary, Named
from localgrad.core.errors import UserError

ROUNDING = 0.02  # By so much the shares of the classes may add up to something else than 1: they may be bfloat16.


class Task(Protocol):
    """What the engine, the heads and the planner ask of a task. A task of your own is an object with these methods.

    Its targets are a tensor, or a tuple, list or dictionary of tensors, each with the batch as its first dimension.
    `lg.predsim()` also reads its `classes`, the number of classes, if it has any. Two methods more may be there:
    `head(boundary)` makes a whole head in the place of the method's own, as for a class of each pixel, or returns None,
    and `check_inputs(x, targets)` raises UserError for inputs that do not belong to the task or to these targets.
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
        """Sums over the batch by name, which add up over batches. A step does not ask for them."""
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
        """The shape of one sample if the network gives a vector for each position: [C, H, W], [C, D, H, W], [C, L]
        or [L, C]. Else None."""
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

    def head(self, boundary: Boundary) -> nn.Module | None:
        """A head that gives a vector for each position, if the network does. Else None."""
        return None if self.dense is None else self.as_network_gives(heads.dense(boundary, self.dense))

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

    score: ClassVar[str] = "top1"  # The name of the score that decides, of those in `scores`.

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
            "count": the number of samples.
        """
        targets = targets.argmax(1) if targets.is_floating_point() else targets  # Of shares, the largest counts.
        ranked = output.topk(min(5, self.classes), dim=1).indices
        hits = ranked == targets[:, None]
        loss = F.cross_entropy(output.float(), targets, reduction="sum")
        return {"top1": hits[:, :1].sum(), "top5": hits.sum(), "loss": loss, "count": torch.tensor(len(targets))}

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """From sums of `metrics` over batches to the mean loss, and the top-1 and top-5 accuracy in percent."""
        count = float(sums["count"])
        accuracies = {name: 100 * float(sums[name]) / count for name in ("top1", "top5")}
        return {"loss": float(sums["loss"]) / count, **accuracies}

    def check_output(self, gives: Any) -> None:
        """Raises UserError unless the network gives one vector of logits a sample, one for each class."""
        match gives:
            case (int() as logits,):
                pass
            case _:
                raise UserError(
                    f"the backbone gives {gives}, not one vector of logits a sample: pass a criterion or a task of "
                    "your own"
                )
        if logits != self.classes:
            raise UserError(
                f"the backbone gives {logits} logits a sample for a task of {self.classes} classes: make it with "
                f"{self.classes} outputs"
            )

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


@dataclass(frozen=True)
class Segmentation:
    """Semantic segmentation, a class for each pixel, by cross-entropy.

    The network returns logits [B, classes, h, w], or a dictionary that has them as "out", as torchvision's networks do.
    A head is one 1x1 convolution. Logits of another size than the masks are resized to them (bilinear), as in InfoPro's
    segmentation (ICLR 2021), so a head's logits cost no more memory than its map.

    Attributes:
        classes: The number of classes, at least 2.
        ignore_index: The value of pixels that have no class and do not count. Default: 255.
        label_smoothing: From 0 to below 1. Default: 0.

    Raises:
        UserError: A number is out of its range, or the ignored value is a class.
    """

    score: ClassVar[str] = "miou"

    classes: int
    ignore_index: int = 255
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        Classification(self.classes, self.label_smoothing)  # It has the same limits.
        if 0 <= self.ignore_index < self.classes:
            raise UserError(
                f"ignore_index takes a value that is no class, and {self.ignore_index} is one of {self.classes}"
            )

    def head(self, boundary: Boundary) -> nn.Module:
        """One 1x1 convolution: [B, *boundary.shape] -> [B, classes, h, w], with the size of the boundary's map."""
        return heads.dense(boundary, (self.classes, *boundary.size))

    def output(self, features: int) -> nn.Module:
        """A layer that gives all pixels the same logits, for a head that reads a vector: [B, features] -> [B, classes,
        1, 1]."""
        return nn.Sequential(nn.Linear(features, self.classes), nn.Unflatten(1, (self.classes, 1, 1)))

    def criterion(self, output: Tensor | dict[str, Tensor], targets: Tensor) -> Tensor:
        """Cross-entropy, mean over the pixels that count, or 0 if none does.

        Args:
            output: Logits [B, classes, h, w] in float32 or wider, or a dictionary with them as "out".
            targets: Masks, int64 [B, H, W].
        """
        counted = (targets != self.ignore_index).sum()
        return self._loss(self._logits(output, targets), targets, self.label_smoothing) / counted.clamp(min=1)

    def metrics(self, output: Tensor | dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, so that batches of any size add up.

        Returns:
            "confusion": [classes, classes], the number of pixels of each class, by row, that each class was given to.
            "loss": the cross-entropy without label smoothing.
        """
        logits = self._logits(output, targets).float()
        counted = targets != self.ignore_index
        pairs = targets[counted] * self.classes + logits.argmax(1)[counted]
        confusion = torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)
        return {"confusion": confusion, "loss": self._loss(logits, targets, 0.0)}

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """From sums of `metrics` over batches to the mean loss, mIoU and pixel accuracy, the last two in percent.

        mIoU is the mean over classes of intersection / union over all pixels of all batches. A class that neither a
        mask nor a prediction has does not count.
        """
        confusion = sums["confusion"].double()
        pixels = max(1.0, float(confusion.sum()))
        hits = confusion.diagonal()
        unions = confusion.sum(0) + confusion.sum(1) - hits
        there = unions > 0
        miou = float((hits[there] / unions[there]).mean()) if bool(there.any()) else 0.0
        accuracy = float(hits.sum()) / pixels
        return {"loss": float(sums["loss"]) / pixels, "miou": 100 * miou, "pixel_accuracy": 100 * accuracy}

    def check_output(self, gives: Any) -> None:
        """Raises UserError unless the network gives a map of logits, one for each class."""
        match gives["out"] if isinstance(gives, dict) and "out" in gives else gives:
            case (self.classes, int(), int()):
                return
        raise UserError(
            f"the backbone gives {gives} for a sample, and segmentation into {self.classes} classes takes logits "
            f"[{self.classes}, height, width], alone or as 'out' of a dictionary: take a network such as "
            "torchvision:fcn_resnet50"
        )

    def check_targets(self, targets: Tensor) -> None:
        """Raises UserError unless targets are int64 masks [B, H, W] of classes and of the ignored value.

        Values are compared on the CPU only, because reading them from another device would make it wait.
        """
        if not isinstance(targets, Tensor) or targets.ndim != 3 or targets.dtype != torch.int64:
            tensor = isinstance(targets, Tensor)
            found = f"{tuple(targets.shape)} {targets.dtype}" if tensor else f"a {type(targets).__name__}"
            raise UserError(f"targets must be int64 masks [B, height, width], a class for each pixel, not {found}")
        if targets.device.type != "cpu":
            return
        if wrong := other_values(targets, self.classes, self.ignore_index):
            raise UserError(
                f"the masks have the value {wrong[0]}, but the classes are 0 to {self.classes - 1}, and "
                f"{self.ignore_index} is a pixel without one"
            )

    def _logits(self, output: Tensor | dict[str, Tensor], targets: Tensor) -> Tensor:
        """The logits, with the size of the masks."""
        logits = output["out"] if isinstance(output, dict) else output
        if logits.shape[2:] == targets.shape[1:]:
            return logits
        return F.interpolate(logits, targets.shape[1:], mode="bilinear")

    def _loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """The sum over all pixels that count."""
        how = {"ignore_index": self.ignore_index, "label_smoothing": smoothing}
        return F.cross_entropy(logits, targets, reduction="sum", **how)


def other_values(masks: Tensor, classes: int, ignored: int) -> list[int]:
    """The values of masks that are neither a class nor the ignored value, in order."""
    return [int(value) for value in masks.unique() if not (0 <= value < classes or value == ignored)]
