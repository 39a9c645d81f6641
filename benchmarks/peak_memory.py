"""Peak memory of one training step of ResNet-110 with BP, DGL and MAN, cut in several ways.

    python benchmarks/peak_memory.py

Images of 3x32x32, float32. Everything that is live counts: parameters, optimizer state, gradients, activations. The
bytes do not depend on the machine's load. Writes results/memory_resnet110.csv, one row for each way to train.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import Table

import localgrad as lg
from localgrad.core.sizes import mib
from localgrad.run.folder import environment

MODEL = "resnet110"
BALANCED = ["layer1.6", "layer1.14", "layer2.8"]  # These cuts make four blocks of about equal bytes.
ROWS: list[tuple[str, lg.MAN | None, int | list[str]]] = [
    ("bp", None, 1),
    ("dgl", None, BALANCED),
    ("dgl+man", lg.MAN(), BALANCED),
    ("dgl+man", lg.MAN(), 4),
    ("dgl+man", lg.MAN(), 8),
    ("dgl+man", lg.MAN(), 55),
    ("dgl+deep-man", lg.DeepMAN(), BALANCED),
]


@dataclass(frozen=True)
class Settings:
    """Measure the peak bytes of one step for each row."""

    batch_size: int = 128
    out: Path = Path("results/memory_resnet110.csv")


def peak(batch_size: int, method: str, coupling: lg.MAN | None, blocks: int | list[str]) -> int:
    """The peak bytes of the second step. The first step makes the optimizer's state."""
    torch.manual_seed(0)
    x, y = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    head = None if isinstance(coupling, lg.DeepMAN) else "1c2f"
    chosen = lg.bp() if method == "bp" else lg.dgl(head)
    backbone = lg.build(MODEL, classes=10)
    model = lg.localize(backbone, blocks=blocks, method=chosen, coupling=coupling, example=x)
    optimizer = torch.optim.SGD(lg.param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9, nesterov=True)

    def step() -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return lg.measure_peak(step).total


def main(settings: Settings) -> None:
    table, bp = Table(settings.out, same=environment()), 0
    for method, coupling, blocks in ROWS:
        size = peak(settings.batch_size, method, coupling, blocks)
        bp = bp or size
        count, cuts = (blocks, "even") if isinstance(blocks, int) else (len(blocks) + 1, " ".join(blocks))
        below = f"{100 * (1 - size / bp):.1f}"
        table.add({
            "model": MODEL, "batch_size": settings.batch_size, "method": method, "blocks": count,
            "cuts": cuts, "peak_bytes": size, "below_bp_percent": below,
        })  # fmt: skip
        print(f"{method:13} {count:3} blocks ({cuts}): {mib(size)}, {below}% below BP", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
