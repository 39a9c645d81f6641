"""Signals: inside the loop a request that is answered once, outside of it the end, in helpers nothing at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUICK
from torch.utils.data import DataLoader, Dataset

from localgrad.cli import main
from localgrad.core.errors import RunError
from localgrad.run import data as datasets
from localgrad.run import readers, signals
from localgrad.run.signals import NOTICE, Stopped, StopRequest, outlive_signals, sigterm_raises
from localgrad.run.step import Stepper

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.fixture(autouse=True)
def others() -> Iterator[list[object]]:
    """Handlers of somebody else, which must be back after each test. (A shell starts what shall run in the background
    with SIGINT ignored.)"""
    before = [
        signal.signal(signal.SIGTERM, lambda *_: None), signal.signal(signal.SIGINT, signal.default_int_handler),
    ]  # fmt: skip
    mine = handlers()
    yield mine
    after = handlers()
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)
    assert after == mine


def in_a_thread(job: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert errors == []


# The request


def test_handlers_are_there_inside_the_context_only_and_nothing_is_asked(
    others: list[object], capfd: pytest.CaptureFixture[str]
) -> None:
    request = StopRequest()
    assert handlers() == others
    with request as stop:
        assert stop is request
        assert not set(handlers()) & set(others)
        stop.check()
        assert stop.number is None
    assert handlers() == others
    assert capfd.readouterr().err == ""


def test_handlers_come_back_after_an_error_and_from_a_context_in_a_context(others: list[object]) -> None:
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert handlers() == others
    with StopRequest() as outer:
        between = handlers()
        with StopRequest() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert handlers() == between
        assert (inner.number, outer.number) == (signal.SIGTERM, None)


@BOTH
def test_the_first_signal_asks_and_says_so_once(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as stop:
        for each in (number, signal.SIGINT, signal.SIGTERM, number):
            signal.raise_signal(each)
            assert stop.number == number
        for _ in range(2):  # it stays asked
            with pytest.raises(Stopped, match=r"^stopped$") as caught:
                stop.check()
            assert (caught.value.number, caught.value.exit_code) == (number, code)
    assert capfd.readouterr().err == NOTICE.decode() == "localgrad: finishing the step, then saving\n"


def test_a_signal_from_outside_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while stop.number is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.number == signal.SIGTERM


def test_a_closed_standard_error_does_not_disturb_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise BrokenPipeError

    with StopRequest() as stop:
        monkeypatch.setattr(os, "write", broken)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.undo()
        assert stop.number == signal.SIGINT


def test_outside_the_main_thread_nothing_is_asked(others: list[object]) -> None:
    def job() -> None:
        with StopRequest() as stop:
            assert handlers() == others
            stop.check()

    in_a_thread(job)
    assert handlers() == others


def test_what_stopped_says() -> None:
    assert Stopped(signal.SIGTERM).exit_code == 143
    assert str(Stopped(2, "at step 3")) == "at step 3"
    with pytest.raises(Stopped) as caught, sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


# Processes that decode images


class Struck(Dataset):
    """Each sample is read in a process that both signals reach, and that then takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __getitem__(self, index: int) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        time.sleep(self.seconds)
        return os.getpid()

    def __len__(self) -> int:
        return 3


def struck(seconds: float) -> list[int]:
    how = {"num_workers": 1, "batch_size": None, "worker_init_fn": outlive_signals}
    try:
        return list(DataLoader(Struck(seconds), **how))
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # or a worker that hangs would hang the tests


def test_a_worker_outlives_signals(others: list[object]) -> None:
    pids = struck(0.02)
    assert len(pids) == 3
    assert len(set(pids)) == 1
    assert os.getpid() not in pids
    assert handlers() == others


def test_a_worker_that_was_to_end_and_hangs_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signals.GRACE >= 60
    monkeypatch.setattr(signals, "GRACE", 1)
    with pytest.raises(RuntimeError, match=r"killed by signal: Alarm|exited unexpectedly"):
        struck(15)


@pytest.fixture
def data(tmp_path: Path) -> datasets.Data:
    """Four test images of two classes, whose red is their number."""
    for split in ("train", "val"):
        for i, name in enumerate(("ant", "ant", "bee", "bee")):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    return datasets.load("image-folder", data_dir=str(tmp_path), image_size=8)


def test_the_workers_of_an_image_folder_outlive_signals(data: datasets.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    here, decode = os.getpid(), readers.decode

    def killed(path: Path) -> object:
        assert os.getpid() != here
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return decode(path)

    monkeypatch.setattr(readers, "decode", killed)
    images = torch.cat([x for x, _ in datasets.eval_batches(data, batch_size=2, workers=2)])
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(4))


def test_workers_end_with_the_batches_even_while_an_error_is_looked_at(
    data: datasets.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(readers, "decode", broken)
    with pytest.raises(RunError) as caught:
        list(datasets.eval_batches(data, batch_size=2, workers=2))
    left = multiprocessing.active_children()  # the traceback still refers to the loader
    del caught
    assert left == []


# The command line


@BOTH
def test_a_signal_while_the_data_is_read_ends_the_command(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], others: list[object],
) -> None:  # fmt: skip
    def slow(*_: object, **__: object) -> None:
        signal.raise_signal(number)
        pytest.fail("went on")

    monkeypatch.setattr(datasets, "load", slow)
    assert main(["train", *QUICK, "--out", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err == "localgrad: stopped\n"
    assert handlers() == others
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_signal_while_the_loop_runs_is_answered_after_a_save(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], others: list[object],
) -> None:  # fmt: skip
    call = Stepper.__call__

    def struck(self: Stepper, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> object:
        for each in (number, signal.SIGTERM, signal.SIGINT) if self.step == 1 else ():
            signal.raise_signal(each)
        return call(self, batches)

    monkeypatch.setattr(Stepper, "__call__", struck)
    run = tmp_path / "run"
    assert main(["train", *QUICK, "--out", str(run)]) == code
    notice, said = capfd.readouterr().err.splitlines()
    assert notice + "\n" == NOTICE.decode()
    where = f"saved as {run / 'checkpoints' / 'step-2'}: the same command goes on from there"
    assert said == f"localgrad: stopped at step 2 of 4, {where}"
    assert handlers() == others


@pytest.mark.parametrize("argv", [["--version"], ["list"], ["trian"], ["eval", "nowhere"], ["train", "--help"], []])
def test_a_command_gives_the_handlers_back_however_it_ends(argv: list[str], others: list[object]) -> None:
    try:
        main(argv)
    except SystemExit:
        assert "--help" in argv
    assert handlers() == others
