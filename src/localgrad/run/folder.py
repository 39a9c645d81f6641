"""A run's folder: the names of its files, what earlier runs have recorded there, and whether a new run may use it."""

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

# The columns of summary.csv. Behind the loss stand the scores of the task in percent, of which the first one decides.
SUMMARY = (
    "epoch", "train_loss", "eval_loss", "lr", "peak_bytes", "peak_rss_bytes", "seconds", "skipped_steps", "bad_images",
)  # fmt: skip
EVAL = "eval_"
CONFIG, METRICS, TABLE, TIMELINE = "config.yaml", "metrics.jsonl", "summary.csv", "memory_timeline.csv"
BAD_IMAGES = "bad_images.txt"


def environment() -> dict[str, str]:
    """What the bits and the timings of a run depend on, apart from the recipe."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "localgrad": localgrad.__version__, "torch": str(torch.__version__), "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {processor()}", "threads": str(torch.get_num_threads()),
        "gpu": gpu, "commit": commit(),
    }  # fmt: skip


def read_environment(folder: Path) -> dict[str, str]:
    """The machine and the versions that a run has recorded."""
    return _section(folder, "environment")


def read_sizes(folder: Path) -> dict[str, int]:
    """The numbers of parameters that a run has recorded: `parameters` of the backbone, `added` of the auxiliaries."""
    return _section(folder, "model")


def read_classes(folder: Path) -> list[str]:
    """The names of the classes that a run was trained on, in the order of its logits. Older runs have recorded none.
    Raises UserError if the file was edited and has other things than names."""
    names = _config(folder).get("classes") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"the classes in {folder / CONFIG} are no list of names: put those in quotes")
    return names


def read_input(folder: Path) -> dict[str, Any]:
    """What a run has recorded about its images: `channels`, `size`, `mean` and `std`. Older runs have nothing."""
    return _section(folder, "input")


def _section(folder: Path, name: str) -> dict[str, Any]:
    """A section of config.yaml. It is empty if an older version has not written it."""
    found = _config(folder).get(name)
    return found if isinstance(found, dict) else {}


def _config(folder: Path) -> dict[str, Any]:
    content = yaml.safe_load((folder / CONFIG).read_text())
    return content if isinstance(content, dict) else {}


def commit() -> str:
    """The commit that this package runs from, with -dirty if its files have changed since; "" if it is installed."""
    source = Path(localgrad.__file__).parent
    if not (source.parents[1] / ".git").exists():
        return ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(source), "--no-optional-locks", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except OSError:
        return ""


def processor() -> str:
    """The processor's name, if the system knows it."""
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name")
    return str(name or platform.processor() or "unknown processor")


def summary_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's summary.csv, one for each epoch. Raises RunError if it is missing or damaged."""
    path = folder / TABLE
    try:
        with path.open(newline="") as file:
            rows = [{name: float(value or "") for name, value in row.items()} for row in csv.DictReader(file)]
        if not all(map(is_row, rows)):
            raise ValueError("a column is missing")
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: remove {folder} and train again ({type(error).__name__})") from error
    if not rows:
        raise RunError(f"{path} is damaged: it has no epoch; remove {folder} and train again")
    return rows


def is_row(row: dict[str, float]) -> bool:
    """Whether a row has the columns of a summary, and at least one score."""
    return row.keys() >= set(SUMMARY) and len(scores_of(row)) > 0


def scores_of(row: dict[str, float]) -> dict[str, float]:
    """The scores of an evaluation in percent, by name, such as {"top1": 90.0, "top5": 99.5}. The first one decides."""
    return {
        name.removeprefix(EVAL): value for name, value in row.items() if name.startswith(EVAL) and name != "eval_loss"
    }


def score_of(row: dict[str, float]) -> tuple[str, float]:
    """The name and the value of the score that decides, such as ("top1", 90.0) or ("miou", 40.0)."""
    return next(iter(scores_of(row).items()))


def finished_runs(paths: Sequence[Path]) -> list[Path]:
    """The finished runs among these folders and the folders in them. Raises UserError for a path without any."""
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
    """The recipe of a finished run. Raises UserError if `run` is not the folder of one."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is no run folder: it has no {CONFIG}")
    if not (run / MODEL).is_file():
        raise UserError(f"{run} holds a run that is not finished: train it to its end first")
    return read_recipe(run / CONFIG)


def evaluated(run: Path, device: str) -> Recipe:
    """The recipe of a finished run, to evaluate its network on a device. fp16 needs a CUDA device, but weights can be
    evaluated in any precision. Raises UserError if `run` is not the folder of a finished run."""
    recipe = replace(open_run(run), device=device)
    return replace(recipe, precision="auto") if recipe.precision == "fp16" else recipe


def claim(folder: Path, recipe: Recipe, *, may_grow: bool = False) -> bool:
    """Returns True if a run of the recipe is finished in the folder, and False if it can begin or go on there.

    Args:
        may_grow: Whether a run of fewer epochs may go on for more.

    Raises:
        UserError: The folder has another run or other files, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out")
    config = folder / CONFIG
    if config.exists():
        earlier = read_recipe(config)
        epochs = max(earlier.epochs, recipe.epochs) if may_grow else earlier.epochs
        found = differences(replace(earlier, epochs=epochs), recipe)
        if found:
            raise UserError(f"{folder} holds a different run ({'; '.join(found[:3])}): choose another --out")
        return earlier.epochs == recipe.epochs and (folder / MODEL).exists()
    # A run that was killed while it wrote its first file leaves these two at most.
    if folder.is_dir() and any(p.name not in (LOCK, CONFIG + PART) for p in folder.iterdir()):
        raise UserError(f"{folder} holds files of something else: choose another --out")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"cannot write to {folder}: {existing} is not a folder that you may write to; choose another --out"
        )
    return False
