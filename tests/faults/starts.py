"""Starts of `localgrad train` for tests of faults: as a command in a process of its own, or forked from a process that
has imported all that a run needs. A fork takes half a second instead of four, can die at a chosen point, and forks the
ranks of a run with several processes from itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["localgrad.run.launch", "localgrad.run.commands", "sklearn.datasets", "torch._dynamo"])
PATIENCE = 120.0  # seconds
COUNTER = itertools.count()
TINY = ("--model", "resnet20", "--batch-size", "16", "--precision", "float32", "--head", "1c2f")


def tiny(epochs: int, *more: str) -> tuple[str, ...]:
    """Flags of a run of four steps an epoch, each of which takes some hundredths of a second."""
    return (*TINY, "--limit-train", "64", "--epochs", str(epochs), *more)


@dataclass(frozen=True)
class Fault:
    """What befalls a forked run. At its `call`-th call of os.fsync or os.replace it gets the signal `number`; with
    `power_cut` files then keep their content only if they were flushed. `limit`: bytes that a file may have, beyond
    which a write fails, or with `torn` ends the process. `early`: the whole group gets SIGTERM when a process that
    decodes images has taken PyTorch's handlers, but not yet ours."""

    call: int = 0
    number: int = signal.SIGKILL
    power_cut: bool = False
    limit: int = 0
    torn: bool = False
    early: bool = False


class Start:
    """One start of a run into `folder`, in a session of its own. What it says goes to files beside the folder, or into
    `out`."""

    def __init__(
        self, folder: Path, *flags: str, fault: Fault | None = None, forked: bool = True, out: Path | None = None
    ) -> None:
        self.argv = ["train", *flags, "--out", str(folder)]
        self.folder, self._config = folder, folder / "config.yaml"
        self._before, self._began = self._written(), time.monotonic()
        name = f"{folder.name}-{next(COUNTER)}"
        self._out, self._err = out or folder.with_name(f"{name}.out"), folder.with_name(f"{name}.err")
        if forked:
            self.process = FORKS.Process(target=_run, args=(self.argv, folder, self._out, self._err, fault or Fault()))
            self.process.start()
        else:
            command = [sys.executable, "-m", "localgrad", *self.argv]
            with self._out.open("wb") as stdout, self._err.open("wb") as stderr:
                self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> list[str]:
        return self._err.read_text().splitlines()

    def until_it_trains(self) -> float:
        """Waits until the run has its folder, and for the end if it never does. Seconds since the start."""
        wait_for(lambda: self._written() != self._before or not self.alive())
        return time.monotonic() - self._began

    def send(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> int:
        """Waits for the end: the exit code, or less than 0 for a signal."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(PATIENCE)
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def alive(self) -> bool:
        popen = self.process
        return popen.poll() is None if isinstance(popen, subprocess.Popen) else popen.is_alive()

    def _written(self) -> int:
        return self._config.stat().st_mtime_ns if self._config.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not (fulfilled := condition()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return fulfilled


def children(parent: int) -> list[int]:
    """The processes that a process has started, the oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return sorted(found)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _run(argv: list[str], folder: Path, out: Path, err: Path, fault: Fault) -> None:
    """The forked process."""
    from localgrad.cli import main
    from localgrad.run import launch

    launch.elastic_launch = _forked_ranks
    multiprocessing.set_start_method(None, force=True)  # not by another server of forks
    os.setsid()
    for handle, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), handle)
    if fault.call:
        Caller(folder, fault)
    if fault.limit:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit, fault.limit))
    if fault.torn:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and the write fails
    if fault.early:
        _signal_the_group_from_a_worker()
    sys.argv[1:] = argv
    sys.exit(main())  # without arguments, because then it ends the process as the command does


def _forked_ranks(config: LaunchConfig, entrypoint: str) -> Callable[..., object]:
    """In place of `elastic_launch`, which starts each rank as a new Python."""
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    launcher = elastic_launch(dataclasses.replace(config, start_method="fork"), _rank)
    return lambda *words: launcher(words[2:])  # without "-m", "localgrad"


def _rank(argv: Sequence[str]) -> None:
    """One rank; at its end it writes the threads of process groups that are left into a file beside the folder."""
    from localgrad.cli import main

    sys.argv[1:] = argv
    code = main()
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    Path(f"{argv[-1]}.threads-{os.environ['RANK']}").write_text(" ".join(name for name in names if "gloo" in name))
    sys.exit(code)


def _signal_the_group_from_a_worker() -> None:
    from torch.utils.data._utils import signal_handling

    take = signal_handling._set_worker_signal_handlers  # pyright: ignore[reportPrivateImportUsage]

    def take_and_signal() -> None:
        take()
        os.killpg(0, signal.SIGTERM)

    signal_handling._set_worker_signal_handlers = take_and_signal  # pyright: ignore[reportPrivateImportUsage]


class Caller:
    """Sends this process the fault's signal before its `call`-th call of os.fsync or os.replace does anything."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.folder, self.fault, self.left = folder, fault, fault.call
        self.flushed = {_stamp(p.stat()) for p in self._files()}  # what an earlier start has left
        self.fsync, self.replace = os.fsync, os.replace
        os.fsync, os.replace = self._fsync, self._replace

    def _fsync(self, handle: int) -> None:
        self._count()
        self.fsync(handle)
        self.flushed.add(_stamp(os.fstat(handle)))

    def _replace(self, source: Path, place: Path) -> None:
        self._count()
        self.replace(source, place)

    def _count(self) -> None:
        self.left -= 1
        if self.left:
            return
        for path in self._files() if self.fault.power_cut else ():
            if _stamp(path.stat()) not in self.flushed:
                os.truncate(path, 0)
        os.kill(os.getpid(), self.fault.number)

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
