"""Simulates a slower network link, for `scaling.py` and `race.py`. It has no command and writes nothing.

A message arrives some time after it was sent. The process that sent it goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


class _DelayedSend:
    """The handle of a message that waits to be sent."""

    def __init__(self) -> None:
        self.work: Any = None
        self.sent = threading.Event()

    def wait(self, *args: Any) -> bool:
        self.sent.wait()
        return self.work.wait(*args)


class _DelayedReduction:
    """The handle of a reduction that ends at the time `due` or later."""

    def __init__(self, work: Any, due: float) -> None:
        self.work, self.due = work, due

    def wait(self, *args: Any) -> bool:
        done = self.work.wait(*args)
        time.sleep(max(0.0, self.due - time.monotonic()))
        return done


@contextlib.contextmanager
def delayed(seconds: float) -> Iterator[None]:
    """Delays the messages of `torch.distributed` inside the context. Their order stays.

    Args:
        seconds: The delay of each message by `dist.isend`. An asynchronous `dist.all_reduce` of two ranks is delayed
            twice as long, because one of its messages waits for the other. 0 changes nothing.
    """
    if not seconds:
        yield
        return
    send, reduce = dist.isend, dist.all_reduce
    waiting: queue.Queue[Any] = queue.Queue()

    def isend(*args: Any, **settings: Any) -> _DelayedSend:
        handle = _DelayedSend()
        waiting.put((time.monotonic() + seconds, handle, args, settings))
        return handle

    def all_reduce(*args: Any, **settings: Any) -> Any:
        began, work = time.monotonic(), reduce(*args, **settings)
        return work and _DelayedReduction(work, began + 2 * seconds)

    def send_when_due() -> None:
        while (message := waiting.get()) is not None:
            due, handle, args, settings = message
            time.sleep(max(0.0, due - time.monotonic()))
            handle.work = send(*args, **settings)
            handle.sent.set()

    sender = threading.Thread(target=send_when_due)
    sender.start()
    names = {"isend": isend, "all_reduce": all_reduce}
    before = [(module, name, getattr(module, name)) for module in (dist, distributed_c10d) for name in names]
    try:
        for module, name, _ in before:
            setattr(module, name, names[name])
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)
        waiting.put(None)
        sender.join()
