"""Peak bytes of one training step of ResNet-110 on 3x32x32, float32: BP, DGL and MAN at several cuts.

    python benchmarks/peak_memory.py --out results/memory_resnet110.csv

Everything live counts: parameters, optimizer state, gradients, activations. Bytes do not depend on the machine's load.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import localgrad as lg
from localgrad.run.runlog import environment, mib

BALANCED = ["layer1.6", "layer1.14", "layer2.8"]  # four blocks of about equal bytes
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

    model: str = "resnet110"
    batch_size: int = 128
    out: Path = Path("results/memory_resnet110.csv")


def peak(settings: Settings, method: str, coupling: lg.MAN | None, blocks: int | list[str]) -> int:
    torch.manual_seed(0)
    x, y = torch.randn(settings.batch_size, 3, 32, 32), torch.randint(10, (settings.batch_size,))
    head = None if isinstance(coupling, lg.DeepMAN) else "1c2f"
    chosen = lg.bp() if method == "bp" else lg.dgl(head)
    backbone = lg.build(settings.model, classes=10)
    model = lg.localize(backbone, blocks=blocks, method=chosen, coupling=coupling, example=x)
    optimizer = torch.optim.SGD(lg.param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9, nesterov=True)

    def step() -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    return lg.measure_peak(step).total


def main(settings: Settings) -> None:
    env = environment()
    columns = ("model", "batch_size", "method", "blocks", "cuts", "peak_bytes", "below_bp_percent")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with settings.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *env])
        base = 0
        for method, coupling, blocks in ROWS:
            size = peak(settings, method, coupling, blocks)
            base = base or size
            count, cuts = (blocks, "even") if isinstance(blocks, int) else (len(blocks) + 1, " ".join(blocks))
            below = 100 * (1 - size / base)
            writer.writerow(
                [settings.model, settings.batch_size, method, count, cuts, size, f"{below:.1f}", *env.values()]
            )
            print(f"{method:13} {count:3} blocks ({cuts}): {mib(size)}, {below:.1f}% below BP", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
