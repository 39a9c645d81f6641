"""How a run ended, for tests of faults: what a finished run is compared by, bit for bit, and what a folder may hold."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from localgrad.run.checkpoint import read_checkpoint

MODEL, AUXILIARIES, STATE = "model.safetensors", "auxiliaries.safetensors", "state.json"
KNOWN = re.compile(
    r"\.lock|config\.yaml|(metrics\.jsonl|(summary|memory_timeline)\.csv)|model\.safetensors|"
    r"checkpoints(/best|/step-\d+(/((model|auxiliaries|state)\.safetensors|state\.json|manifest\.json))?)?"
)


def differences(folder: Path, other: Path, *, memory: bool = True) -> list[str]:
    """In what a finished run differs from one that nothing befell. memory: also in what a step has taken."""
    a, b = (last_checkpoint(place) for place in (folder, other))
    pairs = [(folder / MODEL, other / MODEL), (a / AUXILIARIES, b / AUXILIARIES)]
    found = [x.name for x, y in pairs if x.read_bytes() != y.read_bytes()]
    found += [] if a.name == b.name else [f"the last checkpoint is {a.name}"]
    mine, theirs = state(a), state(b)
    if not memory:
        del mine["stepper"]["peak"], theirs["stepper"]["peak"]
    for both in zip(mine.pop("random"), theirs.pop("random"), strict=False):  # of the ranks that both have
        found += [] if same(*both) else ["random"]
    found += [] if same(mine, theirs) else [STATE]
    found += [] if table(folder, memory) == table(other, memory) else ["summary.csv"]
    mine, theirs = by_block(folder), by_block(other)  # a full disk may have cost a line
    found += [] if all(mine[epoch] == theirs[epoch] for epoch in mine.keys() & theirs.keys()) else ["metrics.jsonl"]
    return [*found, *leftovers(folder), *faults_of_the_record(folder)]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def state(checkpoint: Path) -> dict[str, Any]:
    """Optimizers, random generators and counts. The epochs' rows hold times, and are in the table."""
    content = read_checkpoint(checkpoint).state
    assert any(isinstance(value, Tensor) for _, value in leaves(content["stepper"]["optimizers"]))
    return {name: content[name] for name in ("stepper", "random", "images", "epochs")}


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{place}/{key}")
    else:
        yield place, tree


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""

    def bits(tree: Any) -> list[Any]:
        return [(at, x.dtype, x.numpy().tobytes()) if isinstance(x, Tensor) else (at, x) for at, x in leaves(tree)]

    return bits(a) == bits(b)


def table(folder: Path, memory: bool = True) -> list[dict[str, str]]:
    """summary.csv without what differs from run to run, and, if asked, without memory."""
    with (folder / "summary.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    left_out = ("seconds", "peak_rss_bytes") if memory else ("seconds", "peak_rss_bytes", "peak_bytes")
    return [{name: row[name] for name in row if name not in left_out} for row in rows]


def by_block(folder: Path) -> dict[int, Any]:
    """What metrics.jsonl has of each block at the end of each epoch."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {entry["epoch"]: (entry["losses"], entry["ema_distance"]) for entry in entries if "eval_top1" in entry}


def leftovers(folder: Path) -> list[str]:
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [f"{name} is left over" for name in names if not KNOWN.fullmatch(name)]


def faults_of_the_record(folder: Path) -> list[str]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries]
    epochs = [entry["epoch"] for entry in entries if "eval_top1" in entry]
    found = [] if steps == sorted(steps) else ["metrics.jsonl goes back"]
    return found + ([] if len(epochs) == len(set(epochs)) else ["metrics.jsonl has an epoch twice"])
