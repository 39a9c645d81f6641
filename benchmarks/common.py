"""Tables of results and fair timing, for all benchmark scripts."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from localgrad.run.tables import read_csv, write_csv

ROOT = Path(__file__).parents[1]
NAMES = {"bp": "BP", "dgl": "DGL", "predsim": "PredSim", "infopro": "InfoPro", "auglocal": "AugLocal"}
WARM_UP = 2  # So many rounds run first and are not counted.


class Table:
    """A CSV file that grows row by row. After each `add` the whole file is on the disk, with LF line ends.

    Args:
        path: The file. Its folder is made if it is missing.
        key: The columns that identify what was measured. With a key, the rows of an existing file stay, so that a
            script goes on where it stopped. Without one, the first `add` replaces an existing file.
        same: Columns that have the same value in every new row. They come last.
    """

    def __init__(self, path: Path, key: Sequence[str] = (), same: Mapping[str, object] | None = None) -> None:
        self.path, self.key, self.same = path, key, same or {}
        self.rows = read_csv(path) if key and path.exists() else []

    def __contains__(self, values: tuple[object, ...]) -> bool:
        """Whether a row has these values in its key columns."""
        return tuple(map(str, values)) in map(self._key_of, self.rows)

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Appends rows and writes the file. Older rows that have the key of a new one go."""
        new = [{name: str(value) for name, value in {**row, **self.same}.items()} for row in rows]
        replaced = {self._key_of(row) for row in new} if self.key else set()
        self.rows = [*(row for row in self.rows if self._key_of(row) not in replaced), *new]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, self.rows)

    def _key_of(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in self.key)


def read_results(name: str) -> list[dict[str, str]]:
    """The rows of a file in results/. `*` may stand for a part of the name if only one file fits."""
    (path,) = (ROOT / "results").glob(name)
    return read_csv(path)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The text of a table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(method: str) -> str:
    """dgl+deep-man -> DGL + deep MAN."""
    first, _, coupling = method.partition("+")
    return " + ".join(filter(None, (NAMES[first], coupling.replace("-", " ").replace("man", "MAN"))))


def mean_of(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation. One value has no deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def peak_of(row: dict[str, str]) -> str:
    return f"{int(row['peak_bytes']) / 2**20:.0f} MiB"


def seconds_of(step: Callable[[], object]) -> float:
    """Calls `step` once and returns the seconds that it took."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def medians_in_turn(timers: Sequence[Callable[[], float]], repeats: int, warm_up: int = WARM_UP) -> list[float]:
    """Times several things that are to be compared, and returns the median seconds of each.

    They run in turn, round after round, so that a slow moment of the machine slows all of them alike.

    Args:
        timers: Functions that run the thing once and return the seconds that it took.
        repeats: The number of rounds that count.
        warm_up: The number of rounds before them that do not count.
    """
    rounds = [[timer() for timer in timers] for _ in range(warm_up + repeats)]
    return [statistics.median(column) for column in zip(*rounds[warm_up:], strict=True)]


def keep_freed_memory() -> None:
    """Tells the memory allocator of glibc to return nothing to the system. Without glibc, this does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**30)):
            mallopt(option, value)
