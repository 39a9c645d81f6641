"""Memory and time of one training step at ImageNet's size, predicted: nothing is run, no GPU and no images are needed.

    python benchmarks/imagenet.py

224 px, float32, SGD with momentum; times are of a device of nominal speed (`Speed`), so read their ratios. MAN with
pool + linear heads (`0c1f`), and InfoPro + MAN at the paper's cuts. Writes results/imagenet_memory.csv, a network at a
time; networks that are there already are kept.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.run.runlog import environment
from localgrad.scale.plan import Plan, Planner

# The K=2 cut of InfoPro's published code and the K=4 cuts of MAN's; of transformers we know none, so those are even.
CUTS = {
    "torchvision:resnet101": ["layer2.0", "layer2.2 layer3.8 layer3.16"],
    "torchvision:resnet152": ["layer2.5", "layer2.6 layer3.13 layer3.25"],
    "torchvision:resnext101_32x8d": ["layer2.2", "layer2.2 layer3.8 layer3.16"],
    "timm:vit_small_patch16_224": [],
    "timm:vit_base_patch16_224": [],
}
SHARES = (0.5, 0.4, 0.32, 0.25, 0.2)  # of BP's memory
MOST = 8  # blocks


@dataclass(frozen=True)
class Settings:
    """Predict each row for each network."""

    models: tuple[str, ...] = tuple(CUTS)
    batch_size: int = 128
    out: Path = Path("results/imagenet_memory.csv")


def plans(model: str, batch_size: int) -> Iterator[tuple[str, Plan]]:
    backbone = lg.build(model, classes=1000).to("meta")
    example = torch.empty(batch_size, 3, 224, 224, device="meta")
    man = Planner(backbone, example, method=lg.dgl("0c1f"), coupling=lg.MAN())
    bp = man.exactly(man.bp)
    yield "BP", bp
    yield "checkpointing", man.exactly(man.checkpointing)
    for cuts in CUTS[model]:
        ends = [*cuts.split(), man.costs.names[-1]]
        yield f"MAN, K={len(ends)}, the paper's cuts", man.exactly(man.cut(ends))
    if CUTS[model]:
        infopro = Planner(backbone, example, method=lg.infopro(), coupling=lg.MAN())
        for cuts in CUTS[model]:
            ends = [*cuts.split(), infopro.costs.names[-1]]
            yield f"InfoPro + MAN, K={len(ends)}, the paper's cuts", infopro.exactly(infopro.cut(ends))
    else:
        for blocks in (2, 4):
            yield f"MAN, K={blocks}, even", man.exactly(man.even(blocks))
    for blocks in range(2, MOST + 1):
        yield f"MAN, K={blocks}, balanced", man.exactly(man.balanced(blocks))
    for share in SHARES:
        for name, one in (("BP", True), ("MAN", False)):
            budget = int(share * bp.peak)
            try:
                plan = man.fastest(budget, 1) if one else man.fastest(budget, several=True)
            except UserError:
                continue  # nothing of that kind is so small
            yield f"{name}, the fastest in {share:.0%} of BP's memory", plan
    yield "MAN, the least", man.exactly(man.frontier(several=True)[-1])


def main(settings: Settings) -> None:
    env = environment()
    columns = ["model", "row", "blocks", "peak_bytes", "below_bp_percent", "flops_times_bp", "time_times_bp"]
    columns += ["as_you_go", "units_recomputed", "couplings_recomputed", "cuts", "batch_size", *env]
    done: list[dict[str, str]] = []
    if settings.out.is_file():
        with settings.out.open(newline="") as file:
            done = list(csv.DictReader(file))
    for model in settings.models:
        if any(row["model"] == model for row in done):
            continue
        began, base = time.perf_counter(), None
        for name, plan in plans(model, settings.batch_size):
            base = base or plan
            below = 100 * (base.peak - plan.peak) / base.peak
            ratios = [f"{plan.flops / base.flops:.3f}", f"{plan.seconds / base.seconds:.3f}"]
            what = [plan.step_as_you_go, len(plan.units), len(plan.couplings), " ".join(plan.blocks[:-1])]
            row = [model, name, len(plan.blocks), plan.peak, f"{below:.1f}", *ratios, *what, settings.batch_size]
            done.append(dict(zip(columns, map(str, [*row, *env.values()]), strict=True)))
            print(
                f"{model} {name}: {plan.peak / 2**30:.2f} GiB ({below:.1f}% below BP), arithmetic {ratios[0]}x",
                flush=True,
            )
        print(f"{model}: {time.perf_counter() - began:.0f} s", flush=True)
        with settings.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(done)


if __name__ == "__main__":
    main(tyro.cli(Settings))
