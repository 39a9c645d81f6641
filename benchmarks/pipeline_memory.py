"""Peak memory of the ranks of a local pipeline beside one process, for a network of GPT-2's shape.

    python benchmarks/pipeline_memory.py

12 layers, 768 wide, 12 heads, 50,257 tokens (124 million parameters and the readout's own), contexts of 512, float32 by
fused AdamW, each block stepping as it goes, with one block for each rank. Units are shared out so that each rank needs
about as many bytes. One process trains the same blocks, and BP the whole. In a mesh of 2 x 2 processes each stage has
two, which share the weights of their block, and each trains on one of two contexts.

Writes results/pipeline_memory.csv, one row for each way, with the bytes of the rank that needs most: `peak_bytes` is
what is live in the third step, everything counted, and `rss_bytes` is what the process took from the system in its
life, the building included, after the libraries were loaded. Neither depends on the machine's load. What has a row is
not measured again.
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
from torch.distributed.device_mesh import init_device_mesh

import localgrad as lg
from localgrad.run.folder import environment
from localgrad.scale.costs import Cost, trace_costs
from localgrad.scale.held import Held

ADAM = partial(torch.optim.AdamW, lr=1e-4, fused=True)  # A step that is not fused needs as much again as the weights.
KEY = ("method", "blocks", "ranks", "shards", "batch_size")
COUPLINGS: dict[str, lg.MAN | None] = {"dgl": None, "dgl+man": lg.MAN(lag=lg.least_lag())}


@dataclass(frozen=True)
class Settings:
    """Measure one process, pipelines and a mesh."""

    ranks: tuple[tuple[int, int], ...] = ((2, 1), (3, 1), (2, 2))
    """The ranks of the pipeline, and those that share the weights of a stage."""
    layers: int = 12
    width: int = 768
    vocabulary: int = 50257
    context: int = 512
    results: Path = Path("results")


def network(settings: Settings) -> GPT:
    return GPT(settings.vocabulary, settings.context, settings.width, settings.layers, heads=12)


def example(settings: Settings, batch_size: int = 1) -> torch.Tensor:
    return torch.randint(settings.vocabulary, (batch_size, settings.context))


def cuts(settings: Settings, method: str, ranks: int) -> list[str]:
    """The last unit of each block but the last, so that ranks need about as many bytes: for what they hold, three times
    as much for gradients and AdamW's state of what they train, and what a forward pass keeps."""

    def make() -> lg.LocalModel:
        backbone, x = network(settings), example(settings)
        task = lg.LanguageModel(settings.vocabulary)
        how: dict[str, Any] = {"method": lg.dgl(), "coupling": COUPLINGS[method], "example": x, "task": task}
        return lg.localize(backbone, blocks=lg.units(backbone, x)[:-1], **how)

    costs = trace_costs(Held(make).model, 1, targets=example(settings))

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


def work(
    rank: int, folder: str, settings: Settings, method: str, last: list[str], ranks: int, shards: int, x: int
) -> None:
    """Runs as one rank of a pipeline whose stages have `shards` ranks, on `x` contexts, and writes what it needed."""
    torch.set_num_threads(1)
    before = resident()
    torch.manual_seed(0)
    batch = example(settings, x)
    behind = batch.roll(-1, 1)
    make = partial(model_of, settings, method, last)
    if ranks == 1:
        model = make()
        peak = third_step(model, range(len(model.blocks)), lambda: lg.block_steps(model, batch, behind))
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks * shards)
        mesh = init_device_mesh("cpu", (ranks, shards), mesh_dim_names=("pipeline", "shards")) if shards > 1 else None
        stage = lg.Stage(make, [1] * ranks, mesh=mesh)
        if shards > 1:
            lg.shard(stage.model)
        own_x, own_y = (tokens.chunk(shards)[stage.row.rank] for tokens in (batch, behind))
        peak = third_step(stage.model, stage.blocks, lambda: stage.block_steps(own_x, own_y))
        stage.finish()
        dist.destroy_process_group()
    torch.save((peak, resident() - before), f"{folder}/{rank}.pt")


def resident() -> int:
    """The most bytes that this process has had in memory until now. Unlike `getrusage`, Linux's file counts from its
    own beginning, and not from that of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def measured(settings: Settings, method: str, last: list[str], ranks: int, shards: int, x: int) -> dict[str, Any]:
    """The row of a way, with peak and resident bytes of the rank that needs most."""
    count = ranks * shards
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder, settings, method, last, ranks, shards, x), nprocs=count, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(count)]
    peak, rss = (max(each) for each in zip(*found, strict=True))
    return {
        "method": method, "blocks": len(last) + 1, "ranks": ranks, "shards": shards, "batch_size": x,
        "cuts": " ".join(last), "peak_bytes": peak, "rss_bytes": rss,
    }  # fmt: skip


def main(settings: Settings) -> None:
    shape = {name: getattr(settings, name) for name in ("layers", "width", "vocabulary", "context")}
    same = {**shape, "precision": "float32", **environment()}
    table = Table(settings.results / "pipeline_memory.csv", (*shape, *KEY), same)
    sizes = tuple(shape.values())
    if (*sizes, "bp", 1, 1, 1, 1) not in table:
        table.add(measured(settings, "bp", [], 1, 1, 1) | {"times_one_process": ""})
    for method in COUPLINGS:
        for ranks, shards in settings.ranks:
            if (*sizes, method, ranks, ranks, shards, shards) in table:
                continue
            last = cuts(settings, method, ranks)
            alone = measured(settings, method, last, 1, 1, shards)
            piped = measured(settings, method, last, ranks, shards, shards)
            share = piped["peak_bytes"] / alone["peak_bytes"]
            table.add(alone | {"times_one_process": ""}, piped | {"times_one_process": f"{share:.3f}"})
            print(table.rows[-2:], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
