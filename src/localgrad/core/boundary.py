"""What crosses between two units of a network, and the modules that turn it into a head's input.

One tensor crosses, [B, *shape], or several do. Then one of them is the main tensor, which heads read, and the others
are passengers, such as the maps that a U-Net keeps for its decoder. They cross as a dictionary, the main tensor first:

    {"main": h, "encoder_layer1": skip, ...}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

MAIN = "main"


def main_of(crossing: Any) -> Tensor:
    """The tensor that heads read: what crosses itself, or the main one of several tensors."""
    return crossing[MAIN] if isinstance(crossing, dict) else crossing


def with_main(crossing: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What crosses, with another main tensor, and with the same passengers.

    Args:
        crossing: A tensor, or a dictionary of several.
        change: Takes the main tensor and returns another one.
    """
    return {**crossing, MAIN: change(crossing[MAIN])} if isinstance(crossing, dict) else change(crossing)


def detached(crossing: Any) -> Any:
    """What crosses, without a graph."""
    return tree_map_only(Tensor, Tensor.detach, crossing)


@dataclass(frozen=True)
class Passenger:
    """A description of a tensor that crosses beside the main one, because a later unit reads it.

    Attributes:
        name: Its key in the dictionary of what crosses, which is that of the step that makes it.
        shape: Its whole shape. Sizes that follow the batch are negative: -1 is the size of the batch, -2 twice that.
        dtype: Its dtype without autocast.
        made_by: The name of the module that makes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: str

    def sized(self, batch: int) -> tuple[int, ...]:
        """Its shape for a batch of so many samples."""
        return tuple(size if size >= 0 else -size * batch for size in self.shape)


@dataclass(frozen=True)
class Boundary:
    """A description of the tensor that crosses between two units. Heads read the tensor through `to_map` and `summary`.

    Attributes:
        shape: The shape of one sample.
        layout: The meaning of the dimensions: "NCHW" or "NHWC" feature maps, "NCL" maps of one row, as `nn.Conv1d` has
            them, "NCDHW" maps of volumes or videos, "NLC" tokens, or "NC" vectors.
        stage: The number of changes of shape in the network before it.
        prefix: The number of tokens before those of the image. The class token is the first of them. Default: 0.
        grid: The height and width of the grid of the image's tokens. Default: one column.
        dtype: The dtype of the tensor without autocast. Default: float32.
        passengers: The other tensors that cross there. Default: none.
    """

    shape: tuple[int, ...]
    layout: str
    stage: int
    prefix: int = 0
    grid: tuple[int, int] | None = None
    dtype: torch.dtype = field(default=torch.float32, repr=False)
    passengers: tuple[Passenger, ...] = field(default=(), repr=False)

    def random(self, batch: int, device: torch.device, main_dtype: torch.dtype | None = None) -> Any:
        """Makes what crosses for a batch of so many samples: random real numbers, and zeros of other dtypes.

        Args:
            batch: The number of samples.
            device: Where the tensors are.
            main_dtype: The dtype of the main tensor. Default: its own.
        """

        def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            real = dtype.is_floating_point
            return (torch.randn if real else torch.zeros)(shape, dtype=dtype, device=device)

        main = drawn((batch, *self.shape), main_dtype or self.dtype)
        if not self.passengers:
            return main
        return {MAIN: main, **{p.name: drawn(p.sized(batch), p.dtype) for p in self.passengers}}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map or of the tokens' grid. A vector is a map of one pixel."""
        if self.layout == "NC":
            return 1, 1
        if self.layout == "NCL":
            return 1, self.shape[1]
        if self.layout == "NCDHW":  # The slices of a volume are read as one map, one below the other.
            return self.shape[1] * self.shape[2], self.shape[3]
        if self.layout == "NLC":
            return self.grid or (self.shape[0] - self.prefix, 1)
        height = self.layout.index("H") - 1
        return self.shape[height], self.shape[height + 1]

    @property
    def channels(self) -> int:
        """The number of channels of the map, tokens or vector."""
        return self.shape[0] if self.layout in ("NCHW", "NCL", "NCDHW", "NC") else self.shape[-1]

    def to_map(self) -> list[nn.Module]:
        """Makes the modules that turn [B, *shape] into a map [B, C, H, W]. There are none if it is a map already."""
        if self.layout in ("NC", "NCL"):
            return [nn.Unflatten(1, (self.channels, 1, 1) if self.layout == "NC" else (self.channels, 1))]
        if self.layout == "NCDHW":
            return [nn.Flatten(2, 3)]
        return [] if self.layout == "NCHW" else [ToMap(self.size, self.prefix)]

    def summary(self, *, grid: bool = False) -> tuple[list[nn.Module], Boundary]:
        """Makes the modules that take a classifier's input from [B, *shape], and the boundary behind them.

        The input is the class token, or everything if there is none. Where channels come last, a layer norm comes
        first, as in transformers' own heads and in MAN++'s published code, because transformers do not normalise the
        tensors between their units.

        Args:
            grid: Whether to take everything even if there is a class token. Default: False.
        """
        norm: list[nn.Module] = [nn.LayerNorm(self.channels)] if self.layout in ("NLC", "NHWC") else []
        if grid or not self.prefix:
            return norm, self
        return [ClassToken(), *norm], Boundary((self.channels,), "NC", self.stage, dtype=self.dtype)


class Named(nn.Module):
    """Makes a dictionary of another class, such as those of transformers, or names a tensor in one.

    Args:
        kind: The class.
        name: The name of the tensor. Default: the input is a dictionary.
    """

    def __init__(self, kind: Callable[..., Any], name: str | None = None) -> None:
        super().__init__()
        self.kind, self.name = kind, name

    def forward(self, h: Any) -> Any:
        return self.kind(**(h if self.name is None else {self.name: h}))


class ToMap(nn.Module):
    """[B, prefix + H * W, C] or [B, H, W, C] -> [B, C, H, W]."""

    def __init__(self, size: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.size, self.prefix = size, prefix

    def forward(self, h: Tensor) -> Tensor:
        tokens = h[:, self.prefix :] if h.ndim == 3 else h.flatten(1, 2)
        return tokens.mT.unflatten(2, self.size)

    def extra_repr(self) -> str:
        return f"{self.size}, prefix={self.prefix}"


class ClassToken(nn.Module):
    """[B, L, C] -> [B, C], the first token."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, 0]


def full_precision(x: Tensor) -> Tensor:
    """Converts half precision, which autocast may leave, to float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
