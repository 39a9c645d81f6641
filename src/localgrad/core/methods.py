"""One short function per paper: which heads and objectives sit on a boundary, and how their weights go with depth."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from localgrad.core import heads, objectives
from localgrad.core.auxiliary import Method, Site, Term
from localgrad.core.blocks import select_path
from localgrad.core.decoder import Decoder
from localgrad.core.errors import UserError
from localgrad.core.task import Classification

IMAGENET_SIZE = 128  # images at least this large get InfoPro's ImageNet auxiliaries


def bp() -> Method:
    """End-to-end backpropagation, the baseline: one block, no auxiliary."""
    return Method("bp", None)


def dgl(head: str | None = None, *, channels: int = 128, hidden: int = 512) -> Method:
    """Decoupled Greedy Learning (Belilovsky, Eickenberg, Oyallon, ICML 2020): a local classifier and cross-entropy.

    head: another classifier (`heads.HEADS`) instead of the paper's; its 1x1 convolutions have `channels`, its linear
    layers `hidden` features. Greedy learning (ICML 2019) is `dgl("0c1f")`.
    """
    return Method("dgl", partial(_dgl, channels=channels, hidden=hidden), head)


def _dgl(site: Site, *, channels: int, hidden: int) -> dict[str, Term]:
    own = partial(heads.dgl_classifier, channels=channels, hidden=hidden)
    return {"classifier": Term(_classifier(site, own), site.task.criterion)}


def predsim(head: str | None = None, *, beta: float = 0.99) -> Method:
    """Similarity matching and prediction (Nokland & Eidnes, "Training neural networks with local error signals",
    ICML 2019): `(1 - beta) * cross-entropy + beta * similarity matching` (eq. 3), beta from 0 to 1."""
    if not 0 <= beta <= 1:
        raise UserError(f"beta must lie between 0 and 1, not {beta}")
    return Method("predsim", partial(_predsim, beta=beta), head)


def _predsim(site: Site, *, beta: float) -> dict[str, Term]:
    matching = partial(objectives.similarity_matching, classes=site.task.classes)
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
    """InfoPro (Wang et al., "Revisiting locally supervised learning", ICLR 2021): reconstruct the image (so that no
    early block throws information away) and classify, by cross-entropy or, with `contrast`, by the supervised
    contrastive loss on `features` components at `temperature`.

    weights: (reconstruction, classification) of each auxiliary. By default the paper's: from (5, 0.5) at the first
    auxiliary linearly to (0, 0) at the last in its CIFAR runs, so the last auxiliary, where there is more than one,
    teaches its block nothing; (5, 0.75) throughout for images of 128 pixels and more, which also get the paper's
    ImageNet heads. features: width of the CIFAR classifier's hidden layer, and of what is contrasted. mean, std: of the
    input's normalisation, to recover images from it; without them inputs are taken for images.
    """
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature}")
    terms = partial(_infopro, contrast=contrast, temperature=temperature, features=features, weights=weights)
    return Method("infopro", terms, head, mean, std)


def _infopro(
    site: Site, *, contrast: bool, temperature: float, features: int, weights: list[tuple[float, float]] | None
) -> dict[str, Term]:
    large = min(site.image[1:]) >= IMAGENET_SIZE
    if weights is None:
        pair = (5.0, 0.75) if large else infopro_weights(site.index, site.count)
    elif len(weights) == site.count:
        pair = weights[site.index]
    else:
        raise UserError(f"infopro got {len(weights)} pairs of weights for {site.count} auxiliaries")
    cifar = partial(heads.classifier, "1c2f", width=site.width, hidden=features)
    own = heads.imagenet_classifier if large else cifar
    if contrast:  # the same classifier, but its outputs are components to compare, not logits
        embedding = _classifier(replace(site, task=Classification(features)), own)
        compare = partial(objectives.supervised_contrastive, temperature=temperature)
        classify = Term(embedding, compare, pair[1], pairs=True)
    else:
        classify = Term(_classifier(site, own), site.task.criterion, pair[1])
    decode = heads.imagenet_decoder if large else Decoder
    reconstruct = Term(decode(site.boundary, site.image), objectives.reconstruction, pair[0], against="images")
    return {"classifier": classify, "decoder": reconstruct}


def infopro_weights(index: int, count: int) -> tuple[float, float]:
    """(reconstruction, classification) of auxiliary `index` of `count` in the paper's CIFAR runs.

    >>> infopro_weights(0, 15), infopro_weights(14, 15)
    ((5.0, 0.5), (0.0, 0.0))
    """
    return objectives.ramp(5.0, 0.0, index, count), objectives.ramp(0.5, 0.0, index, count)


def auglocal(head: str | None = None, *, depth: int = 6, shrink: float = 0.5) -> Method:
    """AugLocal (Ma et al., "Scaling supervised local learning with augmented auxiliary networks", ICLR 2024): the
    head is `depth` units of the rest of the backbone, initialised anew, then pool and linear.

    The units are drawn uniformly in the paper's sense, spread evenly over the rest with no chance in it; those that
    change the shape are always among them, even beyond `depth`, so that they chain. The depth shrinks linearly to
    `(1 - shrink) * depth` at the last auxiliary (the paper's pyramid); where nothing is left to draw, the head is pool
    and linear. Raises UserError for a depth below 1 or a shrink outside 0 to 1.
    """
    if depth < 1 or not 0 <= shrink <= 1:
        raise UserError(f"auglocal takes a depth of at least 1 unit and a shrink from 0 to 1, not {depth} and {shrink}")
    return Method("auglocal", partial(_auglocal, depth=depth, shrink=shrink), head)


def _auglocal(site: Site, *, depth: int, shrink: float) -> dict[str, Term]:
    wanted = round(objectives.ramp(depth, (1 - shrink) * depth, site.index, site.count))
    path = select_path(site.downstream, max(wanted, sum(u.changes_shape for u in site.downstream)))
    boundary = path[-1].output if path else site.boundary
    end = heads.classifier(site.head or "0c1f", boundary, site.task, width=site.width)
    return {"classifier": Term(nn.Sequential(*[u.copy(fresh=True) for u in path], end), site.task.criterion)}


def _classifier(site: Site, own) -> nn.Module:
    """The classifier that somebody named for this site, or the method's `own(boundary, task)`."""
    if site.head is None:
        return own(site.boundary, site.task)
    return heads.classifier(site.head, site.boundary, site.task, width=site.width)


METHODS = {"bp": bp, "dgl": dgl, "predsim": predsim, "infopro": infopro, "auglocal": auglocal}
