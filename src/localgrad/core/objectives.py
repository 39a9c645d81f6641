"""Local losses, as pure functions that return a scalar, and how weights change over the depth of the network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from localgrad.core.errors import UserError


def reconstruction(logits: Tensor, images: Tensor) -> Tensor:
    """Binary cross-entropy between a decoder's output and the image, mean over all pixels and channels.

    Source: InfoPro (ICLR 2021), eq. 6 with the Bernoulli likelihood of its section 4.

    Args:
        logits: [B, C, H, W], before the sigmoid, because that is stable under autocast.
        images: [B, C, H, W] in [0, 1], or [B, C, L], tokens [B, L, C] or vectors [B, C], which are compared as maps.
    """
    if images.ndim == 3:
        images = images.unsqueeze(2) if logits.shape[2] == 1 else images.mT.unsqueeze(3)
    return F.binary_cross_entropy_with_logits(logits, images[..., None, None] if images.ndim == 2 else images)


def supervised_contrastive(features: Tensor, targets: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss, which pulls samples of one class together on the unit sphere.

    For each anchor i with positives P(i) it is
    -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)), mean over the batch. An anchor
    without a positive counts as 0. Source: Khosla et al., "Supervised contrastive learning" (NeurIPS 2020), eq. 2.

    Args:
        features: [B, D]. They are normalised here.
        targets: The class of each sample, [B].
        temperature: t, above 0. Default: 0.07.

    Raises:
        UserError: The targets are soft, or say several classes a sample, so that it is open what a positive is.
    """
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        raise UserError(
            "the supervised contrastive loss compares samples by one class each, as integers [B], not by "
            f"{_said(targets)}: leave contrast out"
        )
    if _ignores(targets):
        raise UserError("the supervised contrastive loss cannot leave samples out, as an ignored index asks for")
    if len(features) < 2:
        return features.sum() * 0
    z = F.normalize(features, dim=1)
    similarity = z @ z.T / temperature
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probability = similarity - similarity.masked_fill(diagonal, float("-inf")).logsumexp(dim=1, keepdim=True)
    positive = (targets[:, None] == targets[None, :]) & ~diagonal
    anchors = (log_probability * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return -anchors.mean()


def similarity_matrix(x: Tensor) -> Tensor:
    """Cosine similarities of all pairs of samples, each centred over its features: [B, D] -> [B, B]."""
    x = F.normalize(x - x.mean(dim=1, keepdim=True), dim=1, eps=1e-8)
    return x @ x.T


def similarity_matching(features: Tensor, targets: Tensor, *, classes: int) -> Tensor:
    """Mean squared difference between the similarities of features and those of their one-hot targets.

    Source: Nokland & Eidnes, "Training neural networks with local error signals" (ICML 2019), eq. 1-2 and section 3.

    Args:
        features: [B, D] or [B, C, H, W]. Of a map each channel's standard deviation is compared, or its value if the
            map has one pixel.
        targets: Classes [B], or for each sample its soft or multi-label vector [B, classes], which is then taken in the
            place of the one-hot vector.
        classes: The number of classes.

    Raises:
        UserError: The targets are others.
    """
    if not isinstance(targets, Tensor) or (targets.ndim, targets.is_floating_point()) not in ((1, False), (2, True)):
        raise UserError(
            "similarity matching compares samples by their classes, as integers [B] or as vectors [B, classes] of "
            f"floating point, not by {_said(targets)}: lg.dgl() takes any targets"
        )
    if targets.ndim == 2 and targets.shape[1] != classes:
        raise UserError(f"similarity matching takes targets [B, {classes}], not {_said(targets)}")
    if targets.ndim == 1 and _ignores(targets):
        raise UserError("similarity matching cannot leave samples out, as an ignored index asks for")
    if features.ndim == 4:
        flat = features.flatten(2)
        # The square root of a variance of exactly 0 (a dead channel) has no finite gradient, hence the small floor.
        features = flat.var(dim=2).clamp(min=1e-12).sqrt() if flat.shape[2] > 1 else flat.flatten(1)
    vectors = F.one_hot(targets, classes) if targets.ndim == 1 else targets
    return F.mse_loss(similarity_matrix(features), similarity_matrix(vectors.to(features.dtype)))


def _ignores(targets: Tensor) -> bool:
    """Whether a class is negative. Values are compared on the CPU only, because another device would make it wait."""
    readable = targets.device.type == "cpu" and not isinstance(targets, FakeTensor)
    return readable and len(targets) > 0 and int(targets.min()) < 0


def _said(targets: object) -> str:
    return f"{tuple(targets.shape)} {targets.dtype}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"


def ramp(first: float, last: float, index: int, count: int) -> float:
    """The weight of auxiliary `index` of `count`, which goes linearly from `first` to `last`.

    >>> [ramp(5.0, 0.0, i, 3) for i in range(3)], ramp(5.0, 0.0, 0, 1)
    ([5.0, 2.5, 0.0], 5.0)
    """
    return first + (last - first) * index / (count - 1) if count > 1 else first
