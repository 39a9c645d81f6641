"""A run's folder: what it is called in there, what earlier runs have recorded, and whether a new run may use it."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

import localgrad
from localgrad.core.errors import RunError, UserError
from localgrad.run.files import LOCK, MODEL, PART
from localgrad.run.recipe import Recipe, differences, read_recipe

SUMMARY = (
    "epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr", "peak_bytes", "peak_rss_bytes", "seconds",
    "skipped_steps", "bad_images",
)  # fmt: skip
CONFIG, METRICS, TABLE, TIMELINE = "config.yaml", "metrics.jsonl", "summary.csv", "memory_timeline.csv"
BAD_IMAGES = "bad_images.txt"


def environment() -> dict[str, str]:
    """What bits and timings depend on beside the recipe."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "localgrad": localgrad.__version__, "torch": str(torch.__version__), "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {processor()}", "threads": str(torch.get_num_threads()),
        "gpu": device, "commit": commit(),
    }  # fmt: skip


def read_environment(folder: Path) -> dict[str, str]:
    """What a run recorded of its machine and versions."""
    return _section(folder, "environment")


def read_sizes(folder: Path) -> dict[str, int]:
    """What a run recorded of its model: the backbone's `parameters`, and those of the auxiliaries, `added`."""
    return _section(folder, "model")


def read_classes(folder: Path) -> list[str]:
    """The names of the classes that a run was trained on, in the order of its logits; none in one of an older version.
    Raises UserError where somebody's hand has left other things than names."""
    content = yaml.safe_load((folder / CONFIG).read_text())
    names = content.get("classes") or [] if isinstance(content, dict) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"the classes in {folder / CONFIG} are no list of names: put those in quotes")
    return names


def _section(folder: Path, name: str) -> dict[str, Any]:
    """Of config.yaml; empty where an older version, or somebody's hand, has left none."""
    content = yaml.safe_load((folder / CONFIG).read_text())
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def commit() -> str:
    """The commit that this package is run from, with -dirty if it was changed since; "" if it was installed."""
    source = Path(localgrad.__file__).parent
    if not (source.parents[1] / ".git").exists():  # src/localgrad in its repository; a folder or, in a worktree, a file
        return ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(source), "--no-optional-locks", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except OSError:
        return ""


def processor() -> str:
    """The processor's name, as far as the system tells."""
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name")
    return str(name or platform.processor() or "unknown processor")


def summary_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's summary.csv, one an epoch. Raises RunError if it is not there or damaged."""
    path = folder / TABLE
    try:
        with path.open(newline="") as file:
            rows = [{name: float(row[name] or "") for name in SUMMARY} for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: remove {folder} and train again ({type(error).__name__})") from error
    if not rows:
        raise RunError(f"{path} is damaged: it has no epoch; remove {folder} and train again")
    return rows


def finished_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of finished runs among these and their folders, each once. Raises UserError for a place without."""
    if not paths:
        raise UserError("there is no run to look at: name run folders, or a folder of localgrad compare")
    folders: dict[Path, Path] = {}
    for path in paths:
        found = [p for p in (path, *sorted(path.glob("*/"))) if (p / CONFIG).is_file() and (p / MODEL).is_file()]
        if not found:
            raise UserError(f"{path} holds no finished run: name run folders, or a folder of localgrad compare")
        folders |= {run.resolve(): run for run in found}
    return list(folders.values())


def open_run(run: Path) -> Recipe:
    """The recipe of a finished run. Raises UserError if `run` is none."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is no run folder: it has no {CONFIG}")
    if not (run / MODEL).is_file():
        raise UserError(f"{run} holds a run that is not finished: train it to its end first")
    return read_recipe(run / CONFIG)


def claim(folder: Path, recipe: Recipe, *, may_grow: bool = False) -> bool:
    """Checks that `folder` is free for `recipe`: True if the very same run lies finished in it, False if it can begin
    or go on there. may_grow: a run of fewer epochs can go on too. Raises UserError for another run, other files, or a
    place that cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out")
    config = folder / CONFIG
    if config.exists():
        there = read_recipe(config)
        epochs = max(there.epochs, recipe.epochs) if may_grow else there.epochs
        found = differences(replace(there, epochs=epochs), recipe)
        if found:
            raise UserError(f"{folder} holds a different run ({'; '.join(found[:3])}): choose another --out")
        return there.epochs == recipe.epochs and (folder / MODEL).exists()
    # A run that was killed at its very first file has left no more than these.
    if folder.is_dir() and any(p.name not in (LOCK, CONFIG + PART) for p in folder.iterdir()):
        raise UserError(f"{folder} holds files of something else: choose another --out")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"cannot write to {folder}: {existing} is not a folder that you may write to; choose another --out"
        )
    return False
