"""What ranks of a pipeline send each other: the tensors that cross a boundary, in their memory layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

AHEAD = 2  # The number of messages of a kind that a rank may send before the receiver has got the first of them.


@dataclass(frozen=True)
class Layout:
    """The memory layout of a tensor that one rank sends to the next.

    The receiver restores it, because kernels round differently for another memory format.

    Attributes:
        order: The dimensions from the largest stride to the smallest.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, h: Tensor) -> Layout:
        return cls(tuple(h.shape), tuple(sorted(range(h.ndim), key=lambda d: -h.stride(d))), h.dtype)


@dataclass(frozen=True)
class Layouts:
    """The layouts of all tensors that cross, and the structure in which they cross."""

    own: tuple[Layout, ...]
    structure: TreeSpec

    @classmethod
    def of(cls, crossing: Any) -> Layouts:
        tensors, structure = tree_flatten(crossing)
        return cls(tuple(map(Layout.of, tensors)), structure)

    def __str__(self) -> str:
        return " and ".join(str(layout.shape) for layout in self.own)

    def pack(self, crossing: Any) -> list[Tensor]:
        """The tensors to send, each in the order of its memory."""
        pairs = zip(tree_flatten(crossing)[0], self.own, strict=True)
        return [h.permute(layout.order).contiguous() for h, layout in pairs]

    def empty(self, device: torch.device) -> list[Tensor]:
        """Tensors to receive into."""
        return [torch.empty([i.shape[d] for d in i.order], dtype=i.dtype, device=device) for i in self.own]

    def unpack(self, packed: list[Tensor]) -> Any:
        """What crosses, of the tensors that were received."""
        pairs = zip(packed, self.own, strict=True)
        return tree_unflatten([h.permute(np.argsort(layout.order).tolist()) for h, layout in pairs], self.structure)


@dataclass
class Message:
    """Tensors that travel in the background, each with the handle to wait for."""

    works: list[Any]
    tensors: list[Tensor]

    def wait(self) -> None:
        """Waits until all of them have travelled."""
        for work in self.works:
            work.wait()
