"""A training step that fits a budget of bytes: what `lg.fit` chooses, and whether the step stays within it.

    python examples/into_a_budget.py                    # the budget is 40% of what backpropagation takes
    python examples/into_a_budget.py --budget-mib 40    # a budget in MiB
    python examples/into_a_budget.py --local            # cut into blocks with MAN, to compare

It trains a ResNet-32 on scikit-learn's images of digits, enlarged to 32x32: half a minute on one CPU core.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import localgrad as lg

BATCH = 64
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
MIB = 2**20


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end: normalised images [64, 1, 32, 32] and labels [64]."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = nn.functional.interpolate(((x - x.mean()) / x.std()).float().view(-1, 1, 8, 8), 32)
    while True:
        for chosen in torch.randperm(len(x)).split(BATCH)[:-1]:
            yield x[chosen], y[chosen]


def train(model: lg.LocalModel, steps: int) -> lg.PeakBytes:
    """Trains for some steps, and measures the memory of one more step."""
    optimizer = SGD(lg.param_groups(model))

    def step(x: Tensor, y: Tensor) -> list[float]:
        out = lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.item() for loss in out.losses]

    source = batches()
    for number in range(steps):
        losses = step(*next(source))
        if number % 10 == 0:
            print(f"  step {number}: losses of the blocks {', '.join(f'{loss:.2f}' for loss in losses)}")
    x, y = next(source)
    return lg.measure_peak(lambda: step(x, y), model=model, optimizers=[optimizer])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-mib", type=float)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--steps", type=int, default=31)
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone = lg.build("resnet32", classes=10, in_channels=1)
    example = torch.zeros(BATCH, 1, 32, 32)
    bp = lg.Planner(backbone, example, method=lg.bp(), optimizer=SGD).bp.peak
    budget = bp * 4 // 10 if args.budget_mib is None else int(args.budget_mib * MIB)
    how = {"method": lg.dgl("1c2f"), "coupling": lg.MAN(momentum=0.99)} if args.local else {}
    try:
        fit = lg.fit(backbone, example, budget, optimizer=SGD, **how)
    except lg.UserError as error:  # The sentence names the smallest budget that is enough.
        parser.error(str(error))
    print(f"Predicted before anything is trained. The budget is {budget / MIB:.1f} MiB.")
    print(f"The plan: {fit}.")
    print(fit.model)
    peak = train(fit.model, args.steps).total
    assert peak <= budget, f"the step took {peak} bytes of a budget of {budget}"
    print(f"Measured: {peak / MIB:.1f} MiB, everything counted, which is within the budget.")
    if len(fit.plan.blocks) == 1:
        print("What to conclude: exact training fits. The gradients are those of backpropagation; only time is paid.")
    else:
        print("What to conclude: cutting fits too. The gradients are those of each block's own loss, so compare the")
        print("accuracy on your own task, and take exact training where it is quick enough.")


if __name__ == "__main__":
    main()
