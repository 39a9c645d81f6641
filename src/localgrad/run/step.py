"""One optimizer step of a run. A step that fails leaves blocks and statistics as they were."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from localgrad.core.errors import RunError, UserError, is_out_of_memory
from localgrad.core.groups import param_groups
from localgrad.core.model import LocalModel
from localgrad.core.sharded import clip_gradients, total_norm
from localgrad.core.sizes import mib
from localgrad.core.task import Classification, Segmentation
from localgrad.run.build import Machine, optimizer_of
from localgrad.run.evaluation import Tally
from localgrad.run.modes import Alone
from localgrad.run.recipe import Recipe
from localgrad.run.runlog import StepRecord
from localgrad.scale.memory import MemoryMeter, PeakBytes, optimizers_for

Batch = tuple[Tensor | None, Tensor]  # Inputs and targets on the device. A rank that reads no images has None.
SKIPS = 10  # After so many skipped steps in a row a run ends, because later steps would fail too.


class NotFinite(RunError):
    """A loss or gradient is not finite.

    Attributes:
        block: The number of the first block that has one.
    """

    shared = True  # All ranks find it at the same step, because they average before they check.

    def __init__(self, text: str, block: int) -> None:
        super().__init__(text)
        self.block = block


class Stepper:
    """Takes the optimizer steps of a run: one for all blocks, or one for each block right after its backward pass.

    Attributes:
        task: What the network is trained for.
        mode: Which blocks this rank trains, and what it exchanges with other ranks.
        total: The number of steps of the whole run.
        step: How many steps are done.
        skipped: How many of them changed nothing, because a loss or gradient was not finite.
        measured: The index of the step whose memory is measured on a CPU.
        peak: The memory of that step. On CUDA, the most that any step until now took.
    """

    def __init__(self, recipe: Recipe, mode: Alone, machine: Machine, total: int) -> None:
        self.recipe, self.mode, self.machine, self.total = recipe, mode, machine, total
        self.model = model = mode.model
        self.task = cast("Classification | Segmentation", model.task)
        self.step, self.skipped, self.peak = 0, 0, PeakBytes(0)
        self.measured = min(1, total - 1)  # The second step, because the first one makes the optimizer's state.
        self._rates = [recipe.lr * f for f in recipe.block_factors or [1.0] * len(model.blocks)]
        groups = param_groups(
            model, weight_decay=recipe.weight_decay, no_decay=not recipe.decay_norms, lr=self._rates,
            by_name=slowed(model, self._rates, recipe.backbone_lr),
        )  # fmt: skip
        self._blocks = mode.blocks
        self.optimizers = optimizers_for(groups, optimizer_of(recipe), as_you_go=recipe.step_as_you_go)
        for group in self._groups():
            group["peak_lr"] = group["lr"]
        self.scaler = torch.amp.GradScaler(enabled=machine.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        self._members = [model.members(k) for k in range(len(model.blocks))]
        self._statistics = {k: model.statistics(k) for k in self._blocks}
        self._before = {k: [torch.empty_like(b) for b in buffers] for k, buffers in self._statistics.items()}
        self._consecutive_skips = 0
        self._where = ""  # The current part of the step, for the message when memory runs out.

    @property
    def lr(self) -> float:
        """The learning rate of the first block's auxiliary in the last step, or of the head if there is one block."""
        return self._rates[0] * rate(max(0, self.step - 1), self.total, self.recipe.warmup)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, apart from the model. Each rank of a pipeline calls it, and the first one gets
        the state of all."""
        counts = {"step": self.step, "skipped": self.skipped, "in_a_row": self._consecutive_skips}
        peak = {"total": self.peak.total, "reserved": self.peak.reserved}
        optimizers = self.mode.gather_states([o.state_dict() for o in self.optimizers])
        return {**counts, "peak": peak, "optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave. ValueError if an optimizer's tensors have other shapes."""
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            for parameter, kept in optimizer.state.items():
                for name, t in kept.items():
                    if isinstance(t, Tensor) and t.ndim:
                        if t.shape != parameter.shape:
                            raise ValueError("the optimizer's state is that of other parameters")
                        kept[name] = self.mode.part_of(t, parameter)
        for k in self.mode.other_optimizers(len(self.optimizers)):
            self.optimizers[k].state.clear()
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self._consecutive_skips = state["step"], state["skipped"], state["in_a_row"]
        self.peak = PeakBytes(**state["peak"])

    def __call__(self, batches: Iterator[Batch]) -> StepRecord:
        """Reads `accumulate` batches and steps once.

        If a loss or gradient is not finite, the blocks that have not stepped yet stay as they were.

        Raises:
            NotFinite: A loss or gradient is not finite, and the recipe does not skip such steps.
            RunError: Memory ran out.
        """
        factor = rate(self.step, self.total, self.recipe.warmup)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
        device = self.machine.device
        meter = MemoryMeter() if device.type == "cpu" and self.step == self.measured else None
        self._enter(self._blocks[0], meter)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for k in self._blocks:
            _copy(self._before[k], self._statistics[k])
        try:
            with meter or contextlib.nullcontext():
                record = self._train(batches, meter)
            self._consecutive_skips = 0
        except NotFinite as error:
            record = self._skip(error)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RunError) or not is_out_of_memory(error):
                raise
            raise RunError(self._memory_sentence(error)) from error
        if meter is not None:
            self.peak = meter.result()
        elif device.type == "cuda" and torch.cuda.max_memory_allocated(device) > self.peak.total:
            self.peak = PeakBytes(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        self.step += 1
        return record

    def _train(self, batches: Iterator[Batch], meter: MemoryMeter | None) -> StepRecord:
        """Runs the blocks on each batch, and steps. The record has the losses and the score before the step."""
        accumulate, as_you_go = self.recipe.accumulate, self.recipe.step_as_you_go
        scale = self._loss_scale()
        losses: dict[int, Tensor] = {}  # Each block's mean loss over the batches.
        values: list[float] = []  # The same as numbers, of the blocks that have stepped.
        parts, tally, images = [], Tally(self.task), 0
        for i in range(accumulate):
            x, y = self._next_batch(batches, meter)
            parts = []
            for done in self.mode.block_steps(x, y, scale=scale, autocast=self.machine.autocast):
                k = done.block
                losses[k] = losses.get(k, 0) + done.loss / accumulate
                parts.append(done.parts)
                if i == accumulate - 1:
                    self.mode.start_average(k, losses[k])
                for ready in self._ready_after(k) if as_you_go else ():
                    values += self._step_blocks([ready], losses)
                if k == len(self.model.blocks) - 1:
                    tally.add(done.output, y)
                self._enter(k + 1, meter)
            images += len(y)
        if not as_you_go:
            values = self._step_blocks(self._blocks, losses)
        for k in self._blocks:
            self.model.move_averages(k, stepped=True)
        if self.scaler.is_enabled():
            self.scaler.update()
        score = tally.scores()[self.task.score] if tally.sums else 0.0  # A rank without the last block has no output.
        total, count = self.mode.total([score * images, images], self.machine.device)
        return StepRecord(values, parts, total / count, int(count))

    def _loss_scale(self) -> float | Tensor:
        """The factor on each loss before its backward pass."""
        scale: float | Tensor = 1.0
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones((), device=self.machine.device))
        return scale / self.recipe.accumulate if self.recipe.accumulate > 1 else scale

    def _next_batch(self, batches: Iterator[Batch], meter: MemoryMeter | None) -> Batch:
        self._where = "the next batch"
        with meter.pause() if meter is not None else contextlib.nullcontext():
            batch = next(batches)
        self._where = self._name(self._blocks[0])
        return batch

    def _enter(self, k: int, meter: MemoryMeter | None) -> None:
        """Notes that block k is next, or the update if this rank has no block k."""
        is_update = k > self._blocks[-1]
        self._where = "the update" if is_update else self._name(k)
        if meter is not None:
            meter.mark("update" if is_update else f"block {k}")

    def _ready_after(self, k: int) -> range:
        """The blocks that step after block k's backward pass, when blocks step as they go. The gradients of the last
        few blocks may still be on their way between the ranks, but after the last block all blocks step."""
        first_waiting = k - self.mode.travelling
        last_ready = k if k == self._blocks[-1] else first_waiting
        return range(max(self._blocks[0], first_waiting), last_ready + 1)

    def _step_blocks(self, blocks: Sequence[int], losses: Mapping[int, Tensor]) -> list[float]:
        """Waits for the averaged gradients of these blocks, checks and updates the blocks, and returns their losses."""
        for k in blocks:
            self.mode.finish_average(k)
        values = self._checked({k: losses[k] for k in blocks})
        self._update(self.optimizers[blocks[0] if self.recipe.step_as_you_go else 0], blocks)
        return values

    def _skip(self, error: NotFinite) -> StepRecord:
        """Takes the step back and returns its record, or raises the error again if the run is to end."""
        self._undo(error.block if self.recipe.step_as_you_go else 0)
        error.shared = self.mode.shares_errors
        self._consecutive_skips += 1
        if not self.recipe.skip_nonfinite or self._consecutive_skips == SKIPS:
            raise error
        self.skipped += 1
        return StepRecord([], [], 0.0, 0, skipped=str(error).partition(":")[0])

    def _checked(self, losses: Mapping[int, Tensor]) -> list[float]:
        """The blocks' losses as numbers. Raises NotFinite if one of them or a block's gradient is not finite. The
        gradient scaler takes care of gradients that are too large for fp16."""
        norms = [] if self.scaler.is_enabled() else [_norm(self._members[k]) for k in losses]
        numbers = torch.stack([*losses.values(), *norms]).tolist()  # One transfer, because each waits for the device.
        values = numbers[: len(losses)]
        for k, loss, norm in zip(losses, values, numbers[len(losses) :] or values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient's norm", norm)
                skip = "" if self.recipe.step_as_you_go else "--skip-nonfinite leaves such steps out; "
                raise NotFinite(
                    f"the {what} in {self._name(k)} is {value} at step {self.step + 1}: {skip}a lower lr, a warm-up or "
                    "a clip, into another --out, may avoid them",
                    k,
                )
        return values

    def _undo(self, first: int) -> None:
        """Restores the statistics of block `first` and of later blocks, and drops all gradients."""
        for k in self._blocks:
            if k >= first:
                _copy(self._statistics[k], self._before[k])
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _update(self, optimizer: torch.optim.Optimizer, blocks: Sequence[int]) -> None:
        """Moves the averages and steps. If the gradient scaler's scale is too large, it does neither."""
        self.scaler.unscale_(optimizer)
        if not self.scaler.is_enabled() or all(math.isfinite(float(_norm(self._members[k]))) for k in blocks):
            for k in blocks:
                self.model.move_averages(k)
        if self.recipe.clip is not None:
            for k in blocks:
                clip_gradients(self._members[k], self.recipe.clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad()

    def _name(self, k: int) -> str:
        return f"block {k} ({self.model.blocks[k].names[-1]})"

    def _memory_sentence(self, error: BaseException) -> str:
        on_cuda = self.machine.device.type == "cuda"
        used = torch.cuda.max_memory_allocated(self.machine.device) if on_cuda else peak_rss()
        asked = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
        size = "" if asked is None else mib(float(asked[1])) if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        more = f", {size} more were asked for" if size else ""
        finer = "more --blocks" if len(self.model.blocks) > 1 else "--method dgl with --blocks 4 or more"
        return (
            f"out of memory in {self._where} at step {self.step + 1}: {mib(used)} were held{more}; "
            f"{finer}, --recompute all, or a smaller --batch-size with --accumulate, needs less"
        )

    def _groups(self) -> Iterator[dict]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups


def slowed(model: LocalModel, rates: Sequence[float], factor: float) -> dict[str, dict[str, float]]:
    """What `param_groups` takes as `by_name`, so that the backbone without its head learns at a rate of its own.

    Args:
        model: The model.
        rates: The learning rate of each block.
        factor: By how much the backbone's rate differs. With 1, it does not.

    Raises:
        UserError: The network has no head behind its last unit.
    """
    if factor == 1:
        return {}
    last = model.blocks[-1]
    if not [p for module in list(last)[len(last.names) :] for p in module.parameters()]:
        raise UserError("backbone-lr has no effect on this network, whose head cannot be told from the rest: drop it")
    return {name: {"lr": lr * factor} for lr, block in zip(rates, model.blocks, strict=False) for name in block.names}


def rate(step: int, total: int, warmup: float) -> float:
    """The factor on lr at `step` of `total`: it rises linearly over the first `warmup` share, then falls as a cosine.

    >>> [round(rate(s, 10, 0.2), 3) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.038]
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the gradients. It is not finite if an entry is not, or if float32 cannot hold an entry's square."""
    return total_norm([p.grad for p in parameters if p.grad is not None])


def peak_rss() -> int:
    """The most memory that this process has held, in bytes."""
    import resource  # It is imported here because Windows does not have it.

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
