"""The tensor that crosses between two units of a network, and the modules that turn it into a head's input."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Boundary:
    """A description of the tensor that crosses between two units. Heads read the tensor through `to_map` and `summary`.

    Attributes:
        shape: The shape of one sample.
        layout: The meaning of the dimensions: "NCHW" or "NHWC" feature maps, "NCL" maps of one row, as `nn.Conv1d` has
            them, "NLC" tokens, or "NC" vectors.
        stage: The number of changes of shape in the network before it.
        prefix: The number of tokens before those of the image. The class token is the first of them. Default: 0.
        grid: The height and width of the grid of the image's tokens. Default: one column.
        dtype: The dtype of the tensor without autocast. Default: float32.
    """

    shape: tuple[int, ...]
    layout: str
    stage: int
    prefix: int = 0
    grid: tuple[int, int] | None = None
    dtype: torch.dtype = field(default=torch.float32, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map or of the tokens' grid. A vector is a map of one pixel."""
        if self.layout == "NC":
            return 1, 1
        if self.layout == "NCL":
            return 1, self.shape[1]
        if self.layout == "NLC":
            return self.grid or (self.shape[0] - self.prefix, 1)
        height = self.layout.index("H") - 1
        return self.shape[height], self.shape[height + 1]

    @property
    def channels(self) -> int:
        """The number of channels of the map, tokens or vector."""
        return self.shape[0] if self.layout in ("NCHW", "NCL", "NC") else self.shape[-1]

    def to_map(self) -> list[nn.Module]:
        """Makes the modules that turn [B, *shape] into a map [B, C, H, W]. There are none if it is a map already."""
        if self.layout in ("NC", "NCL"):
            return [nn.Unflatten(1, (self.channels, 1, 1) if self.layout == "NC" else (self.channels, 1))]
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
