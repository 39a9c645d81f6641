"""The run folder and what a person sees while it fills: live on a terminal, one line an interval elsewhere."""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import localgrad
from localgrad.core.errors import RunError, UserError
from localgrad.run.recipe import Recipe, as_dict, differences, read_recipe
from localgrad.scale.memory import PeakBytes

INTERVAL = 10.0  # seconds between two lines without a terminal
SUMMARY = (
    "epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr", "peak_bytes", "peak_rss_bytes", "seconds",
)  # fmt: skip


def environment() -> dict[str, str]:
    """What bits and timings depend on beside the recipe."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "localgrad": localgrad.__version__, "torch": str(torch.__version__), "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {processor()}", "threads": str(torch.get_num_threads()),
        "gpu": device,
    }  # fmt: skip


def read_environment(folder: Path) -> dict[str, str]:
    """What a run recorded of its machine and versions."""
    return yaml.safe_load((folder / "config.yaml").read_text()).get("environment", {})


def processor() -> str:
    """The processor's name, as far as the system tells."""
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name")
    return str(name or platform.processor() or "unknown processor")


def summary_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's summary.csv, one an epoch. Raises RunError if it is not there or damaged."""
    path = folder / "summary.csv"
    try:
        with path.open(newline="") as file:
            rows = [{name: float(row[name] or "") for name in SUMMARY} for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: remove {folder} and train again ({type(error).__name__})") from error
    if not rows:
        raise RunError(f"{path} is damaged: it has no epoch; remove {folder} and train again")
    return rows


def claim(folder: Path, recipe: Recipe) -> bool:
    """Checks that `folder` is free for `recipe`: True if the very same run lies finished in it. Raises UserError for
    another run, other files, or a place that cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out")
    config = folder / "config.yaml"
    if config.exists():
        found = differences(read_recipe(config), recipe)
        if found:
            raise UserError(f"{folder} holds a different run ({'; '.join(found[:3])}): choose another --out")
        return (folder / "model.safetensors").exists()
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files of something else: choose another --out")
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"cannot write to {folder}: {place} is not a folder that you may write to; choose another --out"
        )
    return False


@dataclass(frozen=True)
class Done:
    """One optimizer step: the blocks' losses, mean over its batches; their parts in the last batch; the share of
    training images that were right, in percent; how many images."""

    losses: list[float]
    parts: list[dict[str, Tensor]]
    top1: float
    images: int


class RunLog:
    """Writes one run's folder. A context: nothing exists before it is entered."""

    def __init__(
        self, folder: Path, recipe: Recipe, total: int, used: dict[str, str], *, tensorboard: bool = False
    ) -> None:
        self.folder, self.recipe, self.total, self.used = folder, recipe, total, used
        self.console = Console()
        self._writer = _tensorboard() if tensorboard else None
        self.tensorboard: Any = None
        self.progress: Progress | None = None
        self._since, self._images, self._began = 0.0, 0, 0.0

    def __enter__(self) -> RunLog:
        try:
            for old in ("metrics.jsonl", "summary.csv", "memory_timeline.csv"):
                (self.folder / old).unlink(missing_ok=True)  # what an unfinished start of the same run has left
            for old in ("checkpoints", "tensorboard"):
                shutil.rmtree(self.folder / old, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            config = {"recipe": as_dict(self.recipe), "environment": {**environment(), **self.used}}
            (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            self.metrics = (self.folder / "metrics.jsonl").open("w")
            self.tensorboard = self._writer and self._writer(str(self.folder / "tensorboard"))
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --out") from error
        if self.console.is_terminal:
            columns = [BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()]
            columns += [TextColumn("{task.fields[shown]}")]
            self.progress = Progress(*columns, console=self.console)
            self.bar = self.progress.add_task("", total=self.total, shown="")
            self.progress.start()
        self._began = self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, epoch: int, done: Done, peak: int) -> None:
        """Shows a step: on a terminal each, elsewhere one an interval, which is also when it is recorded."""
        self._images += done.images
        now = time.monotonic()
        due = now - self._since >= INTERVAL or step == self.total
        if not due and self.progress is None:
            return
        speed = self._images / max(now - self._since, 1e-9)
        text = f"losses {_short(done.losses)}  top1 {done.top1:.1f}%  {speed:.0f} images/s  peak {mib(peak)}"
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, shown=text)
        else:
            left = (now - self._began) / step * (self.total - step)
            self.note(f"epoch {epoch + 1} step {step}/{self.total}  {text}  {left:.0f} s left")
        if due:
            parts = [{name: float(value) for name, value in part.items()} for part in done.parts]
            entry = {"step": step, "epoch": epoch + 1, "losses": done.losses, "parts": parts}
            self._record({**entry, "train_top1": done.top1, "images_per_second": speed})
            self._since, self._images = now, 0
            if self.tensorboard is not None:
                for k, loss in enumerate(done.losses):
                    self.tensorboard.add_scalar(f"loss/block {k}", loss, step)

    def epoch(self, row: dict[str, float]) -> None:
        """Adds a row to summary.csv."""
        path = self.folder / "summary.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, SUMMARY)
            if fresh:
                writer.writeheader()
            texts: dict[str, str] = {n: f"{v:.6g}" if isinstance(v, float) else str(v) for n, v in row.items()}
            writer.writerow(texts)  # pyright: ignore[reportArgumentType]
        self._record(row)
        if self.tensorboard is not None:
            for name, value in row.items():
                self.tensorboard.add_scalar(f"epoch/{name}", value, int(row["epoch"]))
        spent = f"peak {mib(row['peak_bytes'])}, {row['seconds']:.0f} s"
        self.note(
            f"epoch {row['epoch']}/{self.recipe.epochs}: train loss {row['train_loss']:.4f}, {scores(row)}, {spent}"
        )

    def timeline(self, peak: PeakBytes) -> None:
        """Writes the measured step: bytes live each time that they changed, and during which block."""
        with (self.folder / "memory_timeline.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("event", "during", "live_bytes"))
            writer.writerows((i, label or "block 0", live) for i, (label, live) in enumerate(peak.timeline))

    def _record(self, entry: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(entry) + "\n")
        self.metrics.flush()


def scores(row: dict[str, float]) -> str:
    return f"test loss {row['eval_loss']:.4f}, top1 {row['eval_top1']:.2f}%, top5 {row['eval_top5']:.2f}%"


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _short(losses: list[float]) -> str:
    """The blocks' losses, first to last; of many, the ends."""
    texts = [f"{loss:.3f}" for loss in losses]
    return " ".join(texts if len(texts) <= 8 else [*texts[:4], "..", *texts[-3:]])


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard is not installed: pip install 'localgrad[tensorboard]'") from None
    return SummaryWriter
