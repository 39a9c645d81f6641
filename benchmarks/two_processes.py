"""Ways to train on two processes, and how they are timed, for `scaling.py` and `race.py`. It has no command and writes
nothing.

Both processes make the same ways in the same order. They have one thread each and exchange real messages by gloo.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from delays import delayed
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

import localgrad as lg
from localgrad.core.boundary import full_precision
from localgrad.core.engine import autocasting
from localgrad.scale.memory import MemoryMeter
from localgrad.scale.messages import Layouts
from localgrad.scale.shards import Same

FILL = 3  # In so many steps a pipeline fills. They are not timed.
# PyTorch's pipelines, each with the parts of the network that each process has.
HALVES, INTERLEAVED, THERE_AND_BACK = ((0,), (1,)), ((0, 2), (1, 3)), ((0, 3), (1, 2))
SCHEDULES: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "gpipe": (ScheduleGPipe, HALVES),
    "1f1b": (Schedule1F1B, HALVES),
    "interleaved 1f1b": (ScheduleInterleaved1F1B, INTERLEAVED),
    "zero bubble": (ScheduleZBVZeroBubble, THERE_AND_BACK),
}


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        name: Its name in the table.
        processes: How many processes take part, 1 or 2.
        blocks: The number of blocks, 1 for BP.
        cut: The unit after which the network is split, "" if it is not.
        step: One training step, to be called on each process that takes part.
        micro_batches: The parts of a batch that follow each other through a pipeline.
        batches: How many batches a step of all processes trains on.
        split: Who chose the cut: "local" or "bp".
        slowest: For a local pipeline, the share of the seconds of all blocks that the slower process takes.
        delayable: Whether `delayed` reaches all messages.
        close: To be called after the last of several steps.
    """

    name: str
    processes: int
    blocks: int
    cut: str
    step: Callable[[], object]
    micro_batches: int = 1
    batches: int = 1
    split: str = "local"
    slowest: float | None = None
    delayable: bool = True
    close: Callable[[], None] = lambda: None


class Part(nn.Module):
    """A part of a network; the others are on both processes.

    What crosses travels in the order of its memory, because gloo takes no other. The last part gives full precision.

    Args:
        blocks: All parts.
        number: Which of them this is, from 0.
        x: A batch, or a micro-batch if there are any. It is needed for the shape of what crosses.
        autocast: The dtype of the forward pass.
    """

    def __init__(self, blocks: Sequence[nn.Module], number: int, x: Tensor, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.block, self.number, self.autocast = blocks[number], number, autocast
        crossing = [Layouts.of(x)]
        with torch.no_grad(), autocasting(x, autocast):
            for block in blocks[:-1]:
                x = block.eval()(x)
                block.train()
                crossing.append(Layouts.of(x))
        self.enters = crossing[number] if number else None
        self.leaves = None if number == len(blocks) - 1 else crossing[number + 1]

    def forward(self, h: Tensor) -> Tensor:
        if self.enters is not None:
            h = self.enters.unpack([h])
        with autocasting(h, self.autocast):
            h = self.block(h)
        if self.leaves is None:
            return full_precision(h)
        sent: Any = Same.apply(self.leaves.pack(h)[0])  # The zero bubble takes no view of a tensor.
        return sent


class Maker:
    """Makes ways to train on a batch. Each of the two processes has one.

    Args:
        rank: The number of this process.
        x: The batch's inputs.
        y: Its targets.
        autocast: The dtype of forward passes.
    """

    def __init__(self, rank: int, x: Tensor, y: Tensor, autocast: torch.dtype | None = None) -> None:
        self.rank, self.x, self.y, self.autocast = rank, x, y, autocast

    def seconds(self, model: lg.LocalModel) -> list[float]:
        """The seconds of each block, summed over the two processes, which measure at the same time."""
        mine = torch.tensor(lg.block_seconds(model, self.x, self.y, autocast=self.autocast))
        dist.all_reduce(mine)
        return mine.tolist()

    def alone(self, name: str, model: lg.LocalModel) -> list[Way]:
        """Two ways: one process alone, and both processes at the same time with a batch each and no messages. No way to
        share the work can be faster than the second, unless each process then needs less of the caches."""
        blocks = partial(lg.block_steps, model, self.x, self.y, autocast=self.autocast)
        one = Way(name, 1, len(model.blocks), model.blocks[0].names[-1], partial(Updates(model).step, blocks))
        return [one, replace(one, name=f"{name}, twice", processes=2, batches=2)]

    def replicas(self, name: str, model: lg.LocalModel) -> Way:
        """Data parallel: each process trains on half of the batch. The gradients of a block travel while the next one
        computes."""
        replicas, update = lg.Replicas(model), Updates(model)
        x, y = self.half()
        last = len(model.blocks) - 1

        def finish(k: int) -> None:
            replicas.finish(k)
            update(k)

        def step() -> None:
            for done in lg.block_steps(model, x, y, autocast=self.autocast):
                replicas.start(done.block, done.loss)
                if done.block:
                    finish(done.block - 1)
            finish(last)

        return Way(name, 2, last + 1, "", step)

    def half(self) -> list[Tensor]:
        """This process's half of the batch."""
        return [t.chunk(2)[self.rank] for t in (self.x, self.y)]

    def pipeline(self, name: str, model: lg.LocalModel) -> Way:
        """The local pipeline. The blocks are divided so that the slower process is as fast as possible."""
        seconds = self.seconds(model)
        shares = lg.shares_of(seconds, 2)
        first = sum(seconds[: shares[0]]) / sum(seconds)
        stage = lg.Stage(model, shares)
        cut = model.blocks[shares[0] - 1].names[-1]
        step = partial(Updates(model).step, partial(stage.block_steps, self.x, self.y, autocast=self.autocast))
        return Way(name, 2, len(model.blocks), cut, step, slowest=max(first, 1 - first), close=stage.finish)

    def rival(self, name: str, parts: lg.LocalModel, micro: int, split: str = "local") -> Way:
        """BP in one of PyTorch's pipelines, on the parts of a network, as many as `parts_of(name)`."""
        kind, placed = SCHEDULES[name]
        blocks, count, mine = parts.blocks, parts_of(name), placed[self.rank]
        modules = [Part(blocks, number, self.x.chunk(micro)[0], self.autocast) for number in mine]
        device = torch.device("cpu")
        stages = [PipelineStage(m, number, count, device) for m, number in zip(modules, mine, strict=True)]
        given = {"n_microbatches": micro, "loss_fn": nn.CrossEntropyLoss()}
        schedule = kind(stages if len(stages) > 1 else stages[0], **given)
        optimizer = sgd([p for module in modules for p in module.parameters()])
        inputs = [self.x] if 0 in mine else []
        last = {"target": self.y, "return_outputs": False} if count - 1 in mine else {}

        def step() -> None:
            schedule.step(*inputs, **last)
            optimizer.step()
            optimizer.zero_grad()

        return Way(name, 2, 1, ", ".join(block.names[-1] for block in blocks[:-1]), step, micro, split=split)


def parts_of(name: str) -> int:
    """Into how many parts one of PyTorch's pipelines splits a network."""
    return sum(map(len, SCHEDULES[name][1]))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)


