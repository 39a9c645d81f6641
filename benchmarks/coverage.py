"""Cuts every network of timm, and torchvision's classification models, into four blocks with MAN; no weights in memory.

    python benchmarks/coverage.py

Writes results/coverage_timm-VERSION.csv a row at a time, and goes on where it stopped.
"""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
import tyro
from torch import nn

import localgrad as lg
from localgrad.core.errors import UserError

COLUMNS = ("name", "source", "units", "ok", "reason", "seconds")


@dataclass(frozen=True)
class Settings:
    """Cut networks, all or those whose name begins so."""

    begins: str = ""
    out: Path = Path(f"results/coverage_timm-{timm.__version__}.csv")


def networks() -> Iterator[tuple[str, str]]:
    yield from ((name, "torchvision") for name in torchvision.models.list_models(module=torchvision.models))
    yield from ((name, "timm") for name in timm.list_models())


def built(name: str, source: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network, and the shape of its images."""
    try:
        with torch.device("meta"):
            network = lg.build(f"{source}:{name}", classes=1000)
    except UserError:
        raise
    except Exception:  # some constructors compute with values
        network = lg.build(f"{source}:{name}", classes=1000).to("meta")
    if source == "torchvision":
        return network, (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    return network, getattr(network, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)


def cut(name: str, source: str) -> tuple[int, str]:
    """How many units, and why not, if not."""
    network, shape = built(name, source)
    example = torch.zeros(2, *shape, device="meta")
    count = len(lg.units(network, example))
    lg.localize(network, blocks=4, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=example)
    return count, ""


def main(settings: Settings) -> None:
    warnings.simplefilter("ignore")  # those of the networks' own constructors
    done: set[tuple[str, str]] = set()
    if settings.out.is_file():
        with settings.out.open(newline="") as file:
            done = {(row["name"], row["source"]) for row in csv.DictReader(file)}
    with settings.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            writer.writerow(COLUMNS)
        for name, source in networks():
            if (name, source) in done or not name.startswith(settings.begins):
                continue
            began = time.perf_counter()
            try:
                count, reason = cut(name, source)
            except UserError as error:
                count, reason = 0, str(error)
            except Exception as error:  # a fault of ours: it counts as refused, and says what it was
                count, reason = 0, f"{type(error).__name__}: {error}".splitlines()[0]
            writer.writerow([name, source, count, not reason, reason, f"{time.perf_counter() - began:.1f}"])
            file.flush()
    with settings.out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for source in ("torchvision", "timm"):
        mine = [row for row in rows if row["source"] == source]
        good = sum(row["ok"] == "True" for row in mine)
        print(f"{source}: {good} of {len(mine)} cut ({100 * good / max(1, len(mine)):.1f}%)")


if __name__ == "__main__":
    main(tyro.cli(Settings))
