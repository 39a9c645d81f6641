"""One short function for each paper. It chooses the heads, the objectives, and their weights over depth."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn
from torch.nn import functional as F

from localgrad.core import heads, objectives
from localgrad.core.auxiliary import Method, Site, Term
from localgrad.core.blocks import Main
from localgrad.core.boundary import MAIN
from localgrad.core.decoder import Decoder
from localgrad.core.errors import UserError
from localgrad.core.paths import select_path
from localgrad.core.task import Classification

IMAGENET_SIZE = 128  # Images of at least this size get InfoPro's ImageNet auxiliaries.


def bp() -> Method:
    """End-to-end backpropagation, the baseline: one block and no auxiliary."""
    return Method("bp", None)


def dgl(head: str | None = None, *, channels: int = 128, hidden: int = 512) -> Method:
    """Decoupled Greedy Learning (Belilovsky, Eickenberg, Oyallon, ICML 2020): a local classifier and the criterion.

    Greedy learning (ICML 2019) is `dgl("0c1f")`.

    Args:
        head: The name of another classifier, as `heads.classifier` takes it. Default: the paper's.
        channels: The channels of the 1x1 convolutions in the paper's classifier. Default: 128.
        hidden: The features of its hidden linear layers. Default: 512.
    """
    return Method("dgl", partial(_dgl, channels=channels, hidden=hidden), head)


def _dgl(site: Site, *, channels: int, hidden: int) -> dict[str, Term]:
    own = partial(heads.dgl_classifier, channels=channels, hidden=hidden)
    return {"classifier": Term(_classifier(site, own), site.task.criterion)}


def predsim(head: str | None = None, *, beta: float = 0.99) -> Method:
    """Similarity matching and prediction: `(1 - beta) * cross-entropy + beta * similarity matching`.

    Source: Nokland & Eidnes, "Training neural networks with local error signals" (ICML 2019), eq. 3.

    Args:
        head: The name of another classifier, as `heads.classifier` takes it. Default: the paper's.
        beta: The weight of similarity matching, from 0 to 1. Default: 0.99.

    Raises:
        UserError: beta is out of its range.
    """
    if not 0 <= beta <= 1:
        raise UserError(f"beta must lie between 0 and 1, not {beta}")
    return Method("predsim", partial(_predsim, beta=beta), head)


def _predsim(site: Site, *, beta: float) -> dict[str, Term]:
    classes = getattr(site.task, "classes", None)
    if classes is None or classes < 2:
        raise UserError("predsim compares samples by their classes, and this task has no two: take lg.dgl()")
    matching = partial(objectives.similarity_matching, classes=classes)
    return {
        "classifier": Term(_classifier(site, heads.predsim_classifier), site.task.criterion, 1 - beta),
        "similarity": Term(heads.similarity(site.boundary), matching, beta, pairs=True),
    }


def infopro(
    head: str | None = None,
    *,
    contrast: bool = False,
    temperature: float = 0.07,
    features: int = 128,
    weights: list[tuple[float, float]] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Method:
    """InfoPro: each block learns to reconstruct the image and to classify it, so that early blocks keep information.

    Images of 128 pixels and more get the paper's ImageNet heads, and smaller ones its CIFAR heads.
    Source: Wang et al., "Revisiting locally supervised learning" (ICLR 2021).

    Args:
        head: The name of another classifier, as `heads.classifier` takes it. Default: the paper's.
        contrast: Whether to classify by the supervised contrastive loss instead of cross-entropy. Default: False.
        temperature: The temperature of the contrastive loss, above 0. Default: 0.07.
        features: The width of the CIFAR classifier's hidden layer, and of the vectors to contrast. Default: 128.
        weights: The weights (reconstruction, classification) of each auxiliary. Default: the paper's, which are
            (5, 0.75) for ImageNet heads, `infopro_weights` for CIFAR heads, and (1.5, 1) where the task makes the
            heads, as for segmentation. By `infopro_weights` the last of several auxiliaries has weights of 0 and
            teaches its block nothing.
        mean: The mean of the input's normalisation, to recover images. Default: the input is the image.
        std: The standard deviation of that normalisation. It is given together with `mean`.

    Raises:
        UserError: The temperature is not above 0, or only one of `mean` and `std` was given. A wrong number of weights
            is an error in `localize`.
    """
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature}")
    terms = partial(_infopro, contrast=contrast, temperature=temperature, features=features, weights=weights)
    return Method("infopro", terms, head, mean, std)


def _infopro(
    site: Site, *, contrast: bool, temperature: float, features: int, weights: list[tuple[float, float]] | None
) -> dict[str, Term]:
    large = min(site.image[1:]) >= IMAGENET_SIZE
    if weights is None and heads.of_task(site.boundary, site.task) is not None:
        pair = (1.5, 1.0)
    elif weights is None:
        pair = (5.0, 0.75) if large else infopro_weights(site.index, site.count)
    elif len(weights) == site.count:
        pair = weights[site.index]
    else:
        raise UserError(f"infopro got {len(weights)} pairs of weights for {site.count} auxiliaries")
    cifar = partial(heads.classifier, "1c2f", width=site.width, hidden=features)
    own = heads.imagenet_classifier if large else cifar
    if contrast:  # The outputs of the same classifier are then components to compare instead of logits.
        embedding = _classifier(replace(site, task=Classification(features)), own)
        compare = partial(objectives.supervised_contrastive, temperature=temperature)
        classify = Term(embedding, compare, pair[1], pairs=True)
    else:
        classify = Term(_classifier(site, own), site.task.criterion, pair[1])
    decode = heads.imagenet_decoder if large else Decoder
    reconstruct = Term(decode(site.boundary, site.image), objectives.reconstruction, pair[0], against="images")
    return {"classifier": classify, "decoder": reconstruct}


def infopro_weights(index: int, count: int) -> tuple[float, float]:
    """The weights (reconstruction, classification) of auxiliary `index` of `count` in InfoPro's CIFAR runs.

    >>> infopro_weights(0, 15), infopro_weights(14, 15)
    ((5.0, 0.5), (0.0, 0.0))
    """
    return objectives.ramp(5.0, 0.0, index, count), objectives.ramp(0.5, 0.0, index, count)


def auglocal(head: str | None = None, *, depth: int = 6, shrink: float = 0.5) -> Method:
    """AugLocal: the head copies some of the later units with new weights; pooling and a linear layer follow.

    The copied units are spread evenly over the rest of the backbone, which the paper calls uniform. Units that change
    the shape are always among them, even beyond `depth`, because the others would not fit together without them.
    Source: Ma et al., "Scaling supervised local learning with augmented auxiliary networks" (ICLR 2024).

    Args:
        head: The classifier behind the copies, as `heads.classifier` takes it. Default: "0c1f", pooling and a linear
            layer.
        depth: The number of units to copy at the first auxiliary. Default: 6.
        shrink: The depth falls linearly to `(1 - shrink) * depth` at the last auxiliary. From 0 to 1, default: 0.5.

    Raises:
        UserError: The depth is below 1, or shrink is out of its range.
    """
    if depth < 1 or not 0 <= shrink <= 1:
        raise UserError(f"auglocal takes a depth of at least 1 unit and a shrink from 0 to 1, not {depth} and {shrink}")
    return Method("auglocal", partial(_auglocal, depth=depth, shrink=shrink), head)


def _auglocal(site: Site, *, depth: int, shrink: float) -> dict[str, Term]:
    wanted = round(objectives.ramp(depth, (1 - shrink) * depth, site.index, site.count))
    path = select_path(site.downstream, max(wanted, sum(u.changes_shape for u in site.downstream)))
    boundary = path[-1].output if path else site.boundary
    end = heads.classifier(site.head or "0c1f", boundary, site.task, width=site.width)
    layers = [*[u.copy(fresh=True) for u in path], *[Main()] * any(u.fed for u in path), end]
    return {"classifier": Term(nn.Sequential(*layers), site.task.criterion, reads=None if path else MAIN)}


def lopt(*, weight: float = 10.0) -> Method:
    """LoPT: a block learns to rebuild the features that enter it from those that leave it, and sees no targets.

    Only the last block is trained for the task. The features that enter the first block are what its first unit, such
    as an embedding, makes of the network's input. No gradient goes through them as the target.
    Source: Shi et al., "Rethinking local learning" (arXiv 2605.04913) and its code, for language models that are
    trained further: `weight` times the mean squared error of layer norm, linear to a quarter of the width, GELU and
    linear. The code takes the mean over the blocks, and here each block has its own loss.

    Args:
        weight: The factor of the reconstruction. Default: 10, as in the paper.

    Raises:
        UserError: The weight is not above 0. Where no tokens cross, or they change their shape within a block,
            `localize` raises it.
    """
    if not weight > 0:
        raise UserError(f"the weight of LoPT's reconstruction must be above 0, not {weight}")
    return Method("lopt", partial(_lopt, weight=weight))


def _lopt(site: Site, *, weight: float) -> dict[str, Term]:
    rebuild = heads.feature_decoder(site.boundary, site.entering)
    return {"features": Term(rebuild, F.mse_loss, weight, against="features")}


def _classifier(site: Site, own) -> nn.Module:
    """Makes the classifier that the site names, or the method's `own(boundary, task)`."""
    if (of_task := heads.of_task(site.boundary, site.task)) is not None:
        return of_task
    if site.head is None:
        return own(site.boundary, site.task)
    return heads.classifier(site.head, site.boundary, site.task, width=site.width)


METHODS = {"bp": bp, "dgl": dgl, "predsim": predsim, "infopro": infopro, "auglocal": auglocal}
