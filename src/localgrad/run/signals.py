"""SIGTERM and SIGINT: the training loop answers them between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

BOTH = (signal.SIGTERM, signal.SIGINT)
GRACE = 300  # Seconds. A step and a save take less.
NOTICE = b"localgrad: finishing the step, then saving\n"


def rank_here() -> int:
    """The rank of this process, which torchrun has set; 0 without torchrun. Rank 0 speaks for all."""
    return int(os.environ.get("RANK", "0"))


class Stopped(BaseException):
    """A signal asked the process to end. This is not an error, so code that handles errors must not catch it.

    Attributes:
        number: The number of the signal.
        exit_code: 128 + that number, as in shells.
    """

    def __init__(self, number: int, text: str = "stopped") -> None:
        super().__init__(text)
        self.number = number
        self.exit_code = 128 + number


class StopRequest:
    """A context in which SIGTERM and SIGINT only set `number`, which `check` looks at.

    Only the first signal counts: a scheduler may send several, and they must not disturb the save. Only the main thread
    hears signals, so in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in BOTH if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Not by `_handled`: between this and the moment when `cli.main` ignores signals there must be little time.
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            with contextlib.suppress(OSError):
                os.write(2, b"" if rank_here() else NOTICE)  # `print` may be what the signal has interrupted.


def outlive_signals(worker: int) -> None:
    """Lets a process that decodes images go on after a signal to all processes, because the loop still needs it.

    After a SIGTERM it ends by itself some minutes later, so that nobody waits for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):
        return
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BOTH)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until the context ends. In processes that start meanwhile they wait until `outlive_signals`, because
    before that they would end the process. Windows cannot hold signals back, but trains no runs either."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def deaf() -> AbstractContextManager[None]:
    """A context in which signals are ignored, for what a process must do before it ends."""
    return _handled(signal.SIG_IGN, BOTH)


def sigterm_raises(*, last: bool = False) -> AbstractContextManager[None]:
    """A context in which SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt. It is used outside the loop, where
    there is nothing to save.

    Args:
        last: Whether the process ends after the context. Both signals are ignored then, because another one must not
            change the exit code.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    return _handled(stop, [signal.SIGTERM], last=last)


def ignore_signals() -> None:
    """Ignores SIGTERM and SIGINT from now on."""
    for number in BOTH:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _handled(
    handler: Callable[..., None] | signal.Handlers, numbers: Sequence[int], *, last: bool = False
) -> Iterator[None]:
    """Sets the handler of these signals inside the context. Outside the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        if last:
            ignore_signals()
        else:
            for number, previous in before.items():
                signal.signal(number, previous)
