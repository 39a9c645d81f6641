"""The training loop: from a recipe and a folder to a trained backbone and its record, in one or more starts."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from localgrad.core.errors import RunError, UserError
from localgrad.core.model import LocalModel
from localgrad.run import checkpoint as checkpoints
from localgrad.run import data as datasets
from localgrad.run.build import Machine, build_model, check_single, machine_for
from localgrad.run.evaluation import evaluate, to_device
from localgrad.run.files import locked
from localgrad.run.folder import environment, is_row, read_environment, score_of
from localgrad.run.image_folder import listed
from localgrad.run.mixing import Mixing
from localgrad.run.modes import Alone, check_batch_share, mode_for
from localgrad.run.recipe import Recipe, Saving, shown
from localgrad.run.runlog import NoLog, RunLog, StepRecord
from localgrad.run.signals import Stopped, StopRequest
from localgrad.run.step import Batch, Stepper, peak_rss
from localgrad.scale.groups import Ranks


def train(
    recipe: Recipe,
    folder: Path,
    *,
    saving: Saving | None = None,
    tensorboard: bool = False,
    ranks: Ranks | None = None,
    share: str = "batches",
    stages: int = 1,
) -> dict[str, float]:
    """Trains by a recipe into a run folder.

    If a run of the same recipe was stopped in that folder, it goes on, and ends with the same bits as without the stop.
    Nothing is written before the data are read and the model is built.

    Args:
        recipe: What to train, on what, and how.
        folder: The run folder.
        saving: When to save besides after each epoch. By default every ten minutes.
        tensorboard: Whether to write TensorBoard events too.
        ranks: The processes that share the run. All of them call this function, and the first one writes.
        share: What the ranks that train the same blocks share: "batches", or "weights" (and batches).
        stages: The number of stages of a pipeline. Each of them has an equal number of ranks.

    Returns:
        The last epoch's row of summary.csv.

    Raises:
        UserError, RunError: The run cannot begin, or has failed.
        Stopped: A signal ended the run, after it was saved.
    """
    ranks = ranks or Ranks()
    run = Run(recipe, folder, saving or Saving(), ranks, share=share, stages=stages)
    with StopRequest() as stop, locked(folder) if ranks.first else contextlib.nullcontext():
        notes = run.resume()
        with run.open_log(folder, tensorboard=tensorboard) as log:
            run.announce(log, notes)
            run.train_epochs(log, stop)
            run.mode.finish()
            weights = run.mode.state_of(run.model.backbone)
            if ranks.first:
                about = datasets.described(run.data.info, run.data.names)
                checkpoints.save_weights(folder / checkpoints.MODEL, weights, about)
    return run.rows[-1]


class Run:
    """The parts of a run, and how far it is.

    Attributes:
        mode: How the ranks share the work. It has the model.
        stepper: Takes the optimizer steps and counts them.
        rows: The rows of summary.csv, one for each finished epoch.
        losses: The sum of each block's loss over the counted steps of the current epoch.
        counted: How many steps of the current epoch these sums have. Skipped steps do not count.
        bad_images: The reason why an image cannot be read, by its path.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, saving: Saving, ranks: Ranks | None = None, **sharing: Any
    ) -> None:
        self.recipe, self.saving, self.ranks = recipe, saving, ranks or Ranks()
        self.checkpoints = folder / "checkpoints"
        self.machine = machine_for(recipe)
        names = ("data_dir", "download", "limit_train", "seed", "image_size")
        self.data = datasets.load(recipe.data, **{name: getattr(recipe, name) for name in names})
        self.build_notes: list[str] = []  # A run that is continued does not repeat them.
        self.mode = self._build_mode(**sharing)
        self.model = self.mode.model
        if self.ranks.rank:  # Each rank draws its own random numbers while it trains, for dropout and the like.
            torch.manual_seed(recipe.seed + self.ranks.rank)
        self.steps_per_epoch = datasets.steps_per_epoch(self.data, recipe.batch_size) // recipe.accumulate
        if self.steps_per_epoch == 0:
            raise UserError(f"{recipe.accumulate} batches of {recipe.batch_size} are more than the training set holds")
        self.stepper = Stepper(recipe, self.mode, self.machine, self.steps_per_epoch * recipe.epochs)
        layout = str(self.machine.memory_format).removeprefix("torch.")
        used = {"device": str(self.machine.device), "precision": self.machine.precision, "memory_format": layout}
        self.environment = {**environment(), **used, "replicas": str(self.mode.replicas)}
        self.rows: list[dict[str, float]] = []
        self._reset_losses()
        self.bad_images: dict[str, str] = {}
        self._reported_bad_images, self._gathered_timelines = 0, False
        self._on_bad_image = self._note_bad_image if recipe.on_bad_image == "skip" else None
        self._start_time, self._earlier_seconds = time.monotonic(), 0.0
        self._last_checkpoint: Path | None = None
        self._last_save = (0, self._start_time)  # The step and the time of the last attempt to save.

    def _build_mode(self, share: str = "batches", stages: int = 1) -> Alone:
        """Builds the model, and the mode in which the ranks train it. The arguments are those of `train`."""
        recipe, count = self.recipe, self.ranks.count // stages
        batch = min(recipe.batch_size, len(self.data.train))
        check_batch_share(batch, count)

        def make() -> LocalModel:
            self.build_notes.clear()  # A rank of a pipeline may make the model twice.
            model = build_model(recipe, self.data, self.machine, self.build_notes.append)
            if batch == (1 if recipe.sync_batch_norm else count):
                what = "the training set is" if batch == 1 else "a rank's share of a batch is"
                check_single(model, self.data.info.targets(1), what)
            return model

        how = {"share": share, "stages": stages, "targets": self.data.info.targets(batch // count)}
        return mode_for(recipe, make, self.machine, self.ranks, self.saving, **how)

    def resume(self) -> list[str]:
        """Continues from the newest sound checkpoint, if there is one, and returns sentences about it for the user.
        Raises UserError if the training set has changed, and RunError if the checkpoint does not fit this run."""
        notes: list[str] = []
        found = self._newest_checkpoint(notes.append)
        if found is None:
            return [*self.build_notes, *notes, *(["no checkpoint is sound: beginning anew"] if notes else [])]
        names = found.state.get("classes", [])
        names = [str(name) for name in names] if isinstance(names, list) else [str(names)]
        not_recorded = datasets.check_classes(self.data, names, found.path)
        try:
            images, epochs = found.state["images"], found.state["epochs"]
            self._load(found)
        except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise RunError(f"{found.path} does not fit this run: remove it, or choose another --out") from error
        if images != len(self.data.train):
            raise UserError(
                f"the training set has {len(self.data.train)} images, but {found.path} was made with {images}: restore "
                "the set, or choose another --out"
            )
        notes.append(f"going on from {found.path}, at step {self.stepper.step} of {self.stepper.total}")
        notes += [not_recorded] if not_recorded else []
        return notes + self._changes_since(epochs, found.environment)

    def _newest_checkpoint(self, note: Callable[[str], None]) -> checkpoints.Checkpoint | None:
        """The checkpoint that the first rank finds, on every rank. With `--resume never` all are removed first."""
        found = None
        if self.ranks.first:
            if self.saving.resume == "never":
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            found = checkpoints.newest_checkpoint(self.checkpoints, note)
        return self.ranks.broadcast_object(found)

    def _load(self, found: checkpoints.Checkpoint) -> None:
        """Puts the run into the state of a checkpoint. For a wrong state it may raise almost any error."""
        state = found.state
        self.mode.load(self.model.backbone, found.model)
        self.mode.load(self.model.auxiliaries, found.auxiliaries)
        self.stepper.load_state_dict(state["stepper"])
        self.rows, self.losses, self.counted = state["rows"], state["losses"], state["taken"]
        self.bad_images, self._earlier_seconds = state["bad_images"], state["spent"]
        if self.ranks.rank < max(1, len(state["random"])):
            checkpoints.set_random_state(state["random"][self.ranks.rank])
        self._check_state()
        self.mode.resume_at(self.stepper.step)
        self._last_checkpoint, self._last_save = found.path, (self.stepper.step, self._start_time)

    def _check_state(self) -> None:
        """Raises ValueError or TypeError for a state that no run has been in."""
        step, epochs = self.stepper.step, len(self.rows)
        most = min((epochs + 1) * self.steps_per_epoch, self.stepper.total)
        if not epochs * self.steps_per_epoch <= step <= most:
            raise ValueError("as many epochs as this are not done at this step")
        for row in self.rows:
            if not (is_row(row) and all(isinstance(value, int | float) for value in row.values())):
                raise ValueError("a row is not one of a summary")
        if not all(isinstance(text, str) for pair in self.bad_images.items() for text in pair):
            raise TypeError("bad images are paths with reasons")
        if len(self.losses) != len(self.model.blocks):
            raise ValueError("there is not a loss for each block")
        self.losses = [float(loss) for loss in self.losses]
        self.counted, self._earlier_seconds = int(self.counted), float(self._earlier_seconds)

    def _changes_since(self, epochs: int, then: dict[str, str]) -> list[str]:
        """Sentences about what has changed since a checkpoint: the number of epochs, and the environment."""
        notes, now = [], self.environment
        if epochs != self.recipe.epochs:
            notes.append(f"{self.recipe.epochs} epochs instead of {epochs}: from here lr follows the longer schedule")
        changed = [f"{name} {now.get(name)}, was {then.get(name)}" for name in now if now.get(name) != then.get(name)]
        if changed:
            notes.append(f"not all is as it was, so the result may differ in its last bits: {'; '.join(changed)}")
        return notes

    def open_log(self, folder: Path, *, tensorboard: bool) -> RunLog | NoLog:
        """The log of this run, which goes on where the run does. Only the first rank writes one."""
        if not self.ranks.first:
            return NoLog()
        modules = {"parameters": self.model.backbone, "added": self.model.auxiliaries}
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        used = read_environment(folder) if self.stepper.step else self.environment
        start = (self.stepper.step, len(self.rows))
        how = {"info": self.data.info, "classes": self.data.names, "start": start, "tensorboard": tensorboard}
        how |= {"score": self.stepper.task.score}
        return RunLog(folder, self.recipe, self.stepper.total, used, sizes, **how)

    def announce(self, log: RunLog | NoLog, notes: Sequence[str]) -> None:
        """Shows what is about to be trained, and the notes of `resume`."""
        first = headline(self.recipe, self.data, self.model, self.machine)
        for text in (first, f"recipe: {shown(self.recipe)}", repr(self.model), *self.mode.notes(self.recipe), *notes):
            log.note(text)
        for sentence in notes:
            log.record({"step": self.stepper.step, "note": sentence})

    def train_epochs(self, log: RunLog | NoLog, stop: StopRequest) -> None:
        """Trains until all epochs are done. When a signal stops the run, it is saved and Stopped is raised."""
        try:
            while len(self.rows) < self.recipe.epochs:
                self._train_epoch(log, stop)
                self._end_epoch(log, stop)
        except Stopped as stopped:
            raise Stopped(stopped.number, self._save_and_tell(log)) from None
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                text = "a process that decodes images was killed: with fewer --workers less memory is needed"
                raise RunError(text) from error
            raise
        finally:
            self._report_bad_images(log)

    def _train_epoch(self, log: RunLog | NoLog, stop: StopRequest) -> None:
        """Takes the steps that are left of the current epoch."""
        stepper, epoch = self.stepper, len(self.rows)
        done, end = stepper.step - epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        with self._batches(epoch, done * self.recipe.accumulate) as batches:
            records: list[StepRecord] = []
            while stepper.step < end:
                records.append(stepper(batches))
                if self.mode.is_sync_due(stepper.step) or stepper.step == end:
                    if self._synchronise(records, log, stop) and stepper.step < end:
                        self.save(log)
                    records = []

    @contextlib.contextmanager
    def _batches(self, epoch: int, start: int) -> Iterator[Iterator[Batch]]:
        """The batches of an epoch from number `start` on. A rank that does not read images gets None instead."""
        recipe, on_bad = self.recipe, self._on_bad_image
        which = {"batch_size": recipe.batch_size, "seed": recipe.seed, "epoch": epoch, "start": start}
        # When an image is replaced, its label changes too. Then every rank has to read the images.
        if not self.mode.reads_images and on_bad is None:
            labels = datasets.train_labels(self.data, **which, shard=self.mode.shard)
            yield self._mixed(((None, y.to(self.machine.device)) for y in labels), epoch, start)
            return
        how = {"shard": self.mode.shard, "workers": recipe.workers, "on_bad": on_bad}
        batches = datasets.train_batches(self.data, **which, **how)
        with contextlib.closing(batches):
            on_device = (to_device(batch, self.data.info, self.machine) for batch in batches)
            yield self._mixed(on_device, epoch, start)

    def _mixed(self, batches: Iterator[Batch], epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, mixed if the recipe says so."""
        recipe, info = self.recipe, self.data.info
        if not recipe.mixes:
            return batches
        mix = Mixing(recipe.mixup, recipe.cutmix, info.classes, info.size, recipe.seed)
        return (mix(x, y, epoch, number) for number, (x, y) in enumerate(batches, start))

    def _synchronise(self, records: list[StepRecord], log: RunLog | NoLog, stop: StopRequest) -> bool:
        """Merges and logs the ranks' records since the last call, and returns whether a save is due. Raises Stopped on
        all ranks if one of them was asked to end."""
        stepper, (saved_step, saved_time) = self.stepper, self._last_save
        since_save = stepper.step - saved_step
        records, peak = self.mode.merge(records, stepper.peak.total, stepper.step, since_save)
        stepper.peak = replace(stepper.peak, total=peak)
        if stepper.step > stepper.measured and not self._gathered_timelines:
            self._gathered_timelines = True
            log.timelines(self.ranks.gather_object(stepper.peak.timeline))
        for record in records:
            if not record.skipped:
                self.losses = [total + loss for total, loss in zip(self.losses, record.losses, strict=True)]
                self.counted += 1
        last = replace(records[-1], images=sum(record.images for record in records))
        log.step(stepper.step, len(self.rows), last, stepper.peak.total)
        self._report_bad_images(log)
        due = self.saving.due(since_save, time.monotonic() - saved_time)
        # All ranks have to stop and to save at the same step.
        signal, any_due = self.ranks.all_reduce_max([stop.number or 0, due], self.machine.device)
        if signal:
            raise Stopped(int(signal))
        return bool(any_due)

    def _end_epoch(self, log: RunLog | NoLog, stop: StopRequest) -> None:
        """Evaluates, adds a row to the summary, and saves."""
        self.mode.share_statistics()
        between = stop.check if self.ranks.count == 1 else lambda: None
        how = {"on_bad": self._on_bad_image, "between": between, "ranks": self.ranks}
        with self.mode.evaluating() as (network, shard):
            scores = evaluate(self.model, self.data, self.recipe, self.machine, network=network, shard=shard, **how)
        by_rank = self.ranks.all_gather_object(self.bad_images)
        self.bad_images = {path: reason for found in by_rank for path, reason in found.items()}
        self._report_bad_images(log)
        losses = [total / max(1, self.counted) for total in self.losses]
        self.rows.append({
            "epoch": len(self.rows) + 1, "train_loss": losses[-1], **scores, "lr": self.stepper.lr,
            "peak_bytes": self.stepper.peak.total, "peak_rss_bytes": peak_rss(), "seconds": self._seconds(),
            "skipped_steps": self.stepper.skipped, "bad_images": len(self.bad_images),
        })  # fmt: skip
        self._reset_losses()
        log.epoch(self.rows, self.stepper.step, {"losses": losses, "ema_distance": self.mode.ema_distances()})
        self.save(log)

    def save(self, log: RunLog | NoLog) -> bool:
        """Writes a checkpoint, unless this step has one. Every rank calls this at the same step; the first one writes.

        Returns:
            False if the disk does not take the checkpoint. The run can go on without it.
        """
        step = self.stepper.step
        self._last_save = (step, time.monotonic())
        self.mode.share_statistics()
        state = self._state()
        weights = {"model": self.model.backbone, "auxiliaries": self.model.auxiliaries}
        weights = {name: self.mode.state_of(module) for name, module in weights.items()}
        if not self.ranks.first or (self._last_checkpoint and self._last_checkpoint.name == f"step-{step}"):
            return True
        try:
            self._last_checkpoint = checkpoints.save_checkpoint(
                self.checkpoints, step, **weights, state=state, environment=self.environment
            )
        except RunError as error:
            log.note(f"{error}; the last checkpoint is {self._last_checkpoint or 'none'}")
            return False
        best = max(range(len(self.rows)), key=lambda epoch: score_of(self.rows[epoch])[1], default=None)
        best_step = None if best is None else (best + 1) * self.steps_per_epoch
        checkpoints.prune(self.checkpoints, self.saving.keep_last, best_step)
        return True

    def _save_and_tell(self, log: RunLog | NoLog) -> str:
        """Saves, and returns a sentence about the run that stops here."""
        saved = self.save(log)
        where = f"stopped at step {self.stepper.step} of {self.stepper.total}"
        if saved:
            return f"{where}, saved as {self._last_checkpoint}: the same command goes on from there"
        return f"{where}, which could not be saved: the last checkpoint is {self._last_checkpoint or 'none'}"

    def _state(self) -> dict[str, Any]:
        """What the rest of the run depends on, apart from the model. Every rank calls it. The position in the data is
        not kept, because order and augmentation follow from seed, epoch and step."""
        return {
            "stepper": self.stepper.state_dict(), "random": self.ranks.all_gather_object(checkpoints.random_state()),
            "rows": self.rows, "losses": self.losses, "taken": self.counted, "bad_images": self.bad_images,
            "spent": self._seconds(),
            "images": len(self.data.train), "epochs": self.recipe.epochs, "classes": list(self.data.names),
        }  # fmt: skip

    def _reset_losses(self) -> None:
        self.losses, self.counted = [0.0] * len(self.model.blocks), 0

    def _seconds(self) -> float:
        """The seconds that the run has taken, those before it was stopped included."""
        return self._earlier_seconds + time.monotonic() - self._start_time

    def _note_bad_image(self, path: str, reason: str) -> None:
        self.bad_images.setdefault(path, reason)

    def _report_bad_images(self, log: RunLog | NoLog) -> None:
        if len(self.bad_images) > self._reported_bad_images:
            self._reported_bad_images = len(self.bad_images)
            log.bad_images(self.bad_images)


def headline(recipe: Recipe, data: datasets.Data, model: LocalModel, machine: Machine) -> str:
    """The first lines of a run: the network, the data, the method, the device, the precision and why, the classes."""
    info, device = data.info, str(machine.device)
    if machine.device.type == "cpu":
        threads = torch.get_num_threads()
        device += f" with {threads} thread{'s' if threads > 1 else ''}"
    images = f"{len(data.train):,} train and {len(data.test):,} test images of {info.channels}x{info.size}x{info.size}"
    return (
        f"{recipe.model} on {recipe.data} ({images}): {recipe.label}, {len(model.blocks)} blocks, seed {recipe.seed}; "
        f"{device}, {machine.precision} ({machine.why})\n{info.classes} classes: {listed(data.names)}"
    )
