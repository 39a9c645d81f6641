"""The ways to train of `race.py`: what each of them learns, and how it is timed. It has no command and writes nothing.

What is learned does not depend on the link. A local pipeline with a lag gives the bits of one process with that lag.
Pipelines of BP give what one process gives that accumulates gradients over their micro-batches. So one process learns
for each way.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from loop import Step, local_step, train
from race_tables import RIVALS, learned_as
from torch import Tensor
from two_processes import SCHEDULES, Maker, Part, Way, sgd
from two_versions import TwoVersions

import localgrad as lg
from localgrad.core.model import LocalModel
from localgrad.run import data as data_room
from localgrad.run.build import build_model, machine_for
from localgrad.run.evaluation import to_device
from localgrad.run.recipe import Recipe, override

BP = {"method": "bp", "coupling": "none", "blocks": "1"}
PLAIN = {"method": "dgl", "coupling": "none"}
MAN = {"method": "dgl", "coupling": "man", "lag": lg.least_lag()}
DEEP = {"method": "dgl", "coupling": "deep-man", "branches": "learnable", "head": "auto"}
POSITIONS = {**PLAIN, "head": "1c1f@4"}
# The rate and the warm-up with which stale gradients learn best, of all in results/race_rates.csv.
STALE = {**BP, "lr": 0.05, "warmup": 0.2}
# Four blocks of about the same bytes, two on each process.
BALANCED = {"blocks": "layer1.1,layer1.3,layer2.2"}
# What is learned: the fields in which it differs from the recipe, by the name of the way and its number of blocks. The
# last two are the recipes fashion_small_k2 and fashion_small_k4.
LEARNED: dict[tuple[str, int], dict[str, Any]] = {
    ("bp", 1): BP, ("2bw", 1): STALE, ("bp data parallel", 1): BP,
    ("man", 2): {**MAN, "blocks": "layer2.0"}, ("man", 4): {**MAN, **BALANCED},
    ("deep man", 2): {**DEEP, "blocks": "layer2.0"}, ("deep man", 4): {**DEEP, **BALANCED},
    ("1c1f@4", 2): {**POSITIONS, "blocks": "layer1.3"}, ("1c1f@4", 4): {**POSITIONS, **BALANCED},
}  # fmt: skip


def timed(micro_batches: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """The ways whose steps are timed: their names, blocks and micro-batches."""
    # PyTorch's 1F1B takes no fewer micro-batches than there are processes.
    rivals = [(name, 1, m) for name in RIVALS for m in micro_batches if name != "1f1b" or m > 1]
    local = [(name, blocks, 1) for name, blocks in LEARNED if blocks > 1]
    return [("bp", 1, 1), ("bp data parallel", 1, 1), *rivals, *local]


def all_learned(micro_batches: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """What all ways learn, each once."""
    return list(dict.fromkeys((learned_as(name), blocks, micro) for name, blocks, micro in timed(micro_batches)))


def recipe_of(base: Recipe, learned: str, blocks: int, micro: int) -> Recipe:
    """The recipe of what is learned. Batch norm sees one of `micro` parts of a batch at a time."""
    parts = {"batch_size": base.batch_size // micro, "accumulate": micro}
    return override(base, LEARNED[learned, blocks] | parts)


class Stale:
    """A step by PipeDream-2BW's rule, w(t + 1) = w(t) - step(gradient at w(t - 1)), for BP. See `two_versions.py`."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []  # w(t - 1)

    def __call__(self, model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> None:
        parameters = list(model.backbone.parameters())
        newest = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, old in zip(parameters, self.before or newest, strict=True):
                parameter.copy_(old)
        local_step(model, x, y, autocast)
        with torch.no_grad():
            for parameter, new in zip(parameters, newest, strict=True):
                parameter.copy_(new)
        self.before = newest


def replicated(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> None:
    """A step of two processes with half of the batch each: the mean of their gradients. The statistics of batch norm
    are those of the first half, as the network of the first process has them."""
    kept: list[Tensor] = []
    for mine in zip(x.chunk(2), y.chunk(2), strict=True):
        lg.local_backward(model, *mine, scale=0.5, autocast=autocast)
        kept = kept or [b.clone() for b in model.buffers()]
    for buffer, first in zip(model.buffers(), kept, strict=True):
        buffer.copy_(first)


def rule_of(learned: str) -> Step:
    """The step that adds the gradients of a batch."""
    return {"2bw": Stale(), "bp data parallel": replicated}.get(learned, local_step)


def learn(base: Recipe, learned: str, blocks: int, micro: int, **changes: float) -> dict[str, Any]:
    """Trains a way in one process, with changes of its recipe, and returns the other columns of its row."""
    recipe = override(recipe_of(base, learned, blocks, micro), changes)
    data = data_room.load(recipe.data, limit_train=recipe.limit_train, seed=recipe.seed)
    row = train(recipe, data, rule_of(learned), every_epoch=True)
    steps = data_room.steps_per_epoch(data, base.batch_size)
    cut = "" if recipe.method == "bp" else recipe.blocks
    return {"cut": cut, "steps_per_epoch": steps, "errors": row["errors"], "seconds": row["seconds"]}


class Bench(Maker):
    """Makes the ways to train on two processes, for a batch of the recipe's data."""

    def __init__(self, rank: int, base: Recipe) -> None:
        self.base, self.machine = base, machine_for(base)
        self.data = data_room.load(base.data, limit_train=base.limit_train)
        batch = next(data_room.train_batches(self.data, batch_size=base.batch_size, seed=0, epoch=0))
        super().__init__(rank, *to_device(batch, self.data.info, self.machine), self.machine.autocast)

    def model(self, changes: dict[str, Any]) -> LocalModel:
        return build_model(override(self.base, changes), self.data, self.machine)

    def way(self, name: str, blocks: int, micro: int) -> Way:
        """One of the ways that `timed` names."""
        if name == "bp":
            return self.alone(name, self.model(BP))[0]
        if name == "bp data parallel":
            return self.replicas(name, self.model(BP))
        if name in SCHEDULES:
            return self.rival(name, self.halves, micro)
        if name == "2bw":
            return self.two_versions(self.halves, micro)
        return self.pipeline(name, self.model(LEARNED[name, blocks]))

    @property
    def halves(self) -> LocalModel:
        """A new network, split where the halves of BP take equally long."""
        return self._with_linear_heads([self.middle])

    @cached_property
    def middle(self) -> str:
        """The last unit of the first half. A linear head on each unit takes next to no time."""
        names = lg.units(self.model(BP).backbone, self.x)
        seconds = self.seconds(self._with_linear_heads(names[:-1]))
        return names[lg.shares_of(seconds, 2)[0] - 1]

    def _with_linear_heads(self, names: list[str]) -> LocalModel:
        return self.model({**PLAIN, "head": "0c1f", "blocks": ",".join(names)})

    def two_versions(self, halves: LocalModel, micro: int) -> Way:
        """BP in PipeDream-2BW's pipeline, on the halves of a network."""
        half = Part(halves.blocks, self.rank, self.x.chunk(micro)[0], self.autocast)
        pipeline = TwoVersions(half, micro, sgd)
        step, cut = partial(pipeline.step, self.x, self.y), halves.blocks[0].names[-1]
        return Way("2bw", 2, 1, cut, step, micro, close=pipeline.finish)
