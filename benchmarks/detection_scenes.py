"""Detection on `fashion-scenes`: mAP, peak memory and time of RetinaNet in the four blocks of MAN++, beside BP.

    python benchmarks/detection_scenes.py

Network, heads and task are those of examples/detection.py: torchvision's RetinaNet with an untrained ResNet-18. A run
takes steps of 16 scenes in bfloat16 by AdamW, each scene mirrored or not by chance.

Writes results/detection.csv, one row for each run as soon as it is finished: mAP, AP50 and AP75 in percent on the 500
test scenes. A run that has a row is not trained again. Before the runs, it measures a step of each way in batches of 16
and of 64 scenes, times them in turn by the time of the processor, and writes results/detection_steps.csv. There "bp,
recompute" is BP that recomputes each unit. It gives the gradients of BP, so its mAP is that of BP.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import ROOT, Table, medians_in_turn
from loop import run_missing
from torch import Tensor
from torchvision.ops import box_iou

import localgrad as lg
from localgrad.core.engine import autocasting
from localgrad.run import data as data_room
from localgrad.run.folder import environment
from localgrad.run.step import rate

EXAMPLE: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "detection.py"))
KEY = ("method", "steps", "seed")
PRECISION = torch.bfloat16
# "dgl" has the heads of MAN++ without its copies. A head that reads too large a map halves it.
WAYS: dict[str, dict[str, Any]] = {
    "bp": {"method": lg.bp()},
    "dgl": {"method": lg.dgl(), "blocks": EXAMPLE["CUTS"]},
    "dgl+man++": {"method": lg.dgl(), "blocks": EXAMPLE["CUTS"], "coupling": lg.MANPlusPlus()},
}
OVERLAPS = torch.linspace(0.5, 0.95, 10)  # The intersection over union from which a box is right.
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
Objects = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Train the runs that the tables lack. Ctrl-C stops them, and the same command continues."""

    ways: tuple[str, ...] = tuple(WAYS)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    batch_size: int = 16
    lr: float = 2e-3
    limit_test: int = 500
    measured: tuple[int, ...] = (16, 64)
    """The batches of which a step of each way is measured and timed."""
    repeats: int = 7
    results: Path = Path("results")
    jobs: int = 2


def average_precisions(found: Sequence[Objects], truth: Sequence[Objects]) -> Tensor:
    """COCO's average precision of each class that there is, at each overlap: [classes, 10], from 0 to 1.

    It is the mean over 101 recalls of the best precision at that recall or a higher one. A box is right if its overlap
    with a true one of its class that no better box has taken is large enough; the true one with the largest counts.

    Args:
        found: For each image "boxes" [D, 4], "labels" [D] and "scores" [D], the best first.
        truth: For each image "boxes" [N, 4] and "labels" [N].
    """
    labels, scores = (torch.cat([image[key] for image in found]) for key in ("labels", "scores"))
    right = torch.cat([_right(f, t) for f, t in zip(found, truth, strict=True)])
    wanted = torch.cat([image["labels"] for image in truth])
    order = scores.argsort(descending=True, stable=True)
    labels, right = labels[order], right[order]
    return torch.stack([_average(right[labels == k], int((wanted == k).sum())) for k in wanted.unique()])


def _right(found: Objects, truth: Objects) -> Tensor:
    """Whether each box is right at each overlap, [D, 10]."""
    overlaps = box_iou(found["boxes"], truth["boxes"]) * (found["labels"][:, None] == truth["labels"])
    right = torch.zeros(len(overlaps), len(OVERLAPS), dtype=torch.bool)
    free = torch.ones(len(OVERLAPS), overlaps.shape[1])
    for i, row in enumerate(overlaps if overlaps.shape[1] else ()):
        best, which = (row * free).max(1)
        right[i] = best >= OVERLAPS
        free[right[i], which[right[i]]] = 0
    return right


def _average(right: Tensor, count: int) -> Tensor:
    """[10] from whether each box of a class is right, the best first, [D, 10], and how many true ones there are."""
    hits = right.double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)[:, None]
    highest = torch.cat(
        [precision.flip(0).cummax(0).values.flip(0), torch.zeros(1, len(OVERLAPS), dtype=torch.float64)]
    )
    recall = (hits / count).mT.contiguous()
    return highest.gather(0, torch.searchsorted(recall, RECALLS.expand(len(recall), -1).contiguous()).mT).mean(0)


def scenes(settings: Settings, *, test: bool = False) -> tuple[Tensor, Objects]:
    """Normalised images and their objects."""
    data = data_room.load("fashion-scenes", only_test=test)
    split: Any = data.test.take(torch.arange(settings.limit_test).numpy()) if test else data.train
    return data_room.normalize(split.images, data.info), split.objects


