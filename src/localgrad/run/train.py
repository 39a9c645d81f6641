"""The loop: a recipe and a folder in, a trained backbone and its record out."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from localgrad.core.auxiliary import Method
from localgrad.core.backbones import build
from localgrad.core.couplings import COUPLINGS, MAN
from localgrad.core.engine import LocalModel, StepResult, local_backward, localize, param_groups
from localgrad.core.errors import RunError, UserError
from localgrad.core.methods import METHODS
from localgrad.core.task import Classification
from localgrad.run import data as data_room
from localgrad.run.checkpoint import keep_last, load_backbone, save_checkpoint, save_weights
from localgrad.run.recipe import Recipe
from localgrad.run.runlog import RunLog
from localgrad.scale.memory import MemoryMeter, PeakBytes

KEPT = 2  # checkpoints of the newest epochs, beside the best
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}


@dataclass(frozen=True)
class Machine:
    """Where and how to compute: resolved from "auto", and why."""

    device: torch.device
    precision: str
    memory_format: torch.memory_format
    why: str

    @property
    def autocast(self) -> torch.dtype | None:
        return DTYPES[self.precision]


def machine_for(recipe: Recipe) -> Machine:
    """Resolves device, precision and memory format. Raises UserError for what this machine does not have."""
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if cuda else "cpu") if recipe.device == "auto" else recipe.device)
    except RuntimeError:
        raise UserError(f"unknown device '{recipe.device}': take auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{recipe.device}' is not supported: take auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{recipe.device}' is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    fast, why = _fast_bf16(device)
    precision = ("bf16" if fast else "float32") if recipe.precision == "auto" else recipe.precision
    if precision == "fp16" and device.type != "cuda":
        raise UserError("fp16 needs a CUDA device (its gradient scaler does): take bf16 or float32")
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return Machine(device, precision, layout, why if recipe.precision == "auto" else "as asked")


def build_model(recipe: Recipe, data: data_room.Data, machine: Machine) -> LocalModel:
    """The recipe's backbone, cut and with its auxiliaries, on the machine's device."""
    info = data.info
    torch.manual_seed(recipe.seed)
    backbone = build(recipe.model, classes=info.classes, in_channels=info.channels)
    if recipe.init is not None:
        load_backbone(backbone, Path(recipe.init))
    backbone.to(machine.device, memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]
    model = localize(
        backbone,
        blocks=recipe.cut,
        method=method_of(recipe, info),
        coupling=coupling_of(recipe),
        example=torch.zeros(2, info.channels, info.size, info.size),
        task=Classification(info.classes, recipe.label_smoothing),
    )
    return model.to(memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]


def method_of(recipe: Recipe, info: data_room.DataInfo) -> Method:
    options: dict = {} if recipe.method == "bp" else {"head": None if recipe.head == "auto" else recipe.head}
    if recipe.method == "infopro":
        options |= {"mean": info.mean, "std": info.std, "contrast": recipe.contrast}
    if recipe.method == "auglocal" and recipe.depth is not None:
        options["depth"] = recipe.depth
    return METHODS[recipe.method](**options)


def coupling_of(recipe: Recipe) -> MAN | None:
    kind = COUPLINGS[recipe.coupling]
    if kind is None:
        return None
    depth = {"depth": recipe.depth} if recipe.coupling == "deep-man" and recipe.depth is not None else {}
    learnable, ema = recipe.branches != "ema", recipe.branches != "learnable"
    return kind(momentum=recipe.momentum, learnable=learnable, ema=ema, form=recipe.form, **depth)


def rate(step: int, total: int, warmup: float) -> float:
    """The factor on lr at `step` of `total`: linear up over the first `warmup` share, then a cosine down to 0.

    >>> [round(rate(s, 10, 0.2), 3) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.038]
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


