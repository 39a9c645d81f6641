"""timm's TrainingTask trains a network in four blocks, with the scaler that timm's train.py calls.

    python examples/with_timm.py     # half a minute on two CPU cores

A vision transformer of timm learns scikit-learn's images of digits, enlarged to 32x32, also by backpropagation in the
same loop. In timm's train.py, after it has made the optimizer of `model`, these lines take the place of its task:

    model = lg.localize(model, blocks=4, method=lg.dgl(), example=torch.zeros(2, 3, 224, 224))
    task = LocalTask(model, device=device)
    optimizer.add_param_group({"params": [p for p in model.auxiliaries.parameters() if p.requires_grad]})
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from timm.task import ClassificationTask, TrainingTask
from timm.utils.cuda import NativeScaler
from torch import Tensor, nn

import localgrad as lg

BATCH = 64


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches: normalised images [64, 1, 32, 32] and labels [64]."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).to(torch.get_default_dtype()).view(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    for chosen in torch.randint(len(x), (steps, BATCH), generator=generator):
        yield nn.functional.interpolate(x[chosen], 32), y[chosen]


class LocalTask(TrainingTask):
    """Returns the loss of all blocks. What timm evaluates, averages and saves as the network is the backbone."""

    def __init__(self, model: lg.LocalModel, device: torch.device | None = None) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = model
        self.eval_model = model.backbone

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        out = lg.as_loss(self.trainable_module, input, target)
        return {"loss": out.loss, "output": out.logits}


def train(task: TrainingTask, steps: int) -> list[float]:
    """The loop of timm's train.py. It returns the loss of the network for each step."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    scaler = NativeScaler(device="cpu")
    losses: list[float] = []
    task.train()
    for x, y in batches(steps):
        result = task(x, y)
        scaler(result["loss"], optimizer, clip_grad=5.0, parameters=task.get_clip_parameters())
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(result["output"].detach(), y).item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    for local in (True, False):
        torch.manual_seed(0)
        size: Any = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
        network = lg.build("timm:vit_tiny_patch16_224", classes=10, in_channels=1, **size)
        task: TrainingTask = ClassificationTask(network, nn.CrossEntropyLoss(), verbose=False)
        if local:
            how: Any = {"method": lg.dgl("0c1f"), "coupling": lg.MAN(momentum=0.99)}
            task = LocalTask(lg.localize(network, blocks=4, example=torch.zeros(BATCH, 1, 32, 32), **how))
        losses: list[float] = []
        peak = lg.measure_peak(lambda t=task, kept=losses: kept.extend(train(t, steps))).total
        name = type(task).__name__
        print(f"{name}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}, peak {peak / 2**20:.1f} MiB")
    print("What to conclude: four blocks take less memory than backpropagation in the same loop.")


if __name__ == "__main__":
    main()
