"""Joins the processes that torchrun has started into a process group, and reports which of them are lost."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # It is imported before there is a group: see `_leave`.

from localgrad.core.errors import RunError, UserError
from localgrad.run.signals import Stopped, deaf, rank_here
from localgrad.scale.groups import Ranks, leave_meshes

PATIENCE = 3.0  # Seconds after which each living rank has noticed that another one has died.
# If one does not answer, the ranks that wait for it notice that one after the other, as they began to wait.
LATER = 30.0
SAID = "localgrad/said"  # This key is in the store if a rank has ended with a sentence of its own.


@contextlib.contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """Gives the ranks of this run, which can exchange tensors as long as the context is open.

    Args:
        device: The recipe's device. With CUDA, each rank of a machine takes another device of it.
        timeout: The seconds that a rank waits for the others.

    Raises:
        UserError: `timeout` is out of range.
        RunError: There are too few devices, the other ranks cannot be reached, or one of them is lost.
        Stopped: Another rank is lost, and has given the reason.
    """
    rank, count = rank_here(), int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    check_timeout(timeout)
    limit = timedelta(seconds=timeout)
    _join(rank, count, limit, on_cuda=device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))
    try:
        yield Ranks(rank, count, limit)
    except (UserError, RunError) as error:
        if not error.shared:
            with contextlib.suppress(RuntimeError):  # The store may be gone.
                _store().set(SAID, str(rank))
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        late = min(timeout, LATER) if "timed out" in str(error).lower() else 0.0
        raise RunError(_lost(rank, count, timeout, PATIENCE + late)) from error
    finally:
        _leave()


def check_timeout(seconds: float) -> None:
    """Raises UserError unless ranks can wait for each other so long."""
    if not 0 < seconds <= 1e9:
        raise UserError(f"--rank-timeout takes seconds above 0, not {seconds}")


def _join(rank: int, count: int, limit: timedelta, *, on_cuda: bool) -> None:
    """Makes the process group of all ranks. Raises RunError."""
    if on_cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise RunError(f"rank {rank} has no device: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(local)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=limit))  # pyright: ignore[reportPrivateImportUsage]
        # The agent's store outlives a restart, and still has the addresses of ranks that have died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        backend = "nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} of {count} cannot meet the others: {str(error).splitlines()[0]}") from error


def _leave() -> None:
    """Ends the process group and its threads. They end only when nothing refers to the group any more.

    A thread frees the tensors of its last work some time after that work is done, and aborts the process if the
    interpreter has ended by then. Four things refer to a group: the frames of an error that is being raised, objects
    that refer to each other, the default arguments in `torch.distributed.nn.functional`, if that is imported while
    there is a group (`torch._dynamo` imports it for an optimizer), and meshes, which caches of DTensors keep.
    """
    error = sys.exception()
    with deaf():  # When a rank has died, the others get SIGTERM, which must not interrupt this.
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
        leave_meshes()
        with contextlib.suppress(RuntimeError):  # The group may have lost a rank.
            dist.destroy_process_group()


def _lost(rank: int, count: int, timeout: float, most: float) -> str:
    """A sentence about the ranks that do not answer. Those that live leave a key in the store, which outlives them.

    Args:
        rank: The number of this rank.
        count: The number of ranks.
        timeout: The seconds that ranks wait for each other, which the sentence names.
        most: The most seconds to wait for these keys. With one rank left that has none, it is that one.
    """
    until = time.monotonic() + most
    try:
        store = _store()
        store.set(f"localgrad/here/{rank}", "1")
        time.sleep(PATIENCE)
        while True:
            if store.check([SAID]):
                raise Stopped(signal.SIGTERM)  # The process that started the ranks would send the same signal.
            silent = [r for r in range(count) if not store.check([f"localgrad/here/{r}"])]
            if len(silent) < 2 or time.monotonic() >= until:
                break
            time.sleep(0.2)
    except RuntimeError:
        silent = []
    lost = " and ".join(f"rank {r}" for r in silent) if silent else "another rank"
    return f"{lost} of {count} died or did not answer for {timeout:.0f} s: the same command goes on from the last save"


def _store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    return dist.distributed_c10d._get_default_store()
