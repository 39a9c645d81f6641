"""A slower link than there is: what a process sends arrives some time later, while it goes on."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


class _Late:
    """The handle of a message that is still to be sent."""

    def __init__(self) -> None:
        self.work: Any = None
        self.sent = threading.Event()

    def wait(self, *args: Any) -> bool:
        self.sent.wait()
        return self.work.wait(*args)


class _Until:
    """The handle of a reduction that is done no earlier than `due`."""

    def __init__(self, work: Any, due: float) -> None:
        self.work, self.due = work, due

    def wait(self, *args: Any) -> bool:
        done = self.work.wait(*args)
        time.sleep(max(0.0, self.due - time.monotonic()))
        return done


@contextlib.contextmanager
def delayed(seconds: float) -> Iterator[None]:
    """Each message by `dist.isend` is `seconds` late, and each asynchronous `dist.all_reduce` of two ranks twice as
    much, because one message of it waits for another. The order of messages stays."""
    if not seconds:
        yield
        return
    send, reduce = dist.isend, dist.all_reduce
    waiting: queue.Queue[Any] = queue.Queue()

    def isend(*args: Any, **settings: Any) -> _Late:
        late = _Late()
        waiting.put((time.monotonic() + seconds, late, args, settings))
        return late

    def all_reduce(*args: Any, **settings: Any) -> Any:
        began, work = time.monotonic(), reduce(*args, **settings)
        return work and _Until(work, began + 2 * seconds)

    def post() -> None:
        while (message := waiting.get()) is not None:
            due, late, args, settings = message
            time.sleep(max(0.0, due - time.monotonic()))
            late.work = send(*args, **settings)
            late.sent.set()

    postman = threading.Thread(target=post)
    postman.start()
    names = {"isend": isend, "all_reduce": all_reduce}
    before = [(module, name, getattr(module, name)) for module in (dist, distributed_c10d) for name in names]
    try:
        for module, name, _ in before:
            setattr(module, name, names[name])
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)
        waiting.put(None)
        postman.join()
