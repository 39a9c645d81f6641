"""Peak memory of the ranks of a local pipeline beside one process, for a network of GPT-2's shape.

    python benchmarks/pipeline_memory.py

12 layers, 768 wide, 12 heads, 50,257 tokens (124 million parameters and the readout's own), contexts of 512, float32 by
fused AdamW, each block stepping as it goes, with one block for each rank. Units are shared out so that each rank needs
about as many bytes. One process trains the same blocks, and BP the whole.

Writes results/pipeline_memory.csv, one row for each way, with the bytes of the rank that needs most: `peak_bytes` is
what is live in the third step, everything counted, and `rss_bytes` is what the process took from the system in its
life, the building included, after the libraries were loaded. Neither depends on the machine's load.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from common import Table
from gpt import GPT

import localgrad as lg
from localgrad.run.folder import environment
from localgrad.scale.costs import Cost, trace_costs
from localgrad.scale.held import Held

ADAM = partial(torch.optim.AdamW, lr=1e-4, fused=True)  # A step that is not fused needs as much again as the weights.
COUPLINGS: dict[str, lg.MAN | None] = {"dgl": None, "dgl+man": lg.MAN(lag=lg.least_lag())}


@dataclass(frozen=True)
class Settings:
    """Measure one process and pipelines."""

    ranks: tuple[int, ...] = (2, 3)
    layers: int = 12
    width: int = 768
    vocabulary: int = 50257
    context: int = 512
    batch_size: int = 1
    results: Path = Path("results")


def network(settings: Settings) -> GPT:
    return GPT(settings.vocabulary, settings.context, settings.width, settings.layers, heads=12)


def example(settings: Settings) -> torch.Tensor:
    return torch.randint(settings.vocabulary, (settings.batch_size, settings.context))


def cuts(settings: Settings, method: str, ranks: int) -> list[str]:
    """The last unit of each block but the last, so that ranks need about as many bytes: for what they hold, three times
    as much for gradients and AdamW's state of what they train, and what a forward pass keeps."""

    def make() -> lg.LocalModel:
        backbone, x = network(settings), example(settings)
        task = lg.LanguageModel(settings.vocabulary)
        how: dict[str, Any] = {"method": lg.dgl(), "coupling": COUPLINGS[method], "example": x, "task": task}
        return lg.localize(backbone, blocks=lg.units(backbone, x)[:-1], **how)

    costs = trace_costs(Held(make).model, settings.batch_size, targets=example(settings))

    def needed(pieces: list[Cost]) -> list[float]:
        return [float(cost.state + 3 * cost.gradients + cost.kept) for cost in pieces]

    shares = lg.shares_of(needed(costs.units[0]), ranks, needed(costs.auxiliaries[0]))
    return [costs.names[sum(shares[: i + 1]) - 1] for i in range(ranks - 1)]


def model_of(settings: Settings, method: str, last: list[str]) -> lg.LocalModel:
    """The network in blocks, or in one block for BP."""
    how: dict[str, Any] = (
        {"method": lg.dgl(), "coupling": COUPLINGS[method], "blocks": last} if last else {"method": lg.bp()}
    )
    task = lg.LanguageModel(settings.vocabulary)
    return lg.localize(network(settings), example=example(settings), task=task, **how)


def third_step(model: lg.LocalModel, blocks: Iterable[int], block_steps: Callable[[], Iterable[lg.BlockResult]]) -> int:
    """The peak bytes of a third step, with all that the process holds."""
    optimizers = {k: ADAM(model.members(k)) for k in blocks}

    def step() -> None:
        for done in block_steps():
            model.move_averages(done.block)
            optimizers[done.block].step()
            optimizers[done.block].zero_grad()

    step()
    step()
    return lg.measure_peak(step, model=model, optimizers=list(optimizers.values())).total


def work(rank: int, folder: str, settings: Settings, method: str, ranks: int, last: list[str]) -> None:
    """Runs as one rank, and writes what it needed."""
    torch.set_num_threads(1)
    before = resident()
    torch.manual_seed(0)
    x = example(settings)
    make = partial(model_of, settings, method, last)
    if ranks == 1:
        model = make()
        peak = third_step(model, range(len(model.blocks)), lambda: lg.block_steps(model, x, x))
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
        stage = lg.Stage(make, [1] * ranks)
        peak = third_step(stage.model, stage.blocks, lambda: stage.block_steps(x, x))
        stage.finish()
        dist.destroy_process_group()
    torch.save((peak, resident() - before), f"{folder}/{rank}.pt")


def resident() -> int:
    """The most bytes that this process has had in memory until now. Unlike `getrusage`, Linux's file counts from its
    own beginning, and not from that of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def measured(settings: Settings, method: str, ranks: int, last: list[str]) -> tuple[int, int]:
    """Peak and resident bytes of the rank that needs most."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder, settings, method, ranks, last), nprocs=ranks, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(ranks)]
    return max(peak for peak, _ in found), max(rss for _, rss in found)


def main(settings: Settings) -> None:
    shape = {name: getattr(settings, name) for name in ("layers", "width", "vocabulary", "context", "batch_size")}
    table = Table(settings.results / "pipeline_memory.csv", same={**shape, "precision": "float32", **environment()})
    table.add(row("bp", 1, 1, [], measured(settings, "bp", 1, [])))
    for method in COUPLINGS:
        for ranks in settings.ranks:
            last = cuts(settings, method, ranks)
            alone = measured(settings, method, 1, last)
            table.add(row(method, ranks, 1, last, alone))
            piped = measured(settings, method, ranks, last)
            table.add(row(method, ranks, ranks, last, piped) | {"times_one_process": f"{piped[0] / alone[0]:.3f}"})
            print(table.rows[-2:], flush=True)


def row(method: str, blocks: int, ranks: int, last: list[str], found: tuple[int, int]) -> dict[str, object]:
    told = {"method": method, "blocks": blocks, "ranks": ranks, "cuts": " ".join(last)}
    return told | {"peak_bytes": found[0], "rss_bytes": found[1], "times_one_process": ""}


if __name__ == "__main__":
    main(tyro.cli(Settings))
