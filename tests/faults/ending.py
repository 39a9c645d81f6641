"""`python ending.py FOLDER TIMES FLAGS`: two ranks that train and end, so often, beside two busy loops; prints how many
of them ended with each exit code. They are forked from a process that has imported what a run needs at its start, and
import the rest, such as what the optimizer needs, while they are a group."""

from __future__ import annotations

import collections
import os
import socket
import subprocess
import sys
from pathlib import Path

import sklearn.datasets  # noqa: F401

from localgrad.cli import main
from localgrad.run import commands  # noqa: F401

BUSY = 2


def both(folder: Path, flags: list[str]) -> list[int]:
    """The exit codes of two ranks; in each of these, raises SystemExit."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank in range(2):
        process = os.fork()
        if not process:
            os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(main(["train", *flags, "--out", str(folder)]))
        ranks.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


if __name__ == "__main__":
    place, times, parent = Path(sys.argv[1]), int(sys.argv[2]), os.getpid()
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        ends = [code for i in range(times) for code in both(place / str(i), sys.argv[3:])]
    finally:
        if os.getpid() == parent:  # the ranks pass here too
            for loop in loops:
                loop.kill()
    print(dict(collections.Counter(ends)))
