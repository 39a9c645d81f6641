"""Runs of two ranks on this machine, and what can befall one of them. gloo on the CPU; NCCL is the same code."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ends import MODEL, differences, last_checkpoint
from starts import Start, tiny, wait_for

from localgrad.cli import main
from localgrad.core.errors import RunError
from localgrad.run.folder import read_environment, summary_rows
from localgrad.run.ranks import joined
from localgrad.run.runlog import scores
from localgrad.run.signals import Stopped

FLAGS = ("--save-every", "5", "--nproc", "2")
SINGLE = (
    "localgrad: a rank's share of a batch is 1 image, too few for an auxiliary, where a batch norm gets 1 value a "
    "channel: take 2 images or more, or a head that has no such norm, as --head 0c1f"
)
EPOCHS = 12  # seconds of training: time for what befalls it


def pids(folder: Path) -> dict[int, int]:
    """The processes that train into the folder, by their rank; the one that started them is rank -1."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            environment = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended, or is somebody else's
        if str(folder).encode() in words:
            rank = next((int(e.removeprefix(b"RANK=")) for e in environment if e.startswith(b"RANK=")), -1)
            found[rank] = int(place.name)
    return found


def until_step(folder: Path, step: int) -> None:
    """Waits until the run has saved a step as late as that one."""
    assert wait_for(lambda: any(int(p.name[5:]) >= step for p in folder.glob("checkpoints/step-*[0-9]")))


def is_gone(folder: Path) -> bool:
    return wait_for(lambda: not pids(folder), 60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "run"
    start = Start(folder, *tiny(EPOCHS, *FLAGS))
    assert start.end() == 0, start.err
    assert read_environment(folder)["replicas"] == "2"
    assert start.out.count("epoch 12/12") == 1  # one rank speaks
    return folder


def test_the_scores_are_those_of_all_test_images_once(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(undisturbed)]) == 0
    row = summary_rows(undisturbed)[-1]
    assert f"360 images of digits, float32: {scores(row)}" in capsys.readouterr().out