class Updates:
    """Moves the averages of one block and takes its optimizer step."""

    def __init__(self, model: lg.LocalModel) -> None:
        self.model = model
        self.optimizers = [sgd(model.members(k)) for k in range(len(model.blocks))]

    def __call__(self, k: int) -> None:
        self.model.move_averages(k)
        self.optimizers[k].step()
        self.optimizers[k].zero_grad()

    def step(self, block_steps: Callable[[], Iterable[lg.BlockResult]]) -> None:
        """A whole step, in which each block steps as soon as it has its gradients."""
        for done in block_steps():
            self(done.block)


def timed(way: Way, rank: int, steps: int) -> float:
    """The mean seconds of a step on this process once the pipeline is full; 0 on a process that takes no part."""
    dist.barrier()
    if rank >= way.processes:
        return 0.0
    ends = []
    for _ in range(FILL + steps):
        way.step()
        ends.append(time.perf_counter())
    way.close()
    return statistics.mean(b - a for a, b in pairwise(ends[FILL - 1 :]))


def peak(way: Way, rank: int) -> int:
    """The peak bytes of a step on this process; 0 on a process that takes no part."""
    dist.barrier()
    if rank >= way.processes:
        return 0
    for _ in range(FILL):
        way.step()
    with MemoryMeter() as meter:
        way.step()
    way.close()
    return meter.result().total


def slowest(values: list[float]) -> list[float]:
    """The largest of each value over the processes."""
    most = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def timer(way: Way, rank: int, steps: int, delay: int) -> Callable[[], float]:
    """A function that times the way on the slowest process, with messages that are `delay` milliseconds late."""

    def run() -> float:
        with delayed(delay / 1000):
            return slowest([timed(way, rank, steps)])[0]

    return run


def on_two_processes(work: Callable[[int, Any], None], settings: Any) -> None:
    """Calls `work(rank, settings)`, a function of a module's top level, in two processes of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (folder, work, settings), nprocs=2, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]


def _rank(rank: int, folder: str, work: Callable[[int, Any], None], settings: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    work(rank, settings)
    dist.barrier()
    dist.destroy_process_group()
