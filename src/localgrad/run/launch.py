"""Starts the ranks of `localgrad train --nproc N` or `--pipeline N` with torchrun's agent, and reports how they end."""

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
from localgrad.run.modes import MOST_SECONDS, check_pipeline, check_shards
from localgrad.run.ranks import check_timeout
from localgrad.run.signals import Stopped

SAVE = 30.0  # Seconds that a rank has to save after it was asked to end.
CODES = (2, 3, 130, 143)  # A rank that ends with one of these exit codes has printed the reason.


def launch(args: Sequence[str], command: Train) -> int:
    """Runs a command line, which was parsed as `command`, as several ranks on this machine. Returns their exit code.

    If a rank dies, all ranks are started again and go on from the last checkpoint, as often as the command allows.

    Raises:
        UserError: The command asks for processes that cannot work together.
        RunError: A rank died once more than the command allows. The sentence names it.
        Stopped: A signal ended the ranks.
    """
    _check(command)
    count = command.nproc * command.pipeline
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # It prints tables of the errors.
    # All processes together have as many threads as one process would have.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    try:
        left = command.restarts
        while failed := _failed(args, count):
            rank, failure = failed
            if left == 0 or failure.exitcode == UserError.exit_code:  # A retry would end in the same error.
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


def _check(command: Train) -> None:
    """Raises UserError unless the processes can work together. It is checked once, and not by each rank."""
    check_timeout(command.rank_timeout)
    check_system()
    for name, value, least in (
        ("--nproc", command.nproc, 1), ("--pipeline", command.pipeline, 1), ("--restarts", command.restarts, 0)
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} takes {least} or more, not {value}")
    if command.share == "weights":
        check_shards(command.recipe, command.nproc)
    if command.pipeline > 1 and command.recipe.blocks != "auto":
        check_pipeline(command.recipe)


def _failed(args: Sequence[str], count: int) -> tuple[int, ProcessFailure] | None:
    """Runs the ranks once. Returns the rank whose end explains the others', and how it ended; None if all finished."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, shutdown_timeout=int(MOST_SECONDS + SAVE),
    )  # fmt: skip
    try:
        elastic_launch(config, entrypoint=sys.executable)("-m", "localgrad", *args)
    except ChildFailedError as error:
        return min(error.failures.items(), key=lambda item: _order(item[1]))
    return None


def _order(failure: ProcessFailure) -> tuple[int, int]:
    """The smallest of the failures explains the others: a kill comes first, then an error that a rank has printed.
    SIGTERM comes last, because the agent sends it to the other ranks when one has failed."""
    followed = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return (0 if failure.exitcode < 0 and not followed else 2 if followed else 1), failure.timestamp
