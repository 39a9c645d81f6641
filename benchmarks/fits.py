"""Measures the peak of a step of what `lg.fit` makes of twelve networks, for four budgets each.

    python benchmarks/fits.py

16 images a step, float32, SGD with momentum. The budgets lie between the least that any plan takes and what
backpropagation takes. The device counts as one of nominal speed. Writes results/fits.csv network by network. Networks
that it has already are not fitted again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import Table

import localgrad as lg
from localgrad.run.folder import environment

SIZES = {
    "resnet20": 32, "resnet32": 32, "resnet56": 32, "resnet110": 32, "torchvision:resnet18": 64, "timm:resnet26d": 96,
    "torchvision:resnet50": 96, "torchvision:resnext50_32x4d": 96, "timm:convnext_atto": 96,
    "timm:efficientnet_b0": 96, "timm:vit_tiny_patch16_224": 224, "timm:swin_tiny_patch4_window7_224": 224,
}  # fmt: skip
BATCH = 16
SHARES = (1.0, 0.6, 0.3, 0.05)  # Of the way from the least to what backpropagation takes.


@dataclass(frozen=True)
class Settings:
    """Fit each network into each budget."""

    models: tuple[str, ...] = tuple(SIZES)
    out: Path = Path("results/fits.csv")


def measured(found: lg.Fit, x: torch.Tensor, y: torch.Tensor) -> int:
    """The peak of a real step."""
    optimizer = torch.optim.SGD(lg.param_groups(found.model), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        lg.local_backward(found.model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    step()  # The first step makes the optimizer's state.
    return lg.measure_peak(step).total


def main(settings: Settings) -> None:
    table = Table(settings.out, key=("model", "share"), same=environment())
    for model in settings.models:
        size = SIZES[model]
        x, y = torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))
        planner = lg.Planner(lg.build(model, classes=10), x, method=lg.dgl(), coupling=lg.MAN())
        bp = planner.exactly(planner.bp).peak
        least = planner.exactly(planner.frontier(as_you_go=False)[-1]).peak
        for share in (share for share in SHARES if (model, share) not in table):
            budget = int(least + share * (bp - least))
            began = time.perf_counter()
            found = lg.fit(lg.build(model, classes=10), x, budget, speed=lg.Speed())
            seconds = time.perf_counter() - began
            peak = measured(found, x, y)
            table.add({
                "model": model, "share": share, "budget_bytes": budget, "peak_bytes": peak,
                "predicted_peak_bytes": found.plan.peak, "within": peak <= budget, "blocks": len(found.plan.blocks),
                "predicted_times_bp": f"{found.times_bp:.3f}", "accumulate": found.plan.accumulate,
                "planning_seconds": f"{seconds:.1f}",
            })  # fmt: skip
            print(f"{model} {share}: {found}; measured {peak / 2**20:.1f} MiB", flush=True)
    print(f"{sum(row['within'] == 'True' for row in table.rows)} of {len(table.rows)} are within their budget")


if __name__ == "__main__":
    main(tyro.cli(Settings))
