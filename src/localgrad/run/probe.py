"""What the units of a trained network have learned: separability, similarity to another network, pictures of features.

Every analysis reads a finished run folder and the test images, draws nothing by chance, and gives rows of a CSV file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from localgrad.core.blocks import Boundary, Unit, split, trace_units
from localgrad.core.errors import UserError
from localgrad.run import data as data_room
from localgrad.run.build import Machine, backbone_of, machine_for
from localgrad.run.checkpoint import MODEL, load_backbone
from localgrad.run.recipe import Recipe
from localgrad.run.train import to_device

Rows = list[dict[str, Any]]
CKA_BATCH = 256  # images of a minibatch of the estimator
SHOWN = 4  # images whose activations are shown, the first of as many classes


@dataclass(frozen=True)
class Network:
    """A finished run's units and data. blocks: which block each unit is in."""

    name: str
    units: list[Unit]
    blocks: list[int]
    data: data_room.Data
    machine: Machine

    def outputs(self, images: int, batch_size: int = CKA_BATCH) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Batch after batch of the first test images: what each unit gives, [B, *unit.output.shape], and the labels."""
        batches = data_room.test_batches(self.data, batch_size=batch_size)
        for images_of, labels in islice(batches, -(-images // batch_size)):
            h, _ = to_device((images_of, labels), self.data.info, self.machine)
            found = []
            with torch.no_grad():
                for unit in self.units:
                    h = unit.module(h)
                    # A clone, because a later unit may write into what it gets.
                    found.append(h.detach().float().clone())
            yield found, labels


def load(run: Path, recipe: Recipe) -> Network:
    """The network of a finished run, in evaluation mode and float32."""
    data = data_room.load(recipe.data, data_dir=recipe.data_dir, image_size=recipe.image_size)
    machine = machine_for(recipe)
    backbone = backbone_of(recipe, data.info)
    load_backbone(backbone, run / MODEL)
    backbone.to(machine.device, memory_format=machine.memory_format).eval()  # pyright: ignore[reportCallIssue]
    info = data.info
    traced = trace_units(backbone, torch.zeros(2, info.channels, info.size, info.size))
    for unit in traced.units:
        unit.module.eval()
    groups = split(traced, recipe.cut)
    return Network(run.name, traced.units, [k for k, group in enumerate(groups) for _ in group], data, machine)


def separability(network: Network, images: int) -> Rows:
    """Accuracy, in percent, of a linear classifier on the pooled output of each unit: logistic regression on
    standardised features, fitted on the first half of the test images and measured on the other half."""
    features, labels = pooled(network, images)
    half = len(labels) // 2
    rows = []
    for k, (unit, x) in enumerate(zip(network.units, features, strict=True)):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(x[:half], labels[:half])
        top1 = round(100 * float(classifier.score(x[half:], labels[half:])), 3)
        row = {"index": k, "unit": unit.name, "block": network.blocks[k], "top1": top1}
        rows.append({**row, "fitted": half, "measured": len(labels) - half})
    return rows


def pooled(network: Network, images: int) -> tuple[list[NDArray], NDArray]:
    """Each unit's output averaged over its places, [images, channels], and the labels."""
    parts: list[list[Tensor]] = [[] for _ in network.units]
    labels = []
    for outputs, targets in network.outputs(images):
        labels.append(targets)
        for part, unit, h in zip(parts, network.units, outputs, strict=True):
            part.append(_map(unit.output, h).mean((2, 3)).cpu())
    # Of the last batch so many as were asked for. Doubles, in which logistic regression converges further.
    return [torch.cat(part)[:images].double().numpy() for part in parts], torch.cat(labels)[:images].numpy()


