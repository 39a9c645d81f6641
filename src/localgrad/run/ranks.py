"""The processes of a run: one, or those that torchrun has started, which meet in a process group here."""

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
import torch.distributed.nn.functional  # before there is a group: see `_leave`

from localgrad.core.errors import RunError, UserError
from localgrad.run.signals import Stopped, deaf, rank_here
from localgrad.scale.replicas import Ranks

PATIENCE = 3.0  # seconds in which every rank that lives has noticed that another does not
SAID = "localgrad/said"  # is in the store once a rank has ended with a sentence of its own


@contextlib.contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """The ranks of this run, as long as the context is open.

    device: of the recipe; each rank takes the CUDA device of its number on the machine. timeout: seconds that a rank
    waits for the others. Raises UserError if that is no time to wait; RunError if there are not as many devices, if the
    others cannot be met, and if one of them is lost; Stopped if that one has said why.
    """
    rank, count = rank_here(), int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    if not 0 < timeout <= 1e9:
        raise UserError(f"--rank-timeout takes seconds above 0, not {timeout}")
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise RunError(f"rank {rank} has no device: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(local)
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=limit))  # pyright: ignore[reportPrivateImportUsage]
        # The agent's store outlives a restart, and in it the addresses of ranks that have died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        backend = "nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} of {count} cannot meet the others: {str(error).splitlines()[0]}") from error
    try:
        yield Ranks(rank, count, limit)
    except (UserError, RunError) as error:
        if not error.shared:
            with contextlib.suppress(RuntimeError):  # of a store that is gone
                _store().set(SAID, str(rank))
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RunError(_lost(rank, count, timeout)) from error
    finally:
        _leave()


def _leave() -> None:
    """Ends the process group and its threads, which only end when nothing refers to a group of theirs any more.

    A thread gives back the tensors of its last work some time after that work is done. If the interpreter has ended by
    then, it aborts the process. What refers to a group: the default arguments in `torch.distributed.nn.functional`, if
    that is imported (as `torch._dynamo` does for an optimizer) while there is one; the frames of an error on its way
    up; and objects that refer to each other.
    """
    error = sys.exception()
    with deaf():  # or the SIGTERM that ends the others of a rank that died leaves this half done
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a group that has lost a rank
            dist.destroy_process_group()


def _lost(rank: int, count: int, timeout: float) -> str:
    """Which ranks do not answer: those that do say so in the store, which outlives them, and look who else has."""
    try:
        store = _store()
        store.set(f"localgrad/here/{rank}", "1")
        time.sleep(PATIENCE)
        if store.check([SAID]):
            raise Stopped(signal.SIGTERM)  # as whoever started the ranks ends those that live
        silent = [r for r in range(count) if not store.check([f"localgrad/here/{r}"])]
    except RuntimeError:
        silent = []
    who = " and ".join(f"rank {r}" for r in silent) if silent else "another rank"
    return f"{who} of {count} died or did not answer for {timeout:.0f} s: the same command goes on from the last save"


def _store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    return dist.distributed_c10d._get_default_store()
