"""What the units of a trained network have learned: separability, similarity to another network, pictures of features.

Each analysis takes a network of a finished run and returns the rows of a CSV file. All use the same test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from localgrad.core.blocks import Unit, split, trace_units
from localgrad.core.boundary import Boundary, main_of
from localgrad.core.errors import UserError
from localgrad.run import data as data_room
from localgrad.run.augment import permutation
from localgrad.run.build import Machine, backbone_of, check_of_images, data_of, machine_for
from localgrad.run.checkpoint import load_backbone
from localgrad.run.files import MODEL
from localgrad.run.recipe import Recipe
from localgrad.run.train import to_device

Rows = list[dict[str, Any]]
BATCH = 256  # The minibatch size of the CKA estimator.
MIN_PER_CLASS = 4  # Two images of each class are needed to fit a classifier, and two to measure it.
TSNE_IMAGES = 2000
SHOWN_CLASSES = 4  # Activations are shown for one image of each of these classes.
SHOWN_UNITS = 8  # Activations are shown for at most this many units.
SHOWN_UNITS_OF_BP = 4  # This many units are shown if the network is a single block.


@dataclass(frozen=True)
class Network:
    """The network of a finished run, with `blocks` as the number of the block of each unit.

    The test split of `data` holds the images to look at, shuffled because an image folder is sorted by class. With
    `skip`, unreadable images are left out.
    """

    name: str
    units: list[Unit]
    blocks: list[int]
    data: data_room.Data
    machine: Machine
    skip: bool

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the images in uint8 and their labels."""
        ignore = (lambda path, why: None) if self.skip else None
        return data_room.eval_batches(self.data, batch_size=BATCH, on_bad=ignore)

    def outputs(self, images: Tensor) -> Iterator[Tensor]:
        """Yields the output of each unit for a batch of uint8 images, [B, *unit.output.shape] in float32."""
        h, _ = to_device((images, torch.empty(0)), self.data.info, self.machine)
        for unit in self.units:
            with torch.no_grad():
                h = unit.module(h)
            yield main_of(h).float().clone()  # A later unit may change its input in place.


def load(run: Path, recipe: Recipe, images: int) -> Network:
    """Loads the network of a finished run in evaluation mode, with `images` of its test images.

    Raises:
        UserError: There are fewer than `MIN_PER_CLASS` images for each class, on average.
    """
    check_of_images(recipe, "a probe")
    data = data_of(run, recipe)
    needed, available = MIN_PER_CLASS * data.info.classes, len(data.test)
    if min(images, available) < needed:
        found = f"--images is {images}" if images < needed <= available else f"the test set has {available} images"
        raise UserError(f"{found}, but a probe of {data.info.classes} classes takes at least {needed}")
    machine = machine_for(recipe)
    backbone = backbone_of(recipe, data.info)
    load_backbone(backbone, run / MODEL)
    machine.place(backbone.eval())
    info = data.info
    traced = trace_units(backbone, torch.zeros(2, info.channels, info.size, info.size), recipe.cut)
    for unit in traced.units:
        unit.module.eval()
    blocks = [k for k, group in enumerate(split(traced, recipe.cut)) for _ in group]
    skip = recipe.on_bad_image == "skip"
    return Network(run.resolve().name, traced.units, blocks, _drawn(data, images), machine, skip)


def _drawn(data: data_room.Data, images: int) -> data_room.Data:
    """Keeps `images` of the test images, in a shuffled order that is always the same."""
    return replace(data, test=data.test.take(permutation(len(data.test), 0, 0)[:images]))


def pooled(network: Network) -> tuple[list[NDArray], NDArray]:
    """The output of each unit averaged over its positions, [images, channels], and the labels."""
    parts: list[list[Tensor]] = [[] for _ in network.units]
    labels = []
    for images, targets in network.batches():
        labels.append(targets)
        for part, unit, h in zip(parts, network.units, network.outputs(images), strict=True):
            part.append(_map(unit.output, h).mean((2, 3)).cpu())
    # In float64, logistic regression converges further.
    return [torch.cat(part).double().numpy() for part in parts], torch.cat(labels).numpy()


def separability(network: Network, features: list[NDArray], labels: NDArray) -> Rows:
    """Measures the accuracy, in percent, of a linear classifier on the pooled output of each unit: logistic regression
    on standardised features, fitted on the first half of the images and measured on the other half."""
    half = len(labels) // 2
    if min(len(np.unique(part)) for part in (labels[:half], labels[half:])) < 2:
        raise UserError("the test images that were drawn have no two classes: a probe needs them")
    rows = []
    for k, (unit, x) in enumerate(zip(network.units, features, strict=True)):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(x[:half], labels[:half])
        top1 = round(100 * float(classifier.score(x[half:], labels[half:])), 3)
        row = {"index": k, "unit": unit.name, "block": network.blocks[k], "top1": top1}
        rows.append({**row, "fitted": half, "measured": len(labels) - half})
    return rows


def similarity(network: Network, other: Network | None = None) -> Rows:
    """Computes the linear CKA of each unit with each unit of the other network, or of the same one without another.

    It is the minibatch estimator of Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the same things?"
    (ICLR 2021), over the images of `network`. A unit whose output is the same for all images has no value.
    """
    check_alike(network, other)
    sums: list[Tensor] = []  # The HSIC of units with other units, of units with themselves, and of others likewise.
    for images, _ in network.batches():
        if len(images) < 4:  # The estimator divides by n - 3.
            continue
        a = [gram(h) for h in network.outputs(images)]
        b = a if other is None else [gram(h) for h in other.outputs(images)]
        found = [
            torch.stack([torch.stack([hsic(k, m) for m in b]) for k in a]),
            torch.stack([hsic(k, k) for k in a]),
            torch.stack([hsic(m, m) for m in b]),
        ]
        sums = [s + f for s, f in zip(sums, found, strict=True)] if sums else found
    cross, own, others = sums
    values = (cross / (own[:, None] * others[None]).sqrt()).tolist()
    name = "itself" if other is None else other.name
    return [
        {"unit": u.name, "against": name, "against_unit": v.name, "cka": "" if math.isnan(x) else round(x, 6)}
        for u, line in zip(network.units, values, strict=True)
        for v, x in zip((other or network).units, line, strict=True)
    ]


