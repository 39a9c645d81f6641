"""Runs as processes, and what can befall one: a kill, a power cut, signals, a second process in its folder, a reader
that goes away. The same command then goes on, to the very bits of a run that nothing befell.
"""

from __future__ import annotations

import csv
import itertools
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import numpy as np
import pytest
from ends import MODEL, contents, differences, faults_of_the_record, leftovers
from PIL import Image
from starts import TINY, Fault, Start, group_is_gone, tiny, wait_for

Figure = Callable[[str, int, int], None]
Disturb = Callable[[Path], list[str] | None]

NOTICE = "localgrad: finishing the step, then saving"
STOPPED = re.compile(r"localgrad: stopped at step (\d+) of \d+, saved as (.*/step-\1): the same command goes on .*")


# Kills and signals


def disturb_often(
    count: int, room: Path, flags: tuple[str, ...], other: Path, disturb: Disturb
) -> tuple[int, list[str]]:
    """Disturbs runs until that has happened `count` times, each start in the folder that the last one left, or in a new
    one once its run has finished. How many times all was well, up to the end of that run, and else what was wrong.

    disturb: starts a run into a folder and lets something befall it; what was wrong, or None if the run had finished.
    """
    well, tried, wrong = 0, 0, []
    for n in itertools.count():
        folder, hits = room / f"run-{n}", 0
        while tried < count and (found := disturb(folder)) is not None:
            tried += 1
            hits += not found
            wrong += found
        if not (folder / MODEL).exists():
            code = Start(folder, *flags).end()
            wrong += [f"exit code {code} at the last start"] if code else []
        found = differences(folder, other) if (folder / MODEL).exists() else ["not finished"]
        wrong += found
        well += 0 if found else hits
        if tried == count:
            return well, wrong
    raise AssertionError


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("count", "forked"), [(4, True), pytest.param(50, False, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_if_it_was_not(
    count: int, forked: bool, tmp_path: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    undisturbed(4)  # the first fork waits for its server, which would count among the moments below
    draw, flags = random.Random(3), tiny(5 if forked else 40, "--save-every", "1")
    began, start = time.monotonic(), Start(tmp_path / "undisturbed", *flags, forked=forked)
    assert wait_for((tmp_path / "undisturbed" / MODEL).exists)
    took, unsaved, in_a_save = time.monotonic() - began, 0, 0
    assert start.end() == 0

    def kill(folder: Path) -> list[str] | None:
        nonlocal unsaved, in_a_save
        start = Start(folder, *flags, forked=forked)
        if forked and not unsaved:
            start.until_it_trains()  # a fork is too quick for one of so few moments to be surely before the first save
        else:
            time.sleep(draw.uniform(0, took))
        finished = (folder / MODEL).exists()
        if not finished:
            start.send(SIGKILL, group=True)
        code = start.end()
        if finished:
            return None if code == 0 else [f"exit code {code} of a finished run"]
        unsaved += not any((folder / "checkpoints").glob("step-*"))
        in_a_save += any((folder / "checkpoints").glob("step-*.part"))
        return [] if code == -SIGKILL else [f"exit code {code} before the kill: {start.err}"]

    well, wrong = disturb_often(count, tmp_path, flags, tmp_path / "undisturbed", kill)
    figure("SIGKILL at random moments", count, well)
    figure("of these before the first save", unsaved, unsaved if well == count else 0)
    figure("of these within a save", in_a_save, in_a_save if well == count else 0)
    assert wrong == []
    assert well == count
    assert unsaved
    assert in_a_save or count < 50


@pytest.mark.parametrize(("power_cut", "every", "stride"), [
    (True, "4", 5),
    *(pytest.param(power_cut, every, 1, marks=pytest.mark.slow) for power_cut in (True, False) for every in "14"),
])  # fmt: skip
def test_a_run_killed_at_each_call_of_a_save_goes_on(
    power_cut: bool, every: str, stride: int, tmp_path: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    """Each `stride`-th call is the last of a start; the next start goes on."""
    folder, flags, kills, wrong = tmp_path / "run", tiny(4, "--save-every", every), 0, []
    for _ in range(2):  # the second time all is saved but the weights
        (folder / MODEL).unlink(missing_ok=True)
        for call in itertools.count(1, stride):
            code = Start(folder, *flags, fault=Fault(call, power_cut=power_cut)).end()
            if code != -SIGKILL:
                break
            kills += 1
        wrong += [f"exit code {code}"] if code else differences(folder, undisturbed(4))
    figure(f"{'power cut' if power_cut else 'SIGKILL'} at each flush and rename", kills, 0 if wrong else kills)
    assert wrong == []
    assert kills > 25 / stride


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("count", "forked"), [(4, True), pytest.param(36, False, marks=pytest.mark.slow)])
def test_a_run_that_gets_signals_saves_and_goes_on(
    count: int, forked: bool, tmp_path: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    draw, epochs = random.Random(3), 4 if forked else 20
    plans = itertools.cycle([[SIGTERM], [SIGTERM, SIGTERM], [SIGTERM, SIGINT], [SIGINT], [SIGTERM] * 3, [SIGTERM]])
    flags, other = tiny(epochs), undisturbed(epochs)
    seconds = seconds_of(other)

    def stop(folder: Path) -> list[str] | None:
        start = Start(folder, *flags, forked=forked)
        start.until_it_trains()
        time.sleep(draw.uniform(0, seconds))
        plan = next(plans)
        for number in plan:
            start.send(number)
            time.sleep(draw.uniform(0, 0.005))
        return faults_of_a_stop(start, *plan)

    well, wrong = disturb_often(count, tmp_path, flags, other, stop)
    figure("SIGTERM, once or more, with SIGINT or without, at random moments", count, well)
    assert wrong == []
    assert well == count


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_signals_change_nothing_until_the_process_has_ended(forked: bool, tmp_path: Path, figure: Figure) -> None:
    start = Start(tmp_path / "run", *tiny(200), forked=forked)
    start.until_it_trains()
    start.send(SIGTERM)
    for number in itertools.cycle([SIGINT, SIGTERM]):
        if not start.alive():
            break
        time.sleep(0.01)
        start.send(number)
    wrong = faults_of_a_stop(start, SIGTERM, SIGINT)
    figure("signals from the first to the end of the process", 1, int(wrong == []))
    assert wrong == []


def seconds_of(folder: Path) -> float:
    """Seconds that a run took without its start."""
    with (folder / "summary.csv").open(newline="") as file:
        return float([*csv.DictReader(file)][-1]["seconds"])


def faults_of_a_stop(start: Start, *numbers: int) -> list[str] | None:
    """What was wrong with how a run answered signals, of which Python may see the last first; None if it had finished
    before."""
    code = start.end()
    if (start.folder / MODEL).exists():
        return None
    wrong = [] if code - 128 in numbers else [f"exit code {code} after signals {numbers}"]
    said = [line for line in start.err if line != NOTICE]  # processes that decode may have given the notice too
    saved = STOPPED.fullmatch(said[0]) if len(said) == 1 and NOTICE in start.err else None
    wrong += [] if saved and Path(saved[2]).is_dir() else [f"it said {start.err}"]
    return wrong + leftovers(start.folder)


def test_an_epoch_that_ends_in_a_stop_is_saved_once_and_for_all(tmp_path: Path, figure: Figure) -> None:
    flags = (*tiny(3), "--batch-size", "32")  # so that the timeline is written in the first epoch's last step
    stop = Start(tmp_path / "run", *flags, fault=Fault(8, SIGTERM))
    kill = Start(tmp_path / "run", *flags, fault=Fault(10)) if stop.end() == 143 else stop
    codes = (kill.end(), Start(tmp_path / "run", *flags).end())
    assert codes == (-SIGKILL, 0)
    assert STOPPED.fullmatch(stop.err[-1])[1] == "2"  # pyright: ignore[reportOptionalSubscript]
    found = faults_of_the_record(tmp_path / "run")
    figure("SIGTERM in an epoch's last step, then SIGKILL", 1, int(found == []))
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("count", "forked"), [(2, True), (10, False)])
def test_a_run_with_workers_ends_with_them_and_goes_on(
    count: int, forked: bool, tmp_path: Path, figure: Figure
) -> None:
    flags = (*images(tmp_path / "images"), "--epochs", "3", "--save-every", "2")
    assert Start(tmp_path / "undisturbed", *flags).end() == 0
    draw, seconds, groups = random.Random(3), seconds_of(tmp_path / "undisturbed"), []
    plans = itertools.cycle([(SIGTERM, True), (SIGKILL, False)])

    def stop(folder: Path) -> list[str] | None:
        start = Start(folder, *flags, "--workers", "2", forked=forked)
        start.until_it_trains()
        time.sleep(draw.uniform(0, seconds))
        number, group = next(plans)
        start.send(number, group=group)
        groups.append(start.pid)
        return faults_of_a_stop(start, number) if number == SIGTERM else killed(start)

    well, wrong = disturb_often(count, tmp_path, flags, tmp_path / "undisturbed", stop)
    figure("SIGTERM to a run and its workers, SIGKILL to the run without them", count, well)
    assert wrong == []
    assert well == count
    assert wait_for(lambda: all(group_is_gone(group) for group in groups), 30)


def killed(start: Start) -> list[str] | None:
    code = start.end()
    if (start.folder / MODEL).exists():
        return None
    return [] if code == -SIGKILL else [f"exit code {code}: {start.err}"]


def test_workers_that_have_just_begun_outlive_a_signal(tmp_path: Path, figure: Figure) -> None:
    flags = (*images(tmp_path / "images"), "--epochs", "4", "--workers", "2")
    wrong = faults_of_a_stop(Start(tmp_path / "run", *flags, fault=Fault(early=True)), SIGTERM)
    figure("SIGTERM to workers that have just begun", 1, int(wrong == []))
    assert wrong == []


def images(folder: Path) -> tuple[str, ...]:
    """Flags of a run on small images, which are written."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label, i in itertools.product(("one", "other"), range(count)):
            path = folder / split / label / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return (*TINY, "--data", "image-folder", "--data-dir", str(folder), "--image-size", "32")


# Others about


def test_a_second_process_is_refused_and_the_first_undisturbed(
    tmp_path: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    folder, flags = tmp_path / "run", tiny(4)
    first = Start(folder, *flags)
    assert wait_for((folder / "checkpoints" / "step-4").exists)
    first.send(signal.SIGSTOP)  # so that it surely lives while the others try
    before = contents(folder)
    others = [Start(folder, *flags, *more) for more in ((), ("--resume", "never"))]
    codes, touched = [other.end() for other in others], contents(folder) != before
    first.send(signal.SIGCONT)
    code = first.end()
    figure("a second process in a run's folder", 2, codes.count(2) if code == 0 and not touched else 0)
    assert (codes, code, touched) == ([2, 2], 0, False)
    for other in others:
        assert other.err == [
            f"localgrad: another process is training in {folder}: wait for it, or choose another --out"
        ]
    assert differences(folder, undisturbed(4)) == []


@pytest.mark.parametrize("out", ["closed pipe", pytest.param("/dev/full", marks=pytest.mark.slow)])
def test_a_run_whose_words_nobody_takes_goes_on(
    out: str, tmp_path: Path, undisturbed: Callable[[int], Path], figure: Figure
) -> None:
    os.mkfifo(tmp_path / "closed pipe")
    start = Start(tmp_path / "run", *tiny(4), out=tmp_path / out, forked=out == "closed pipe")
    if out == "closed pipe":
        with (tmp_path / out).open() as reader:
            assert reader.read(1)
    code = start.end()
    ended = (
        (0, [])
        if out == "closed pipe"
        else (1, ["localgrad: what was printed is not complete: No space left on device"])
    )
    well = (code, start.err) == ended and differences(tmp_path / "run", undisturbed(4)) == []
    figure(f"standard output is {out}", 1, int(well))
    assert (code, start.err, well) == (*ended, True)
