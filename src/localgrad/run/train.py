"""The loop: a recipe and a folder in, a trained backbone and its record out."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from localgrad.core.engine import LocalModel, StepResult, local_backward, param_groups
from localgrad.core.errors import RunError, UserError
from localgrad.core.task import Classification
from localgrad.run import data as data_room
from localgrad.run.build import Machine, build_model, machine_for
from localgrad.run.checkpoint import keep_last, save_checkpoint, save_weights
from localgrad.run.recipe import Recipe, shown
from localgrad.run.runlog import Done, RunLog
from localgrad.scale.memory import MemoryMeter, PeakBytes

KEPT = 2  # checkpoints of the newest epochs, beside the best

Batch = tuple[Tensor, Tensor]  # normalised inputs and targets, on the device


def train(recipe: Recipe, folder: Path, *, tensorboard: bool = False) -> dict[str, float]:
    """Trains after `recipe` into `folder` and returns the last epoch's row of its summary.

    Nothing is written before data and model are there. Raises UserError and RunError.
    """
    machine = machine_for(recipe)
    data = data_room.load(
        recipe.data,
        data_dir=recipe.data_dir,
        download=recipe.download,
        limit_train=recipe.limit_train,
        seed=recipe.seed,
        image_size=recipe.image_size,
    )
    model = build_model(recipe, data, machine)
    per_epoch = data_room.steps_per_epoch(data, recipe.batch_size) // recipe.accumulate
    if per_epoch == 0:
        raise UserError(f"{recipe.accumulate} batches of {recipe.batch_size} are more than the training set holds")
    stepper = Stepper(recipe, model, machine, per_epoch * recipe.epochs)
    checkpoints = folder / "checkpoints"
    used = {"device": str(machine.device), "precision": machine.precision}
    with RunLog(folder, recipe, stepper.total, used, tensorboard=tensorboard) as log:
        log.note(headline(recipe, data, model, machine))
        log.note(f"recipe: {shown(recipe)}")
        log.note(repr(model))
        start, best, row = time.monotonic(), -1.0, {}
        for epoch in range(recipe.epochs):
            loss = _train_epoch(epoch, per_epoch, stepper, data, log)
            row = {
                "epoch": epoch + 1,
                "train_loss": loss,
                **evaluate(model, data, recipe, machine),
                "lr": stepper.lr,
                "peak_bytes": stepper.peak.total,
                "peak_rss_bytes": peak_rss(),
                "seconds": time.monotonic() - start,
            }
            log.epoch(row)
            position = {"epoch": epoch + 1, "step": stepper.step}
            save_checkpoint(checkpoints, f"step-{stepper.step}", model, stepper.optimizers, position)
            keep_last(checkpoints, KEPT)
            if row["eval_top1"] > best:
                best = row["eval_top1"]
                save_checkpoint(checkpoints, "best", model, stepper.optimizers, position)
        save_weights(folder / "model.safetensors", model.backbone.state_dict())
    return row


def _train_epoch(epoch: int, steps: int, stepper: Stepper, data: data_room.Data, log: RunLog) -> float:
    """One pass over the training images; the last block's mean loss."""
    recipe, machine, model = stepper.recipe, stepper.machine, stepper.model
    model.train()
    batches = data_room.train_batches(
        data, batch_size=recipe.batch_size, seed=recipe.seed, epoch=epoch, workers=recipe.workers
    )
    stream = (to_device(batch, data.info, machine) for batch in batches)
    total = 0.0
    for _ in range(steps):
        done = stepper(stream)
        if stepper.peak.timeline and stepper.step == stepper.measured + 1:
            log.timeline(stepper.peak)
        total += done.losses[-1]
        log.step(stepper.step, epoch, done, stepper.peak.total)
    return total / steps


