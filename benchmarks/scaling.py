"""Compares two processes with one, in images per second and peak memory: BP, local learning, and pipelines.

    python benchmarks/scaling.py

One process with one thread trains with BP and with local learning that steps as it goes. Two processes with one thread
each train with local data parallel, with sharded weights (local, and BP with PyTorch's FSDP2, unit by unit), with the
local pipeline, and with PyTorch's pipelines of BP, GPipe and 1F1B, with more and more micro-batches. All ways run in
the same two processes and take turns. The messages are real ones, sent by gloo. With a delay, each message arrives
later, which shows what a slower link would cost. Those of sharded weights cannot be delayed.

Writes results/scaling_resnet110.csv, one row for each way and delay: the median over the repeats of the slowest
process, and the peak bytes of the process that needs most. `local` is DGL with MAN's coupling. Two blocks are cut where
the pipeline is fastest on trial. BP's pipelines are split there too (`split` is local) and, if that is another place,
where the halves of BP take equally long (`split` is bp).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from common import Table, medians_in_turn
from delays import delayed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import localgrad as lg
from localgrad.run.folder import environment
from localgrad.scale.memory import MemoryMeter

FILL = 3  # In so many steps a pipeline fills. They are not timed.
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


@dataclass(frozen=True)
class Settings:
    """Time each way to train."""

    model: str = "resnet110"
    batch_size: int = 32
    repeats: int = 5
    steps: int = 4
    """Timed steps of a repeat."""
    micro_batches: tuple[int, ...] = (2, 4, 8, 16)
    delays: tuple[int, ...] = (0, 10, 100)
    """Milliseconds by which messages are late."""
    out: Path = Path("results/scaling_resnet110.csv")


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
    delayable: bool = True
    close: Callable[[], None] = lambda: None


class Bench:
    """Builds the ways to train. Each of the two processes has a bench."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        torch.manual_seed(0)
        self.x, self.y = torch.randn(settings.batch_size, 3, 32, 32), torch.randint(10, (settings.batch_size,))

    def model(self, blocks: int | list[str], coupling: lg.MAN | None = None, *, bp: bool = False) -> lg.LocalModel:
        torch.manual_seed(0)
        backbone = lg.build(self.settings.model, classes=10)
        method = lg.bp() if bp else lg.dgl("0c1f")
        return lg.localize(backbone, blocks=blocks, method=method, coupling=coupling, example=self.x)

    def ways(self) -> list[Way]:
        names = lg.units(self.model(1, bp=True).backbone, self.x)
        # A linear head on each unit takes next to no time, so these are the seconds of the units themselves.
        seconds = self.seconds(self.model(names[:-1]))
        middle = lg.shares_of(seconds, 2)[0] - 1
        trial: dict[str, float] = {}  # The seconds of a step for each cut.
        for name in names[middle - 1 : middle + 3]:
            way = self.pipeline(self.model([name], lg.MAN(lag=lg.least_lag())), (1, 1))
            trial[name] = min(slowest([timed(way, self.rank, self.settings.steps) for _ in range(3)]))
        cut = min(trial, key=lambda name: trial[name])
        found = [*self.alone("bp", self.model(1, bp=True)), self.fsdp()]
        for blocks in ([cut], 4):
            found += self.alone("local", self.model(blocks, lg.MAN()))
            found.append(self.replicas(self.model(blocks, lg.MAN())))
            found.append(self.shards(self.model(blocks, lg.MAN())))
            piped = self.model(blocks, lg.MAN(lag=lg.least_lag()))
            found.append(self.pipeline(piped, lg.shares_of(self.seconds(piped), 2)))
        splits = {cut: "local", names[middle]: "bp"} if cut != names[middle] else {cut: "local"}
        for at, split in splits.items():
            for name in SCHEDULES:
                found += [self.rival(name, at, split, m) for m in self.settings.micro_batches]
        return found

    def seconds(self, model: lg.LocalModel) -> list[float]:
        """The seconds of each block, summed over the two processes, which measure at the same time."""
        mine = torch.tensor(lg.block_seconds(model, self.x, self.y))
        dist.all_reduce(mine)
        return mine.tolist()

    def alone(self, name: str, model: lg.LocalModel) -> list[Way]:
        """Two ways: one process alone, and both processes at the same time with a batch each and no messages. No way to
        share the work can be faster than the second, unless each process then needs less of the caches."""
        step = partial(Updates(model).step, partial(lg.block_steps, model, self.x, self.y))
        one = Way(name, 1, len(model.blocks), model.blocks[0].names[-1], step)
        return [one, replace(one, name=f"{name}, twice", processes=2, batches=2)]

    def replicas(self, model: lg.LocalModel) -> Way:
        """Local data parallel: each process trains on half of the batch."""
        replicas, update = lg.Replicas(model), Updates(model)
        x, y = self.half()
        last = len(model.blocks) - 1

        def finish(k: int) -> None:
            replicas.finish(k)
            update(k)

        def step() -> None:
            for done in lg.block_steps(model, x, y):
                replicas.start(done.block, done.loss)
                if done.block:  # The gradients of a block travel while the next one computes.
                    finish(done.block - 1)
            finish(last)

        return Way("local data parallel", 2, last + 1, "", step)

    def shards(self, model: lg.LocalModel) -> Way:
        """Each process holds half of the weights, and trains on half of the batch."""
        step = partial(Updates(lg.shard(model)).step, partial(lg.block_steps, model, *self.half()))
        return Way("local, sharded", 2, len(model.blocks), "", step, delayable=False)

    def fsdp(self) -> Way:
        """BP with FSDP2, in which each unit is gathered twice a step."""
        x, y = self.half()
        module = nn.Sequential(*self.model(lg.units(self.model(1, bp=True).backbone, x)[:-1]).blocks)
        for unit in module:
            fully_shard(unit, reshard_after_forward=True)
        fully_shard(module)
        optimizer = sgd(list(module.parameters()))

        def step() -> None:
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return Way("bp with fsdp2", 2, 1, "", step, delayable=False)

    def half(self) -> list[torch.Tensor]:
        """This process's half of the batch."""
        return [t.chunk(2)[self.rank] for t in (self.x, self.y)]

    def pipeline(self, model: lg.LocalModel, shares: tuple[int, ...]) -> Way:
        """The local pipeline. `shares` has the number of blocks of each process."""
        stage = lg.Stage(model, shares)
        cut = model.blocks[shares[0] - 1].names[-1]
        step = partial(Updates(model).step, partial(stage.block_steps, self.x, self.y))
        return Way("local pipeline", 2, len(model.blocks), cut, step, close=stage.finish)

    def rival(self, name: str, cut: str, split: str, micro: int) -> Way:
        """BP in one of PyTorch's pipelines."""
        module = nn.Sequential(self.model([cut]).blocks[self.rank])
        stage = PipelineStage(module, self.rank, 2, torch.device("cpu"))
        schedule = SCHEDULES[name](stage, n_microbatches=micro, loss_fn=nn.CrossEntropyLoss())
        optimizer = sgd(list(module.parameters()))

        def step() -> None:
            if self.rank == 0:
                schedule.step(self.x)
            else:
                schedule.step(target=self.y, return_outputs=False)
            optimizer.step()
            optimizer.zero_grad()

        return Way(name, 2, 1, cut, step, micro, split=split)


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


