"""Memory of one training step against depth: BP, and one unit per block with MAN. ResNets on 3x32x32, float32.

    python benchmarks/depth.py

Local plans are measured (the second step), BP is predicted: ResNet-1202 would take more than 11 GiB. Bytes do not
depend on the machine's load. `benchmarks/pictures.py` draws it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

import localgrad as lg
from localgrad.core.backbones import CifarResNet
from localgrad.run.runlog import environment, mib
from localgrad.scale.memory import KINDS, PeakBytes, optimizers_for, training_step

DEPTHS = (32, 56, 110, 218, 434, 1202)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Settings:
    """Measure a step for each depth."""

    depths: tuple[int, ...] = DEPTHS
    batch_size: int = 128
    out: Path = Path("results/depth.csv")


def local(depth: int, batch_size: int) -> PeakBytes:
    torch.manual_seed(0)
    x, y = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    backbone = CifarResNet(depth)
    count = len(lg.units(backbone, x))
    model = lg.localize(backbone, blocks=count, method=lg.dgl("1c2f"), coupling=lg.MAN(), example=x)
    optimizers = optimizers_for(lg.param_groups(model), SGD, as_you_go=True)
    step = partial(training_step, model, optimizers, x, y, step_as_you_go=True)
    step()  # makes the optimizers' state
    return lg.measure_peak(step, model=model, optimizers=optimizers)


def bp(depth: int, batch_size: int) -> PeakBytes:
    model = lg.localize(CifarResNet(depth), method=lg.bp(), example=torch.zeros(1, 3, 32, 32))
    return lg.predict_peak(model, batch_size, lambda own: [SGD(own.parameters())])


def main(settings: Settings) -> None:
    env = environment()
    series: dict[str, list[int]] = {"BP, all": [], "one unit per block, all": [], "one unit per block, activations": []}
    with settings.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["depth", "method", "blocks", "how", "peak_bytes", *KINDS, "batch_size", *env])
        for depth in settings.depths:
            whole, own = bp(depth, settings.batch_size), local(depth, settings.batch_size)
            count = (depth - 2) // 2 + 1
            for row in (("bp", 1, "predicted", whole), ("dgl+man 1c2f, step as you go", count, "measured", own)):
                *named, peak = row
                split = [peak.split[kind] for kind in KINDS]
                writer.writerow([depth, *named, peak.total, *split, settings.batch_size, *env.values()])
            for sizes, size in zip(series.values(), (whole.total, own.total, own.split["activations"]), strict=True):
                sizes.append(size)
            print(f"ResNet-{depth}: " + ", ".join(f"{name} {mib(s[-1])}" for name, s in series.items()), flush=True)
    activations = series["one unit per block, activations"]
    print(f"activations: the largest is {max(activations) / min(activations):.3f} times the smallest")


if __name__ == "__main__":
    main(tyro.cli(Settings))
