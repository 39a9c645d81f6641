"""What crosses between two units of a network, and the modules that turn it into what a head reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Boundary:
    """What crosses between two units: the shape of one sample, its layout, and how many shape changes came before.

    layout: "NCHW" or "NHWC" feature maps, "NCL" maps of one row, as `nn.Conv1d` has them, "NLC" tokens or "NC" vectors.
    prefix: tokens before those of the image, the class token first. grid: on which those of the image lie. dtype: in
    which it arrives, without autocast. Heads read
    it through `to_map` and `summary`; nobody guesses from `ndim`.
    """

    shape: tuple[int, ...]
    layout: str
    stage: int
    prefix: int = 0
    grid: tuple[int, int] | None = None
    dtype: torch.dtype = field(default=torch.float32, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map, or of the tokens' grid; a vector is a map of one pixel."""
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
        return self.shape[0] if self.layout in ("NCHW", "NCL", "NC") else self.shape[-1]

    def to_map(self) -> list[nn.Module]:
        """Modules that turn what crosses, [B, *shape], into a map [B, C, H, W]: none where it is one already."""
        if self.layout in ("NC", "NCL"):
            return [nn.Unflatten(1, (self.channels, 1, 1) if self.layout == "NC" else (self.channels, 1))]
        return [] if self.layout == "NCHW" else [ToMap(self.size, self.prefix)]

    def summary(self) -> tuple[list[nn.Module], Boundary]:
        """What a classifier reads, and the modules that take it from [B, *shape]: the class token, or all there is.

        Where channels come last they are normed first, as transformers' own heads do: what runs between their layers
        is not. So does MAN++'s published code for vision transformers.
        """
        norm: list[nn.Module] = [nn.LayerNorm(self.channels)] if self.layout in ("NLC", "NHWC") else []
        if not self.prefix:
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