def work(rank: int, folder: str, settings: Settings) -> None:
    """Runs in each of the two processes. The first one writes the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    ways = Bench(settings, rank).ways()
    peaks = slowest([peak(way, rank) for way in ways])
    same = {name: getattr(settings, name) for name in ("repeats", "steps", "model", "batch_size")}
    table = Table(settings.out, same={**same, **environment()})
    speeds: dict[str, float] = {}  # Images per second without a delay.
    for delay in settings.delays:
        # Delays are of interest only where the processes exchange messages, and for one cut.
        late = [w.processes > w.batches and w.split == "local" and w.delayable for w in ways]
        chosen = [i for i in range(len(ways)) if late[i] or not delay]
        timers = [timer(ways[i], rank, settings.steps, delay) for i in chosen]
        for i, median in zip(chosen, medians_in_turn(timers, settings.repeats, warm_up=1), strict=True):
            way = ways[i]
            speed = way.batches * settings.batch_size / median
            speeds.setdefault(f"{way.name} {way.blocks}", speed)
            local = f"{speed / speeds[f'local {max(way.blocks, 2)}']:.3f}" if way.name[:2] != "bp" else ""
            row = {
                "way": way.name, "processes": way.processes, "blocks": way.blocks, "split": way.split, "cut": way.cut,
                "micro_batches": way.micro_batches, "delay_ms": delay, "images_per_second": f"{speed:.2f}",
                "times_bp": f"{speed / speeds['bp 1']:.3f}", "times_local": local, "peak_bytes": int(peaks[i]),
            }  # fmt: skip
            if rank == 0:
                table.add(row)
                print(*(f"{name}={value}" for name, value in row.items()), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder, settings), nprocs=2, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]


if __name__ == "__main__":
    main(tyro.cli(Settings))
