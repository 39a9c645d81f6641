"""Compares two processes with one, in images per second and peak memory: BP, local learning, and pipelines.

    python benchmarks/scaling.py

One process with one thread trains with BP and with local learning that steps as it goes. Two processes with one thread
each train with local data parallel, with sharded weights (local, and BP with PyTorch's FSDP2, unit by unit), with the
local pipeline, and with PyTorch's pipelines of BP: GPipe, 1F1B, interleaved 1F1B and zero bubble (ZBV), with more and
more micro-batches. All ways run in the same two processes and take turns. The messages are real ones, sent by gloo.
With a delay, each message arrives later, which shows what a slower link would cost. Those of sharded weights cannot be
delayed.

Writes results/scaling_resnet110.csv, one row for each way and delay: the median over the repeats of the slowest
process, and the peak bytes of the process that needs most. `local` is DGL with MAN's coupling. Two blocks are cut where
the pipeline is fastest on trial. BP's pipelines are split there too (`split` is local) and, if that is another place,
where the halves of BP take equally long (`split` is bp). For the last two kinds of pipelines, in which each process has
two parts of the network, the four parts of BP take equally long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import tyro
from common import Table, medians_in_turn
from torch import nn
from torch.distributed.fsdp import fully_shard
from two_processes import SCHEDULES, Maker, Updates, Way, on_two_processes, parts_of, peak, sgd, slowest, timed, timer

import localgrad as lg
from localgrad.run.folder import environment


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


class Bench(Maker):
    """Makes all ways to train."""

    def __init__(self, settings: Settings, rank: int) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(settings.batch_size, 3, 32, 32), torch.randint(10, (settings.batch_size,))
        super().__init__(rank, x, y)
        self.settings = settings

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
            way = self.pipeline("local pipeline", self.model([name], lg.MAN(lag=lg.least_lag())))
            trial[name] = min(slowest([timed(way, self.rank, self.settings.steps) for _ in range(3)]))
        cut = min(trial, key=lambda name: trial[name])
        found = [*self.alone("bp", self.model(1, bp=True)), self.fsdp()]
        for blocks in ([cut], 4):
            found += self.alone("local", self.model(blocks, lg.MAN()))
            found.append(self.replicas("local data parallel", self.model(blocks, lg.MAN())))
            found.append(self.shards(self.model(blocks, lg.MAN())))
            found.append(self.pipeline("local pipeline", self.model(blocks, lg.MAN(lag=lg.least_lag()))))
        splits = {cut: "local", names[middle]: "bp"} if cut != names[middle] else {cut: "local"}
        for at, split in splits.items():
            for name in (name for name in SCHEDULES if parts_of(name) == 2):
                found += [self.rival(name, self.model([at]), m, split) for m in self.settings.micro_batches]
        quarters = [names[end - 1] for end in accumulate(lg.shares_of(seconds, 4)[:-1])]
        for name in (name for name in SCHEDULES if parts_of(name) == 4):
            found += [self.rival(name, self.model(quarters), m) for m in self.settings.micro_batches]
        return found

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


def work(rank: int, settings: Settings) -> None:
    """Runs in each of the two processes. The first one writes the table."""
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
                "micro_batches": way.micro_batches, "slowest_share": f"{way.slowest:.3f}" if way.slowest else "",
                "delay_ms": delay, "images_per_second": f"{speed:.2f}",
                "times_bp": f"{speed / speeds['bp 1']:.3f}", "times_local": local, "peak_bytes": int(peaks[i]),
            }  # fmt: skip
            if rank == 0:
                table.add(row)
                print(*(f"{name}={value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    on_two_processes(work, tyro.cli(Settings))
