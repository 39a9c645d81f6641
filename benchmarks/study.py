"""The study: test error, memory and time of each method on `fashion_small`, over seeds; its ablations; a long training.

    python benchmarks/study.py

Runs grids of `localgrad compare`, two runs at a time. Writes results/accuracy_fashion_small_runs.csv, one row for each
run as soon as it is finished; results/accuracy_fashion_small.csv, the means over seeds; and
results/accuracy_fashion_small_pairs.csv, the differences paired by seed. A run that has a row is not trained again, so
the study goes on where it stopped, on whatever machine. There is one exception: a run whose weights another one starts
from is trained again if the weights are gone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import Table

from localgrad.run.arguments import Compare
from localgrad.run.checkpoint import MODEL
from localgrad.run.compare import Cell, grid, run_all
from localgrad.run.tables import SAME, paired, read_runs, row_of, show, summarize, write_csv

RUNS = "accuracy_fashion_small_runs.csv"
KEY = (*SAME, "seed")
EARLY = "layer1.0/layer1.2/layer1.4"  # Blocks are small where the maps are large; one block has the rest.
# FIRST has the cuts of 16 blocks up to the end of the first stage, and LAST those after it.
FIRST = "stem/layer1.0/layer1.1/layer1.2/layer1.3/layer1.4"
LAST = "/".join(["layer1.4"] + [f"layer2.{i}" for i in range(5)] + [f"layer3.{i}" for i in range(4)])
FIRST_STAGE = "/".join(f"layer1.{i}" for i in range(5))
DEEP = "dgl+deep-man"
# A cut after the first unit of the second stage, and the cuts for 2 and for 4 blocks that balance the bytes of DGL.
BALANCED = "layer1.1/layer1.3/layer2.2"
POSITIONS = f"layer2.0,layer1.3,{BALANCED}"
METHODS = "bp,dgl,dgl+man,dgl+man++,dgl+deep-man"


@dataclass(frozen=True)
class Settings:
    """Train the runs that the table lacks. Ctrl-C stops the study, and the same command continues it."""

    results: Path = Path("results")
    out: Path = Path("runs/study")
    """The folder of the runs, for `localgrad probe` and `localgrad report`."""
    jobs: int = 2
    parts: str = "main,heads,coupled,accumulate,sides,gap,others,ablation,long,variants,local,exact"
    """The parts to train, in this order. `exact` comes last, because it starts from weights of `local`."""


def _compare(methods: str, blocks: str, seeds: str = "0", **changes: Any) -> Compare:
    vary = tuple(f"{name}={value}" for name, value in changes.items())
    return Compare(methods=methods, blocks=blocks, seeds=seeds, recipe="fashion_small", vary=vary)


def _weights(compare: Compare) -> str:
    """The weights of a grid that has one run, as a path in the repository."""
    (cell,) = grid(compare)
    return str(Settings.out / cell.name / MODEL)


# Six epochs in two phases: 16 or 4 blocks first, and then BP, which starts from their weights. Each row names the runs
# of the first phase and what BP has in the second.
LATE = [
    (_compare(DEEP, EARLY, branches="learnable", epochs="4"), {"epochs": "2", "lr": "0.05"}),
    (_compare(DEEP, "16", branches="learnable", epochs="4"), {"epochs": "2", "lr": "0.05"}),
    (_compare(DEEP, "16", branches="learnable", epochs="2"), {"epochs": "4"}),
]

# The main part trains one seed after the other, so that all methods have about as many seeds at any time.
PARTS: dict[str, list[Compare]] = {
    "main": [
        compare
        for seed in range(5)
        for compare in (_compare(METHODS, "16", str(seed)), _compare("dgl,dgl+man,dgl+deep-man", "4", str(seed)))
        if compare.blocks == "16" or seed < 3
    ],
    # Heads that keep position, at even cuts and at cuts that balance bytes.
    "heads": [
        compare
        for seed in "012"
        for compare in (_compare("dgl", f"4,16,{POSITIONS}", seed, head="1c1f@4"), _compare("dgl", POSITIONS, seed))
    ],
    # The same with couplings, and other heads.
    "coupled": [
        compare
        for seed in "012"
        for compare in (
            _compare("dgl+man", f"16,{BALANCED},4", seed, head="1c1f@4"),
            _compare(DEEP, f"layer2.0,{BALANCED}", seed, branches="learnable", head="0c1f@4"),
            _compare("dgl+man", f"{BALANCED},4", seed, form="pull", head="1c1f@4"),
        )
    ],
    "sides": [
        _compare("dgl", "4,16", head="1c1f@2,1c1f@7"),
        *(_compare("dgl", f"4,16,{POSITIONS}", seed, head="1c2f@4") for seed in "012"),
    ],
    # What batch norm over parts of a batch costs BP: 128 images a step, in 2, 4 or 8 parts.
    "accumulate": [
        _compare("bp", "1", "0,1,2", batch_size=str(128 // parts), accumulate=str(parts)) for parts in (2, 4, 8)
    ],
    "others": [
        _compare("predsim,predsim+man,infopro,infopro+man,auglocal,auglocal+man", "16"),
        _compare("dgl", "16", head="0c1f"),  # This is greedy learning (ICML 2019).
    ],
    "ablation": [
        _compare("dgl+man", "16", momentum="0.9,0.999"),
        _compare("dgl+man", "16", "0,1,2", form="pull"),
        _compare("dgl+man", "16", "0,1,2", branches="ema,learnable"),
        _compare("dgl+man", "16", "0,1,2", momentum="0,0.99"),
    ],
    # How the gap to BP gets smaller: by other cuts, by other objectives. Some rows show where 16 blocks lose accuracy.
    "gap": [
        _compare(DEEP, FIRST, branches="learnable"),
        _compare(DEEP, LAST, branches="learnable"),
        _compare(DEEP, EARLY, branches="learnable", lr="0.05,0.2"),
        _compare(DEEP, EARLY, "0,1,2", branches="learnable"),
        _compare("infopro+deep-man,predsim+deep-man", FIRST, branches="learnable"),
        _compare("infopro+deep-man", EARLY, branches="learnable"),
        _compare(DEEP, "layer1.1/layer1.4/layer2.4,layer1.2/layer1.4/layer2.4,layer1.2", branches="learnable"),
        _compare(DEEP, "16", "0,1,2", branches="learnable"),
        _compare(DEEP, "layer2.0/layer3.1/layer3.3", "0,1,2", branches="learnable", recompute="layer1.0/layer1.1"),
        _compare(DEEP, "layer3.1/layer3.2/layer3.3", "0,1,2", branches="learnable", recompute=FIRST_STAGE),
        _compare(DEEP, "layer2.0,layer2.4", branches="learnable"),  # The planner made these cuts for 80 and 41 MiB.
    ],
    # These rows have other branches, other units to copy, or other learning rates.
    "variants": [
        _compare("bp", "1", lr="0.05,0.2"),
        _compare("dgl,dgl+man,dgl+deep-man", EARLY),
        _compare(DEEP, EARLY, form="pull"),
        _compare(DEEP, EARLY, branches="ema", momentum="0.9", depth="2"),
        _compare(DEEP, "layer1.0/layer1.1/layer1.3", branches="learnable"),
        _compare(DEEP, "layer1.0/layer1.1/layer1.2", branches="learnable", depth="2"),
        _compare(DEEP, "16", branches="learnable", block_lr="/".join(["0.3"] * 6 + ["1"] * 10)),  # Stage 1 is slow.
    ],
    "local": [local for local, _ in LATE],
    "exact": [_compare("bp", "1", **then, warmup="0", init=_weights(local)) for local, then in LATE]
    + [_compare("bp", "1", epochs="2,4")],  # Second phases without a first one.
    "long": [_compare("bp,dgl,dgl+man,dgl+deep-man", "4", limit_train=60000, epochs=15)],
}


def lacking(parts: Iterable[str], there: Container[tuple]) -> list[Cell]:
    """The runs of these parts that are not in `there`, each once."""
    cells = {cell.name: cell for part in parts for compare in PARTS[part] for cell in grid(compare)}
    return [c for c in cells.values() if (c.method, c.blocks, c.setting, c.recipe.seed) not in there]


def queues(settings: Settings) -> tuple[list[Cell], list[Cell]]:
    """The runs to train: those with fresh weights, and then those that start from the weights of another run. All parts
    share a queue, so that no core waits at the end of a part."""
    there = Table(settings.results / RUNS, KEY)
    names = settings.parts.split(",")
    late = lacking(["exact"] if "exact" in names else [], there)
    early = lacking([name for name in names if name != "exact"], there)
    # Runs whose weights are needed and gone are trained again, though they have a row.
    gone = {c.recipe.init for c in late if c.recipe.init and not Path(c.recipe.init).exists()}
    again = lacking(["local"] if gone else [], ())
    return early + [c for c in again if str(settings.out / c.name / MODEL) in gone and c not in early], late


def summed_up(settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes the means and the paired differences of all runs that have a row, and returns both tables."""
    runs = read_runs(settings.results / RUNS)
    means, pairs = summarize(runs), paired(runs)
    write_csv(settings.results / "accuracy_fashion_small.csv", means)
    write_csv(settings.results / "accuracy_fashion_small_pairs.csv", pairs)
    return means, pairs


def main(settings: Settings) -> None:
    def add(cell: Cell) -> None:
        row = row_of(settings.out / cell.name, cell.method, cell.blocks, cell.setting, cell.recipe.seed)
        Table(settings.results / RUNS, KEY).add(row)
        summed_up(settings)

    for name in settings.parts.split(","):
        if name not in PARTS:
            raise SystemExit(f"the study has no part '{name}': take {', '.join(PARTS)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for queue in queues(settings):
        failed += run_all(queue, settings.out, settings.jobs, done=add)
    if (settings.results / RUNS).exists():
        show(*summed_up(settings))
    if failed:
        raise SystemExit(f"these runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
