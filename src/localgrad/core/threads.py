"""What a trace shares with the other threads of the process: `nn.Module`, which it changes while it lasts, and the
generators of random numbers."""

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
if hasattr(os, "register_at_fork"):  # a process that forks during a trace would keep its change, and the lock
    os.register_at_fork(before=ONE_TRACE.acquire, after_in_parent=ONE_TRACE.release, after_in_child=ONE_TRACE.release)


@contextlib.contextmanager
def one_trace() -> Iterator[None]:
    """One trace at a time, and none while `torch.compile` compiles, which would compile the change with the rest."""
    compiling = getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", contextlib.nullcontext())
    with compiling, ONE_TRACE:
        yield


class RandomState:
    """Of the generators that all threads share: Python's, numpy's and PyTorch's. Where `numpy_lock` is held, taking and
    comparing it hardly lets another thread in between."""

    def __init__(self) -> None:
        _, key, *numpy = np.random.get_state()  # noqa: NPY002
        numbers = torch.get_rng_state().numpy().tobytes()
        self.state = random.getstate(), (key.tobytes(), *numpy), numbers  # pyright: ignore[reportAttributeAccessIssue]

    def put_back(self) -> None:
        python, (key, *numpy), numbers = self.state
        random.setstate(python)
        state: Any = ("MT19937", np.frombuffer(key, np.uint32), *numpy)
        np.random.set_state(state)  # noqa: NPY002
        torch.set_rng_state(torch.frombuffer(bytearray(numbers), dtype=torch.uint8))


def numpy_lock() -> Any:
    """Which numpy holds as it draws. Asking for its state waits for it, and lets other threads draw meanwhile."""
    return np.random.get_bit_generator().lock  # pyright: ignore[reportAttributeAccessIssue]


def alone() -> bool:
    """Whether there is no other thread that could draw random numbers."""
    return threading.active_count() == 1
