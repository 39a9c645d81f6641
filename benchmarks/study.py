"""The study: test error, memory and time of each method on `fashion_small`, with seeds; its ablations; a long training.

    python benchmarks/study.py

Grids of `localgrad compare`, two runs at a time. A run that is finished adds its row to
results/accuracy_fashion_small_runs.csv at once; what has a row there is not run again (unless another starts from its
weights, and they are gone), so a stopped study goes on where it was, on whatever machine. The means go to
results/accuracy_fashion_small.csv, differences paired by seed to results/accuracy_fashion_small_pairs.csv.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from localgrad.run.arguments import Compare
from localgrad.run.checkpoint import MODEL
from localgrad.run.compare import Cell, grid, run_all
from localgrad.run.tables import SAME, paired, read_runs, row_of, show, summarize, write_csv

EARLY = "layer1.0/layer1.2/layer1.4"  # small blocks where maps are large, and all else in the last block
FIRST = "stem/layer1.0/layer1.1/layer1.2/layer1.3/layer1.4"  # of 16 blocks, the cuts of the first stage alone
LAST = "/".join(["layer1.4"] + [f"layer2.{i}" for i in range(5)] + [f"layer3.{i}" for i in range(4)])  # and from there
AGAIN = "/".join(f"layer1.{i}" for i in range(5))
DEEP = "dgl+deep-man"
METHODS = "bp,dgl,dgl+man,dgl+man++,dgl+deep-man"


@dataclass(frozen=True)
class Settings:
    """Train what the table lacks. Ctrl-C stops it; the same command goes on."""

    results: Path = Path("results")
    out: Path = Path("runs/study")
    """Where the run folders lie, which `localgrad probe` and `localgrad report` read."""
    jobs: int = 2
    parts: str = "main,gap,others,ablation,long,variants,local,exact"
    """Which of the parts to train, in this order, but for `exact`, which starts from weights of `local`."""


def _compare(methods: str, blocks: str, seeds: str = "0", **changes: Any) -> Compare:
    vary = tuple(f"{name}={value}" for name, value in changes.items())
    return Compare(methods=methods, blocks=blocks, seeds=seeds, recipe="fashion_small", vary=vary)


def _weights(compare: Compare) -> str:
    """Where the weights of a grid's only run are, as seen from the repository."""
    (cell,) = grid(compare)
    return str(Settings.out / cell.name / MODEL)


# A late phase with fewer blocks, here one: the weights after some epochs, and how BP goes on from them to the sixth.
LATE = [
    (_compare(DEEP, EARLY, branches="learnable", epochs="4"), {"epochs": "2", "lr": "0.05"}),
    (_compare(DEEP, "16", branches="learnable", epochs="4"), {"epochs": "2", "lr": "0.05"}),
    (_compare(DEEP, "16", branches="learnable", epochs="2"), {"epochs": "4"}),
]

# The seeds of the main part one after the other, so that what is there at any time is balanced.
PARTS: dict[str, list[Compare]] = {
    "main": [
        compare
        for seed in range(5)
        for compare in (_compare(METHODS, "16", str(seed)), _compare("dgl,dgl+man,dgl+deep-man", "4", str(seed)))
        if compare.blocks == "16" or seed < 3
    ],
    "others": [
        _compare("predsim,predsim+man,infopro,infopro+man,auglocal,auglocal+man", "16"),
        _compare("dgl", "16", head="0c1f"),  # greedy learning (ICML 2019)
    ],
    "ablation": [
        _compare("dgl+man", "16", momentum="0.9,0.999"),
        _compare("dgl+man", "16", "0,1,2", form="pull"),
        _compare("dgl+man", "16", "0,1,2", branches="ema,learnable"),
        _compare("dgl+man", "16", "0,1,2", momentum="0,0.99"),
    ],
    # Towards BP: where to cut and with which objective, and where the errors of 16 blocks come from.
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
        _compare(DEEP, "layer3.1/layer3.2/layer3.3", "0,1,2", branches="learnable", recompute=AGAIN),
        _compare(DEEP, "layer2.0,layer2.4", branches="learnable"),  # what the planner takes in 80 and in 41 MiB
    ],
    # Which branches, which units, how fast.
    "variants": [
        _compare("bp", "1", lr="0.05,0.2"),
        _compare("dgl,dgl+man,dgl+deep-man", EARLY),
        _compare(DEEP, EARLY, form="pull"),
        _compare(DEEP, EARLY, branches="ema", momentum="0.9", depth="2"),
        _compare(DEEP, "layer1.0/layer1.1/layer1.3", branches="learnable"),
        _compare(DEEP, "layer1.0/layer1.1/layer1.2", branches="learnable", depth="2"),
        _compare(DEEP, "16", branches="learnable", block_lr="/".join(["0.3"] * 6 + ["1"] * 10)),  # a slow first stage
    ],
    "local": [local for local, _ in LATE],
    "exact": [_compare("bp", "1", **then, warmup="0", init=_weights(local)) for local, then in LATE]
    + [_compare("bp", "1", epochs="2,4")],  # and without what came before
    "long": [_compare("bp,dgl,dgl+man,dgl+deep-man", "4", limit_train=60000, epochs=15)],
}


def key(row: dict[str, Any]) -> tuple:
    return (*(row[name] for name in SAME), row["seed"])


def lacking(parts: Iterable[str], there: Collection[tuple]) -> list[Cell]:
    """The runs of these parts, each once, without those that are there."""
    cells = {cell.name: cell for part in parts for compare in PARTS[part] for cell in grid(compare)}
    return [c for c in cells.values() if (c.method, c.blocks, c.setting, c.recipe.seed) not in there]


def main(settings: Settings) -> None:
    place = settings.results / "accuracy_fashion_small_runs.csv"

    def add(cell: Cell) -> None:
        row = row_of(settings.out / cell.name, cell.method, cell.blocks, cell.setting, cell.recipe.seed)
        write_csv(place, [*(other for other in runs() if key(other) != key(row)), row])
        summed_up()

    def runs() -> list[dict[str, Any]]:
        return read_runs(place) if place.exists() else []

    def summed_up() -> None:
        write_csv(settings.results / "accuracy_fashion_small.csv", summarize(runs()))
        write_csv(settings.results / "accuracy_fashion_small_pairs.csv", paired(runs()))

    names = settings.parts.split(",")
    for name in names:
        if name not in PARTS:
            raise SystemExit(f"the study has no part '{name}': take {', '.join(PARTS)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    there, failed = {key(run) for run in runs()}, []
    late = lacking(["exact"] if "exact" in names else [], there)
    starts = {c.recipe.init for c in late if c.recipe.init and not Path(c.recipe.init).exists()}
    early = lacking([name for name in names if name != "exact"], there)
    again = lacking(["local"] if starts else [], set())
    early += [c for c in again if str(settings.out / c.name / MODEL) in starts and c not in early]
    # One queue, so that no core waits at the end of a part, and another for what starts from weights of the first.
    for queue in (early, late):
        failed += run_all(queue, settings.out, settings.jobs, done=add)
    if rows := runs():
        summed_up()
        show(summarize(rows), paired(rows))
    if failed:
        raise SystemExit(f"these runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
