"""Measures the memory of one step: everything live, parameters and optimizer state included."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class PeakBytes:
    """The most bytes that were live at once. reserved: what CUDA's allocator held (None on the CPU). timeline: on the
    CPU, (label, bytes live) each time that a storage came or went; labels come from `MemoryMeter.mark`."""

    total: int
    reserved: int | None = None
    timeline: list[tuple[str, int]] = field(default_factory=list, repr=False)


class MemoryMeter(TorchDispatchMode):
    """Follows every tensor storage that an operation reads or makes, on the CPU or another eager device.

    A storage first seen as an input was live before, so it counts from the start. Each operation gets slower: measure
    one step, not a run. Scratch memory inside a kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self._paused = False
        self._known: dict[int, weakref.finalize] = {}
        self._before = 0
        self._changes: list[tuple[str, int]] = []

    def mark(self, label: str) -> None:
        """What happens from now on is listed under `label`."""
        self.label = label

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside, such as reading the next batch from a set that lies in memory."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        self._see((args, kwargs), made=False)
        out = func(*args, **kwargs)
        self._see(out, made=True)
        return out

    def result(self) -> PeakBytes:
        """The peak so far."""
        live, timeline = self._before, [("", self._before)]
        for label, change in self._changes:
            live += change
            timeline.append((label, live))
        return PeakBytes(max(bytes_live for _, bytes_live in timeline), timeline=timeline)

    def _see(self, tree: Any, *, made: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage(), made)

    def _follow(self, storage: torch.UntypedStorage, made: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        if made:
            self._changes.append((self.label, size))
        else:
            self._before += size
        self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self._changes.append((self.label, -size))

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        for finalizer in self._known.values():
            finalizer.detach()
        self._known.clear()


def measure_peak(step: Callable[[], object], *, device: torch.device | str = "cpu") -> PeakBytes:
    """Runs `step` once and returns the most bytes that were live during it.

    What `step` should hold: forward and backward passes and the optimizer's step, after a first step that has made
    the optimizer's state. On the CPU through `MemoryMeter`; on CUDA from the allocator's own peak.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return PeakBytes(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    meter = MemoryMeter()
    with meter:
        step()
    return meter.result()
