"""The log of a run: the files in its folder, and a progress bar on a terminal or a line of text now and then."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from localgrad.core.errors import UserError
from localgrad.core.sizes import mib
from localgrad.run.data import DataInfo
from localgrad.run.files import MODEL, PART, write_text
from localgrad.run.folder import BAD_IMAGES, CONFIG, METRICS, TABLE, TIMELINE, scores_of
from localgrad.run.recipe import Recipe, as_dict

INTERVAL = 10.0  # Seconds between two records of a step, and between two lines without a terminal.


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        losses: The loss of each block, the mean over the step's batches.
        parts: The objectives of each block by name, in the last batch.
        score: The task's first score on the step's training images, in percent, such as the top-1 accuracy. Over
            several ranks it is the mean.
        images: The number of these images.
        skipped: Why the step was skipped; "" if it was not.
    """

    losses: list[float]
    parts: list[dict[str, Tensor]]
    score: float
    images: int
    skipped: str = ""


class RunLog:
    """Writes one run's folder. It is a context manager, and writes nothing before it is entered.

    If the disk takes no more later, lines of the record are lost, but the run goes on.

    Args:
        recipe: The recipe, for config.yaml.
        total: The number of steps of the whole run.
        environment, sizes, classes: The other sections of config.yaml.
        info: What is known about the images, for its section `input`.
        score: The name of the score of a step.
        start: The step and the number of finished epochs from which the run goes on; (0, 0) for a new run.
        tensorboard: Whether to write TensorBoard events too.
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
        info: DataInfo | None = None,
        score: str = "top1",
        start: tuple[int, int] = (0, 0),
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.recipe, self.total = folder, recipe, total
        self.start, self._epochs = start
        self.environment, self.sizes, self.classes = environment, sizes, list(classes)
        self.info, self.score = info, score
        self.console = _Console()
        self._writer = _tensorboard() if tensorboard else None
        self.tensorboard: Any = None
        self.progress: Progress | None = None
        self._recorded_at, self._images, self._began = 0.0, 0, 0.0  # The images are those since the last record.
        self._failing: set[str] = set()

    def __enter__(self) -> RunLog:
        self._open_files()
        if self.console.is_terminal:
            columns = [BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()]
            columns += [TextColumn("{task.fields[shown]}")]
            self.progress = Progress(*columns, console=self.console)
            self.bar = self.progress.add_task("", total=self.total, completed=self.start, shown="")
            self.progress.start()
        self._began = self._recorded_at = time.monotonic()
        return self

    def _open_files(self) -> None:
        """Removes what a killed process has left and what the run will write again, and opens the record."""
        try:
            for rest in self.folder.glob(f"*{PART}"):
                rest.unlink()
            # The weights go first, because a folder that has them counts as finished.
            for old in (MODEL, BAD_IMAGES, *(() if self.start else (METRICS, TABLE, TIMELINE))):
                (self.folder / old).unlink(missing_ok=True)
            if not self.start:
                shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            config: dict[str, Any] = {"recipe": as_dict(self.recipe), "model": self.sizes}
            config |= {"environment": self.environment, "classes": self.classes}
            config |= {"input": self.info.input} if self.info else {}
            write_text(self.folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
            write_text(self.folder / METRICS, _until(self.start, self._epochs, self.folder / METRICS))
            self.metrics = (self.folder / METRICS).open("a")
            purge = self.start + 1 if self.start else None
            self.tensorboard = self._writer and self._writer(str(self.folder / "tensorboard"), purge_step=purge)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --out") from error

    def __exit__(self, *exc_info: object) -> None:
        if self.progress is not None:
            self.progress.stop()
        with self._tolerating(METRICS):
            self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def note(self, text: str) -> None:
        """Shows a text. Letters that the terminal's encoding does not have are shown by their numbers."""
        encoding = self.console.encoding
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        with contextlib.suppress(OSError):  # The reader has gone, or the output goes to a full disk.
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, epoch: int, done: StepRecord, peak: int) -> None:
        """Records a step once in an interval, and shows it then. On a terminal, each step is shown."""
        if done.skipped:
            self.note(f"{done.skipped}: left out")
            self.record({"step": step, "epoch": epoch + 1, "skipped": done.skipped})
            return
        self._images += done.images
        now = time.monotonic()
        due = now - self._recorded_at >= INTERVAL or step == self.total
        if not due and self.progress is None:
            return
        speed = self._images / max(now - self._recorded_at, 1e-9)
        text = f"losses {_short(done.losses)}  {self.score} {done.score:.1f}%  {speed:.0f} images/s  peak {mib(peak)}"
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, shown=text)
        else:
            left = (now - self._began) / (step - self.start) * (self.total - step)
            self.note(f"epoch {epoch + 1} step {step}/{self.total}  {text}  {left:.0f} s left")
        if due:
            parts = [{name: float(value) for name, value in part.items()} for part in done.parts]
            entry = {"step": step, "epoch": epoch + 1, "losses": done.losses, "parts": parts}
            self.record({**entry, f"train_{self.score}": done.score, "images_per_second": speed})
            self._recorded_at, self._images = now, 0
            if self.tensorboard is not None:
                for k, loss in enumerate(done.losses):
                    self.tensorboard.add_scalar(f"loss/block {k}", loss, step)

    def epoch(self, rows: list[dict[str, float]], step: int, by_block: dict[str, list[float | None]]) -> None:
        """Writes the rows of all epochs to summary.csv, and records the last one with some values of each block."""
        text, row = io.StringIO(), rows[-1]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(row)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in map(r.get, row)] for r in rows)
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

    def timelines(self, ranks: Sequence[Sequence[tuple[str, int]]]) -> None:
        """Writes the memory of the measured step on each rank: the live bytes after each change, and the block that
        ran. Where nothing was measured, nothing is written."""
        events = [(rank, i, *event) for rank, own in enumerate(ranks) for i, event in enumerate(own)]
        lines = [f"{rank},{i},{label},{live}\n" for rank, i, label, live in events]
        if lines:
            with self._tolerating(TIMELINE):
                write_text(self.folder / TIMELINE, "".join(["rank,event,during,live_bytes\n", *lines]))

    def bad_images(self, found: dict[str, str]) -> None:
        """Writes the images that cannot be read, each on a line with the reason."""
        with self._tolerating(BAD_IMAGES):
            write_text(self.folder / BAD_IMAGES, "".join(f"{path}\t{why}\n" for path, why in found.items()))

    def record(self, entry: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl. It has a `step`, so that a continued run can drop the steps that it repeats."""
        with self._tolerating(METRICS):
            self.metrics.write(json.dumps(entry) + "\n")
            self.metrics.flush()

    @contextlib.contextmanager
    def _tolerating(self, name: str) -> Iterator[None]:
        """Turns an error of the disk into a note, which is shown once for each file."""
        try:
            yield
        except OSError as error:
            if name not in self._failing:
                self.note(f"cannot write {self.folder / name}: {error.strerror}; the run goes on")
            self._failing.add(name)


class NoLog(contextlib.AbstractContextManager):
    """The log of a rank that is not the first one. It does nothing."""

    def __exit__(self, *exc_info: object) -> None: ...

    def note(self, *args: Any) -> None: ...

    step = epoch = timelines = bad_images = record = note


def scores(row: dict[str, float]) -> str:
    """The scores of an evaluation as words: test loss 0.1234, top1 95.00%, top5 99.00%."""
    named = [f"{name.replace('_', ' ')} {value:.2f}%" for name, value in scores_of(row).items()]
    return ", ".join([f"test loss {row['eval_loss']:.4f}", *named])


class _Console(Console):
    """Falls silent when its reader goes away. The console of rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _until(step: int, epochs: int, metrics: Path) -> str:
    """The lines of metrics.jsonl up to a step, with the rows of that many epochs. A torn last line is left out."""
    lines = []
    for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            if entry["step"] <= step and ("eval_loss" not in entry or entry["epoch"] <= epochs):
                lines.append(line + "\n")
    return "".join(lines)


def _short(losses: list[float]) -> str:
    """The blocks' losses in order. If there are many, those in the middle are left out."""
    texts = [f"{loss:.3f}" for loss in losses]
    return " ".join(texts if len(texts) <= 8 else [*texts[:4], "..", *texts[-3:]])


def _tensorboard() -> Any:
    """The class that writes TensorBoard events."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard is not installed: pip install 'localgrad[tensorboard]'") from None
    return SummaryWriter
