"""DistributedDataParallel averages the gradients of a network in four blocks over two processes.

    torchrun --nproc-per-node 2 examples/with_ddp.py     # half a minute on two CPU cores
    python examples/with_ddp.py                          # the same whole batches on one process, for comparison

A network with group norm learns scikit-learn's images of digits, enlarged to 32x32, also by backpropagation in the same
loop. `lg.Replicas` does the same without DistributedDataParallel, and averages block k while block k+1 computes.
"""

import argparse
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: see docs/scaling.md
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import localgrad as lg

BATCH = 64


def batches(steps: int, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of the same random batches: normalised images [64 / count, 1, 32, 32] and labels."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).to(torch.get_default_dtype()).view(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    for chosen in torch.randint(len(x), (steps, BATCH), generator=generator).chunk(count, dim=1)[rank]:
        yield nn.functional.interpolate(x[chosen], 32), y[chosen]


def unit(channels: int, out: int) -> nn.Module:
    stride = 1 if out == channels else 2
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(4, out), nn.ReLU())


def network() -> nn.Module:
    widths = [1, *[16] * 5, *[32] * 4, *[64] * 3]
    units = [unit(a, b) if a > 1 else nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    return nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Loss(nn.Module):
    """What DistributedDataParallel wraps: it averages gradients of a loss that the wrapped module has returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.model, lg.LocalModel):
            loss = nn.functional.cross_entropy(self.model(x), y)
            return loss, loss.detach()
        out = lg.as_loss(self.model, x, y)
        return out.loss, out.losses[-1]


def train(model: nn.Module, steps: int, rank: int, count: int) -> list[float]:
    """Trains for some steps, and returns the loss of the network for each, on this rank's part of the batch."""
    loss_of = DistributedDataParallel(Loss(model)) if count > 1 else Loss(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses: list[float] = []
    for x, y in batches(steps, rank, count):
        loss, own = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(own.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        dist.init_process_group("gloo")
    for local in (True, False):
        torch.manual_seed(0)  # the same network on each rank
        model: Any = network()
        if local:
            how: Any = {"method": lg.dgl("0c1f"), "coupling": lg.MAN(momentum=0.99)}
            model = lg.localize(model, blocks=4, example=torch.zeros(BATCH, 1, 32, 32), **how)
        losses: list[float] = []
        peak = lg.measure_peak(lambda m=model, kept=losses: kept.extend(train(m, steps, rank, count))).total
        weights = sum(p.sum().item() for p in model.parameters())
        name = "four blocks" if local else "backpropagation"
        print(f"rank {rank}, {name}: loss {losses[-1]:.3f}, peak {peak / 2**20:.1f} MiB, sum of weights {weights:.6f}")
    if count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
