"""Runs a function in several processes of one gloo group, and returns the result of each. And what to train in them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import localgrad as lg

LIMIT = timedelta(seconds=120)  # A rank that fails must not leave the others waiting in a collective for ever.
# The server of forks imports these once, so that the processes need not.
multiprocessing.set_forkserver_preload(["localgrad.run.modes", "timm", "torchvision", "hypothesis", "pytest"])
# Each method and each coupling, as functions without arguments.
CASES: dict[str, tuple[Any, Any]] = {
    "bp": (lg.bp, None),
    "dgl": (lambda: lg.dgl("1c2f"), None),
    "predsim": (lg.predsim, None),
    "infopro": (lg.infopro, None),
    "infopro contrast": (lambda: lg.infopro(contrast=True), None),
    "auglocal": (lambda: lg.auglocal(depth=3), None),
    "man": (lg.dgl, lg.MAN),
    "man pull": (lg.dgl, lambda: lg.MAN(form="pull")),
    "man++": (lg.dgl, lg.MANPlusPlus),
    "deep-man": (lg.predsim, lg.DeepMAN),
}


def on_ranks(function: Callable[..., Any], place: Path, *args: Any, count: int = 2) -> list[Any]:
    """Calls `function(*args)`, a function of a module's top level, on each of `count` ranks."""
    mp.start_processes(_rank, (count, str(place), function, args), nprocs=count, start_method="forkserver")  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(place / f"rank{r}.pt", weights_only=True) for r in range(count)]


def _rank(rank: int, count: int, place: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/group", rank=rank, world_size=count, timeout=LIMIT)
    try:
        torch.save(function(*args), f"{place}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()