def check_alike(network: Network, other: Network | None) -> None:
    """Raises UserError unless both networks were trained on the same data."""
    if other is None:
        return
    ours, theirs = ((n.data.info.name, n.data.info.channels, n.data.info.size) for n in (network, other))
    if ours != theirs:
        texts = [f"{name} ({channels}x{size}x{size})" for name, channels, size in (ours, theirs)]
        raise UserError(
            f"--against needs a run on the same data: {network.name} saw {texts[0]}, {other.name} {texts[1]}"
        )
    data_room.check_classes(network.data, other.data.names, other.name)


def gram(h: Tensor) -> Tensor:
    """The Gram matrix of the samples' features, [B, B] in float64, with zeros on the diagonal."""
    x = h.flatten(1).double()
    return (x @ x.T).fill_diagonal_(0)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion (HSIC), a scalar.

    Song et al., "Feature selection via dependence maximization", JMLR 2012. The Gram matrices have a zero diagonal.
    """
    n = len(k)
    trace = (k * m).sum()  # This is the trace of k @ m, because both are symmetric.
    product = k.sum() * m.sum() / ((n - 1) * (n - 2))
    rows = (k.sum(0) * m.sum(0)).sum() * 2 / (n - 2)
    return (trace + product - rows) / (n * (n - 3))


def embedding(features: NDArray, labels: NDArray) -> Rows:
    """Computes the t-SNE of features [images, channels]: a point in the plane for each image."""
    features, labels = features[:TSNE_IMAGES], labels[:TSNE_IMAGES]
    perplexity = min(30.0, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    rows = zip(points.tolist(), labels.tolist(), strict=True)
    return [{"image": i, "label": y, "x": round(p[0], 4), "y": round(p[1], 4)} for i, (p, y) in enumerate(rows)]


def activations(network: Network) -> Rows:
    """Computes activation maps of some units, for one image of each of a few classes.

    A map is the mean over channels of the absolute output, divided by the map's maximum. The image itself is the unit
    "image". The units are the last ones of the blocks, or evenly spaced ones if there are too many blocks or only one.
    A unit whose output has no positions, such as vectors, has no map.
    """
    chosen = _shown_units(network)
    images, labels = _first_of_each(network)
    maps: dict[str, Tensor] = {"image": images.float().mean(1)}
    for k, h in enumerate(network.outputs(images)):
        if k in chosen:
            maps[network.units[k].name] = _map(network.units[k].output, h).abs().mean(1)
    blocks = {"image": "", **{network.units[k].name: network.blocks[k] for k in chosen}}
    return [
        {"image": i, "label": label, "unit": name, "block": blocks[name], "row": row, "column": column,
         "value": round(float(value), 4)}
        for i, label in enumerate(labels.tolist())
        for name, found in maps.items()
        for row, line in enumerate((found[i] / found[i].max().clamp_min(1e-12)).tolist())
        for column, value in enumerate(line)
    ]  # fmt: skip


def _shown_units(network: Network) -> list[int]:
    ends = [k for k, block in enumerate(network.blocks) if network.blocks[k + 1 : k + 2] != [block]]
    if len(ends) == 1:
        ends = _evenly(list(range(len(network.units))), SHOWN_UNITS_OF_BP)
    return [k for k in _evenly(ends, SHOWN_UNITS) if network.units[k].output.size != (1, 1)]


def _first_of_each(network: Network) -> tuple[Tensor, Tensor]:
    """The first image of each of the first few classes, and their labels."""
    found: dict[int, Tensor] = {}
    for images, labels in network.batches():
        for image, label in zip(images, labels.tolist(), strict=True):
            if label < SHOWN_CLASSES:
                found.setdefault(label, image)
        if len(found) == min(SHOWN_CLASSES, network.data.info.classes):
            break
    order = sorted(found)
    return torch.stack([found[label] for label in order]), torch.tensor(order)


def probe(network: Network, other: Network | None, say: Callable[[str], None]) -> dict[str, Rows]:
    """Runs all analyses and returns their rows by the names of their files. `say` is called before each of them."""
    say(f"{network.name}: features")
    features, labels = pooled(network)
    say(f"{network.name}: separability")
    separable = separability(network, features, labels)
    say(f"{network.name}: CKA")
    alike = similarity(network, other)
    say(f"{network.name}: t-SNE")
    points = embedding(features[-1], labels)
    return {"separability": separable, "cka": alike, "tsne": points, "activations": activations(network)}


def agreement(rows: Rows) -> dict[str, float]:
    """The CKA of each unit with the unit of the same name in the other network."""
    return {row["unit"]: row["cka"] for row in rows if row["unit"] == row["against_unit"] and row["cka"] != ""}


def _evenly(items: list[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spaced. The last item is always among them."""
    count = min(most, len(items))
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def _map(boundary: Boundary, h: Tensor) -> Tensor:
    """Turns a unit's output [B, *shape] into a map [B, C, H, W]."""
    for module in boundary.to_map():
        h = module(h)
    return h
