"""Mixup and CutMix by torchvision. The draws for a batch are a function of seed, epoch and the number of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localgrad.run.augment import MIX, draws


@dataclass(frozen=True)
class Mixing:
    """Mixes each image of a batch with the image before it, and their classes in the same shares.

    Each rank of data parallel mixes its own share of a batch. All ranks draw the same shares.

    Attributes:
        mixup: Mixup's alpha, 0 for none (Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018).
        cutmix: CutMix's alpha, 0 for none (Yun et al., "CutMix", ICCV 2019). With both, chance takes one for a batch.
        classes: The number of classes.
        size: The side of the images in pixels.
        seed: The seed of the run.
    """

    mixup: float
    cutmix: float
    classes: int
    size: int
    seed: int

    def __call__(self, x: Tensor | None, y: Tensor, epoch: int, batch: int) -> tuple[Tensor | None, Tensor]:
        """Mixes a batch.

        Args:
            x: Images, [B, C, H, W], or None if only the targets are needed.
            y: Classes, int64 [B].
            epoch: The number of the epoch.
            batch: The number of the batch in the epoch.

        Returns:
            The images, in their memory format, and the share of each class, float32 [B, classes].
        """
        from torchvision.transforms import v2

        kinds = [kind for kind, alpha in ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)) if alpha]
        seed, choice = (int(draw) for draw in draws(self.seed, epoch, np.array([batch]), 2, MIX)[0])
        kind = kinds[choice % len(kinds)]
        mix = kind(alpha=self.mixup if kind is v2.MixUp else self.cutmix, num_classes=self.classes)
        images = torch.zeros(len(y), 1, self.size, self.size, device=y.device) if x is None else x
        with torch.random.fork_rng(devices=()):  # torchvision draws from the global generator.
            torch.default_generator.manual_seed(seed % 2**63)
            mixed, shares = mix(images, y)
        if x is None:
            return None, shares
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return mixed.contiguous(memory_format=layout), shares
