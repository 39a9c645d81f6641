"""A run whose blocks lie on several ranks: who trains which, and when they tell each other how it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from localgrad.core.engine import LocalModel
from localgrad.core.errors import UserError
from localgrad.run.build import Machine
from localgrad.run.recipe import Recipe, Saving
from localgrad.run.runlog import Done
from localgrad.run.step import Stepper
from localgrad.scale.pipeline import Stage, block_seconds, least_lag, shares_of
from localgrad.scale.replicas import Ranks

APART, STEPS_APART = 10.0, 20  # seconds, and at least steps, between two meetings of all ranks


def stage_of(recipe: Recipe, model: LocalModel, machine: Machine, ranks: Ranks, batch: int) -> Stage:
    """This rank's blocks: as many for each as make the slowest rank fast, by the time that each block takes here.
    Raises UserError for a recipe that no pipeline can follow."""
    for wrong, text in (
        (not recipe.step_as_you_go, "a pipeline steps each block as it goes: add --step-as-you-go"),
        (machine.precision == "fp16", "a pipeline has no common gradient scaler for fp16: take bf16 or float32"),
    ):
        if wrong:
            raise UserError(text)
    shares_of([1.0] * len(model.blocks), ranks.count)  # before seconds are spent: are there blocks for each?
    noise = torch.Generator().manual_seed(0)  # one that nothing else draws from
    x = torch.randn(batch, *model.image, generator=noise).to(machine.device, memory_format=machine.memory_format)
    y = torch.zeros(batch, dtype=torch.int64, device=machine.device)
    seconds = ranks.summed(block_seconds(model, x, y, autocast=machine.autocast), machine.device)
    return Stage(model, shares_of(seconds, ranks.count), timeout=ranks.timeout)


def advice(recipe: Recipe, stage: Stage) -> list[str]:
    """What a person should know of a pipeline's blocks."""
    said = [f"pipeline: {' + '.join(map(str, stage.shares))} blocks"]
    lag = least_lag(stage.ranks.count)
    if recipe.coupling != "none" and recipe.branches != "learnable" and recipe.lag < lag:
        said.append(f"with --lag {recipe.lag} ranks wait for the EMA's sources; they need not with --lag {lag}")
    return said


class Meetings:
    """Ranks of a pipeline are some steps apart. Where they meet, all wait for the last: so seldom, but at each step
    that is to be saved, and at the end of an epoch."""

    def __init__(self, stage: Stage, saving: Saving) -> None:
        self.ranks, self.saving = stage.ranks, saving
        self._next, self._since, self._step = 1, time.monotonic(), 0

    def due(self, step: int) -> bool:
        return step >= self._next

    def told(self, dones: Sequence[Done], stepper: Stepper, saved: int) -> list[Done]:
        """These steps of all ranks' blocks, on every rank; and the memory of the fattest rank becomes the run's. saved:
        the step of the last save."""
        now = time.monotonic()
        each = (now - self._since) / max(1, stepper.step - self._step)
        steps = min(max(STEPS_APART, int(APART / max(each, 1e-6))), self.saving.steps_left(stepper.step - saved))
        mine = [(d.losses, [{n: float(v) for n, v in p.items()} for p in d.parts], d.top1, d.images) for d in dones]
        by_rank = self.ranks.gathered((mine, stepper.peak.total, stepper.step + steps))
        stepper.peak = replace(stepper.peak, total=max(peak for _, peak, _ in by_rank))
        self._next, self._since, self._step = by_rank[0][2], now, stepper.step
        merged = []
        for parts in zip(*(steps for steps, _, _ in by_rank), strict=True):
            losses, values = ([one for part in parts for one in part[i]] for i in (0, 1))
            merged.append(Done(losses, values, parts[-1][2], parts[-1][3]))
        return merged
