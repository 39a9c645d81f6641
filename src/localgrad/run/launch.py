"""`localgrad train --nproc N` or `--pipeline N`: torchrun's agent starts the ranks, a sentence tells how they end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from localgrad.core.errors import RunError, UserError
from localgrad.run.arguments import Train
from localgrad.run.files import check_system
from localgrad.run.modes import MOST_SECONDS, check_pipeline
from localgrad.run.signals import Stopped

SAVE = 30.0  # seconds that a rank has to save, once it has heard that it shall end
CODES = (2, 3, 130, 143)  # of ranks that have said why they ended


def launch(args: Sequence[str], command: Train) -> int:
    """Runs `localgrad ARGS`, which were parsed as `command`, as several ranks on this machine and returns their exit
    code.

    All ranks are started again as often as the command allows when one has died; they go on from the last checkpoint.
    Raises RunError that names the rank which died, Stopped when a signal ended them, and UserError.
    """
    check_system()
    for name, value, least in (
        ("--nproc", command.nproc, 1), ("--pipeline", command.pipeline, 1), ("--restarts", command.restarts, 0)
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} takes {least} or more, not {value}")
    if command.nproc > 1 and command.pipeline > 1:
        raise UserError("processes share either batches (--nproc) or blocks (--pipeline): take one of the two")
    if command.pipeline > 1 and command.recipe.blocks != "auto":
        check_pipeline(command.recipe)  # once, and not on each rank and with each restart
    count = max(command.nproc, command.pipeline)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its tables; the sentence comes from us
    # As many threads for all as one process would have.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    try:
        left = command.restarts
        while failed := _failed(args, count):
            rank, failure = failed
            # What is refused once would be refused each time.
            if left == 0 or failure.exitcode == UserError.exit_code:
                break
            left -= 1
    except SignalException as stopped:
        raise Stopped(int(stopped.sigval), "stopped with all ranks") from None
    if not failed:
        return 0
    if failure.exitcode in CODES:
        return failure.exitcode
    how = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    raise RunError(f"rank {rank} of {count} ended with {how}: the same command goes on from the last save")


def _failed(args: Sequence[str], count: int) -> tuple[int, ProcessFailure] | None:
    """Runs the ranks once. The rank whose end explains the others', and how it ended; None if all have finished."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, shutdown_timeout=int(MOST_SECONDS + SAVE),
    )  # fmt: skip
    try:
        elastic_launch(config, entrypoint=sys.executable)("-m", "localgrad", *args)
    except ChildFailedError as error:
        return min(error.failures.items(), key=lambda item: _first(item[1]))
    return None


def _first(failure: ProcessFailure) -> tuple[int, int]:
    """Which end explains the others: a kill, then what a rank has said, then the ends that followed from it (the agent
    ends the others by SIGTERM)."""
    followed = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return (0 if failure.exitcode < 0 and not followed else 2 if followed else 1), failure.timestamp
