"""Local losses as pure functions to a scalar, and how their weights change over the depth of the network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reconstruction(logits: Tensor, images: Tensor) -> Tensor:
    """Binary cross-entropy of a decoder's output to the image, mean over every pixel and channel.

    logits [B, C, H, W], before the sigmoid (so that it is stable under autocast); images [B, C, H, W] in [0, 1]. Those
    that are maps of one row [B, C, L], tokens [B, L, C] or vectors [B, C] are compared as maps, as the logits are.
    Source: InfoPro (ICLR 2021), eq. 6 with the Bernoulli likelihood of its section 4.
    """
    if images.ndim == 3:
        images = images.unsqueeze(2) if logits.shape[2] == 1 else images.mT.unsqueeze(3)
    return F.binary_cross_entropy_with_logits(logits, images[..., None, None] if images.ndim == 2 else images)


def supervised_contrastive(features: Tensor, targets: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Pulls samples of one class together on the unit sphere: for each anchor i with positives P(i),
    -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)), mean over the batch.

    features [B, D], normalised here; targets [B]. An anchor without a positive counts 0.
    Source: Khosla et al., "Supervised contrastive learning" (NeurIPS 2020), eq. 2; InfoPro uses it as its second
    classification objective.
    """
    if len(features) < 2:
        return features.sum() * 0
    z = F.normalize(features, dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probability = similarity - similarity.masked_fill(itself, float("-inf")).logsumexp(dim=1, keepdim=True)
    positive = (targets[:, None] == targets[None, :]) & ~itself
    anchors = (log_probability * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return -anchors.mean()


def similarity_matrix(x: Tensor) -> Tensor:
    """Cosine similarities of all pairs of samples after centring each sample's features: [B, D] -> [B, B]."""
    x = F.normalize(x - x.mean(dim=1, keepdim=True), dim=1, eps=1e-8)
    return x @ x.T


def similarity_matching(features: Tensor, targets: Tensor, *, classes: int) -> Tensor:
    """Mean squared difference between the similarities of features and those of their one-hot targets.

    features [B, C, H, W], of which each channel's standard deviation over the map is compared (a map of one pixel is
    compared as it is), or [B, D]; targets [B].
    Source: Nokland & Eidnes, "Training neural networks with local error signals" (ICML 2019), eq. 1-2 and section 3.
    """
    if features.ndim == 4:
        flat = features.flatten(2)
        # The square root of a variance of exactly 0 (a dead channel) has no finite gradient, hence the small floor.
        features = flat.var(dim=2).clamp(min=1e-12).sqrt() if flat.shape[2] > 1 else flat.flatten(1)
    onehot = F.one_hot(targets, classes).to(features.dtype)
    return F.mse_loss(similarity_matrix(features), similarity_matrix(onehot))


def ramp(first: float, last: float, index: int, count: int) -> float:
    """The weight of auxiliary `index` of `count`: linear over the index from `first` to `last`.

    >>> [ramp(5.0, 0.0, i, 3) for i in range(3)], ramp(5.0, 0.0, 0, 1)
    ([5.0, 2.5, 0.0], 5.0)
    """
    return first + (last - first) * index / (count - 1) if count > 1 else first
