"""A training step that fits a budget of bytes: what the planner chooses, and whether the step stays within it.

    python examples/into_a_budget.py                    # the budget is 30% of what backpropagation takes
    python examples/into_a_budget.py --budget-mib 40    # a budget in MiB

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
METHOD, COUPLING = lg.dgl("1c2f"), lg.MAN(momentum=0.99)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
MIB = 2**20


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end: normalised images [64, 1, 32, 32] and labels [64]."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = nn.functional.interpolate(((x - x.mean()) / x.std()).float().view(-1, 1, 8, 8), 32)
    while True:
        for chosen in torch.randperm(len(x)).split(BATCH)[:-1]:
            yield x[chosen], y[chosen]


def train(model: lg.LocalModel, plan: lg.Plan, steps: int) -> lg.PeakBytes:
    """Trains for some steps as `plan` says, and measures the memory of one more step."""
    groups = lg.param_groups(model)
    if plan.step_as_you_go:  # Each block has an optimizer of its own.
        optimizers = [SGD([g for g in groups if g["block"] == k]) for k in range(len(model.blocks))]
    else:
        optimizers = [SGD(groups)]

    def step(x: Tensor, y: Tensor) -> list[float]:
        losses = []
        for done in lg.block_steps(model, x, y):
            model.move_averages(done.block)
            losses.append(done.loss.item())
            if plan.step_as_you_go:  # The gradients of this block are freed before the next block has any.
                optimizers[done.block].step()
                optimizers[done.block].zero_grad()
        if not plan.step_as_you_go:
            optimizers[0].step()
            optimizers[0].zero_grad()
        return losses

    source = batches()
    for number in range(steps):
        losses = step(*next(source))
        if number % 10 == 0:
            print(f"  step {number}: losses of the blocks {', '.join(f'{loss:.2f}' for loss in losses)}")
    x, y = next(source)
    return lg.measure_peak(lambda: step(x, y), model=model, optimizers=optimizers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-mib", type=float)
    parser.add_argument("--steps", type=int, default=31)
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone = lg.build("resnet32", classes=10, in_channels=1)
    example = torch.zeros(BATCH, 1, 32, 32)
    planner = lg.Planner(backbone, example, method=METHOD, coupling=COUPLING, optimizer=SGD)
    budget = planner.bp.peak * 3 // 10 if args.budget_mib is None else int(args.budget_mib * MIB)
    try:
        plan = planner.fastest(budget)
    except lg.UserError as error:  # The sentence names the smallest budget that is enough.
        parser.error(str(error))
    plans = {"backpropagation": planner.bp, "activation checkpointing": planner.checkpointing, "the plan": plan}
    print(f"Predicted before anything runs. The budget is {budget / MIB:.1f} MiB.")
    for name, p in plans.items():
        print(f"  {name}: {p.peak / MIB:.1f} MiB, {p.seconds / planner.bp.seconds:.2f} times the time of BP")
    print(f"Blocks of the plan: {len(plan.blocks)}. Their last units: {', '.join(plan.blocks)}.")
    print(f"Units to recompute: {len(plan.units)}. Step as you go: {'yes' if plan.step_as_you_go else 'no'}.")
    coupling = COUPLING if len(plan.blocks) > 1 else None
    model = plan.apply(lg.localize(backbone, blocks=plan.blocks, method=METHOD, coupling=coupling, example=example))
    peak = train(model, plan, args.steps).total
    assert peak <= budget, f"the step took {peak} bytes of a budget of {budget}"
    print(f"Measured: {peak / MIB:.1f} MiB, everything counted, which is within the budget.")
    if len(plan.blocks) == 1:
        print("What to conclude: recomputing is enough here. The gradients are exact, and only time is paid.")
    else:
        print("What to conclude: cutting is the fastest way into this budget. The gradients are those of each block's")
        print("own loss, so compare the accuracy on your own task. Where a larger budget avoids the cut, take that.")


if __name__ == "__main__":
    main()
