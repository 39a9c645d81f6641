"""What a network is given: one tensor, or several in a tuple or by name, as its forward takes them.

Several tensors enter the first block as they cross between blocks: as a dictionary with the main one first, which is
that of real numbers with the most to read, such as images, or else the first, such as the numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from localgrad.core.boundary import MAIN, Passenger
from localgrad.core.errors import UserError

LABELS = "labels"  # In a dictionary, this key holds the targets.


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The input tensors of a batch by name, the main one first.

    Args:
        batch: A tensor [B, ...], a tuple of the arguments of the network's forward, or a dictionary of them by name, of
            which `labels` is left out.
    """
    if isinstance(batch, Tensor):
        return {"x": batch}
    named = dict(batch.items()) if isinstance(batch, Mapping) else {f"x{i}": t for i, t in enumerate(batch)}
    named.pop(LABELS, None)
    main = next((name for name, t in named.items() if t.is_floating_point() and t.ndim > 1), next(iter(named)))
    return {main: named.pop(main), **named}


def main_input(batch: Any) -> Tensor:
    """The main one of the tensors of a batch, which has the batch first."""
    return next(iter(tensors_of(batch).values()))


def rows(batch: Any, index: Any) -> Any:
    """Some samples of a batch. Its tensors without the batch as their first dimension stay as they are."""
    count = len(main_input(batch))

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[index] if tensor.ndim and len(tensor) == count else tensor

    if isinstance(batch, Tensor):
        return chosen(batch)
    if isinstance(batch, Mapping):
        return {name: chosen(tensor) for name, tensor in batch.items()}
    return tuple(map(chosen, batch))


def resized(batch: Any, count: int, change: Any) -> Any:
    """A batch of another number of samples.

    Args:
        batch: The batch.
        count: The number of samples.
        change: Makes a tensor of each: called with the tensor and its new shape.
    """
    before = len(main_input(batch))

    def other(tensor: Tensor) -> Tensor:
        batched = tensor.ndim > 0 and len(tensor) == before
        return change(tensor, (count, *tensor.shape[1:]) if batched else tuple(tensor.shape))

    if isinstance(batch, Tensor):
        return other(batch)
    if isinstance(batch, Mapping):
        return {name: other(tensor) for name, tensor in batch.items() if name != LABELS}
    return tuple(map(other, batch))


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of the network's forward, in order and by name."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {name: tensor for name, tensor in batch.items() if name != LABELS}
    return tuple(batch), {}


@dataclass(frozen=True)
class Inputs:
    """The inputs that a model was cut for.

    Attributes:
        kind: What a batch is: "a tensor", "a tuple" or "a dictionary".
        names: The names of its tensors, the main one first.
        passengers: How the others enter the first block, in the same order.
    """

    kind: str
    names: tuple[str, ...]
    passengers: tuple[Passenger, ...]

    @classmethod
    def of(cls, example: Any, passengers: tuple[Passenger, ...]) -> Inputs:
        """The inputs of an example."""
        return cls(kind_of(example), tuple(tensors_of(example)), passengers)

    def crossing(self, batch: Any) -> Any:
        """What enters the first block: a tensor, or a dictionary of tensors with the main one first.

        Raises:
            UserError: The batch has another structure than the example, or one of its tensors beside the main one has
                another shape.
        """
        check_inputs("x", batch)
        named = tensors_of(batch)
        if kind_of(batch) != self.kind or set(named) != set(self.names):
            given = f"{kind_of(batch)} of {', '.join(named)}" if len(named) > 1 else kind_of(batch)
            wanted = f"{self.kind} of {', '.join(self.names)}" if len(self.names) > 1 else self.kind
            raise UserError(f"x is {given}, and this model was localized for {wanted}")
        if self.kind == "a tensor":
            return batch
        main, *others = self.names
        count, crossing = len(named[main]), {MAIN: named[main]}
        for name, passenger in zip(others, self.passengers, strict=True):
            given, wanted = tuple(named[name].shape), passenger.sized(count)
            # One row for all samples takes the place of a row for each of them, and the other way round.
            alike = given[:1] == wanted[:1] or {*given[:1], *wanted[:1]} <= {1, count}
            if given[1:] != wanted[1:] or not alike:
                raise UserError(
                    f"{name} of shape {given}: this model was localized for {wanted} in a batch of {count}: pad, crop "
                    "or resize each batch to that"
                )
            crossing[passenger.name] = named[name]
        return crossing

    def rows(self, batch: Any, index: slice) -> Any:
        """Some samples of a batch. Its tensors that have no row for each sample in the example stay whole.

        Raises:
            UserError: As `crossing` does.
        """
        self.crossing(batch)
        some, pairs = rows(batch, index), zip(self.names[1:], self.passengers, strict=True)
        whole = {name: tensors_of(batch)[name] for name, p in pairs if p.shape[:1] != (-1,)}
        if isinstance(batch, tuple):
            return tuple(whole.get(f"x{i}", tensor) for i, tensor in enumerate(some))
        return {**some, **whole} if whole else some

    def batch(self, crossing: Any) -> Any:
        """The batch that enters the first block as `crossing`."""
        if self.kind == "a tensor":
            return crossing
        named = dict(zip(self.names, crossing.values(), strict=True))
        return named if self.kind == "a dictionary" else tuple(named[f"x{i}"] for i in range(len(named)))


def kind_of(batch: Any) -> str:
    """What a batch is, for a person."""
    if isinstance(batch, Tensor):
        return "a tensor"
    return "a dictionary" if isinstance(batch, Mapping) else "a tuple"


def check_inputs(name: str, batch: Any) -> None:
    """Raises UserError unless a batch, the argument of this name, is a tensor, or a tuple or dictionary of tensors."""
    values = (
        list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, tuple) else [batch]
    )
    wrong = [value for value in values if not isinstance(value, Tensor)]
    if values and not wrong:
        return
    if isinstance(batch, np.ndarray):
        raise UserError(f"{name} takes a tensor, not an array of numpy: torch.from_numpy(...) makes one")
    kind = type(wrong[0] if wrong else batch).__name__
    raise UserError(
        f"{name} takes a tensor, or a tuple or dictionary of tensors as the network's forward takes them, not "
        f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
    )


def targets_of(batch: Any, targets: Any) -> Any:
    """The targets of a batch: those that are given, or its labels."""
    if targets is None and isinstance(batch, Mapping) and LABELS in batch:
        return batch[LABELS]
    return targets


def check_batched(targets: Any, count: int) -> None:
    """Raises UserError if targets are a list with a dictionary for each of `count` samples, as in torchvision's
    detection.

    A list of dictionaries whose tensors have a row for each sample is taken, unless each has "boxes" [N, 4], of which
    an image may have as many as there are images.
    """
    if not (isinstance(targets, list | tuple) and targets and all(isinstance(t, Mapping) for t in targets)):
        return
    lengths = {len(leaf) for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.ndim}
    each = len(targets) == count and (lengths != {count} or all("boxes" in t and t["boxes"].ndim == 2 for t in targets))
    if each or len(lengths) > 1:
        raise UserError(
            "targets are a list with a dictionary for each sample, but each tensor must have the batch as its first "
            'dimension: pad all samples to the same number of rows and stack them, such as "boxes" [B, N, 4] and '
            '"labels" [B, N] in examples/detection.py'
        )
