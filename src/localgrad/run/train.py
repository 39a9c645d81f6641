"""The loop: a recipe and a folder in, a trained backbone and its record out, in as many starts as it takes."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.errors import RunError, UserError
from localgrad.core.model import LocalModel
from localgrad.core.task import Classification
from localgrad.run import checkpoint as checkpoints
from localgrad.run import data as data_room
from localgrad.run.build import Machine, build_model, check_single, machine_for
from localgrad.run.files import locked
from localgrad.run.folder import SUMMARY, environment, read_environment
from localgrad.run.image_folder import listed
from localgrad.run.modes import check_batch_share, mode_for
from localgrad.run.recipe import Recipe, Saving, shown
from localgrad.run.runlog import NoLog, RunLog, StepRecord
from localgrad.run.signals import Stopped, StopRequest
from localgrad.run.step import Batch, Stepper
from localgrad.scale.memory import peak_rss
from localgrad.scale.replicas import Ranks


def train(
    recipe: Recipe,
    folder: Path,
    *,
    saving: Saving | None = None,
    tensorboard: bool = False,
    ranks: Ranks | None = None,
    pipeline: bool = False,
) -> dict[str, float]:
    """Trains after `recipe` into `folder` and returns the last epoch's row of its summary.

    A run of the same recipe that was stopped there goes on, to the very bits that it would have reached without the
    stop. Nothing is written before data and model are there. ranks: the processes that share each batch, or with
    `pipeline` the blocks; all of them call this, and the first one writes. Raises UserError and RunError; Stopped when
    a signal ended it, after a save.
    """
    ranks = ranks or Ranks()
    run = Run(recipe, folder, saving or Saving(), ranks, pipeline=pipeline)
    with StopRequest() as stop, locked(folder) if ranks.first else contextlib.nullcontext():
        said = run.resume()
        used = read_environment(folder) if run.stepper.step and ranks.first else run.environment
        start = (run.stepper.step, len(run.rows))
        log_of = RunLog if ranks.first else NoLog
        how = {"classes": run.data.names, "start": start, "tensorboard": tensorboard}
        with log_of(folder, recipe, run.stepper.total, used, run.sizes, **how) as log:
            log.note(headline(recipe, run.data, run.model, run.machine))
            log.note(f"recipe: {shown(recipe)}")
            log.note(repr(run.model))
            for sentence in run.mode.notes(recipe):
                log.note(sentence)
            for sentence in said:
                log.note(sentence)
                log.record({"step": run.stepper.step, "note": sentence})
            try:
                while len(run.rows) < recipe.epochs:
                    run.epoch(log, stop)
            except Stopped as stopped:
                raise Stopped(stopped.number, run.farewell(log)) from None
            except RuntimeError as error:
                if "DataLoader worker" in str(error):
                    text = "a process that decodes images was killed: with fewer --workers less memory is needed"
                    raise RunError(text) from error
                raise
            finally:
                run.tell_bad_images(log)
            run.mode.finish()
            if ranks.first:
                checkpoints.save_weights(folder / checkpoints.MODEL, run.model.backbone.state_dict(), run.data.names)
    return run.rows[-1]


class Run:
    """What a run is made of, and where it is: `stepper.step`, the `rows` of its whole epochs, and sums over the epoch
    that it is in."""

    def __init__(
        self, recipe: Recipe, folder: Path, saving: Saving, ranks: Ranks | None = None, *, pipeline: bool = False
    ) -> None:
        self.recipe, self.saving, self.checkpoints = recipe, saving, folder / "checkpoints"
        self.ranks = ranks = ranks or Ranks()
        self.machine = machine_for(recipe)
        self.data = data_room.load(
            recipe.data,
            data_dir=recipe.data_dir,
            download=recipe.download,
            limit_train=recipe.limit_train,
            seed=recipe.seed,
            image_size=recipe.image_size,
        )
        batch = min(recipe.batch_size, len(self.data.train))
        check_batch_share(batch, ranks, pipeline=pipeline)
        self.said: list[str] = []  # Notes of how the run begins, which a run that goes on does not repeat.
        self.model = build_model(recipe, self.data, self.machine, self.said.append)
        if batch == (1 if pipeline or recipe.sync_batch_norm else ranks.count):
            check_single(self.model, "the training set is" if batch == 1 else "a rank's share of a batch is")
        self.mode = mode_for(recipe, self.model, self.machine, ranks, saving, pipeline=pipeline, batch=batch)
        if ranks.rank:  # Each rank draws numbers of its own while it trains, such as those of dropout.
            torch.manual_seed(recipe.seed + ranks.rank)
        self.per_epoch = data_room.steps_per_epoch(self.data, recipe.batch_size) // recipe.accumulate
        if self.per_epoch == 0:
            raise UserError(f"{recipe.accumulate} batches of {recipe.batch_size} are more than the training set holds")
        self.stepper = Stepper(recipe, self.mode, self.machine, self.per_epoch * recipe.epochs)
        layout = str(self.machine.memory_format).removeprefix("torch.")
        used = {"device": str(self.machine.device), "precision": self.machine.precision, "memory_format": layout}
        self.environment = {**environment(), **used, "replicas": str(self.mode.replicas)}
        modules = {"parameters": self.model.backbone, "added": self.model.auxiliaries}
        self.sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        self.rows: list[dict[str, float]] = []
        self._begin_epoch()
        self.bad_images: dict[str, str] = {}
        self._told = 0  # of them
        self._began, self._spent = time.monotonic(), 0.0  # and seconds of earlier starts
        self._saved: Path | None = None
        self._tried = (0, self._began)  # the step and time of the last attempt to save

    def resume(self) -> list[str]:
        """Goes to where the newest sound checkpoint is, if there is one. What a person should know of it."""
        said: list[str] = []
        found = None
        if self.ranks.first:
            if self.saving.resume == "never":
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            found = checkpoints.newest_checkpoint(self.checkpoints, said.append)
        found = self.ranks.broadcast_object(found)
        if found is None:
            return [*self.said, *said, *(["no checkpoint is sound: beginning anew"] if said else [])]
        state = found.state
        names = state.get("classes", [])
        names = [str(name) for name in names] if isinstance(names, list) else [str(names)]
        unknown = data_room.check_classes(self.data, names, found.path)
        try:
            self.model.backbone.load_state_dict(found.model)
            self.model.auxiliaries.load_state_dict(found.auxiliaries)
            self.stepper.load_state_dict(state["stepper"])
            self.rows, self.losses, self.taken = state["rows"], state["losses"], state["taken"]
            self.bad_images, self._spent, images, epochs = (
                state[n] for n in ("bad_images", "spent", "images", "epochs")
            )
            if self.ranks.rank < max(1, len(state["random"])):
                checkpoints.set_random_state(state["random"][self.ranks.rank])
            self._check_position()
            self.mode.resume_at(self.stepper.step)
        except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise RunError(f"{found.path} does not fit this run: remove it, or choose another --out") from error
        if images != len(self.data.train):
            raise UserError(
                f"the training set has {len(self.data.train)} images, but {found.path} was made with {images}: restore "
                "the set, or choose another --out"
            )
        self._saved, self._tried = found.path, (self.stepper.step, self._began)
        said.append(f"going on from {found.path}, at step {self.stepper.step} of {self.stepper.total}")
        said += [unknown] if unknown else []
        if epochs != self.recipe.epochs:
            said.append(f"{self.recipe.epochs} epochs instead of {epochs}: from here lr follows the longer schedule")
        now, then = self.environment, found.environment
        changed = [f"{name} {now.get(name)}, was {then.get(name)}" for name in now if now.get(name) != then.get(name)]
        if changed:
            said.append(f"not all is as it was, so the result may differ in its last bits: {'; '.join(changed)}")
        return said

    def _begin_epoch(self) -> None:
        """Each block's loss is summed over the steps of an epoch that are not skipped."""
        self.losses, self.taken = [0.0] * len(self.model.blocks), 0

    def epoch(self, log: RunLog, stop: StopRequest) -> None:
        """What is left of an epoch, its evaluation, and a save."""
        recipe, stepper, epoch = self.recipe, self.stepper, len(self.rows)
        first, end = stepper.step - epoch * self.per_epoch, (epoch + 1) * self.per_epoch
        on_bad = self._on_bad if recipe.on_bad_image == "skip" else None
        self.model.train()
        with self._batches(epoch, first * recipe.accumulate, on_bad) as stream:
            records: list[StepRecord] = []
            while stepper.step < end:
                records.append(stepper(stream))
                if stepper.peak.timeline and stepper.step == stepper.measured + 1:
                    log.timeline(stepper.peak)
                if not self.mode.is_sync_due(stepper.step) and stepper.step < end:
                    continue
                since_save = stepper.step - self._tried[0]
                records, peak = self.mode.merge(records, stepper.peak.total, stepper.step, since_save)
                stepper.peak = replace(stepper.peak, total=peak)
                for record in records:
                    if not record.skipped:
                        self.losses = [total + loss for total, loss in zip(self.losses, record.losses, strict=True)]
                        self.taken += 1
                record = replace(records[-1], images=sum(record.images for record in records))
                log.step(stepper.step, epoch, record, stepper.peak.total)
                records = []
                self.tell_bad_images(log)
                seconds = time.monotonic() - self._tried[1]
                if self._agree(stop, self.saving.due(since_save, seconds)) and stepper.step < end:
                    self.save(log)
        self.mode.gather_model()
        between = stop.check if self.ranks.count == 1 else lambda: None
        scores = evaluate(self.model, self.data, recipe, self.machine, on_bad=on_bad, between=between, ranks=self.ranks)
        self.bad_images = {
            path: why for found in self.ranks.all_gather_object(self.bad_images) for path, why in found.items()
        }
        self.tell_bad_images(log)
        losses = [total / max(1, self.taken) for total in self.losses]
        row = {
            "epoch": epoch + 1,
            "train_loss": losses[-1],
            **scores,
            "lr": stepper.lr,
            "peak_bytes": stepper.peak.total,
            "peak_rss_bytes": peak_rss(),
            "seconds": self._seconds(),
            "skipped_steps": stepper.skipped,
            "bad_images": len(self.bad_images),
        }
        self.rows.append(row)
        self._begin_epoch()
        log.epoch(self.rows, stepper.step, {"losses": losses, "ema_distance": self.model.ema_distances()})
        self.save(log)

    @contextlib.contextmanager
    def _batches(self, epoch: int, start: int, on_bad: data_room.OnBad | None) -> Iterator[Iterator[Batch]]:
        """An epoch's batches from number `start` on, as far as this rank reads them."""
        recipe = self.recipe
        which = {"batch_size": recipe.batch_size, "seed": recipe.seed, "epoch": epoch, "start": start}
        # Where an image that cannot be read is replaced, its label is too: then all ranks read.
        if not self.mode.reads_images and on_bad is None:
            yield ((None, y.to(self.machine.device)) for y in data_room.train_labels(self.data, **which))
            return
        batches = data_room.train_batches(
            self.data, **which, shard=self.mode.shard, workers=recipe.workers, on_bad=on_bad
        )
        with contextlib.closing(batches):
            yield (to_device(batch, self.data.info, self.machine) for batch in batches)

    def save(self, log: RunLog) -> bool:
        """Writes a checkpoint, unless this step has one. A disk that does not take it costs that checkpoint only.

        Every rank calls this at the same step, and the first one writes."""
        step = self.stepper.step
        self._tried = (step, time.monotonic())
        self.mode.gather_model()
        state = self._state()
        if not self.ranks.first:
            return True
        if self._saved is not None and self._saved.name == f"step-{step}":
            return True
        try:
            self._saved = checkpoints.save_checkpoint(
                self.checkpoints, step, model=self.model.backbone.state_dict(),
                auxiliaries=self.model.auxiliaries.state_dict(), state=state,
                environment=self.environment,
            )  # fmt: skip
        except RunError as error:
            log.note(f"{error}; the last checkpoint is {self._saved or 'none'}")
            return False
        best = max(range(len(self.rows)), key=lambda epoch: self.rows[epoch]["eval_top1"], default=None)
        checkpoints.prune(
            self.checkpoints, self.saving.keep_last, None if best is None else (best + 1) * self.per_epoch
        )
        return True

    def farewell(self, log: RunLog) -> str:
        """Saves, and says how it went."""
        saved = self.save(log)
        where = f"stopped at step {self.stepper.step} of {self.stepper.total}"
        if saved:
            return f"{where}, saved as {self._saved}: the same command goes on from there"
        return f"{where}, which could not be saved: the last checkpoint is {self._saved or 'none'}"

    def _check_position(self) -> None:
        """Raises ValueError or TypeError for a state that no run has been in."""
        step, epochs = self.stepper.step, len(self.rows)
        if not epochs * self.per_epoch <= step <= min((epochs + 1) * self.per_epoch, self.stepper.total):
            raise ValueError("as many epochs as this are not done at this step")
        for row in self.rows:
            if set(row) != set(SUMMARY) or not all(isinstance(value, int | float) for value in row.values()):
                raise ValueError("a row is not one of a summary")
        if not all(isinstance(text, str) for pair in self.bad_images.items() for text in pair):
            raise TypeError("bad images are paths with reasons")
        if len(self.losses) != len(self.model.blocks):
            raise ValueError("there is not a loss for each block")
        self.losses = [float(loss) for loss in self.losses]
        self.taken, self._spent = int(self.taken), float(self._spent)

    def _agree(self, stop: StopRequest, due: bool) -> bool:
        """Whether a rank is due to save. Raises Stopped on every rank if one of them was asked to end."""
        number, some = self.ranks.all_reduce_max([stop.number or 0, due], self.machine.device)
        if number:
            raise Stopped(int(number))
        return bool(some)

    def _state(self) -> dict[str, Any]:
        """All that a run depends on beside the model, as tensors and plain values; every rank calls it. The position in
        the data is the step: order and augmentation are functions of seed, epoch and index."""
        return {
            "stepper": self.stepper.state_dict(), "random": self.ranks.all_gather_object(checkpoints.random_state()),
            "rows": self.rows,
            "losses": self.losses, "taken": self.taken, "bad_images": self.bad_images, "spent": self._seconds(),
            "images": len(self.data.train), "epochs": self.recipe.epochs, "classes": list(self.data.names),
        }  # fmt: skip

    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._began

    def _on_bad(self, path: str, reason: str) -> None:
        self.bad_images.setdefault(path, reason)

    def tell_bad_images(self, log: RunLog) -> None:
        if len(self.bad_images) > self._told:
            self._told = len(self.bad_images)
            log.bad_images(self.bad_images)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: data_room.Data,
    recipe: Recipe,
    machine: Machine,
    *,
    on_bad: data_room.OnBad | None = None,
    between: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Loss and accuracies, in percent, of a backbone or local model on the test images.

    on_bad: is told of an image that cannot be read, which is left out; without it, RunError names it. between: is
    called after each batch. ranks: those that share the test images; each has the scores of all, and no image counts
    twice.
    """
    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    task = Classification(data.info.classes)
    sums: dict[str, float] = dict.fromkeys(("loss", "top1", "top5"), 0.0)
    count = 0
    size, shard = max(recipe.batch_size, 256), (ranks.rank, ranks.count)
    batches = data_room.eval_batches(data, batch_size=size, shard=shard, workers=recipe.workers, on_bad=on_bad)
    with contextlib.closing(batches):
        for batch in batches:
            x, y = to_device(batch, data.info, machine)
            with machine.cast():
                logits = model(x)
            for name, value in task.metrics(logits, y).items():
                sums[name] += float(value)
            count += len(y)
            between()
    model.train(was_training)
    loss, top1, top5, images = ranks.all_reduce_sum([*sums.values(), count], machine.device)
    if not images:
        raise RunError("no image of the test set can be read")
    return {"eval_loss": loss / images, "eval_top1": 100 * top1 / images, "eval_top5": 100 * top5 / images}


def headline(recipe: Recipe, data: data_room.Data, model: LocalModel, machine: Machine) -> str:
    """The first lines of a run: what trains on what, where, and in which precision and why; and the classes."""
    info, device = data.info, str(machine.device)
    if machine.device.type == "cpu":
        threads = torch.get_num_threads()
        device += f" with {threads} thread{'s' if threads > 1 else ''}"
    images = f"{len(data.train):,} train and {len(data.test):,} test images of {info.channels}x{info.size}x{info.size}"
    return (
        f"{recipe.model} on {recipe.data} ({images}): {recipe.label}, {len(model.blocks)} blocks, seed {recipe.seed}; "
        f"{device}, {machine.precision} ({machine.why})\n{info.classes} classes: {listed(data.names)}"
    )


def to_device(batch: tuple[Tensor, Tensor], info: data_room.DataInfo, machine: Machine) -> tuple[Tensor, Tensor]:
    images, targets = (t.to(machine.device, non_blocking=True) for t in batch)
    x = data_room.normalize(images, info)
    return x.contiguous(memory_format=machine.memory_format), targets
