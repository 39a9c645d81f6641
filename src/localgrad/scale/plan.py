"""Fit a training step into a budget: where to cut and what to recompute, so that the fastest plan that fits is found.

Every unit and every auxiliary that a cut could add is traced once (`costs.py`). A block of units i..j then has a known
peak and time, with some or all of its units recomputed, its coupling, both or neither. For a cap on the peak of any
block, dynamic programming over the cuts finds the fastest chain of blocks under it (`search.py`); many caps give the
frontier. The peak of the plan that is chosen is then predicted on the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.auxiliary import Method
from localgrad.core.blocks import units
from localgrad.core.checks import check_network
from localgrad.core.copies import without_values
from localgrad.core.couplings import MAN
from localgrad.core.errors import UserError
from localgrad.core.methods import dgl
from localgrad.core.model import LocalModel, localize, param_groups
from localgrad.core.sizes import bytes_of
from localgrad.core.task import Task
from localgrad.scale.costs import trace_costs
from localgrad.scale.memory import MakeOptimizer, optimizers_for, predict_peak
from localgrad.scale.recompute import recompute
from localgrad.scale.search import BlockOption, block_options, fastest_chain
from localgrad.scale.speed import Speed

TRIES = 5  # to come down from an estimate to within the budget
CAPS = 48  # on the peak of a block, evenly spread in the logarithm


@dataclass(frozen=True)
class Plan:
    """How to train a network.

    blocks: the last unit of each block, as `localize` takes them; one block is backpropagation. units, couplings: what
    `recompute` makes again. peak: bytes of a step, everything counted; `exact` if it was predicted on the whole step
    and not put together from its pieces. lasting: those of them that parameters, averages and the optimizer's state
    hold. seconds: predicted time of a step. flops: its floating-point operations.
    """

    blocks: tuple[str, ...]
    units: tuple[str, ...]
    couplings: tuple[int, ...]
    step_as_you_go: bool
    peak: int
    lasting: int
    seconds: float
    flops: float
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
        check_network(backbone, example)
        if not any(p.requires_grad for p in backbone.parameters()):
            raise UserError("nothing can be planned: every parameter of the network is frozen (requires_grad=False)")
        shapes, one = without_values(backbone, "meta"), torch.empty_like(example[:1], device="meta")
        self._coupling = coupling
        cuttable = method if method.terms else dgl("0c1f")  # to tell the units' costs; no head of it is in a plan
        self._cut = partial(localize, shapes, method=cuttable, example=one, task=task)
        self._batch, self._autocast = len(example), autocast
        self._blocks = None if method.terms else 1
        self._optimizer = optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
        self.costs = trace_costs(self._cut(blocks=len(units(shapes, one)), coupling=coupling), self._batch, autocast)
        self._options = block_options(self.costs, speed or Speed(), coupled=coupling is not None)
        self._slots = _slots(self._optimizer)

    @property
    def bp(self) -> Plan:
        """Backpropagation, for comparison."""
        return self._whole(recomputed=0)

    @property
    def checkpointing(self) -> Plan:
        """Backpropagation with every unit recomputed: activation checkpointing, for comparison."""
        return self._whole(recomputed=len(self.costs.names))

    def cut(self, blocks: Sequence[str]) -> Plan:
        """Cut after the units named, the last included, and nothing recomputed; for comparison."""
        ends = [self.costs.names.index(name) for name in blocks]
        starts = [0, *(end + 1 for end in ends)]
        plain = {(f.i, f.j): f for options in self._options.values() for f in options if f.plain}
        return self._plan([plain[i, j] for i, j in zip(starts, ends, strict=False)], as_you_go=False)

    def even(self, blocks: int) -> Plan:
        """As many blocks as asked for, cut as `localize` cuts, nothing recomputed; for comparison."""
        self._check(blocks)
        count = len(self._options)
        return self.cut([self.costs.names[i * count // blocks - 1] for i in range(1, blocks + 1)])

    def balanced(self, blocks: int) -> Plan:
        """As many blocks as asked for, cut so that the step needs the least, nothing recomputed."""
        self._check(blocks)
        plain = {j: [f for f in options if f.plain] for j, options in self._options.items()}

        def chain(cap: int) -> list[BlockOption] | None:
            return fastest_chain(self.costs, plain, cap, as_you_go=False, blocks=blocks)

        low, high = 0, 2 * self.bp.peak
        while low + 1 < high:  # no cap of `low` will do
            middle = (low + high) // 2
            low, high = (low, middle) if chain(middle) else (middle, high)
        return self._plan(chain(high) or [], as_you_go=False)

    def frontier(self, blocks: int | None = None, *, several: bool = False, as_you_go: bool = True) -> list[Plan]:
        """The plans of which no other needs both less memory and less time, of as many blocks as asked for; the fastest
        first."""
        self._check(2 if several else blocks or 1)
        ends = [min(option.peak for option in options) for options in self._options.values()]
        low, high = max(ends), self._options[len(self._options) - 1][0].peak
        plans: dict[tuple, Plan] = {}
        for n in range(CAPS):
            for go in (False, True) if as_you_go else (False,):
                plan = self._under(int(low * (high / low) ** (n / (CAPS - 1))), go, blocks, several)
                if plan is not None:
                    plans[plan.blocks, plan.units, plan.couplings, plan.step_as_you_go] = plan
        best: list[Plan] = []
        for plan in sorted(plans.values(), key=lambda p: (p.seconds, p.peak, p.step_as_you_go)):
            if not best or plan.peak < best[-1].peak:
                best.append(plan)
        return best

    def fastest(
        self, budget: int | float | str, blocks: int | None = None, *, several: bool = False, as_you_go: bool = True
    ) -> Plan:
        """The fastest plan whose step takes at most `budget` bytes, by exact prediction; of as many blocks as asked
        for, or of `several`: not BP with units recomputed, which is one block. as_you_go: whether it may step as it
        goes. Raises UserError if none does, saying the least that would do and what holds it."""
        budget = bytes_of(budget)
        ways = (False, True) if as_you_go else (False,)
        plans = [plan for go in ways if (plan := self._fitting(budget, go, blocks, several))]
        if plans:
            return min(plans, key=lambda plan: (plan.seconds, plan.peak))
        least = self.exactly(self.frontier(blocks, several=several, as_you_go=as_you_go)[-1])
        if least.peak <= budget:  # it was put together from pieces that need less in one
            return least
        raise UserError(
            f"no plan fits {budget / 2**20:.0f} MiB: the least is {least.peak / 2**20:.0f} MiB, of which parameters, "
            f"averages and the optimizer's state hold {least.lasting / 2**20:.0f}; a smaller batch needs less"
        )

    def exactly(self, plan: Plan) -> Plan:
        """`plan` with its peak predicted on the whole step."""
        coupling = self._coupling if len(plan.blocks) > 1 else None
        model = plan.apply(self._cut(blocks=list(plan.blocks), coupling=coupling))

        def optimizers(own: LocalModel) -> list[torch.optim.Optimizer]:
            return optimizers_for(param_groups(own), self._optimizer, as_you_go=plan.step_as_you_go)

        found = predict_peak(
            model, self._batch, optimizers, step_as_you_go=plan.step_as_you_go, autocast=self._autocast
        )
        return replace(plan, peak=found.total, exact=True)

    def _check(self, blocks: int) -> None:
        count = len(self._options)
        if not 1 <= blocks <= count:
            raise UserError(f"blocks={blocks} is out of range: this network has {count} units, so 1 to {count}")

    def _fitting(self, budget: int, as_you_go: bool, blocks: int | None, several: bool) -> Plan | None:
        """The plan of the highest cap that stays within `budget`."""
        target = budget
        for _ in range(TRIES):
            found, low, high = None, 0, budget
            while low + 1 < high:
                cap = (low + high) // 2
                plan = self._under(cap, as_you_go, blocks, several)
                if plan is not None and plan.peak > target:
                    high = cap
                else:
                    found, low = plan or found, cap
            if found is None:
                return None
            found = self.exactly(found)
            if found.peak <= budget:
                return found
            target -= found.peak - budget  # what is put together from pieces is a little off
        return None

    def _under(self, cap: int, as_you_go: bool, blocks: int | None, several: bool) -> Plan | None:
        """The fastest plan none of whose blocks goes beyond `cap`."""
        blocks = blocks or self._blocks
        chain = fastest_chain(self.costs, self._options, cap, as_you_go=as_you_go, blocks=blocks, several=several)
        return None if chain is None else self._plan(chain, as_you_go=as_you_go and len(chain) > 1)

    def _whole(self, recomputed: int) -> Plan:
        (option,) = [f for f in self._options[len(self._options) - 1] if f.i == 0 and f.recomputed == recomputed]
        return self._plan([option], as_you_go=False)

    def _plan(self, chain: Sequence[BlockOption], *, as_you_go: bool) -> Plan:
        names = self.costs.names
        ends = [self.costs.auxiliaries[0][option.j] for option in chain[:-1]]
        pieces = [*self.costs.units[0], *ends]
        gradients = sum(piece.gradients for piece in pieces)
        lasting = sum(piece.state for piece in pieces) + round(self._slots * gradients)
        kept, remade = self.costs.units
        run = [u for f in chain for u in (*remade[f.i : f.i + f.recomputed], *kept[f.i + f.recomputed : f.j + 1])]
        run += [self.costs.auxiliaries[option.coupling_recomputed][option.j] for option in chain[:-1]]
        peak, before = 0, self.costs.images if len(chain) > 1 else 0
        for option, end in zip(chain, [*ends, None], strict=True):
            peak = max(peak, before + option.peak)
            if not as_you_go:
                before += sum(unit.gradients for unit in self.costs.units[0][option.i : option.j + 1])
                before += end.gradients if end is not None else 0
        return Plan(
            blocks=tuple(names[option.j] for option in chain),
            units=tuple(name for option in chain for name in names[option.i : option.i + option.recomputed]),
            couplings=tuple(k for k, option in enumerate(chain) if option.coupling_recomputed),
            step_as_you_go=as_you_go,
            peak=lasting + max(peak, before),
            lasting=lasting,
            seconds=sum(option.seconds for option in chain),
            flops=sum(piece.forward.flops + piece.backward.flops for piece in run),
        )


def plan(backbone: nn.Module, example: Tensor, budget: int | float | str, **how: Any) -> Plan:
    """The fastest plan for `backbone` whose training step on a batch like `example` takes at most `budget` bytes,
    which may be text such as "2GiB".

    how: method, coupling, task, optimizer, autocast and speed, as for `Planner`. Train it with
    `plan.apply(localize(backbone, blocks=plan.blocks, ...))`. Raises UserError if none fits, saying the least that
    would do.
    """
    budget = bytes_of(budget)
    return Planner(backbone, example, **how).fastest(budget)


def _slots(optimizer: MakeOptimizer) -> float:
    """Bytes of the optimizer's state for each byte of a parameter."""
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros(4096)
    made = optimizer([{"params": [parameter]}])
    made.step()
    state = [t for own in made.state.values() for t in own.values() if isinstance(t, Tensor) and t.numel() > 1]
    return sum(t.numel() * t.element_size() for t in state) / (4 * 4096)
