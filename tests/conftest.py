"""One thread a test process: two run beside each other, and their results must not depend on the machine's cores.

`figure` collects what a test of faults tried and what came of it; the figures are shown after the run, and written to
the CSV file that `--figures` names.
"""

from __future__ import annotations

import csv
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch starts, and for the processes that tests start

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored, and tests send it
FIGURES = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="CSV file for the figures of the tests of faults")


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Callable[[str, int, int], None]:
    """`figure(fault, tried, passed)`: a row of the table of faults, to which calls of the same name add up. Call it
    before the assertion on `passed`."""
    began = time.monotonic()
    rows = pytestconfig.stash.setdefault(FIGURES, {})

    def add(fault: str, tried: int, passed: int) -> None:
        row = rows.setdefault(fault, {"fault": fault, "tried": 0, "passed": 0, "seconds": 0.0})
        row["tried"] += tried
        row["passed"] += passed
        row["seconds"] = round(row["seconds"] + time.monotonic() - began, 1)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = list(config.stash.get(FIGURES, {}).values())
    for row in rows:
        terminalreporter.write_line("{fault}: {passed} of {tried}, {seconds} s".format(**row))
    place = config.getoption("--figures")
    if rows and place is not None:
        used = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        used |= {"cpu": torch.cpu.get_capabilities().get("cpu_name", ""), "date": time.strftime("%Y-%m-%d")}
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *used], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | used for row in rows)
