"""What a trace shares with other threads of the process: `nn.Module`, which a trace changes while it lasts, and the
random generators."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

ONE_TRACE = threading.RLock()
if hasattr(os, "register_at_fork"):  # Else a process that forks during a trace would keep the change and the lock.
    os.register_at_fork(before=ONE_TRACE.acquire, after_in_parent=ONE_TRACE.release, after_in_child=ONE_TRACE.release)


@contextlib.contextmanager
def one_trace() -> Iterator[None]:
    """Lets other traces wait, and waits for `torch.compile`, which would compile the changed `nn.Module`."""
    compiling = getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", contextlib.nullcontext())
    with compiling, ONE_TRACE:
        yield


def alone() -> bool:
    """Whether there is no other thread that could draw random numbers."""
    return threading.active_count() == 1


class Draws:
    """Finds out where in a forward pass random numbers are drawn, from the states of the random generators.

    All threads share these generators. So `moved` may hold places at which another thread has drawn, but that hardly
    happens at the same place in several passes.

    Attributes:
        moved: The places before which a state had moved.
        lock: numpy's own lock. Taking numpy's state waits for it, and other threads would draw meanwhile. So the
            caller holds it during the forward pass, except in `allowed`.
    """

    def __init__(self) -> None:
        self.moved: set[Any] = set()
        self.lock = np.random.get_bit_generator().lock  # pyright: ignore[reportAttributeAccessIssue]
        self._last: Any = None

    def look(self, place: Any) -> None:
        """Adds `place` to `moved` if random numbers were drawn since the last look."""
        now = _states()
        if self._last is not None and now != self._last:
            self.moved.add(place)
        self._last = now

    @contextlib.contextmanager
    def allowed(self, place: Any) -> Iterator[None]:
        """Random numbers may be drawn inside. If there is no other thread, the generators are put back afterwards."""
        self.look(place)
        before = self._last
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()
            self._last = _states()
            if self._last != before and alone():
                _put_back(before)
                self._last = before


def _states() -> tuple[Any, ...]:
    """The states of Python's, numpy's and PyTorch's generators, as values that can be compared."""
    _, key, *numpy = np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), (key.tobytes(), *numpy), torch_state  # pyright: ignore[reportAttributeAccessIssue]


def _put_back(states: tuple[Any, ...]) -> None:
    python, (key, *numpy), torch_state = states
    random.setstate(python)
    state: Any = ("MT19937", np.frombuffer(key, np.uint32), *numpy)
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(torch.frombuffer(bytearray(torch_state), dtype=torch.uint8))