@pytest.mark.parametrize("kills", [[(15, 0)], pytest.param([(10, 1), (25, 0)], marks=pytest.mark.slow)])
def test_a_killed_rank_costs_nothing_with_restarts(
    kills: list[tuple[int, int]], tmp_path: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    start = Start(folder, *tiny(EPOCHS, *FLAGS, "--restarts", "5"))
    for step, rank in kills:
        until_step(folder, step)
        os.kill(pids(folder)[rank], signal.SIGKILL)
        time.sleep(2)  # the others are ended too, and all begin again
    assert start.end() == 0, start.err
    assert differences(folder, undisturbed) == []
    assert start.out.count("going on from") >= len(kills)
    assert is_gone(folder)


def test_a_killed_rank_ends_the_others_with_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start = Start(folder, *tiny(EPOCHS, *FLAGS))
    until_step(folder, 10)
    os.kill(pids(folder)[1], signal.SIGKILL)
    assert start.end() == 3
    assert "localgrad: rank 1 of 2 ended with SIGKILL: the same command goes on from the last save" in start.err
    assert "Traceback" not in "".join(start.err)
    assert is_gone(folder)


def test_a_pipeline_that_is_killed_and_stopped_goes_on_as_one_process(tmp_path: Path) -> None:
    """To the bits of a run that was on one process all the time."""
    flags = tiny(EPOCHS, "--save-every", "5", "--step-as-you-go", "--lag", "2")
    folder, alone = tmp_path / "run", tmp_path / "alone"
    start = Start(folder, *flags, "--pipeline", "2", "--restarts", "1")
    until_step(folder, 10)
    os.kill(pids(folder)[1], signal.SIGKILL)
    time.sleep(2)  # the other is ended too, and both begin again
    until_step(folder, 25)
    start.send(signal.SIGTERM)
    assert start.end() == 143, start.err
    assert start.out.count("pipeline: ") == 2
    assert start.out.count("going on from") == 1
    assert is_gone(folder)
    for place in (folder, alone):
        once = Start(place, *flags)
        assert once.end() == 0, once.err
    assert differences(folder, alone, memory=False) == []


@pytest.mark.slow
def test_a_later_rank_says_what_it_alone_has_met(tmp_path: Path) -> None:
    flags = tiny(EPOCHS, "--step-as-you-go", "--coupling", "none", "--block-lr", "1,1,1,1e38", "--pipeline", "2")
    start = Start(tmp_path / "run", *flags)
    assert start.end() == 3
    said = [line for line in start.err if line.startswith("localgrad: ")]
    assert len(said) == 1, start.err
    assert re.match(r"localgrad: the loss in block 3 \(layer3.2\) is (nan|inf) at step \d: ", said[0])
    assert is_gone(tmp_path / "run")


def end_of(rank: int, port: int, place: Path) -> None:
    """Ends as the ranks of a run do whose second meets a fault, and then takes long to go away."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2")
    try:
        with joined("cpu", 30) as ranks:
            if ranks.rank == 1:
                raise RunError("the loss is nan")
            dist.all_reduce(torch.ones(1))
    except (RunError, Stopped) as error:
        (place / str(rank)).write_text(f"{type(error).__name__}: {error}")
    wait_for(lambda: (place / "0").exists(), 20)


def test_a_rank_is_silent_where_another_has_said_why(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    method = multiprocessing.get_context("forkserver")
    ranks = [method.Process(target=end_of, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [(tmp_path / str(r)).read_text() for r in range(2)] == ["Stopped: stopped", "RunError: the loss is nan"]


@pytest.mark.slow
def test_torchrun_itself_starts_and_restarts_the_ranks(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "localgrad"]
    command = [sys.executable, *torchrun, "train", *tiny(EPOCHS, "--save-every", "5"), "--out", str(folder)]
    with subprocess.Popen(command, start_new_session=True) as process:
        until_step(folder, 10)
        os.kill(pids(folder)[1], signal.SIGKILL)
        assert process.wait(120) == 0
    assert differences(folder, undisturbed) == []
    assert is_gone(folder)


@pytest.mark.slow  # a rank that does not hear its SIGTERM is given a minute and a half
@pytest.mark.parametrize("share", [("--nproc", "2"), ("--pipeline", "2", "--step-as-you-go", "--lag", "2")])
def test_a_rank_that_hangs_is_named(tmp_path: Path, share: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    start = Start(folder, *tiny(EPOCHS, "--save-every", "5", *share, "--rank-timeout", "5"))
    until_step(folder, 10)
    began = time.monotonic()
    os.kill(pids(folder)[1], signal.SIGSTOP)
    assert start.end() == 3
    assert time.monotonic() - began < 120
    sentence = "localgrad: rank 1 of 2 died or did not answer for 5 s: the same command goes on from the last save"
    assert sentence in start.err
    assert is_gone(folder)


@pytest.mark.slow  # that of a pipeline, below, is not
def test_sigterm_saves_once_and_the_same_command_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    start = Start(folder, *tiny(EPOCHS, *FLAGS))
    until_step(folder, 10)
    start.send(signal.SIGTERM)
    assert start.end() == 143, start.err
    stopped = [line for line in start.err if re.match(r"localgrad: stopped at step \d+ of 48, saved as", line)]
    assert len(stopped) == 1
    assert last_checkpoint(folder).name in stopped[0]
    assert is_gone(folder)
    again = Start(folder, *tiny(EPOCHS, *FLAGS))
    assert again.end() == 0, again.err
    assert differences(folder, undisturbed) == []


def test_a_run_moves_between_one_process_and_two(tmp_path: Path) -> None:
    """With batch norm over all ranks, two are one process up to rounding, and go on where one was."""
    synced = ("--sync-batch-norm", "--lr", "0.01")
    for name, nproc in (("one", ("1", "1")), ("moves", ("1", "2"))):
        for epochs, count in zip(("2", "4"), nproc, strict=True):
            start = Start(tmp_path / name, *tiny(int(epochs), *synced), "--nproc", count)
            assert start.end() == 0, start.err
    one, moves = (summary_rows(tmp_path / name) for name in ("one", "moves"))
    assert one[:2] == [
        {**row, **{n: one[i][n] for n in ("peak_rss_bytes", "seconds")}} for i, row in enumerate(moves[:2])
    ]
    assert moves[3]["train_loss"] == pytest.approx(one[3]["train_loss"], rel=0.02)
    assert (tmp_path / "moves" / MODEL).exists()


THREADS = """
import atexit, os
from pathlib import Path

def write():
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    Path({folder!r}, "threads-" + os.environ["RANK"]).write_text(" ".join(n for n in names if "gloo" in n))

if "RANK" in os.environ:
    atexit.register(write)
"""
AS_YOU_GO = ("--step-as-you-go", "--coupling", "none")


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--nproc", "2"), 0),
        pytest.param(("--nproc", "2", *AS_YOU_GO, "--block-lr", "1e38,1,1,1"), 3, marks=pytest.mark.slow),
        pytest.param(("--pipeline", "2", "--step-as-you-go", "--lag", "2"), 0, marks=pytest.mark.slow),
        pytest.param(("--pipeline", "2", *AS_YOU_GO, "--block-lr", "1,1,1,1e38"), 3, marks=pytest.mark.slow),
    ],
)
def test_no_thread_of_the_group_outlives_it(
    flags: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does aborts the process as it ends, if it is late to give back its last tensor."""
    (tmp_path / "sitecustomize.py").write_text(THREADS.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    start = Start(tmp_path / "run", *tiny(1, *flags), forked=False)
    assert start.end() == code, start.err
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "flags"), [(100, ("--nproc", "2")), (20, ("--pipeline", "2", "--step-as-you-go", "--lag", "2"))]
)
def test_ranks_end_cleanly_beside_other_load(times: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    script = [sys.executable, str(Path(__file__).with_name("ending.py")), str(tmp_path), str(times)]
    run = subprocess.run([*script, *tiny(1, *flags)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == str({0: 2 * times}), run.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nproc", "3"), "localgrad: 3 ranks cannot share a batch of 16 images: take a multiple of 3"),
        (("--pipeline", "2"), "localgrad: a pipeline steps each block as it goes: add --step-as-you-go"),
        (
            ("--nproc", "3", "--restarts", "2"),
            "localgrad: 3 ranks cannot share a batch of 16 images: take a multiple of 3",
        ),
        (("--nproc", "2", "--rank-timeout", "nan"), "localgrad: --rank-timeout takes seconds above 0, not nan"),
        (("--nproc", "2", "--batch-size", "2", "--restarts", "2", "--head", "dgl"), SINGLE),
        (("--nproc", "2", "--batch-size", "2", "--accumulate", "2", "--head", "dgl"), SINGLE),
    ],
)
def test_what_cannot_be_shared_is_refused_once(flags: tuple[str, ...], says: str, tmp_path: Path) -> None:
    start = Start(tmp_path / "run", *tiny(1, *flags))
    assert start.end() == 2
    assert start.err == [says]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nproc", "0"), "--nproc takes 1 or more, not 0"),
        (("--pipeline", "-2"), "--pipeline takes 1 or more, not -2"),
        (("--nproc", "2", "--restarts", "-1"), "--restarts takes 0 or more, not -1"),
        (("--nproc", "2", "--pipeline", "2"), "processes share either batches (--nproc) or blocks (--pipeline): take "),
    ],
)
def test_numbers_that_start_nothing(flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"localgrad: {says}")
