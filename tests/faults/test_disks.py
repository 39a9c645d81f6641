"""Disks that take no more, and writes that are cut off: what is whole stays, and the same command goes on once there is
room, to the very bits of a run that nothing befell.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGTERM

import pytest
from ends import MODEL, contents, differences, last_checkpoint, leftovers
from starts import Fault, Start, tiny

Figure = Callable[[str, int, int], None]


WEIGHTS, OPTIMIZERS = 500_000, 1_500_000  # bytes: less than a checkpoint's file of the backbone, or of the rest, has


@pytest.mark.parametrize(
    ("limit", "weights_only"),
    [
        (OPTIMIZERS, False),
        pytest.param(WEIGHTS, False, marks=pytest.mark.slow),
        pytest.param(WEIGHTS, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_within_a_write_leaves_nothing_of_it(
    limit: int, weights_only: bool, tmp_path: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    folder = tmp_path / "run"
    if weights_only:
        shutil.copytree(undisturbed(4), folder, symlinks=True)
        (folder / MODEL).unlink()
    torn = Start(folder, *tiny(4), fault=Fault(limit=limit, torn=True)).end()
    code = Start(folder, *tiny(4)).end()
    found = differences(folder, undisturbed(4))
    figure(f"kill within the write of {'the weights' if weights_only else 'a checkpoint'}", 1, int(not found))
    assert (torn, code, found) == (-signal.SIGXFSZ, 0, [])


def stopped(folder: Path, flags: tuple[str, ...]) -> Path:
    """The checkpoint of a run that was stopped soon after its start."""
    start = Start(folder, *flags)
    start.until_it_trains()
    start.send(SIGTERM)
    assert start.end() == 143
    return last_checkpoint(folder)


@pytest.mark.parametrize(("limit", "code"), [(WEIGHTS, 3), pytest.param(OPTIMIZERS, 0, marks=pytest.mark.slow)])
def test_a_disk_that_takes_no_checkpoint_costs_no_older_one(
    limit: int, code: int, tmp_path: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    folder, flags = tmp_path / "run", tiny(4)
    good = stopped(folder, flags)
    before = contents(folder / "checkpoints")
    full = Start(folder, *flags, fault=Fault(limit=limit))
    ended = full.end()
    intact = contents(folder / "checkpoints") == before and leftovers(folder) == []
    again = Start(folder, *flags).end()
    weights = (folder / MODEL).read_bytes() == (undisturbed(4) / MODEL).read_bytes()
    figure("disk full for a checkpoint", 1, int(intact and weights and (ended, again) == (code, 0)))
    assert (ended, again, intact, weights) == (code, 0, True, True)
    assert re.search(rf"cannot write .*step-16.*: .*File too large.*; the last checkpoint is {good}\n", full.out)
    assert refusals(full, "File too large") == (1 if code else 0)  # the weights alone may fit
    assert not code or differences(folder, undisturbed(4)) == []


def refusals(start: Start, why: str) -> int:
    """Counts the sentences on stderr, which must all be about the final weights."""
    assert all(re.fullmatch(rf"localgrad: cannot write {start.folder / MODEL}: .*{why}.*", line) for line in start.err)
    return len(start.err)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4500k", "tmpfs", str(place)]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs a right that is missing here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_with_room_for_one_checkpoint_keeps_it(
    small_disk: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    folder, flags = small_disk / "run", tiny(4)
    full = Start(folder, *flags)
    code, left = full.end(), leftovers(folder)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = Start(folder, *flags)
    well = (code, left, again.end()) == (3, [], 0)
    figure("disk full for the second checkpoint", 1, int(well))
    assert well, (code, left)
    assert re.search(
        r"cannot write .*step-16.*: .*No space left on device.*; the last checkpoint is .*step-4\n", full.out
    )
    assert refusals(full, "No space left on device") == 1
    assert "step-4, at step 4 of 16" in again.out
    assert differences(folder, undisturbed(4)) == []
