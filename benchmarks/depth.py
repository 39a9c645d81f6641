"""Memory of one training step against the depth of the network, for BP and for one unit per block with MAN.

    python benchmarks/depth.py

ResNets on images of 3x32x32, float32. The local steps are measured. BP is predicted, because ResNet-1202 would take
more than 11 GiB. The bytes do not depend on the machine's load. Writes results/depth.csv, two rows for each depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from common import Table

import localgrad as lg
from localgrad.core.backbones import CifarResNet
from localgrad.core.sizes import mib
from localgrad.run.folder import environment
from localgrad.scale.memory import KINDS, PeakBytes, optimizers_for, training_step

DEPTHS = (32, 56, 110, 218, 434, 1202)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Settings:
    """Measure a step for each depth."""

    depths: tuple[int, ...] = DEPTHS
    batch_size: int = 128
    out: Path = Path("results/depth.csv")


def one_unit_per_block(depth: int, batch_size: int) -> tuple[int, PeakBytes]:
    """The number of blocks, and the measured peak of the second step."""
    torch.manual_seed(0)
    x, y = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    backbone = CifarResNet(depth)
    count = len(lg.units(backbone, x))
    model = lg.localize(backbone, blocks=count, method=lg.dgl("1c2f"), coupling=lg.MAN(), example=x)
    optimizers = optimizers_for(lg.param_groups(model), SGD, as_you_go=True)
    step = partial(training_step, model, optimizers, x, y, step_as_you_go=True)
    step()  # The first step makes the state of the optimizers.
    return count, lg.measure_peak(step, model=model, optimizers=optimizers)


def bp(depth: int, batch_size: int) -> PeakBytes:
    """The predicted peak of a step."""
    model = lg.localize(CifarResNet(depth), method=lg.bp(), example=torch.zeros(1, 3, 32, 32))
    return lg.predict_peak(model, batch_size, lambda own: [SGD(own.parameters())])


def main(settings: Settings) -> None:
    table = Table(settings.out, same={"batch_size": settings.batch_size, **environment()})
    activations = []
    for depth in settings.depths:
        whole, (count, local) = bp(depth, settings.batch_size), one_unit_per_block(depth, settings.batch_size)
        rows = (("bp", 1, "predicted", whole), ("dgl+man 1c2f, step as you go", count, "measured", local))
        for method, blocks, how, peak in rows:
            split = {kind: peak.split[kind] for kind in KINDS}
            row = {"depth": depth, "method": method, "blocks": blocks, "how": how, "peak_bytes": peak.total}
            table.add(row | split)
        activations.append(local.split["activations"])
        told = f"one unit per block {mib(local.total)}, of which activations {mib(activations[-1])}"
        print(f"ResNet-{depth}: BP {mib(whole.total)}, {told}", flush=True)
    print(f"the largest activations are {max(activations) / min(activations):.3f} times the smallest")


if __name__ == "__main__":
    main(tyro.cli(Settings))
