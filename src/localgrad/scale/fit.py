"""One call from a network and a budget to a model that trains within it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from localgrad.core.auxiliary import Method
from localgrad.core.boundary import detached
from localgrad.core.copies import duplicate, undisturbed
from localgrad.core.couplings import MAN
from localgrad.core.errors import UserError
from localgrad.core.inputs import main_input
from localgrad.core.methods import bp, dgl
from localgrad.core.model import LocalModel
from localgrad.core.recomputation import repeats
from localgrad.core.sizes import bytes_of, mib
from localgrad.core.task import Task
from localgrad.scale.checks import check_planned
from localgrad.scale.memory import MakeOptimizer
from localgrad.scale.plan import Accumulate, Loss, Planner
from localgrad.scale.planned import Plan
from localgrad.scale.speed import Speed, calibrate


@dataclass(frozen=True, eq=False)
class Fit:
    """A model that fits into a budget. `print(fit)` says in one sentence what was chosen and what it costs.

    Attributes:
        model: the model, for `local_backward` or `block_steps`.
        plan: how it trains.
        times_bp: the predicted time of a step over that of backpropagation.
        why: the sentence.
    """

    model: LocalModel
    plan: Plan
    times_bp: float
    why: str

    def __str__(self) -> str:
        return self.why


def fit(
    backbone: nn.Module,
    example: Any,
    budget: int | float | str,
    *,
    method: Method | None = None,
    coupling: MAN | None = None,
    exact: bool = False,
    at_most: float = 1.3,
    criterion: Loss | None = None,
    targets: Any = None,
    task: Task | None = None,
    optimizer: MakeOptimizer | None = None,
    autocast: torch.dtype | None = None,
    speed: Speed | None = None,
    accumulate: Accumulate = "exact",
) -> Fit:
    """Makes a model of `backbone` whose training step on a batch like `example` takes at most `budget` bytes.

    Training is exact, by backpropagation, if that fits in `at_most` times its own time: with units that are computed
    again in the backward pass, and with the batch in parts where that changes nothing. Otherwise the network is cut
    into as few blocks as will do, which is not exact.

        fit = lg.fit(backbone, x, "2GiB")
        print(fit)
        optimizer = torch.optim.SGD(lg.param_groups(fit.model), lr=0.1, momentum=0.9, nesterov=True)
        for x, y in loader:
            out = lg.local_backward(fit.model, x, y)
            optimizer.step()
            optimizer.zero_grad()

    Args:
        backbone: the network to train.
        example: a batch [B, ...] of the size of a step, on the device that trains.
        budget: bytes, as a number or as text such as "2GiB", or a share of what backpropagation takes, such as "50%".
        method: local losses that are wanted. By default exact training is preferred, and `dgl()` with `MAN()` is taken
            where blocks are needed.
        coupling: what goes with `method`.
        exact: whether training must be exact, whatever time it takes.
        at_most: how slow exact training may be before cuts are tried: the time of a step over that of backpropagation.
        criterion: as for `localize`.
        targets: an example of the targets, or those of the batch. By default an int64 class a sample.
        task: as for `localize`.
        optimizer: makes the optimizer from groups of parameters; its state counts. By default SGD with momentum.
        autocast: as for `local_backward`.
        speed: of the device. By default it is measured, which takes seconds.
        accumulate: whether the batch may be split; see `Planner`.

    Raises:
        UserError: nothing fits. It says the least that would do, what holds it, and what would lower it. Or a unit that
            the plan recomputes cannot be run twice.
    """
    bytes_of(budget)  # It is checked before anything runs.
    wanted = method or (bp() if coupling is None else dgl())
    check_planned(backbone, example, wanted, coupling, optimizer, autocast, speed, accumulate)
    asked = method is not None and method.terms is not None
    if exact and (asked or coupling is not None):
        what = "method" if asked else "coupling"
        raise UserError(f"exact=True is backpropagation: leave the {what} of local losses out, or exact=True")
    if not (isinstance(at_most, Real) and at_most > 0) or isinstance(at_most, bool):
        raise UserError(f"at_most takes a number of times backpropagation's time, such as 1.3, not {at_most!r}")
    if speed is None and not main_input(example).is_meta:
        speed = calibrate(backbone, example, autocast=autocast)
    how: dict[str, Any] = {"criterion": criterion, "targets": targets, "task": task, "optimizer": optimizer}
    how |= {"autocast": autocast, "speed": speed, "accumulate": accumulate}
    whole = Planner(backbone, example, method=bp(), **how)
    budget = whole.bytes_of(budget)
    most = at_most * whole.bp.seconds
    plan = None if asked else whole.within(budget, 1, several=False, as_you_go=False)
    # The method and the coupling of local training, if it comes to that.
    own, beside = (dgl(), coupling or MAN()) if method is None else (method, coupling)
    if own.terms is not None and not exact and (plan is None or plan.seconds > most):
        local = Planner(backbone, example, method=own, coupling=beside, **how)
        cut = _fewest_cuts(local, budget, most)
        if cut is None and plan is None:
            cut = local.fastest(budget, several=asked, as_you_go=False)  # It says what would do.
        plan = min(filter(None, (plan, cut)), key=lambda found: found.seconds)
    elif plan is None:
        plan = whole.fastest(budget, 1, as_you_go=False)  # It says what would do.
    model = plan.localize(backbone, example)
    if plan.units and not main_input(example).is_meta:
        _check_repeats(model, example)
    return _fit(model, plan, whole.bp, budget)


def _fewest_cuts(planner: Planner, budget: int, most: float) -> Plan | None:
    """The plan of the fewest blocks, two at least, that fits into `budget` and takes at most `most` seconds. If each
    takes more, the fastest of them."""
    fastest = None
    if len(planner.costs.names) > 1:
        fastest = planner.within(budget, several=True, as_you_go=False)
    if fastest is None or fastest.seconds > most:
        return fastest  # No number of blocks fits, or none is quick enough.
    for blocks in range(2, len(fastest.blocks)):
        plan = planner.within(budget, blocks, several=True, as_you_go=False)
        if plan is not None and plan.seconds <= most:
            return plan
    return fastest


def _check_repeats(model: LocalModel, example: Any) -> None:
    """Raises UserError for a recomputed unit whose second run would give another result than its first one."""
    h = detached(model.inputs.crossing(model.inputs.rows(example, slice(2))))
    with undisturbed(main_input(example).device):
        for block in model.blocks:
            for u, (name, module) in enumerate(zip(block.names, block, strict=False)):
                if any(a <= u <= b for a, b in block.ranges) and not repeats(duplicate(module), h):
                    raise UserError(
                        f"'{name}' cannot be computed again: with the same input and state it gives another result; "
                        "let it draw random numbers with torch, numpy or random, and keep its state in its attributes"
                    )
                h = duplicate(module)(h)


def _fit(model: LocalModel, plan: Plan, baseline: Plan, budget: int) -> Fit:
    times = plan.seconds / baseline.seconds
    count = len(plan.blocks)
    how = ["exact training" if count == 1 else f"local training in {count} blocks, which is not exact"]
    how += plan.measures
    if len(how) == 1 and count == 1:
        how.append("nothing recomputed")
    why = (
        f"{', '.join(how)}: {mib(plan.peak)} of the {mib(budget)} allowed, and {times:.2f} times the time of "
        f"backpropagation, which takes {mib(baseline.peak)}; predicted"
    )
    return Fit(model, plan, times, why)