def similarity(network: Network, other: Network, images: int) -> Rows:
    """Linear CKA of every unit with every unit of the other network, over the same images: the minibatch estimator of
    Nguyen, Raghu and Kornblith (ICLR 2021, "Do wide and deep networks learn the same things?", eq. 3 and 4)."""
    if network.data.info != other.data.info:
        ours, theirs = network.data.info.name, other.data.info.name
        raise UserError(f"--against needs a run on the same data: {network.name} saw {ours}, {other.name} {theirs}")
    sums: list[Tensor] = []  # of HSIC: units with others', own with own, others' with others'
    size = min(CKA_BATCH, images)
    whole = images // size * size  # the estimator averages over batches of one size
    for (mine, _), (theirs, _) in zip(network.outputs(whole, size), other.outputs(whole, size), strict=True):
        a, b = ([gram(h) for h in side] for side in (mine, theirs))
        found = [
            torch.stack([torch.stack([hsic(k, m) for m in b]) for k in a]),
            torch.stack([hsic(k, k) for k in a]),
            torch.stack([hsic(m, m) for m in b]),
        ]
        sums = [s + f for s, f in zip(sums, found, strict=True)] if sums else found
    cross, own, others = sums
    values = (cross / (own[:, None] * others[None]).sqrt()).tolist()
    return [
        {"unit": u.name, "against": other.name, "against_unit": v.name, "cka": round(values[i][j], 6)}
        for i, u in enumerate(network.units)
        for j, v in enumerate(other.units)
    ]


def gram(h: Tensor) -> Tensor:
    """Inner products of each two samples' features, [B, B] in float64, with zeros on the diagonal."""
    x = h.flatten(1).double()
    return (x @ x.T).fill_diagonal_(0)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion of two Gram matrices without diagonals
    (Song et al., JMLR 2012, eq. 5): a scalar."""
    n = len(k)
    trace = (k * m).sum()  # of k @ m, both symmetric
    product = k.sum() * m.sum() / ((n - 1) * (n - 2))
    rows = (k.sum(0) * m.sum(0)).sum() * 2 / (n - 2)
    return (trace + product - rows) / (n * (n - 3))


def embedding(network: Network, images: int) -> Rows:
    """t-SNE of what the last unit gives, pooled: a point in the plane for each image."""
    features, labels = pooled(network, images)
    perplexity = min(30.0, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features[-1])
    rows = zip(points.tolist(), labels.tolist(), strict=True)
    return [{"image": i, "label": y, "x": round(p[0], 4), "y": round(p[1], 4)} for i, (p, y) in enumerate(rows)]


def activations(network: Network) -> Rows:
    """Where each block's output is large, for the first image of each of a few classes: the mean over the channels of
    its absolute values, over the map's largest. Blocks that hand on vectors have no places and no rows."""
    labels = network.data.test.labels
    chosen = [int((labels == c).nonzero()[0]) for c in range(network.data.info.classes) if (labels == c).any()][:SHOWN]
    found: dict[int, list[Tensor]] = {}
    for start, (outputs, _) in zip(range(0, len(labels), CKA_BATCH), network.outputs(max(chosen) + 1), strict=False):
        found |= {i: [h[i - start] for h in outputs] for i in chosen if start <= i < start + CKA_BATCH}
    ends = [k for k, block in enumerate(network.blocks) if network.blocks[k + 1 : k + 2] != [block]]
    rows = []
    for image in chosen:
        for k in ends:
            boundary = network.units[k].output
            values = _map(boundary, found[image][k][None])[0].abs().mean(0)
            values = (values / values.max().clamp_min(1e-12)).tolist()
            if boundary.size == (1, 1):
                continue
            named = {"image": image, "label": int(labels[image]), "block": network.blocks[k]}
            rows += [
                {**named, "row": i, "column": j, "value": round(value, 4)}
                for i, line in enumerate(values)
                for j, value in enumerate(line)
            ]
    return rows


def probe(network: Network, other: Network | None, images: int, say: Callable[[str], None]) -> dict[str, Rows]:
    """Every analysis, by the name of its file. other: the network to compare with, itself if there is none."""
    most = len(network.data.test)
    if not 4 * network.data.info.classes <= images:
        raise UserError(f"--images must be at least {4 * network.data.info.classes} for as many classes, not {images}")
    images = min(images, most)
    tables: dict[str, Rows] = {}
    for name, analysis in (
        ("separability", lambda: separability(network, images)),
        ("cka", lambda: similarity(network, other or network, images)),
        ("tsne", lambda: embedding(network, min(images, 2000))),
        ("activations", lambda: activations(network)),
    ):
        say(name)
        tables[name] = analysis()
    return tables


def agreement(rows: Rows) -> dict[str, float]:
    """Each unit's CKA with the unit of the same name in the other network."""
    return {row["unit"]: row["cka"] for row in rows if row["unit"] == row["against_unit"]}


def _map(boundary: Boundary, h: Tensor) -> Tensor:
    """A unit's output [B, *shape] as a map [B, C, H, W]."""
    for module in boundary.to_map():
        h = module(h)
    return h
