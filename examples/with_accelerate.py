"""Accelerate trains a network in four blocks: by one loss, or by one backward pass for each block.

    python examples/with_accelerate.py     # half a minute on two CPU cores; needs pip install 'localgrad[examples]'

A ResNet-32 learns scikit-learn's images of digits, enlarged to 16x16, also by backpropagation in the same loop.
"""
# pyright: reportMissingImports=false

import argparse
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import localgrad as lg

BATCH = 64


def digits() -> TensorDataset:
    """All images [1797, 1, 16, 16], normalised, with their labels [1797]."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).to(torch.get_default_dtype()).view(-1, 1, 8, 8)
    return TensorDataset(nn.functional.interpolate(x, 16), y)


def by_loss(accelerator: Accelerator, model: lg.LocalModel, x: Tensor, y: Tensor) -> Tensor:
    out = lg.as_loss(model, x, y, move_averages=False)
    accelerator.backward(out.loss)
    return out.losses[-1]


def by_blocks(accelerator: Accelerator, model: lg.LocalModel, x: Tensor, y: Tensor) -> Tensor:
    out = lg.local_backward(model, x, y, backward=accelerator.backward, move_averages=False)
    return out.losses[-1]


def by_backpropagation(accelerator: Accelerator, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(network(x), y)
    accelerator.backward(loss)
    return loss


def train(model: Any, step: Callable[..., Tensor], steps: int, accumulate: int = 1) -> list[float]:
    """Trains for some batches, and returns the loss of the network for each. The optimizer steps every `accumulate`."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    groups = lg.param_groups(model) if isinstance(model, lg.LocalModel) else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    loader = DataLoader(digits(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0), drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for _, (x, y) in zip(range(steps), loader, strict=False):
        with accelerator.accumulate(model):
            losses.append(step(accelerator, model, x, y).item())
            if accelerator.sync_gradients:  # The optimizer steps now.
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
                if isinstance(model, lg.LocalModel):
                    model.move_averages()
            optimizer.step()
            optimizer.zero_grad()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    for step in (by_loss, by_blocks, by_backpropagation):
        torch.manual_seed(0)
        model: Any = lg.build("resnet32", classes=10, in_channels=1)
        if step is not by_backpropagation:
            how: Any = {"method": lg.dgl("1c2f"), "coupling": lg.MAN(momentum=0.99)}
            model = lg.localize(model, blocks=4, example=torch.zeros(BATCH, 1, 16, 16), **how)
        losses: list[float] = []
        peak = lg.measure_peak(lambda m=model, s=step, kept=losses: kept.extend(train(m, s, steps))).total
        print(f"{step.__name__}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}, peak {peak / 2**20:.1f} MiB")
    print("What to conclude: both ways give the same losses, in less memory than backpropagation in the same loop.")


if __name__ == "__main__":
    main()
