"""SIGTERM and SIGINT as a request that the loop answers between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

BOTH = (signal.SIGTERM, signal.SIGINT)
GRACE = 300  # seconds, more than a step and a save take
NOTICE = b"localgrad: finishing the step, then saving\n"


def rank_here() -> int:
    """Which of several processes of one run this is (torchrun tells): what all would say is said by the first, 0."""
    return int(os.environ.get("RANK", "0"))


class Stopped(BaseException):
    """The process was asked to end by a signal: no error, so nothing that handles errors may take it for one.
    exit_code: 128 + its number, as shells have it."""

    def __init__(self, number: int, text: str = "stopped") -> None:
        super().__init__(text)
        self.number = number
        self.exit_code = 128 + number


class StopRequest:
    """A context in which SIGTERM and SIGINT only ask, and `check` answers.

    More signals change nothing: a scheduler may send both, or one twice, and the save must not suffer. Outside the
    main thread, which alone can hear signals, nothing is asked.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in BOTH if signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
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
                os.write(2, b"" if rank_here() else NOTICE)  # not print, which the signal may have interrupted


def outlive_signals(worker: int) -> None:
    """For processes that decode images: a signal to the whole group is the loop's to answer, which still needs them.

    After a SIGTERM they end by themselves, late: whoever waits for them to end must not wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):
        return
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BOTH)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until the end, and in processes that begin meanwhile until `outlive_signals`: before that they would
    end such a process. Systems that cannot hold signals back (Windows) train no runs."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """No thread hears signals: for what a process that is about to end must do before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in BOTH}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """For the time outside of the loop, when there is nothing to save: SIGTERM raises Stopped, as SIGINT raises
    KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
