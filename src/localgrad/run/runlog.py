"""The run folder and what a person sees while it fills: live on a terminal, one line an interval elsewhere."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from localgrad.run.checkpoint import MODEL
from localgrad.run.files import LOCK, PART, write_text
from localgrad.run.recipe import Recipe, as_dict, differences, read_recipe
from localgrad.scale.memory import PeakBytes

INTERVAL = 10.0  # seconds between two lines without a terminal
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


def finished_runs(places: Sequence[Path]) -> list[Path]:
    """The folders of finished runs among these and their folders, each once. Raises UserError for a place without."""
    if not places:
        raise UserError("there is no run to look at: name run folders, or a folder of localgrad compare")
    folders: dict[Path, Path] = {}
    for place in places:
        found = [p for p in (place, *sorted(place.glob("*/"))) if (p / CONFIG).is_file() and (p / MODEL).is_file()]
        if not found:
            raise UserError(f"{place} holds no finished run: name run folders, or a folder of localgrad compare")
        folders |= {path.resolve(): path for path in found}
    return list(folders.values())


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
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"cannot write to {folder}: {place} is not a folder that you may write to; choose another --out"
        )
    return False


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: the blocks' losses, mean over its batches; their parts in the last batch; the share of
    training images that were right, in percent; how many images; and if it was left out, why."""

    losses: list[float]
    parts: list[dict[str, Tensor]]
    top1: float
    images: int
    skipped: str = ""


