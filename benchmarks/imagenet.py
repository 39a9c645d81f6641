"""Predicts memory and time of one training step at ImageNet's size. It needs no GPU and no images.

    python benchmarks/imagenet.py

224 px, float32, SGD with momentum. DGL and MAN have pool + linear heads (`0c1f`), and InfoPro + MAN has the paper's
cuts. Batches are not split. The times are those of a device of nominal speed (`Speed`), so only their ratios mean
something. Writes results/imagenet_memory.csv network by network. Networks that it has already are not predicted again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import Table
from torch import Tensor, nn

import localgrad as lg
from localgrad.run.folder import environment
from localgrad.scale.plan import Plan, Planner

# The K=2 cut of InfoPro's published code and the K=4 cuts of MAN's. Nobody has published cuts of the transformers, so
# those are cut evenly.
CUTS = {
    "torchvision:resnet101": ["layer2.0", "layer2.2 layer3.8 layer3.16"],
    "torchvision:resnet152": ["layer2.5", "layer2.6 layer3.13 layer3.25"],
    "torchvision:resnext101_32x8d": ["layer2.2", "layer2.2 layer3.8 layer3.16"],
    "timm:vit_small_patch16_224": [],
    "timm:vit_base_patch16_224": [],
}
# Networks of other sizes that people have, without the rows for a number of blocks.
SIZES = ("torchvision:resnet50", "timm:convnext_tiny", "timm:efficientnet_b0", "timm:swin_tiny_patch4_window7_224")
SHARES = (0.5, 0.4, 0.33, 0.25, 0.2)  # Budgets, as shares of BP's memory.
MOST_BLOCKS = 8


@dataclass(frozen=True)
class Settings:
    """Predict each row for each network."""

    models: tuple[str, ...] = (*CUTS, *SIZES)
    batch_size: int = 128
    out: Path = Path("results/imagenet_memory.csv")


def plans(model: str, batch_size: int) -> Iterator[tuple[str, Plan]]:
    """The rows of a network, each with its plan. The first is BP."""
    backbone = lg.build(model, classes=1000).to("meta")
    example = torch.empty(batch_size, 3, 224, 224, device="meta")
    exact = Planner(backbone, example, method=lg.bp(), accumulate="never")
    dgl = Planner(backbone, example, method=lg.dgl("0c1f"), accumulate="never")
    man = Planner(backbone, example, method=lg.dgl("0c1f"), coupling=lg.MAN(), accumulate="never")
    bp = exact.exactly(exact.bp)
    yield "BP", bp
    yield "exact, unit by unit", exact.exactly(exact.checkpointing)
    yield from cuts(model, man, backbone, example)
    kinds = (("exact", exact, 1), ("DGL", dgl, None), ("MAN", man, None))
    for share in SHARES:
        for name, planner, blocks in kinds:
            plan = planner.within(int(share * bp.peak), blocks, several=blocks is None, as_you_go=True)
            if plan is not None:
                yield f"{name}, the fastest in {share:.0%} of BP's memory", plan
    for name, planner, blocks in kinds:
        yield f"{name}, the least", planner.exactly(planner.frontier(blocks, several=blocks is None)[-1])


def cuts(model: str, man: Planner, backbone: nn.Module, example: Tensor) -> Iterator[tuple[str, Plan]]:
    """Plans that recompute nothing: the papers' cuts, even ones, and those that need the least for their number."""
    if model not in CUTS:
        return
    for cut in CUTS[model]:
        ends = [*cut.split(), man.costs.names[-1]]
        yield f"MAN, K={len(ends)}, the paper's cuts", man.exactly(man.cut(ends))
    if CUTS[model]:
        infopro = Planner(backbone, example, method=lg.infopro(), coupling=lg.MAN())
        for cut in CUTS[model]:
            ends = [*cut.split(), infopro.costs.names[-1]]
            yield f"InfoPro + MAN, K={len(ends)}, the paper's cuts", infopro.exactly(infopro.cut(ends))
    else:
        for blocks in (2, 4):
            yield f"MAN, K={blocks}, even", man.exactly(man.even(blocks))
    for blocks in range(2, MOST_BLOCKS + 1):
        yield f"MAN, K={blocks}, balanced", man.exactly(man.balanced(blocks))


def main(settings: Settings) -> None:
    table = Table(settings.out, key=("model",), same={"batch_size": settings.batch_size, **environment()})
    for model in settings.models:
        if (model,) in table:
            continue
        rows, bp = [], None
        for name, plan in plans(model, settings.batch_size):
            bp = bp or plan
            below = f"{100 * (bp.peak - plan.peak) / bp.peak:.1f}"
            row = {
                "model": model, "row": name, "blocks": len(plan.blocks), "peak_bytes": plan.peak,
                "below_bp_percent": below, "flops_times_bp": f"{plan.flops / bp.flops:.3f}",
                "time_times_bp": f"{plan.seconds / bp.seconds:.3f}", "as_you_go": plan.step_as_you_go,
                "units": " ".join(plan.units), "couplings_recomputed": len(plan.couplings),
                "cuts": " ".join(plan.blocks[:-1]),
            }  # fmt: skip
            rows.append(row)
            size = f"{plan.peak / 2**30:.2f} GiB ({below}% below BP)"
            print(f"{model} {name}: {size}, arithmetic {row['flops_times_bp']} times BP", flush=True)
        table.add(*rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
