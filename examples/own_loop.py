"""A training loop of your own: evaluation, a schedule, gradient accumulation, clipping and saving.

    python examples/own_loop.py     # less than a minute on two CPU cores

It trains a ResNet-20 on scikit-learn's 1,797 images of digits twice: by backpropagation, and as four blocks.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import localgrad as lg

BATCH = 32
ACCUMULATE = 2  # The gradients of two batches are added up before the optimizer steps.


def digits() -> TensorDataset:
    """All images [1797, 1, 8, 8], normalised, with their labels [1797]."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    return TensorDataset(((x - x.mean()) / x.std()).float().view(-1, 1, 8, 8), y)


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of the images whose digit is recognised, in percent."""
    network.eval()
    right = network(x).argmax(1) == y
    network.train()
    return 100 * right.float().mean().item()


def train(model: lg.LocalModel, epochs: int, file: Path) -> float:
    """Trains `model`, saves the backbone of its best epoch in `file`, and returns the accuracy of that epoch."""
    data, test = random_split(digits(), [1437, 360], torch.Generator().manual_seed(0))
    test_x, test_y = test[:]
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(lg.param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(loader) // ACCUMULATE))
    best = 0.0
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()  # The last batch of an epoch may have had no second one.
        for number, (x, y) in enumerate(loader, 1):
            last = number % ACCUMULATE == 0
            for done in lg.block_steps(model, x, y, scale=1 / ACCUMULATE):
                # Here block `done.block` has its gradients, and its activations are already freed.
                if last:
                    nn.utils.clip_grad_norm_(model.members(done.block), max_norm=5.0)
            if last:
                model.move_averages()  # once for each step of the optimizer, before that step
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        found = accuracy(model.backbone, test_x, test_y)
        print(f"  epoch {epoch}: accuracy {found:.1f}%, next learning rate {schedule.get_last_lr()[0]:.3f}")
        if found > best:
            best = found
            save_file(model.backbone.state_dict(), file)
    plain = lg.build("resnet20", classes=10, in_channels=1)
    plain.load_state_dict(load_file(file))
    assert accuracy(plain, test_x, test_y) == best, "the saved network is not the one that was evaluated"
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    found = []
    for method, coupling in ((lg.bp(), None), (lg.dgl("1c2f"), lg.MAN(momentum=0.99))):
        torch.manual_seed(0)
        backbone = lg.build("resnet20", classes=10, in_channels=1)
        model = lg.localize(backbone, method=method, coupling=coupling, example=torch.zeros(BATCH, 1, 8, 8))
        print(f"{method.name}, blocks: {len(model.blocks)}")
        with tempfile.TemporaryDirectory() as folder:
            found.append(train(model, epochs, Path(folder, "best.safetensors")))
    print(f"Backpropagation reached {found[0]:.1f}%, and four blocks with no gradient between them {found[1]:.1f}%.")
    print("The saved file is a plain ResNet-20: it has the usual state_dict keys, and no auxiliary is in it.")
    print("What to conclude: on 360 test images and one seed, a point or two between them is chance. Four blocks can")
    print("learn this task as well. Where backpropagation fits your memory, take it; cut where it does not fit.")


if __name__ == "__main__":
    main()