class RunLog:
    """Writes one run's folder. A context: nothing exists before it is entered.

    start: the step and the whole epochs that the run goes on from; (0, 0) begins anew. environment, sizes, classes:
    what config.yaml shall say of machine and versions, of the model, and of the data. Once the run is under way, a disk
    that takes no more costs lines of the record, not the run.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        total: int,
        environment: dict[str, str],
        sizes: dict[str, int],
        *,
        classes: Sequence[str] = (),
        start: tuple[int, int] = (0, 0),
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.recipe, self.total = folder, recipe, total
        self.start, self._epochs = start
        self.environment, self.sizes, self.classes = environment, sizes, list(classes)
        self.console = _Console()
        self._writer = _tensorboard() if tensorboard else None
        self.tensorboard: Any = None
        self.progress: Progress | None = None
        self._since, self._images, self._began = 0.0, 0, 0.0
        self._failing: set[str] = set()

    def __enter__(self) -> RunLog:
        try:
            for rest in self.folder.glob(f"*{PART}"):
                rest.unlink()
            # The weights first: a folder that has them counts as finished.
            for old in (MODEL, BAD_IMAGES, *(() if self.start else (METRICS, TABLE, TIMELINE))):
                (self.folder / old).unlink(missing_ok=True)
            if not self.start:
                shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            config = {"recipe": as_dict(self.recipe), "model": self.sizes, "environment": self.environment}
            config["classes"] = self.classes
            write_text(self.folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
            write_text(self.folder / METRICS, _until(self.start, self._epochs, self.folder / METRICS))
            self.metrics = (self.folder / METRICS).open("a")
            purge = self.start + 1 if self.start else None
            self.tensorboard = self._writer and self._writer(str(self.folder / "tensorboard"), purge_step=purge)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --out") from error
        if self.console.is_terminal:
            columns = [BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()]
            columns += [TextColumn("{task.fields[shown]}")]
            self.progress = Progress(*columns, console=self.console)
            self.bar = self.progress.add_task("", total=self.total, completed=self.start, shown="")
            self.progress.start()
        self._began = self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        with self._tolerating(METRICS):
            self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def note(self, text: str) -> None:
        encoding = self.console.encoding  # which may not have the letters of a class's name
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        with contextlib.suppress(OSError):  # nobody reads it any more, or the disk that it goes to is full
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, epoch: int, done: StepRecord, peak: int) -> None:
        """Shows a step: on a terminal each, elsewhere one an interval, which is also when it is recorded."""
        if done.skipped:
            self.note(f"{done.skipped}: left out")
            self.record({"step": step, "epoch": epoch + 1, "skipped": done.skipped})
            return
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
            left = (now - self._began) / (step - self.start) * (self.total - step)
            self.note(f"epoch {epoch + 1} step {step}/{self.total}  {text}  {left:.0f} s left")
        if due:
            parts = [{name: float(value) for name, value in part.items()} for part in done.parts]
            entry = {"step": step, "epoch": epoch + 1, "losses": done.losses, "parts": parts}
            self.record({**entry, "train_top1": done.top1, "images_per_second": speed})
            self._since, self._images = now, 0
            if self.tensorboard is not None:
                for k, loss in enumerate(done.losses):
                    self.tensorboard.add_scalar(f"loss/block {k}", loss, step)

    def epoch(self, rows: list[dict[str, float]], step: int, by_block: dict[str, list[float | None]]) -> None:
        """Writes summary.csv, whose last row is new. by_block: what is recorded of each block beside it."""
        text, row = io.StringIO(), rows[-1]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(SUMMARY)
        writer.writerows([_cell(r[name]) for name in SUMMARY] for r in rows)
        with self._tolerating(TABLE):
            write_text(self.folder / TABLE, text.getvalue())
        self.record({"step": step, **row, **by_block})
        if self.tensorboard is not None:
            named = {f"epoch/{name}": value for name, value in row.items()}
            for what, values in by_block.items():
                named |= {f"epoch {what}/block {k}": value for k, value in enumerate(values) if value is not None}
            for name, value in named.items():
                self.tensorboard.add_scalar(name, value, step)
        spent = f"peak {mib(row['peak_bytes'])}, {row['seconds']:.0f} s"
        self.note(
            f"epoch {row['epoch']}/{self.recipe.epochs}: train loss {row['train_loss']:.4f}, {scores(row)}, {spent}"
        )

    def timeline(self, peak: PeakBytes) -> None:
        """Writes the measured step: bytes live each time that they changed, and during which block."""
        lines = [f"{i},{label or 'block 0'},{live}\n" for i, (label, live) in enumerate(peak.timeline)]
        with self._tolerating(TIMELINE):
            write_text(self.folder / TIMELINE, "".join(["event,during,live_bytes\n", *lines]))

    def bad_images(self, found: dict[str, str]) -> None:
        """Writes which images cannot be used, one a line with the reason."""
        with self._tolerating(BAD_IMAGES):
            write_text(self.folder / BAD_IMAGES, "".join(f"{path}\t{why}\n" for path, why in found.items()))

    def record(self, entry: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl. Each has its `step`, by which a run that goes on drops those it will repeat."""
        with self._tolerating(METRICS):
            self.metrics.write(json.dumps(entry) + "\n")
            self.metrics.flush()

    @contextlib.contextmanager
    def _tolerating(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if name not in self._failing:
                self.note(f"cannot write {self.folder / name}: {error.strerror}; the run goes on")
            self._failing.add(name)


class NoLog(contextlib.AbstractContextManager):
    """The log of a rank that is not the first: nothing."""

    def __init__(self, *args: Any, **settings: Any) -> None: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def note(self, *args: Any) -> None: ...

    step = epoch = timeline = bad_images = record = note


def scores(row: dict[str, float]) -> str:
    return f"test loss {row['eval_loss']:.4f}, top1 {row['eval_top1']:.2f}%, top5 {row['eval_top5']:.2f}%"


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


class _Console(Console):
    """Falls silent when its reader goes away, where rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _until(step: int, epochs: int, metrics: Path) -> str:
    """The lines of metrics.jsonl up to `step`, and the rows of so many epochs; one that a kill has torn is none."""
    lines = []
    for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            if entry["step"] <= step and ("eval_top1" not in entry or entry["epoch"] <= epochs):
                lines.append(line + "\n")
    return "".join(lines)


def _cell(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