class Stepper:
    """One optimizer step over `accumulate` batches: after the pass, or block by block as it goes."""

    def __init__(self, recipe: Recipe, model: LocalModel, machine: Machine, total: int) -> None:
        self.recipe, self.model, self.machine, self.total = recipe, model, machine, total
        self.step = 0
        factors = recipe.block_factors
        rates = None if factors is None else [recipe.lr * f for f in factors]
        groups = param_groups(model, weight_decay=recipe.weight_decay, no_decay=recipe.no_decay, lr=rates)
        count = len(model.blocks)
        shares = [[g for g in groups if g["block"] == k] for k in range(count)] if recipe.step_as_you_go else [groups]
        self.optimizers = [self._optimizer(share) for share in shares]
        for group in self._groups():
            group["peak_lr"] = group["lr"]
        self.scaler = torch.amp.GradScaler(enabled=machine.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]

    def __call__(self, batches: list[tuple[Tensor, Tensor]], meter: MemoryMeter | None = None) -> StepResult:
        """batches: normalised inputs and targets on the device. Raises RunError for a loss that is not finite."""
        now = rate(self.step, self.total, self.recipe.warmup)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * now
        scale = self.scaler.scale(torch.ones((), device=self.machine.device)) if self.scaler.is_enabled() else 1.0
        scale = scale / len(batches) if len(batches) > 1 else scale

        def after_block(k: int) -> None:
            if self.recipe.step_as_you_go:
                self._update(self.optimizers[k], [k])
            if meter is not None:
                meter.mark(f"block {k + 1}")

        out = None
        for i, (x, y) in enumerate(batches):
            out = local_backward(
                self.model, x, y, scale=scale, autocast=self.machine.autocast, after_block=after_block,
                micro_batch=(i, len(batches)),
            )  # fmt: skip
            self._check(out)
        assert out is not None
        if meter is not None:
            meter.mark("update")
        if not self.recipe.step_as_you_go:
            self._update(self.optimizers[0], range(len(self.model.blocks)))
        if self.scaler.is_enabled():
            self.scaler.update()
        self.step += 1
        return out

    def _update(self, optimizer: torch.optim.Optimizer, blocks: range | list[int]) -> None:
        if self.recipe.clip is not None:
            self.scaler.unscale_(optimizer)
            for k in blocks:
                nn.utils.clip_grad_norm_(self.model.members(k), self.recipe.clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad()

    def _check(self, out: StepResult) -> None:
        losses = torch.stack(out.losses).tolist()
        for k, loss in enumerate(losses):
            if not math.isfinite(loss):
                block = self.model.blocks[k]
                where = f"block {k} ({block.names[0]} .. {block.names[-1]})"
                raise RunError(f"the loss of {where} is {loss} at step {self.step}: a lower lr or a clip may keep it finite")

    def _groups(self) -> Iterator[dict]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups

    def _optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        if self.recipe.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.recipe.lr)
        return torch.optim.SGD(groups, lr=self.recipe.lr, momentum=0.9, nesterov=True)