class Stepper:
    """One optimizer step over `accumulate` batches: after the pass, or block by block as it goes.

    total: steps of the whole run. step: how many are done. peak: memory of step `measured`, once it is done (on CUDA
    the most that any step took).
    """

    def __init__(self, recipe: Recipe, model: LocalModel, machine: Machine, total: int) -> None:
        self.recipe, self.model, self.machine, self.total = recipe, model, machine, total
        self.step, self.peak = 0, PeakBytes(0)
        self.measured = min(1, total - 1)  # the second step, because the first makes the optimizer's state
        factors = recipe.block_factors
        rates = None if factors is None else [recipe.lr * f for f in factors]
        groups = param_groups(model, weight_decay=recipe.weight_decay, no_decay=not recipe.decay_norms, lr=rates)
        count = len(model.blocks)
        shares = [[g for g in groups if g["block"] == k] for k in range(count)] if recipe.step_as_you_go else [groups]
        self.optimizers = [_optimizer(recipe, share) for share in shares]
        for group in self._groups():
            group["peak_lr"] = group["lr"]
        self.scaler = torch.amp.GradScaler(enabled=machine.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]

    @property
    def lr(self) -> float:
        """The first block's learning rate in the last step."""
        return next(self._groups())["lr"]

    def __call__(self, batches: Iterator[Batch]) -> Done:
        """Takes `accumulate` of the batches and steps once. Raises RunError for a loss that is not finite."""
        now = rate(self.step, self.total, self.recipe.warmup)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * now
        device = self.machine.device
        meter = MemoryMeter() if device.type == "cpu" and self.step == self.measured else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with meter or contextlib.nullcontext():
            done = self._pass(batches, meter)
            if not self.recipe.step_as_you_go:
                self._update(self.optimizers[0], range(len(self.model.blocks)))
        if self.scaler.is_enabled():
            self.scaler.update()
        if meter is not None:
            self.peak = meter.result()
        elif device.type == "cuda" and torch.cuda.max_memory_allocated(device) > self.peak.total:
            self.peak = PeakBytes(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        self.step += 1
        return done

    def _pass(self, batches: Iterator[Batch], meter: MemoryMeter | None) -> Done:
        count = self.recipe.accumulate
        scale: float | Tensor = 1.0
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones((), device=self.machine.device))
        if count > 1:
            scale = scale / count

        def after_block(k: int) -> None:
            if self.recipe.step_as_you_go:
                self._update(self.optimizers[k], [k])
            if meter is not None:
                meter.mark(f"block {k + 1}" if k + 1 < len(self.model.blocks) else "update")

        losses, parts, hits, images = [0.0] * len(self.model.blocks), [], 0.0, 0
        for i in range(count):
            with meter.pause() if meter is not None else contextlib.nullcontext():
                x, y = next(batches)
            out = local_backward(
                self.model,
                x,
                y,
                scale=scale,
                autocast=self.machine.autocast,
                after_block=after_block,
                micro_batch=(i, count),
            )
            losses = [total + loss / count for total, loss in zip(losses, self._finite(out), strict=True)]
            parts = out.parts
            hits += float(self.model.task.metrics(out.logits, y)["top1"])
            images += len(y)
        return Done(losses, parts, 100 * hits / images, images)

    def _finite(self, out: StepResult) -> list[float]:
        losses = torch.stack(out.losses).tolist()
        for k, loss in enumerate(losses):
            if not math.isfinite(loss):
                where = f"block {k} ({self.model.blocks[k].names[-1]}) is {loss} at step {self.step + 1}"
                raise RunError(
                    f"the loss of {where}: a lower lr, a warm-up or a clip, into another --out, may keep it finite"
                )
        return losses

    def _update(self, optimizer: torch.optim.Optimizer, blocks: Sequence[int]) -> None:
        if self.recipe.clip is not None:
            self.scaler.unscale_(optimizer)
            for k in blocks:
                nn.utils.clip_grad_norm_(self.model.members(k), self.recipe.clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad()

    def _groups(self) -> Iterator[dict]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups


def rate(step: int, total: int, warmup: float) -> float:
    """The factor on lr at `step` of `total`: linear up over the first `warmup` share, then a cosine down to 0.

    >>> [round(rate(s, 10, 0.2), 3) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.038]
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


@torch.no_grad()
def evaluate(model: nn.Module, data: data_room.Data, recipe: Recipe, machine: Machine) -> dict[str, float]:
    """Loss and accuracies, in percent, of a backbone or local model on the test images."""
    was_training = model.training
    model.eval()
    task = Classification(data.info.classes)
    sums: dict[str, float] = {}
    count = 0
    for batch in data_room.test_batches(data, batch_size=max(recipe.batch_size, 256), workers=recipe.workers):
        x, y = to_device(batch, data.info, machine)
        with machine.cast():
            logits = model(x)
        for name, value in task.metrics(logits, y).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += len(y)
    model.train(was_training)
    return {
        "eval_loss": sums["loss"] / count,
        "eval_top1": 100 * sums["top1"] / count,
        "eval_top5": 100 * sums["top5"] / count,
    }


def headline(recipe: Recipe, data: data_room.Data, model: LocalModel, machine: Machine) -> str:
    """The first line of a run: what trains on what, where, and in which precision and why."""
    info, device = data.info, str(machine.device)
    if machine.device.type == "cpu":
        threads = torch.get_num_threads()
        device += f" with {threads} thread{'s' if threads > 1 else ''}"
    images = f"{len(data.train):,} train and {len(data.test):,} test images of {info.channels}x{info.size}x{info.size}"
    return (
        f"{recipe.model} on {recipe.data} ({images}): {recipe.label}, {len(model.blocks)} blocks, seed {recipe.seed}; "
        f"{device}, {machine.precision} ({machine.why})"
    )


def peak_rss() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def to_device(batch: tuple[Tensor, Tensor], info: data_room.DataInfo, machine: Machine) -> tuple[Tensor, Tensor]:
    images, targets = (t.to(machine.device, non_blocking=True) for t in batch)
    x = data_room.normalize(images, info)
    return x.contiguous(memory_format=machine.memory_format), targets


def _optimizer(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
