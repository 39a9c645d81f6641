"""Fit a training step into a budget: where to cut and what to recompute, so that the fastest plan that fits is found.

Every unit and every auxiliary that a cut could add is traced once (`costs.py`). A block of units i..j then has a known
peak and time, in four forms: its units, its coupling, both or neither recomputed. For a cap on the peak of any block,
dynamic programming over the cuts finds the fastest chain of blocks under it; many caps give the frontier. The peak of
the plan that is chosen is then predicted on the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.auxiliary import Method
from localgrad.core.blocks import units
from localgrad.core.couplings import MAN
from localgrad.core.engine import LocalModel, localize, param_groups
from localgrad.core.errors import UserError
from localgrad.core.task import Task
from localgrad.scale.costs import Cost, Costs, trace_costs
from localgrad.scale.memory import predict_peak, without_values
from localgrad.scale.recompute import recompute
from localgrad.scale.speed import Speed

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
CAPS = 48  # on the peak of a block, evenly spread in the logarithm


@dataclass(frozen=True)
class Plan:
    """How to train a network.

    blocks: the last unit of each block, as `localize` takes them; one block is backpropagation. units, couplings: what
    `recompute` makes again. peak: bytes of a step, everything counted; `exact` if it was predicted on the whole step
    and not put together from its pieces. lasting: those of them that parameters, averages and the optimizer's state
    hold. seconds: predicted time of a step.
    """

    blocks: tuple[str, ...]
    units: tuple[str, ...]
    couplings: tuple[int, ...]
    step_as_you_go: bool
    peak: int
    lasting: int
    seconds: float
    exact: bool = False

    def apply(self, model: LocalModel) -> LocalModel:
        """Sets what `model`, which was localized with `blocks`, recomputes."""
        return recompute(model, units=self.units, couplings=self.couplings)


class Planner:
    """Traces a network once; then `frontier` and `fastest` are quick.

    backbone, example, method, coupling, task: as for `localize`; the batch is the example's. optimizer: makes one from
    groups of parameters; SGD with Nesterov momentum by default. autocast: as for `local_backward`. speed: of the
    device (`calibrate`). Nothing is run and the backbone is left as it was.
    """

    def __init__(
        self,
        backbone: nn.Module,
        example: Tensor,
        *,
        method: Method,
        coupling: MAN | None = None,
        task: Task | None = None,
        optimizer: MakeOptimizer | None = None,
        autocast: torch.dtype | None = None,
        speed: Speed | None = None,
    ) -> None:
        shapes, one = without_values(backbone, "meta"), torch.empty_like(example[:1], device="meta")
        self._coupling = coupling
        self._cut = partial(localize, shapes, method=method, example=one, task=task)
        self._batch, self._autocast = len(example), autocast
        self._optimizer = optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
        self.costs = trace_costs(self._cut(blocks=len(units(shapes, one)), coupling=coupling), self._batch, autocast)
        self._forms = _forms(self.costs, speed or Speed(), coupling is not None)
        self._slots = _slots(self._optimizer)

    @property
    def bp(self) -> Plan:
        """Backpropagation, for comparison."""
        whole = next(f for f in self._forms[len(self._forms) - 1] if f.i == 0 and not f.again)
        return self._plan([whole], as_you_go=False)

    @property
    def checkpointing(self) -> Plan:
        """Backpropagation with every unit recomputed: activation checkpointing, for comparison."""
        whole = next(f for f in self._forms[len(self._forms) - 1] if f.i == 0 and f.again)
        return self._plan([whole], as_you_go=False)

    def even(self, blocks: int) -> Plan:
        """As many blocks as asked for, cut as `localize` cuts, nothing recomputed; for comparison."""
        ends = [i * len(self._forms) // blocks - 1 for i in range(1, blocks + 1)]
        starts = [0, *(end + 1 for end in ends)]
        plain = {(f.i, f.j): f for forms in self._forms.values() for f in forms if not (f.again or f.coupling_again)}
        return self._plan([plain[i, j] for i, j in zip(starts, ends, strict=False)], as_you_go=False)

    def frontier(self) -> list[Plan]:
        """The plans of which no other needs both less memory and less time; the fastest first."""
        ends = [min(form.peak for form in forms) for forms in self._forms.values()]
        low, high = max(ends), self._forms[len(self._forms) - 1][0].peak
        plans: dict[tuple, Plan] = {}
        for n in range(CAPS):
            for as_you_go in (False, True):
                chain = _chain(self.costs, self._forms, int(low * (high / low) ** (n / (CAPS - 1))), as_you_go)
                if chain is not None:
                    plan = self._plan(chain, as_you_go=as_you_go and len(chain) > 1)
                    plans[plan.blocks, plan.units, plan.couplings, plan.step_as_you_go] = plan
        best: list[Plan] = []
        for plan in sorted(plans.values(), key=lambda p: (p.seconds, p.peak, p.step_as_you_go)):
            if not best or plan.peak < best[-1].peak:
                best.append(plan)
        return best

    def fastest(self, budget: int) -> Plan:
        """The fastest plan whose step takes at most `budget` bytes, by exact prediction. Raises UserError if none
        does, saying the least that would do and what holds it."""
        plans = self.frontier()
        for plan in plans:
            if plan.peak <= 1.02 * budget:  # what is put together from pieces is a little off
                plan = self.exactly(plan)
                if plan.peak <= budget:
                    return plan
        least = self.exactly(plans[-1])
        raise UserError(
            f"no plan fits {budget / 2**20:.0f} MiB: the least is {least.peak / 2**20:.0f} MiB, of which parameters, "
            f"averages and the optimizer's state hold {least.lasting / 2**20:.0f}; a smaller batch needs less"
        )

    def exactly(self, plan: Plan) -> Plan:
        """`plan` with its peak predicted on the whole step."""
        coupling = self._coupling if len(plan.blocks) > 1 else None
        model = plan.apply(self._cut(blocks=list(plan.blocks), coupling=coupling))

        def optimizers(own: LocalModel) -> list[torch.optim.Optimizer]:
            groups = param_groups(own)
            if not plan.step_as_you_go:
                return [self._optimizer(groups)]
            return [self._optimizer([g for g in groups if g["block"] == k]) for k in range(len(own.blocks))]

        found = predict_peak(
            model, self._batch, optimizers, step_as_you_go=plan.step_as_you_go, autocast=self._autocast
        )
        return replace(plan, peak=found.total, exact=True)

    def _plan(self, chain: Sequence[_Form], *, as_you_go: bool) -> Plan:
        names = self.costs.names
        ends = [self.costs.auxiliaries[0][form.j] for form in chain[:-1]]
        pieces = [*self.costs.units[0], *ends]
        gradients = sum(piece.gradients for piece in pieces)
        lasting = sum(piece.state for piece in pieces) + round(self._slots * gradients)
        peak, before = 0, 0
        for form, end in zip(chain, [*ends, None], strict=True):
            peak = max(peak, before + form.peak)
            if not as_you_go:
                before += sum(unit.gradients for unit in self.costs.units[0][form.i : form.j + 1])
                before += end.gradients if end is not None else 0
        return Plan(
            blocks=tuple(names[form.j] for form in chain),
            units=tuple(name for form in chain if form.again for name in names[form.i : form.j + 1]),
            couplings=tuple(k for k, form in enumerate(chain) if form.coupling_again),
            step_as_you_go=as_you_go,
            peak=lasting + max(peak, before),
            lasting=lasting,
            seconds=sum(form.seconds for form in chain),
        )


def plan(backbone: nn.Module, example: Tensor, budget: int, **how: Any) -> Plan:
    """The fastest plan for `backbone` whose training step on a batch like `example` takes at most `budget` bytes.

    how: method, coupling, task, optimizer, autocast and speed, as for `Planner`. Train it with
    `plan.apply(localize(backbone, blocks=plan.blocks, ...))`. Raises UserError if none fits, saying the least that
    would do.
    """
    return Planner(backbone, example, **how).fastest(budget)


@dataclass(frozen=True)
class _Form:
    """Units i..j as one block."""

    i: int
    j: int
    again: bool  # its units
    coupling_again: bool
    peak: int
    seconds: float


def _forms(costs: Costs, speed: Speed, coupled: bool) -> dict[int, list[_Form]]:
    """Every possible block by its last unit."""
    count = len(costs.names)
    found: dict[int, list[_Form]] = {j: [] for j in range(count)}
    for again in (False, True):
        own = costs.units[again]
        times = [speed.seconds(u.forward + u.backward) for u in own]
        for i in range(count):
            enters = costs.batch if i == 0 else costs.batch + own[i - 1].output
            for j in range(i, count):
                for coupling_again in (False, True) if coupled and j < count - 1 else (False,):
                    end = costs.auxiliaries[coupling_again][j] if j < count - 1 else None
                    spent = sum(times[i : j + 1]) + (speed.seconds(end.forward + end.backward) if end else 0)
                    peak = enters + _peak(own[i : j + 1], end)
                    found[j].append(_Form(i, j, again, coupling_again, peak, spent))
    return found


def _peak(own: Sequence[Cost], end: Cost | None) -> int:
    """The most bytes above a block's input and what lives anyway: forward through the units, through the auxiliary and
    back, and back through the units, whose gradients stay."""
    kept = peak = gradients = 0
    for unit in own:
        peak = max(peak, kept + unit.forward_peak)
        kept += unit.kept
    if end is not None:
        peak = max(peak, kept + end.forward_peak, kept + end.backward_peak)
        gradients = end.gradients
    for unit in reversed(own):
        kept -= unit.kept
        peak = max(peak, kept + unit.backward_peak + gradients)
        gradients += unit.gradients
    return peak


def _chain(costs: Costs, forms: dict[int, list[_Form]], cap: int, as_you_go: bool) -> list[_Form] | None:
    """The fastest blocks in a row, none of which goes beyond `cap`; with gradients of those before it on top unless
    each block steps right away."""
    before = [0]
    for unit in costs.units[0]:
        before.append(before[-1] + unit.gradients)
    # By the last unit of a chain: its time, the gradients of its auxiliaries, and its last block.
    best: dict[int, tuple[float, int, _Form | None]] = {-1: (0.0, 0, None)}
    for j, ending in forms.items():
        for form in ending:
            start = best.get(form.i - 1)
            if start is None or form.peak + (0 if as_you_go else before[form.i] + start[1]) > cap:
                continue
            seconds = start[0] + form.seconds
            if j not in best or seconds < best[j][0]:
                extra = costs.auxiliaries[0][j].gradients if j < len(forms) - 1 else 0
                best[j] = (seconds, start[1] + extra, form)
    chain: list[_Form] = []
    at = len(forms) - 1
    while at >= 0:
        if at not in best:
            return None
        form = best[at][2]
        assert form is not None
        chain.insert(0, form)
        at = form.i - 1
    return chain


def _slots(optimizer: MakeOptimizer) -> float:
    """Bytes of the optimizer's state for each byte of a parameter."""
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros(4096)
    made = optimizer([{"params": [parameter]}])
    made.step()
    state = [t for own in made.state.values() for t in own.values() if isinstance(t, Tensor) and t.numel() > 1]
    return sum(t.numel() * t.element_size() for t in state) / (4 * 4096)
