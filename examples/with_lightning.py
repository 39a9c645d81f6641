"""Lightning trains a network in four blocks: with automatic optimization by one loss, or with manual optimization.

    python examples/with_lightning.py     # half a minute on two CPU cores; needs pip install 'localgrad[examples]'

A ResNet-32 learns scikit-learn's images of digits, enlarged to 16x16, also by backpropagation in the same trainer.
"""
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportIncompatibleMethodOverride=false

import argparse
import logging
from typing import Any

import torch
from lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import localgrad as lg

BATCH = 64


def digits() -> DataLoader:
    """Batches of normalised images [64, 1, 16, 16] with their labels [64]."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).to(torch.get_default_dtype()).view(-1, 1, 8, 8)
    data = TensorDataset(nn.functional.interpolate(x, 16), y)
    return DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0), drop_last=True)


class Backpropagation(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


class Automatic(Backpropagation):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda own, *_: own.zero_grad())  # Lightning clears too late.
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out = lg.as_loss(self.model, *batch, move_averages=False)
        self.losses.append(out.losses[-1].item())
        return out.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.model.move_averages()  # once a step, also with accumulate_grad_batches


class Manual(Backpropagation):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer: Any = self.optimizers()
        out = lg.local_backward(self.model, *batch, backward=self.manual_backward)
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(out.losses[-1].item())


def train(module: LightningModule, steps: int, **settings: Any) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    Trainer(max_steps=steps, **quiet, **settings).fit(module, digits())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for kind in (Automatic, Manual, Backpropagation):
        torch.manual_seed(0)
        model: Any = lg.build("resnet32", classes=10, in_channels=1)
        if kind is not Backpropagation:
            how: Any = {"method": lg.dgl("1c2f"), "coupling": lg.MAN(momentum=0.99)}
            model = lg.localize(model, blocks=4, example=torch.zeros(BATCH, 1, 16, 16), **how)
        module = kind(model)
        peak = lg.measure_peak(lambda m=module: train(m, steps)).total
        print(f"{kind.__name__}: last loss {module.losses[-1]:.3f}, peak {peak / 2**20:.1f} MiB")
    print("What to conclude: both ways give the same losses, in less memory than backpropagation.")


if __name__ == "__main__":
    main()
