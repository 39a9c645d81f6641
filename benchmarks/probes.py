"""Runs `localgrad probe` on each network of the study, and compares it with BP.

    python benchmarks/probes.py

Each network is compared with BP of the next seed, and those of the last seed with BP of the first. Seeds differ because
weights that begin alike may stay alike. BP's own networks are compared too, because the similarity of two networks of
one method is the measure for all others.

Probes the finished runs of the study's main part in runs/study. Writes results/probes_fashion_small.csv, a row for each
unit of each run. Runs that it has already are not probed again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import Table

from localgrad.cli import main as localgrad
from localgrad.run.checkpoint import MODEL
from localgrad.run.folder import read_environment
from localgrad.run.probe import agreement
from localgrad.run.tables import read_csv

# The names of the main part's runs, whose recipes have no setting of their own: method, blocks, seed.
NAMED = re.compile(r"(.+)_k(\d+)_s(\d+)")


@dataclass(frozen=True)
class Settings:
    """Probe the runs that the table lacks. Ctrl-C stops the script, and the same command continues it."""

    results: Path = Path("results")
    runs: Path = Path("runs/study")


def rows_of(run: Path, method: str, blocks: str, seed: str, bp: Path) -> list[dict[str, Any]]:
    """Probes a run. A row for each unit: its separability, and its CKA with the same unit of the run `bp`."""
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
    table = Table(settings.results / "probes_fashion_small.csv", key=("method", "blocks", "seed"))
    finished = sorted(run for run in settings.runs.iterdir() if NAMED.fullmatch(run.name) and (run / MODEL).exists())
    bps = sorted((int(run.name.removeprefix("bp_k1_s")), run) for run in finished if run.name.startswith("bp_"))
    for run in finished:
        method, blocks, seed = NAMED.fullmatch(run.name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        others = [bp for s, bp in bps if s > int(seed)] + [bp for s, bp in bps if s < int(seed)]
        if others and (method, blocks, seed) not in table:
            table.add(*rows_of(run, method, blocks, seed, others[0]))


if __name__ == "__main__":
    main(tyro.cli(Settings))
