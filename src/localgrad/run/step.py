"""One optimizer step of a run, and what keeps a bad one from doing harm."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.errors import RunError, is_out_of_memory
from localgrad.core.model import param_groups
from localgrad.core.sizes import mib
from localgrad.run.build import Machine, optimizer_of
from localgrad.run.modes import Alone
from localgrad.run.recipe import Recipe
from localgrad.run.runlog import StepRecord
from localgrad.scale.memory import MemoryMeter, PeakBytes, optimizers_for, peak_rss

Batch = tuple[Tensor | None, Tensor]  # normalised inputs, where they are read, and targets, on the device
SKIPS = 10  # steps skipped one after another before a run is given up: no later one will be better


class NotFinite(RunError):
    """A loss or gradient that is not finite. block: the first block that has one."""

    shared = True  # it is found in the mean over the ranks

    def __init__(self, text: str, block: int) -> None:
        super().__init__(text)
        self.block = block


class Stepper:
    """One optimizer step over `accumulate` batches: after the pass, or block by block as it goes.

    Attributes:
        mode: which blocks this rank trains, and what it exchanges with others.
        total: steps of the whole run.
        step: how many steps are done.
        skipped: how many of those changed nothing, because a loss or gradient was not finite.
        peak: memory of step `measured`, once it is done (on CUDA the most that any step took).
    """

    def __init__(self, recipe: Recipe, mode: Alone, machine: Machine, total: int) -> None:
        self.recipe, self.model, self.machine, self.total = recipe, mode.model, machine, total
        self.mode, model = mode, mode.model
        self.step, self.skipped, self.peak = 0, 0, PeakBytes(0)
        self.measured = min(1, total - 1)  # the second step, because the first makes the optimizer's state
        factors = recipe.block_factors
        rates = None if factors is None else [recipe.lr * f for f in factors]
        groups = param_groups(model, weight_decay=recipe.weight_decay, no_decay=not recipe.decay_norms, lr=rates)
        self._blocks = mode.blocks
        self.optimizers = optimizers_for(groups, optimizer_of(recipe), as_you_go=recipe.step_as_you_go)
        for group in self._groups():
            group["peak_lr"] = group["lr"]
        self.scaler = torch.amp.GradScaler(enabled=machine.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        self._members = [model.members(k) for k in range(len(model.blocks))]
        self._statistics = {k: model.statistics(k) for k in self._blocks}
        self._before = {k: [torch.empty_like(b) for b in buffers] for k, buffers in self._statistics.items()}
        self._consecutive_skips = 0
        self._where = ""  # What is being computed, for the message when memory runs out.

    @property
    def lr(self) -> float:
        """The first block's learning rate in the last step."""
        return next(self._groups())["lr"]

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on beside the model, as tensors and plain values. Each rank of a pipeline
        calls it, and the first one gets the state of all."""
        counts = {"step": self.step, "skipped": self.skipped, "in_a_row": self._consecutive_skips}
        peak = {"total": self.peak.total, "reserved": self.peak.reserved}
        optimizers = self.mode.gather_states([o.state_dict() for o in self.optimizers])
        return {**counts, "peak": peak, "optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            for parameter, kept in optimizer.state.items():
                if any(isinstance(t, Tensor) and t.ndim and t.shape != parameter.shape for t in kept.values()):
                    raise ValueError("the optimizer's state is that of other parameters")
        for k in self.mode.other_optimizers(len(self.optimizers)):
            self.optimizers[k].state.clear()
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self._consecutive_skips = state["step"], state["skipped"], state["in_a_row"]
        self.peak = PeakBytes(**state["peak"])

    def __call__(self, batches: Iterator[Batch]) -> StepRecord:
        """Takes `accumulate` of the batches and steps once.

        Where a loss or gradient is not finite, the block that has it, and with a step after the pass every block,
        stays as it was before: the step is skipped if the recipe says so, or else NotFinite is raised. RunError if
        memory runs out.
        """
        now = rate(self.step, self.total, self.recipe.warmup)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * now
        device = self.machine.device
        meter = MemoryMeter() if device.type == "cpu" and self.step == self.measured else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for k in self._blocks:
            _copy(self._before[k], self._statistics[k])
        try:
            with meter or contextlib.nullcontext():
                done = self._pass(batches, meter)
            self._consecutive_skips = 0
        except NotFinite as error:
            self._undo(error.block if self.recipe.step_as_you_go else 0)
            error.shared = self.mode.shares_errors
            self._consecutive_skips += 1
            if not self.recipe.skip_nonfinite or self._consecutive_skips == SKIPS:
                raise
            self.skipped += 1
            done = StepRecord([], [], 0.0, 0, skipped=str(error).partition(":")[0])
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RunError) or not is_out_of_memory(error):
                raise
            raise RunError(self._memory_sentence(error)) from error
        if meter is not None:
            self.peak = meter.result()
        elif device.type == "cuda" and torch.cuda.max_memory_allocated(device) > self.peak.total:
            self.peak = PeakBytes(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        self.step += 1
        return done

    def _pass(self, batches: Iterator[Batch], meter: MemoryMeter | None) -> StepRecord:
        count, go = self.recipe.accumulate, self.recipe.step_as_you_go
        scale: float | Tensor = 1.0
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones((), device=self.machine.device))
        if count > 1:
            scale = scale / count
        totals: dict[int, Tensor] = {}  # Each block's loss, the mean over the batches.
        found: list[float] = []
        waiting: list[int] = []  # Blocks that have their gradients and have yet to step.
        parts, hits, images, end = [], 0.0, 0, self._blocks[-1]
        for i in range(count):
            self._where = "the next batch"
            with meter.pause() if meter is not None else contextlib.nullcontext():
                x, y = next(batches)
            self._where = self._name(self._blocks[0])
            parts = []
            for done in self.mode.block_steps(x, y, scale=scale, autocast=self.machine.autocast):
                k = done.block
                totals[k] = totals.get(k, 0) + done.loss / count
                parts.append(done.parts)
                if i == count - 1:
                    self.mode.start_average(k, totals[k])
                waiting += [k] if go else []
                while len(waiting) > (self.mode.travelling if k != end else 0):
                    block = waiting.pop(0)
                    found += self._settled([block], totals)
                    self._update(self.optimizers[block], [block])
                if k == len(self.model.blocks) - 1:
                    hits += float(self.model.task.metrics(done.output, y)["top1"])
                self._where = "the update" if k == end else self._name(k + 1)
                if meter is not None:
                    meter.mark("update" if k == end else f"block {k + 1}")
            images += len(y)
        if not go:
            found = self._settled(self._blocks, totals)
            self._update(self.optimizers[0], self._blocks)
        for k in self._blocks:
            self.model.move_averages(k, stepped=True)
        if self.scaler.is_enabled():
            self.scaler.update()
        hits, images = self.mode.total([hits, images], self.machine.device)
        return StepRecord(found, parts, 100 * hits / images, int(images))

    def _settled(self, blocks: Sequence[int], losses: Mapping[int, Tensor]) -> list[float]:
        """The blocks' losses, when their gradients are those of all ranks and have been found finite."""
        for k in blocks:
            self.mode.finish_average(k)
        return self._checked({k: losses[k] for k in blocks})

    def _checked(self, losses: Mapping[int, Tensor]) -> list[float]:
        """Blocks' losses as numbers, once these and the blocks' gradients are found finite; NotFinite names the first
        block where they are not. Gradients too large for fp16 are left to the gradient scaler."""
        norms = [] if self.scaler.is_enabled() else [_norm(self._members[k]) for k in losses]
        values = torch.stack([*losses.values(), *norms]).tolist()  # one wait for the device
        found = values[: len(losses)]
        for k, loss, norm in zip(losses, found, values[len(losses) :] or found, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient's norm", norm)
                skip = "" if self.recipe.step_as_you_go else "--skip-nonfinite leaves such steps out; "
                raise NotFinite(
                    f"the {what} in {self._name(k)} is {value} at step {self.step + 1}: {skip}a lower lr, a warm-up or "
                    "a clip, into another --out, may avoid them",
                    k,
                )
        return found

    def _undo(self, first: int) -> None:
        """Brings the statistics of block `first` and of those after it back, and drops all gradients."""
        for k in self._blocks:
            if k >= first:
                _copy(self._statistics[k], self._before[k])
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _update(self, optimizer: torch.optim.Optimizer, blocks: Sequence[int]) -> None:
        """Moves the averages and steps; neither where the gradient scaler finds its scale too large."""
        self.scaler.unscale_(optimizer)
        if not self.scaler.is_enabled() or all(math.isfinite(float(_norm(self._members[k]))) for k in blocks):
            for k in blocks:
                self.model.move_averages(k)
        if self.recipe.clip is not None:
            for k in blocks:
                nn.utils.clip_grad_norm_(self._members[k], self.recipe.clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad()

    def _name(self, k: int) -> str:
        return f"block {k} ({self.model.blocks[k].names[-1]})"

    def _memory_sentence(self, error: BaseException) -> str:
        on_cuda = self.machine.device.type == "cuda"
        held = torch.cuda.max_memory_allocated(self.machine.device) if on_cuda else peak_rss()
        asked = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
        size = "" if asked is None else mib(float(asked[1])) if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        more = f", {size} more were asked for" if size else ""
        finer = "more --blocks" if len(self.model.blocks) > 1 else "--method dgl with --blocks 4 or more"
        return (
            f"out of memory in {self._where} at step {self.step + 1}: {mib(held)} were held{more}; "
            f"{finer}, --recompute all, or a smaller --batch-size with --accumulate, needs less"
        )

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


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of their gradients; nan or infinite if an entry is (or beyond 1e19, where float32 has no square)."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def _copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for a, b in zip(into, source, strict=True):
        a.copy_(b)
