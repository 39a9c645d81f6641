"""How the processes of a run share its work: alone, as replicas, as shards or as a pipeline.

Each replica trains all blocks on a share of every batch, and so does each shard, which holds a part of all parameters.
Each stage of a pipeline trains a share of the blocks. It is one rank alone, or several as replicas or shards. The modes
have one interface, so that the loop and the step do not ask which one they have.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from localgrad.core.engine import BlockResult, block_steps
from localgrad.core.errors import RunError, UserError, is_out_of_memory
from localgrad.core.model import LocalModel
from localgrad.core.sharded import shard_of
from localgrad.run.build import Machine
from localgrad.run.recipe import Recipe, Saving
from localgrad.run.runlog import StepRecord
from localgrad.scale.groups import Ranks
from localgrad.scale.held import Held
from localgrad.scale.pipeline import Stage, least_lag
from localgrad.scale.replicas import Replicas
from localgrad.scale.shards import gather, gathered, shard
from localgrad.scale.shares import block_seconds, shares_of

# When the ranks of a pipeline synchronise, all of them wait for the slowest one. They do so every SYNC_SECONDS or every
# SYNC_STEPS steps, whichever is later. If SYNC_STEPS steps take more than MOST_SECONDS, they do so earlier, because a
# rank answers signals only then.
SYNC_SECONDS = 10.0
SYNC_STEPS = 20
MOST_SECONDS = 60.0
SHARES = {"batches": "replicas", "weights": "shards"}  # What ranks that train the same blocks share, and are called.


class Alone:
    """One process that trains every block on every batch. The other modes override what differs.

    Attributes:
        model: The model that is trained.
        ranks: The processes of the run.
        blocks: The numbers of the blocks that this rank trains.
        shard: (i, n) if this rank reads part i of n of each batch.
        replicas: How many ranks train the same blocks.
        reads_images: Whether this rank reads the images. Every rank reads the targets.
        travelling: How many blocks may have gradients on their way while the next block computes.
        shares_errors: Whether all ranks find a loss or gradient that is not finite at the same step.
    """

    reads_images = True
    travelling = 0
    shares_errors = True

    def __init__(self, model: LocalModel, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.blocks = range(len(model.blocks))
        self.shard, self.replicas = (0, 1), 1

    def notes(self, recipe: Recipe) -> list[str]:
        """Sentences about this mode for the user, shown when the run begins."""
        return []

    def block_steps(
        self, x: Any, y: Tensor, *, scale: float | Tensor, autocast: torch.dtype | None
    ) -> Iterator[BlockResult]:
        """`localgrad.block_steps` through this rank's blocks."""
        return block_steps(self.model, x, y, scale=scale, autocast=autocast)

    def start_average(self, k: int, loss: Tensor) -> None:
        """Begins to average block k's gradients and its loss over the replicas."""

    def finish_average(self, k: int) -> None:
        """Waits until block k's gradients and its loss are averaged over all replicas."""

    def total(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The sum of each number over the replicas."""
        return list(numbers)

    def share_statistics(self) -> None:
        """Makes the model the same on every rank that has all of it."""

    def gather_states(self, states: list[Any]) -> list[Any]:
        """The states of all optimizers, on the first rank. In `states`, only those of this rank's blocks are right."""
        return states

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of a module of the model, on the first rank. Every rank calls it."""
        return module.state_dict()

    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Loads what `state_of` gave. It is on every rank."""
        module.load_state_dict(state)

    def part_of(self, state: Tensor, parameter: Tensor) -> Tensor:
        """What this rank keeps of a tensor of an optimizer's state that has the shape of the parameter."""
        return state

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[tuple[Callable[[Any], Any], tuple[int, int]]]:
        """A context without gradients with the network as a function, and with the part of the test batches that this
        rank gives it: (i, n) for part i of n. Every rank enters it."""
        with gather(self.model):
            yield self.model, (self.ranks.rank, self.ranks.count)

    def ema_distances(self) -> list[float | None]:
        """`LocalModel.ema_distances`. Every rank calls it."""
        return self.model.ema_distances()

    def other_optimizers(self, count: int) -> set[int]:
        """Which of the `count` optimizers are stepped by other ranks."""
        return set()

    def is_sync_due(self, step: int) -> bool:
        """Whether the ranks compare their records after this step."""
        return True

    def merge(
        self, records: Sequence[StepRecord], peak: int, step: int, since_save: int
    ) -> tuple[list[StepRecord], int]:
        """Merges the records and peaks of all ranks.

        Args:
            records: This rank's records of the steps since the last call.
            peak: This rank's peak bytes.
            step: How many steps are done.
            since_save: How many steps were done since the last save.
        """
        return list(records), peak

    def resume_at(self, step: int) -> None:
        """Prepares for the step after `step`, once each rank has loaded a checkpoint."""

    def finish(self) -> None:
        """Ends the exchange with other ranks. Every rank calls it after the last step."""


class _SharedBatches(Alone):
    """Each rank trains every block on its share of each batch."""

    def __init__(self, model: LocalModel, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        self.shard, self.replicas = (ranks.rank, ranks.count), ranks.count

    def total(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        return self.ranks.all_reduce_sum(numbers, device)

    def share_statistics(self) -> None:
        """Gives every rank the batch-norm statistics of the first one. The parameters are equal already."""
        self.ranks.broadcast([b for k in self.blocks for b in self.model.statistics(k)])


class DataParallel(_SharedBatches):
    """Each rank has all parameters. Gradients are averaged block by block."""

    travelling = 1

    def __init__(self, model: LocalModel, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        self._averaging = Replicas(model)

    def start_average(self, k: int, loss: Tensor) -> None:
        self._averaging.start(k, loss)

    def finish_average(self, k: int) -> None:
        self._averaging.finish(k)


class Sharded(_SharedBatches):
    """Each rank has a part of all parameters. A backward pass averages its gradients itself."""

    def __init__(self, model: LocalModel, ranks: Ranks) -> None:
        super().__init__(shard(model), ranks)
        self._travelling: dict[int, tuple[Tensor, Any]] = {}

    def start_average(self, k: int, loss: Tensor) -> None:
        self._travelling[k] = (loss, self.ranks.start_adding(loss))

    def finish_average(self, k: int) -> None:
        loss, work = self._travelling.pop(k)
        work.wait()
        loss /= self.ranks.count

    def gather_states(self, states: list[Any]) -> list[Any]:
        return gathered(states, keep=self.ranks.first)

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        return gathered(module.state_dict(), keep=self.ranks.first)

    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        own = module.state_dict()
        module.load_state_dict({name: shard_of(t, own[name]) if name in own else t for name, t in state.items()})

    def part_of(self, state: Tensor, parameter: Tensor) -> Tensor:
        return shard_of(state, parameter)


class Pipeline(Alone):
    """Each stage trains its share of the blocks on every batch, some steps ahead of the stage with the next blocks.

    Attributes:
        stage: The blocks of this rank.
        row: How this rank shares the work with those that train the same blocks.
    """

    shares_errors = False

    def __init__(self, stage: Stage, row: Alone, ranks: Ranks, saving: Saving) -> None:
        super().__init__(stage.model, ranks)
        self.stage, self.row, self.saving = stage, row, saving
        self.blocks = row.blocks = stage.blocks
        self.reads_images = stage.reads_images
        self.shard, self.replicas, self.travelling = row.shard, row.replicas, row.travelling
        self._next_sync, self._last_sync = 1, time.monotonic()

    def notes(self, recipe: Recipe) -> list[str]:
        """How many blocks each rank has, and whether a larger lag would keep ranks from waiting."""
        each = f", each stage on {self.replicas} ranks" if self.replicas > 1 else ""
        notes = [f"pipeline: {' + '.join(map(str, self.stage.shares))} blocks{each}"]
        lag = least_lag(self.stage.hops)
        if recipe.lag < lag:
            notes.append(f"with --lag {recipe.lag} ranks wait for the EMA's sources; they need not with --lag {lag}")
        return notes

    def block_steps(
        self, x: Any, y: Tensor, *, scale: float | Tensor, autocast: torch.dtype | None
    ) -> Iterator[BlockResult]:
        return self.stage.block_steps(x, y, scale=scale, autocast=autocast)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[tuple[Callable[[Any], Any], tuple[int, int]]]:
        """The function runs the blocks of all stages, so all of them give it the same batches. The last one gets the
        output, and the others None. If the blocks cannot evaluate the network, each rank has all of it meanwhile."""
        if self.model.sharded is not None:  # Ranks with shards run each batch together, and the first of them tells.
            first = self.stage.row.first
            yield lambda x: (self.stage.forward(x), None)[not first], (0, 1)
            return
        if self.model.evaluates:
            yield self.stage.forward, self.shard
            return
        with self.stage.gathered(), torch.no_grad():
            yield self.model, (self.ranks.rank, self.ranks.count)

    def ema_distances(self) -> list[float | None]:
        return self.stage.ema_distances()

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        return self.stage.state_dict(module)

    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        self.stage.load_state_dict(state, module)

    def start_average(self, k: int, loss: Tensor) -> None:
        self.row.start_average(k, loss)

    def finish_average(self, k: int) -> None:
        self.row.finish_average(k)

    def total(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        return self.row.total(numbers, device)

    def share_statistics(self) -> None:
        self.row.share_statistics()

    def part_of(self, state: Tensor, parameter: Tensor) -> Tensor:
        return self.row.part_of(state, parameter)

    def gather_states(self, states: list[Any]) -> list[Any]:
        own = self.row.gather_states([states[k] for k in self.blocks])
        by_stage = self.stage.ranks.gather_object(own) if self.stage.row.first else []
        return [state for part in by_stage for state in part]

    def other_optimizers(self, count: int) -> set[int]:
        return set(range(count)) - set(self.blocks)

    def is_sync_due(self, step: int) -> bool:
        return step >= self._next_sync

    def merge(
        self, records: Sequence[StepRecord], peak: int, step: int, since_save: int
    ) -> tuple[list[StepRecord], int]:
        """Joins the losses of all ranks' blocks, takes the largest peak, and agrees on the next step to synchronise.
        The last rank has the network's output, so it knows the score."""
        now = time.monotonic()
        seconds = max((now - self._last_sync) / max(1, len(records)), 1e-6)
        interval = max(min(SYNC_STEPS, int(MOST_SECONDS / seconds)), int(SYNC_SECONDS / seconds), 1)
        next_sync = step + min(interval, self.saving.steps_left(since_save, seconds))
        own = [(r.losses, [{n: float(v) for n, v in p.items()} for p in r.parts], r.score, r.images) for r in records]
        by_rank = self.ranks.all_gather_object((own, peak, next_sync))
        self._next_sync, self._last_sync = by_rank[0][2], now
        merged, column = [], by_rank[:: self.replicas]  # Losses and scores of a row are averaged already.
        for same_step in zip(*(records for records, _, _ in column), strict=True):
            losses = [loss for losses, _, _, _ in same_step for loss in losses]
            parts = [part for _, parts, _, _ in same_step for part in parts]
            _, _, score, images = same_step[-1]
            merged.append(StepRecord(losses, parts, score, images))
        return merged, max(peak for _, peak, _ in by_rank)

    def resume_at(self, step: int) -> None:
        self.stage.go_on(step)

    def finish(self) -> None:
        self.stage.finish()


def mode_for(
    recipe: Recipe,
    make: Callable[[], LocalModel],
    machine: Machine,
    ranks: Ranks,
    saving: Saving,
    *,
    share: str,
    stages: int,
    targets: Tensor,
) -> Alone:
    """The mode of a run. Every rank calls it.

    Args:
        make: Makes the model, the same on all ranks.
        share: What ranks that train the same blocks share, one of `SHARES`.
        stages: The number of stages of a pipeline.
        targets: An example of the targets of a rank's part of a batch.

    Raises:
        UserError: The ranks cannot share this recipe's blocks.
        RunError: Memory ran out while the blocks were timed.
    """
    if share == "weights":
        check_shards(recipe, ranks.count // stages)
    if stages == 1 or ranks.count == 1:
        return _sharing(make(), ranks, share)
    stage = stage_for(recipe, Held(make), machine, ranks, targets, stages, share)
    return Pipeline(stage, _sharing(stage.model, stage.row, share), ranks, saving)


def _sharing(model: LocalModel, ranks: Ranks, share: str) -> Alone:
    """The mode of ranks that train the same blocks."""
    if ranks.count == 1:
        return Alone(model, ranks)
    return Sharded(model, ranks) if share == "weights" else DataParallel(model, ranks)


def check_batch_share(batch: int, count: int) -> None:
    """Raises UserError if so many replicas cannot share a batch of this many images evenly."""
    if batch % count:
        raise UserError(f"{count} ranks cannot share a batch of {batch} images: take a multiple of {count}")


def check_shards(recipe: Recipe, count: int) -> None:
    """Raises UserError if no shards can follow the recipe, or if it would be one alone."""
    if count == 1:
        raise UserError("--shard shares the weights among processes: add --nproc with 2 or more")
    if recipe.precision == "fp16":
        raise UserError("shards have no common gradient scaler for fp16: take bf16 or float32")


def check_pipeline(recipe: Recipe) -> None:
    """Raises UserError if no pipeline can follow the recipe."""
    for wrong, text in (
        (recipe.method == "bp" or recipe.cut == 1, "a pipeline needs a block for each process: take another --method"
         " than bp, and more --blocks"),
        (not recipe.step_as_you_go, "a pipeline steps each block as it goes: add --step-as-you-go"),
        (recipe.precision == "fp16", "a pipeline has no common gradient scaler for fp16: take bf16 or float32"),
    ):  # fmt: skip
        if wrong:
            raise UserError(text)


def stage_for(
    recipe: Recipe, held: Held, machine: Machine, ranks: Ranks, targets: Tensor, stages: int, share: str = "batches"
) -> Stage:
    """This rank's stage of a pipeline. Each block is timed here, and the blocks are shared out so that the slowest rank
    is as fast as possible. Raises UserError if no pipeline can follow the recipe, and RunError if memory runs out."""
    check_pipeline(recipe)
    model = held.model
    if share == "weights" and not model.evaluates:
        raise UserError("the blocks of this network do not evaluate it, which shards of a pipeline need: drop --shard")
    shares_of([1.0] * len(model.blocks), stages)  # It refuses too few blocks before the timing takes seconds.
    noise = torch.Generator().manual_seed(0)  # It leaves the run's own random generators as they are.
    x = torch.randn(len(targets), *model.image, generator=noise).to(machine.device, memory_format=machine.memory_format)
    try:
        own_seconds = block_seconds(held, x, targets.to(machine.device), autocast=machine.autocast)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = (
            f"out of memory as rank {ranks.rank} timed the blocks: more --blocks or a smaller --batch-size needs less"
        )
        raise RunError(text) from error
    seconds = ranks.all_reduce_sum(own_seconds, machine.device)
    shape, names = (stages, ranks.count // stages), ("pipeline", SHARES[share])
    mesh = None if stages == ranks.count else init_device_mesh(machine.device.type, shape, mesh_dim_names=names)
    return Stage(held, shares_of(seconds, stages), mesh=mesh, timeout=ranks.timeout)