def train(recipe: Recipe, folder: Path, *, tensorboard: bool = False) -> dict[str, float]:
    """Trains after `recipe` into `folder` and returns the last epoch's row of its summary.

    Nothing is written before data and model are there. Raises UserError and RunError.
    """
    machine = machine_for(recipe)
    torch.use_deterministic_algorithms(recipe.deterministic)
    if machine.device.type == "cuda":
        torch.backends.cudnn.benchmark = not recipe.deterministic
    data = data_room.load(
        recipe.data, data_dir=recipe.data_dir, download=recipe.download, limit_train=recipe.limit_train,
        seed=recipe.seed, image_size=recipe.image_size,
    )  # fmt: skip
    model = build_model(recipe, data, machine)
    per_epoch = data_room.steps_per_epoch(data, recipe.batch_size) // recipe.accumulate
    if per_epoch == 0:
        raise UserError(f"{recipe.accumulate} batches of {recipe.batch_size} are more than the training set holds")
    total = per_epoch * recipe.epochs
    stepper = Stepper(recipe, model, machine, total)

    with RunLog(folder, recipe, describe(recipe, data, model, machine), total, tensorboard=tensorboard) as log:
        log.note(repr(model))
        best, peak, row = -1.0, PeakBytes(0), {}
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(machine.device)
        start = time.monotonic()
        for epoch in range(recipe.epochs):
            model.train()
            batches = data_room.train_batches(data, batch_size=recipe.batch_size, seed=recipe.seed, epoch=epoch, workers=recipe.workers)
            stream = (_to_device(b, data.info, machine) for b in batches)
            loss_sum = torch.zeros(())
            for _ in range(per_epoch):
                group = list(islice(stream, recipe.accumulate))
                # The second step is measured, because the first makes the optimizer's state.
                measure = machine.device.type == "cpu" and stepper.step == min(1, total - 1)
                meter = MemoryMeter() if measure else None
                with meter or contextlib.nullcontext():
                    out = stepper(group, meter)
                if meter is not None:
                    peak = meter.result()
                    log.timeline(peak)
                elif machine.device.type == "cuda":
                    peak = PeakBytes(torch.cuda.max_memory_allocated(machine.device), torch.cuda.max_memory_reserved(machine.device))
                loss_sum += out.losses[-1].cpu()
                images = sum(len(y) for _, y in group)
                metrics = model.task.metrics(out.logits, group[-1][1])
                log.step(stepper.step, epoch, out, float(metrics["top1"]) / len(group[-1][1]), images, peak.total)
                del group, out
            lr = stepper.optimizers[0].param_groups[0]["lr"]
            row = {"epoch": epoch + 1, "train_loss": float(loss_sum) / per_epoch, **evaluate(model, data, recipe, machine), "lr": lr}
            row |= {"peak_bytes": peak.total, "peak_rss_bytes": peak_rss(), "seconds": time.monotonic() - start}
            log.epoch(row)
            position = {"epoch": epoch + 1, "step": stepper.step}
            checkpoints = folder / "checkpoints"
            save_checkpoint(checkpoints, f"step-{stepper.step}", model, stepper.optimizers, position)
            keep_last(checkpoints, KEPT)
            if row["eval_top1"] > best:
                best = row["eval_top1"]
                save_checkpoint(checkpoints, "best", model, stepper.optimizers, position)
        save_weights(folder / "model.safetensors", model.backbone.state_dict())
    return row


@torch.no_grad()
def evaluate(model: nn.Module, data: data_room.Data, recipe: Recipe, machine: Machine) -> dict[str, float]:
    """Loss and accuracies, in percent, of a backbone or local model on the test images."""
    was_training = model.training
    model.eval()
    task = Classification(data.info.classes)
    sums: dict[str, float] = {}
    count = 0
    for batch in data_room.test_batches(data, batch_size=max(recipe.batch_size, 256), workers=recipe.workers):
        x, y = _to_device(batch, data.info, machine)
        with torch.autocast(machine.device.type, machine.autocast or torch.bfloat16, enabled=machine.autocast is not None):
            logits = model(x)
        for name, value in task.metrics(logits, y).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += len(y)
    model.train(was_training)
    return {"eval_loss": sums["loss"] / count, "eval_top1": 100 * sums["top1"] / count, "eval_top5": 100 * sums["top5"] / count}


def describe(recipe: Recipe, data: data_room.Data, model: LocalModel, machine: Machine) -> str:
    """The first line of a run: what trains on what, where, and in which precision and why."""
    threads = f", {torch.get_num_threads()} threads" if machine.device.type == "cpu" else ""
    sizes = f"{len(data.train):,} train and {len(data.test):,} test images of {data.info.channels}x{data.info.size}x{data.info.size}"
    return (
        f"{recipe.model} on {recipe.data} ({sizes}), {recipe.label}, {len(model.blocks)} blocks, seed {recipe.seed}; "
        f"{machine.device}{threads}, {machine.precision} ({machine.why})"
    )


def peak_rss() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _to_device(batch: tuple[Tensor, Tensor], info: data_room.DataInfo, machine: Machine) -> tuple[Tensor, Tensor]:
    images, targets = (t.to(machine.device, non_blocking=True) for t in batch)
    x = data_room.normalize(images, info)
    return x.contiguous(memory_format=machine.memory_format), targets


def _fast_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return fast, "this GPU has bf16 tensor cores" if fast else "this GPU has no bf16 tensor cores"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")):
        if capabilities.get(flag):
            return True, f"this processor has {name}"
    return False, "this processor has no bf16 arithmetic"
