"""Fit a training step into a budget: how to split the batch, where to cut and what to recompute.

Every unit and every auxiliary that a cut could add is traced once (`costs.py`). For each possible block, dynamic
programming gives the fastest recomputation under each number of bytes, and dynamic programming over the blocks gives
the fastest chain of them under a cap (`search.py`). Many caps give the frontier. The peak of a plan is put together
from the costs of its pieces (`peaks.py`); that of the chosen plan is predicted on the whole step too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localgrad.core.auxiliary import Auxiliary, Method, Term
from localgrad.core.copies import undisturbed, without_values
from localgrad.core.couplings import MAN
from localgrad.core.errors import UserError
from localgrad.core.groups import param_groups
from localgrad.core.inputs import main_input, resized, targets_of
from localgrad.core.methods import bp
from localgrad.core.model import LocalModel, localize_traced
from localgrad.core.sizes import bytes_of
from localgrad.core.task import Classification, Task
from localgrad.core.trace import trace
from localgrad.scale.apart import treats_samples_apart
from localgrad.scale.checks import check_planned
from localgrad.scale.costs import Cost, trace_costs, without_gradients
from localgrad.scale.memory import MakeOptimizer, check_targets, optimizer_slots, optimizers_for, predicted
from localgrad.scale.planned import Plan
from localgrad.scale.search import BlockOption, Search
from localgrad.scale.speed import Speed

TRIES = 5  # to come from an estimated peak to an exact one within the budget
CAPS = 48  # on the peak of a block, evenly spread in the logarithm
SPLITS = (2, 4, 8, 16)  # into how many micro-batches a batch may be split

Accumulate = Literal["never", "exact", "any"]
Loss = Callable[[Any, Any], Tensor]


class Planner:
    """Traces a network once; then `frontier` and `fastest` are quick. No step is run and the backbone stays as it was.

    Args:
        backbone: the network to train.
        example: a batch [B, ...] of the size of a step.
        method: the local losses, as for `localize`; `lg.bp()` plans exact training alone.
        coupling: as for `localize`.
        criterion: as for `localize`.
        targets: an example of the targets, or those of the batch. By default an int64 class a sample.
        task: as for `localize`.
        optimizer: makes an optimizer from groups of parameters. By default SGD with Nesterov momentum.
        autocast: as for `local_backward`.
        speed: of the device (`calibrate`). By default one that ranks plans, but tells no seconds.
        accumulate: whether a plan may split the batch into micro-batches: "never"; "exact", where the loss is the
            default one and each sample is trained as if it were alone (no batch statistics, no buffer that moves); or
            "any".

    Raises:
        UserError: the network cannot be cut or trained, or the criterion does not take the targets.
    """

    def __init__(
        self,
        backbone: nn.Module,
        example: Any,
        *,
        method: Method,
        coupling: MAN | None = None,
        criterion: Loss | None = None,
        targets: Any = None,
        task: Task | None = None,
        optimizer: MakeOptimizer | None = None,
        autocast: torch.dtype | None = None,
        speed: Speed | None = None,
        accumulate: Accumulate = "exact",
    ) -> None:
        check_planned(backbone, example, method, coupling, optimizer, autocast, speed, accumulate)
        traced, shapes = trace(backbone, example), without_values(backbone, "meta")
        one = resized(example, 1, lambda t, shape: torch.empty(shape, dtype=t.dtype, device="meta"))
        self._batch, self._targets = len(main_input(example)), targets_of(example, targets)
        self._coupling, self._speed, self._autocast, self._accumulate = coupling, speed or Speed(), autocast, accumulate
        if accumulate == "exact" and self._batch > 1 and not treats_samples_apart(backbone, example, autocast, traced):
            self._accumulate = "never"
        cuttable = method if method.terms else Method("units", _no_loss)
        self._how: dict[str, Any] = {"method": method, "coupling": coupling, "criterion": criterion, "task": task}
        self._cut = partial(localize_traced, shapes, traced, **self._how | {"method": cuttable, "example": one})
        self._blocks = None if method.terms else 1
        self._optimizer = optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
        with undisturbed(torch.device("meta")), torch.enable_grad():  # Heads draw numbers, even without values.
            self._model = self._cut(of_units=True)
        check_targets(self._model, self._targets, next(backbone.parameters()).device)
        self._searches: dict[tuple[int, bool], Search] = {}
        self.costs = self._search(1).costs
        self._slots, scratch = optimizer_slots(self._optimizer)
        self._scratch = round(scratch * max(p.nbytes for p in shapes.parameters() if p.requires_grad))

    @property
    def bp(self) -> Plan:
        """Backpropagation, for comparison."""
        return self._whole(())

    @property
    def checkpointing(self) -> Plan:
        """Backpropagation with each unit recomputed by itself: plain activation checkpointing, for comparison."""
        return self._whole([(u, u) for u in range(len(self.costs.names))])

    def accumulation(self, micro_batches: int) -> Plan:
        """Backpropagation of so many micro-batches, for comparison; with batch norm it is not the same training."""
        if not 1 <= micro_batches <= self._batch or self._batch % micro_batches:
            raise UserError(f"a batch of {self._batch} cannot be split into {micro_batches} equal micro-batches")
        return self._whole((), micro_batches)

    def cut(self, blocks: Sequence[str]) -> Plan:
        """Cut after the units named, the last included, and nothing recomputed; for comparison."""
        ends = [self.costs.names.index(name) for name in blocks]
        starts = [0, *(end + 1 for end in ends)]
        return self._plan([BlockOption(i, j) for i, j in zip(starts, ends, strict=False)])

    def even(self, blocks: int) -> Plan:
        """As many blocks as asked for, cut as `localize` cuts, nothing recomputed; for comparison."""
        self._check(blocks)
        count = len(self.costs.names)
        return self.cut([self.costs.names[i * count // blocks - 1] for i in range(1, blocks + 1)])

    def balanced(self, blocks: int) -> Plan:
        """As many blocks as asked for, cut so that the step needs the least, nothing recomputed."""
        self._check(blocks)
        search = self._search(1, recompute=False)
        under = partial(search.fastest, as_you_go=False, blocks=blocks)
        low, high = 0, self._enough(under)
        while low + 1 < high:  # No cap of `low` will do.
            middle = (low + high) // 2
            low, high = (low, middle) if under(middle) else (middle, high)
        return self._plan(under(high) or [])

    def frontier(self, blocks: int | None = None, *, several: bool = False, as_you_go: bool = True) -> list[Plan]:
        """The plans of which no other needs both less memory and less time, the fastest first.

        Args:
            blocks: how many, or None for any number.
            several: whether backpropagation, which is one block, is left out.
            as_you_go: whether blocks may step right after their backward pass.
        """
        self._check(blocks, several)
        plans: dict[tuple, Plan] = {}
        for way in self._ways(blocks, several, as_you_go):
            low, high = 0, (most := self._enough(lambda cap, way=way: self._under(cap, *way)))
            while low + 1 < high:  # No plan stays below `low`.
                middle = (low + high) // 2
                low, high = (low, middle) if self._under(middle, *way) else (middle, high)
            for step in range(CAPS):
                plan = self._under(int(high * (most / high) ** (step / (CAPS - 1))), *way)
                if plan is not None:
                    plans[plan.blocks, plan.units, plan.couplings, plan.step_as_you_go, plan.accumulate] = plan
        best: list[Plan] = []
        for plan in sorted(plans.values(), key=lambda p: (p.seconds, p.peak, p.step_as_you_go)):
            if not best or plan.peak < best[-1].peak:
                best.append(plan)
        return best

    def within(self, budget: int, blocks: int | None = None, *, several: bool, as_you_go: bool) -> Plan | None:
        """What `fastest` returns, or None where it raises."""
        self._check(blocks, several)
        estimates = [
            (plan, way) for way in self._ways(blocks, several, as_you_go) if (plan := self._estimate(budget, *way))
        ]
        best: Plan | None = None
        for plan, way in sorted(estimates, key=lambda found: (found[0].seconds, found[0].peak)):
            if best is None or plan.seconds < best.seconds:
                found = self._fitting(budget, plan, *way)
                best = min(filter(None, (best, found)), key=lambda p: (p.seconds, p.peak), default=None)
        return best

    def fastest(
        self, budget: int | float | str, blocks: int | None = None, *, several: bool = False, as_you_go: bool = True
    ) -> Plan:
        """The fastest plan whose step takes at most `budget` bytes, by exact prediction.

        Args:
            budget: bytes, as a number or as text such as "2GiB", or a share of backpropagation's peak, such as "50%".
            blocks: how many, or None for any number. 1 is exact training.
            several: whether backpropagation, which is one block, is left out.
            as_you_go: whether blocks may step right after their backward pass.

        Raises:
            UserError: no plan fits. It says the least that would do, what holds it, and what would lower it.
        """
        budget = self.bytes_of(budget)
        found = self.within(budget, blocks, several=several, as_you_go=as_you_go)
        if found is not None:
            return found
        least = self.exactly(self.frontier(blocks, several=several, as_you_go=as_you_go)[-1])
        if least.peak <= budget:  # It was put together from pieces that need less in one.
            return least
        advice = "a smaller batch needs less"
        if self._accumulate != "any" and self._batch > 1:
            advice += ", and so does the same batch in parts (accumulate='any', or --accumulate in a command)"
        raise UserError(
            f"no plan fits {budget // 2**20} MiB: the least is {-(-least.peak // 2**20)} MiB, of which parameters, "
            f"averages and the optimizer's state hold {least.lasting / 2**20:.0f}; {advice}"
        )

    def exactly(self, plan: Plan) -> Plan:
        """`plan` with its peak predicted on the whole step."""
        coupling = self._coupling if len(plan.blocks) > 1 else None
        with undisturbed(torch.device("meta")), torch.enable_grad():
            model = plan.apply(self._cut(blocks=list(plan.blocks), coupling=coupling))

        def optimizers(own: LocalModel) -> list[torch.optim.Optimizer]:
            return optimizers_for(param_groups(own), self._optimizer, as_you_go=plan.step_as_you_go)

        how = {"step_as_you_go": plan.step_as_you_go, "autocast": self._autocast}
        return replace(plan, peak=predicted(model, self._batch, optimizers, self._targets, **how).total, exact=True)

    def bytes_of(self, budget: int | float | str, what: str = "budget") -> int:
        """Reads a budget, of which a share such as "50%" is one of backpropagation's peak."""
        return bytes_of(budget, lambda: self.exactly(self.bp).peak, what)

    def _enough(self, under: Callable[[int], object]) -> int:
        """A cap that there is a plan under. Auxiliaries may take many times what backpropagation takes."""
        cap = 2 * self.bp.peak
        while not under(cap):
            cap *= 2
        return cap

    def _check(self, blocks: int | None, several: bool = False) -> None:
        count = len(self.costs.names)
        if several and (blocks or self._blocks) == 1:
            raise UserError("several=True leaves plans of one block out, and no others are asked for: leave it out")
        blocks = blocks or (2 if several else 1)
        if not 1 <= blocks <= count:
            raise UserError(f"blocks={blocks} is out of range: this network has {count} units, so 1 to {count}")

    def _search(self, micro_batches: int, *, recompute: bool = True) -> Search:
        """The tables for so many micro-batches, whose gradients are live from the start if they are more than one."""
        if (micro_batches, recompute) in self._searches:
            return self._searches[micro_batches, recompute]
        if recompute:
            costs = trace_costs(self._model, self._batch // micro_batches, self._autocast, self._targets)
            costs = self._speed.timed(costs)
            if micro_batches > 1:
                costs = replace(without_gradients(costs), batch=costs.batch * micro_batches)
        else:
            costs = self._search(micro_batches).costs
        found = Search(costs, coupled=self._coupling is not None, recompute=recompute)
        self._searches[micro_batches, recompute] = found
        return found

    def _ways(self, blocks: int | None, several: bool, as_you_go: bool) -> Iterator[tuple[int, bool, int | None, bool]]:
        """Ways to plan: the number of micro-batches, whether to step as one goes, how many blocks, and not one."""
        blocks = blocks or self._blocks
        for go in (False, True) if as_you_go and blocks != 1 else (False,):
            yield 1, go, blocks, several
        for n in SPLITS if self._accumulate != "never" else ():
            if self._batch % n or not self._can_take(self._batch // n):
                continue
            if self._splits_exactly(several or blocks != 1):
                yield n, False, blocks, several
            elif not several and blocks is None and self._splits_exactly(False):
                yield n, False, 1, False

    def _can_take(self, batch_size: int) -> bool:
        """Whether the network and all auxiliaries can be trained on so few samples."""
        try:
            self._model.checks.check_size(self._model, batch_size)
        except UserError:
            return False
        return True

    def _splits_exactly(self, local: bool) -> bool:
        """Whether the mean over micro-batches is the result of the whole batch, or "any" result will do."""
        model = self._model if local else self._model.backbone
        terms = [t for a in self._model.auxiliaries if isinstance(a, Auxiliary) for t in a.terms.values()]
        pairs = local and any(term.pairs for term in terms)
        norms = any(isinstance(m, _BatchNorm) and (m.training or not m.track_running_stats) for m in model.modules())
        return self._accumulate == "any" or (type(self._model.task) is Classification and not (pairs or norms))

    def _estimate(self, target: int, n: int, as_you_go: bool, blocks: int | None, several: bool) -> Plan | None:
        """The plan of the highest cap whose peak, put together from pieces, stays within `target`."""
        found, low, high = None, 0, target
        while low + 1 < high:
            cap = (low + high) // 2
            plan = self._under(cap, n, as_you_go, blocks, several)
            if plan is not None and plan.peak > target:
                high = cap
            else:
                found, low = plan or found, cap
        return found

    def _fitting(
        self, budget: int, plan: Plan | None, n: int, as_you_go: bool, blocks: int | None, several: bool
    ) -> Plan | None:
        """`plan`, or one near it, that stays within `budget` by exact prediction."""
        best: Plan | None = None
        for _ in range(TRIES):
            if plan is None:
                break
            exact = self.exactly(plan)
            if exact.peak <= budget and (best is None or exact.seconds < best.seconds):
                best = exact
            off = exact.peak - plan.peak  # What is put together from pieces is a little off.
            if best is not None and abs(off) < budget / 1000:
                break
            plan = self._estimate(budget - off, n, as_you_go, blocks, several)
        return best

    def _under(self, cap: int, n: int, as_you_go: bool, blocks: int | None, several: bool) -> Plan | None:
        """The fastest plan none of whose blocks goes beyond `cap`."""
        search = self._search(n)
        if (blocks or 1) > len(search.pieces):  # Blocks smaller than the pieces of a long chain recompute nothing.
            search = self._search(n, recompute=False)
        chain = search.fastest(cap, as_you_go=as_you_go, blocks=blocks, several=several)
        return None if chain is None else self._plan(chain, n, as_you_go=as_you_go and len(chain) > 1)

    def _whole(self, ranges: Sequence[tuple[int, int]], n: int = 1) -> Plan:
        return self._plan([BlockOption(0, len(self.costs.names) - 1, tuple(ranges))], n)

    def _plan(self, chain: Sequence[BlockOption], n: int = 1, *, as_you_go: bool = False) -> Plan:
        costs, names = self._search(n).costs, self.costs.names
        ends = [self.costs.end(option.i, option.j) for option in chain]
        lasting, gradients = self._lasting([end for end in ends if end is not None])
        peak, before = 0, costs.images if any(ends) else 0
        before += gradients if n > 1 else 0  # They are live from the second micro-batch on.
        for option, end in zip(chain, ends, strict=True):
            made = sum(unit.gradients for unit in costs.units[0][option.i : option.j + 1])
            made += 0 if end is None or n > 1 else end.gradients
            peak = max(peak, before + option.peak(costs), before + costs.batch + made + self._scratch)
            before += 0 if as_you_go else made
        return Plan(
            blocks=tuple(names[option.j] for option in chain),
            units=tuple(_name(names, a, b) for option in chain for a, b in option.ranges),
            couplings=tuple(k for k, option in enumerate(chain) if option.coupling_recomputed),
            step_as_you_go=as_you_go,
            accumulate=n,
            peak=lasting + peak,
            lasting=lasting,
            seconds=n * sum(option.seconds(costs) for option in chain),
            flops=n * sum(option.work(costs).flops for option in chain),
            recomputed=sum(any(a <= u <= b for a, b in o.ranges) for o in chain for u in range(o.i, o.j + 1)),
            count=len(names),
            how=self._how,
        )

    def _lasting(self, ends: Sequence[Cost]) -> tuple[int, int]:
        """Bytes of parameters, buffers and the optimizer's state, and of all gradients."""
        own = [*self.costs.units[0], *ends]
        gradients = sum(piece.gradients for piece in own)
        return sum(piece.state for piece in own) + round(self._slots * gradients), gradients


def plan(
    backbone: nn.Module,
    example: Any,
    budget: int | float | str,
    *,
    method: Method | None = None,
    coupling: MAN | None = None,
    criterion: Loss | None = None,
    targets: Any = None,
    task: Task | None = None,
    optimizer: MakeOptimizer | None = None,
    autocast: torch.dtype | None = None,
    speed: Speed | None = None,
    accumulate: Accumulate = "exact",
) -> Plan:
    """The fastest plan for `backbone` whose step on a batch like `example` takes at most `budget` bytes.

    `plan.localize(backbone, example)` makes the model to train, and `fit` does both.

    Args:
        budget: bytes, as a number or as text such as "2GiB", or a share of what backpropagation takes, such as "50%".
        method: local losses. By default `bp()`: exact training.

    The other arguments are those of `Planner`.

    Raises:
        UserError: no plan fits. It says the least that would do.
    """
    bytes_of(budget)  # It is checked before anything is traced.
    planner = Planner(
        backbone, example, method=method or bp(), coupling=coupling, criterion=criterion, targets=targets, task=task,
        optimizer=optimizer, autocast=autocast, speed=speed, accumulate=accumulate,
    )  # fmt: skip
    return planner.fastest(budget)


def _no_loss(site: Any) -> dict[str, Term]:
    """An auxiliary without parameters, to tell the costs of units in a plan of one block, which has no auxiliary."""
    return {"none": Term(nn.Flatten(), lambda output, targets: output.sum())}


def _name(names: Sequence[str], first: int, last: int) -> str:
    return names[first] if first == last else f"{names[first]}:{names[last]}"
