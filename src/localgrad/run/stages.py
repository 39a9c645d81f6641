"""A run whose blocks lie on several ranks: who trains which, and when they tell each other how it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from localgrad.core.engine import LocalModel
from localgrad.core.errors import RunError, UserError
from localgrad.run.build import Machine
from localgrad.run.recipe import Recipe, Saving
from localgrad.run.runlog import Done
from localgrad.run.step import Stepper
from localgrad.scale.memory import is_out_of_memory
from localgrad.scale.pipeline import Stage, least_lag
from localgrad.scale.replicas import Ranks
from localgrad.scale.shares import block_seconds, shares_of

APART = 10.0  # seconds between two meetings of all ranks, but at least
STEPS_APART = 20  # steps, because ranks wait where they meet, unless these take
TOO_LATE = 60.0  # seconds, as a rank answers signals there


def refuse(recipe: Recipe) -> None:
    """Raises UserError for a recipe that no pipeline can follow."""
    for wrong, text in (
        (recipe.method == "bp" or recipe.cut == 1, "a pipeline needs a block for each process: take another --method"
         " than bp, and more --blocks"),
        (not recipe.step_as_you_go, "a pipeline steps each block as it goes: add --step-as-you-go"),
        (recipe.precision == "fp16", "a pipeline has no common gradient scaler for fp16: take bf16 or float32"),
    ):  # fmt: skip
        if wrong:
            raise UserError(text)


def stage_of(recipe: Recipe, model: LocalModel, machine: Machine, ranks: Ranks, batch: int) -> Stage:
    """This rank's blocks: as many for each as make the slowest rank fast, by the time that each block takes here.
    Raises UserError for a recipe that no pipeline can follow, RunError if memory runs out."""
    refuse(recipe)
    shares_of([1.0] * len(model.blocks), ranks.count)  # before seconds are spent: are there blocks for each?
    noise = torch.Generator().manual_seed(0)  # one that nothing else draws from
    x = torch.randn(batch, *model.image, generator=noise).to(machine.device, memory_format=machine.memory_format)
    y = torch.zeros(batch, dtype=torch.int64, device=machine.device)
    try:
        mine = block_seconds(model, x, y, autocast=machine.autocast)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = (
            f"out of memory as rank {ranks.rank} timed the blocks: more --blocks or a smaller --batch-size needs less"
        )
        raise RunError(text) from error
    seconds = ranks.summed(mine, machine.device)
    return Stage(model, shares_of(seconds, ranks.count), timeout=ranks.timeout)


def advice(recipe: Recipe, stage: Stage) -> list[str]:
    """What a person should know of a pipeline's blocks."""
    said = [f"pipeline: {' + '.join(map(str, stage.shares))} blocks"]
    lag = least_lag(stage.hops)
    if recipe.lag < lag:
        said.append(f"with --lag {recipe.lag} ranks wait for the EMA's sources; they need not with --lag {lag}")
    return said


class Meetings:
    """Ranks of a pipeline are some steps apart. Where they meet, all wait for the last: so seldom, but at each step
    that is to be saved, and at the end of an epoch."""

    def __init__(self, stage: Stage, saving: Saving) -> None:
        self.ranks, self.saving = stage.ranks, saving
        self._next, self._since = 1, time.monotonic()

    def due(self, step: int) -> bool:
        return step >= self._next

    def told(self, dones: Sequence[Done], stepper: Stepper, saved: int) -> list[Done]:
        """These steps of all ranks' blocks, on every rank; and the memory of the fattest rank becomes the run's. saved:
        the step of the last save."""
        now = time.monotonic()
        each = max((now - self._since) / max(1, len(dones)), 1e-6)
        apart = max(min(STEPS_APART, int(TOO_LATE / each)), int(APART / each), 1)
        steps = min(apart, self.saving.steps_left(stepper.step - saved, each))
        mine = [(d.losses, [{n: float(v) for n, v in p.items()} for p in d.parts], d.top1, d.images) for d in dones]
        by_rank = self.ranks.gathered((mine, stepper.peak.total, stepper.step + steps))
        stepper.peak = replace(stepper.peak, total=max(peak for _, peak, _ in by_rank))
        self._next, self._since = by_rank[0][2], now
        merged = []
        for parts in zip(*(steps for steps, _, _ in by_rank), strict=True):
            losses, values = ([one for part in parts for one in part[i]] for i in (0, 1))
            merged.append(Done(losses, values, parts[-1][2], parts[-1][3]))
        return merged
