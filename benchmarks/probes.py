"""What the units of the study's networks have learned: `localgrad probe` of each, those of backpropagation too, against
backpropagation of the next seed, and of the last against the first: weights that begin alike may stay so, and how
alike two networks of one method are is what the others have to be measured by.

    python benchmarks/probes.py

Looks at the runs of the study's main part that lie in runs/study and are finished, and adds a row for each of their
units to results/probes_fashion_small.csv. What has rows there is not probed again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from localgrad.cli import main as localgrad
from localgrad.run.checkpoint import MODEL
from localgrad.run.probe import agreement
from localgrad.run.runlog import read_environment
from localgrad.run.tables import read_csv, write_csv

NAMED = re.compile(r"(.+)_k(\d+)_s(\d+)")  # runs whose recipe is that of the main part


@dataclass(frozen=True)
class Settings:
    """Probe what the table lacks. Ctrl-C stops it; the same command goes on."""

    results: Path = Path("results")
    runs: Path = Path("runs/study")


def rows_of(run: Path, method: str, blocks: str, seed: str, bp: Path) -> list[dict[str, Any]]:
    """What `localgrad probe` has found: each unit's separability, and its CKA with the same unit of BP."""
    if code := localgrad(["probe", str(run), "--against", str(bp)]):
        raise SystemExit(code)
    cka = agreement(read_csv(run / "probe" / "cka.csv"))
    same = {"method": method, "blocks": blocks, "seed": seed}
    used = {name: value for name, value in read_environment(run).items() if name in ("commit", "torch", "machine")}
    return [
        {**same, "unit": row["unit"], "top1": row["top1"], "cka": cka[row["unit"]], "with": bp.name, **used}
        for row in read_csv(run / "probe" / "separability.csv", ("top1",))
    ]


def main(settings: Settings) -> None:
    place = settings.results / "probes_fashion_small.csv"
    finished = sorted(run for run in settings.runs.iterdir() if NAMED.fullmatch(run.name) and (run / MODEL).exists())
    bps = sorted((int(run.name.removeprefix("bp_k1_s")), run) for run in finished if run.name.startswith("bp_"))
    for run in finished:
        method, blocks, seed = NAMED.fullmatch(run.name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        later = [bp for s, bp in bps if s > int(seed)]
        others = later + [bp for s, bp in bps if s < int(seed)]
        there: list[dict[str, Any]] = [*read_csv(place)] if place.exists() else []
        if others and not any((row["method"], row["blocks"], row["seed"]) == (method, blocks, seed) for row in there):
            write_csv(place, [*there, *rows_of(run, method, blocks, seed, others[0])])


if __name__ == "__main__":
    main(tyro.cli(Settings))