def batch(images: Tensor, objects: Objects, size: int, draw: torch.Generator) -> tuple[Tensor, Objects]:
    """Some of the scenes, each mirrored or not."""
    rows, mirrored = (torch.randint(high, (size,), generator=draw) for high in (len(images), 2))
    mirrored, boxes = mirrored.bool(), objects["boxes"][rows]
    x = torch.where(mirrored[:, None, None, None], images[rows].flip(3), images[rows])
    left, top, right, bottom = boxes.unbind(2)
    other = torch.stack([images.shape[3] - right, top, images.shape[3] - left, bottom], 2)
    return x, {"boxes": torch.where(mirrored[:, None, None], other, boxes), "labels": objects["labels"][rows]}


def localized(way: str, seed: int, size: int) -> lg.LocalModel:
    torch.manual_seed(seed)
    network = EXAMPLE["Detector"]()
    example = torch.zeros(size, 3, EXAMPLE["SIZE"], EXAMPLE["SIZE"])
    return lg.localize(network, example=example, task=EXAMPLE["Detection"](network), **WAYS[way])


def optimizer_of(settings: Settings, model: lg.LocalModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lg.param_groups(model, weight_decay=0.05), lr=settings.lr)


def trained(settings: Settings, way: str, steps: int, seed: int) -> dict[str, Any]:
    """Trains one way, and returns what it finds in the test scenes, and the seconds of training."""
    torch.set_num_threads(1)
    model = localized(way, seed, settings.batch_size)
    optimizer = optimizer_of(settings, model)
    train, draw = scenes(settings), torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(step, steps, 0.1)
        lg.local_backward(model, *batch(*train, settings.batch_size, draw), autocast=PRECISION)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    return {**tested(model, *scenes(settings, test=True)), "seconds": f"{seconds:.0f}"}


@torch.no_grad()
def tested(model: lg.LocalModel, images: Tensor, objects: Objects) -> dict[str, str]:
    """mAP, AP50 and AP75 of the backbone in percent. It is left in evaluation mode."""
    backbone, task = model.backbone.eval(), EXAMPLE["Detection"](model.backbone)
    found = []
    for x in images.split(50):
        with autocasting(x, PRECISION):
            output = backbone(x)
        found += task.detections({name: tensor.float() for name, tensor in output.items()})
    precisions = 100 * average_precisions(found, task.objects(objects)).mean(0)
    return {"map": f"{precisions.mean():.2f}", "ap50": f"{precisions[0]:.2f}", "ap75": f"{precisions[5]:.2f}"}


def step_of(settings: Settings, way: str, x: Tensor, y: Objects) -> tuple[Callable[[], None], int]:
    """A step of a way, and its peak bytes with everything counted."""
    name, _, recomputing = way.partition(", ")
    model = localized(name, 0, len(x))
    if recomputing:
        lg.recompute(model)
    optimizer = optimizer_of(settings, model)

    def step() -> None:
        lg.local_backward(model, x, y, autocast=PRECISION)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    return step, lg.measure_peak(step, model=model, optimizers=[optimizer]).total


def measure_steps(settings: Settings, size: int) -> list[dict[str, Any]]:
    """Measures and times a step of each way in batches of a size, and of BP that recomputes."""
    torch.set_num_threads(1)
    x, y = batch(*scenes(settings), size, torch.Generator().manual_seed(0))
    ways = (*settings.ways, "bp, recompute")
    steps, peaks = zip(*(step_of(settings, way, x, y) for way in ways), strict=True)

    def timer(step: Callable[[], None]) -> float:
        began = time.process_time()
        step()
        return time.process_time() - began

    medians = medians_in_turn([partial(timer, step) for step in steps], settings.repeats)
    found = zip(ways, peaks, medians, strict=True)
    return [{"method": w, "batch_size": size, "peak_bytes": p, "cpu_ms": f"{1000 * t:.0f}"} for w, p, t in found]


def main(settings: Settings) -> None:
    same = {"precision": "bf16", **environment(), "threads": 1}
    table = Table(settings.results / "detection_steps.csv", ("method", "batch_size"), same=same)
    for size in settings.measured:
        if any((way, size) not in table for way in settings.ways):
            table.add(*measure_steps(settings, size))
            print(*table.rows[-len(settings.ways) - 1 :], sep="\n", flush=True)
    runs: dict[tuple[object, ...], Callable[[], dict[str, Any]]] = {
        (way, settings.steps, seed): partial(trained, settings, way, settings.steps, seed)
        for seed in settings.seeds
        for way in settings.ways
    }
    run_missing(settings.results / "detection.csv", KEY, runs, settings.jobs)


if __name__ == "__main__":
    main(tyro.cli(Settings))
