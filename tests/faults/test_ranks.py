"""Runs of two ranks on this machine, and what can befall one of them. gloo on the CPU; NCCL is the same code."""

from __future__ import annotations

import collections
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ends import differences, last_checkpoint
from safetensors.torch import load_file
from starts import Start, children, group_is_gone, tiny, wait_for

from localgrad.cli import main
from localgrad.core.errors import RunError
from localgrad.run import ranks as run_ranks
from localgrad.run.folder import read_environment, summary_rows
from localgrad.run.ranks import joined
from localgrad.run.runlog import scores
from localgrad.run.signals import Stopped

EPOCHS = 6  # long enough for what befalls the run
TWO = ("--nproc", "2", "--save-every", "5")
PIPELINE = ("--pipeline", "2", "--step-as-you-go", "--lag", "2")
LONG = ("--pipeline", "3", *PIPELINE[2:])
DIVERGES = ("--step-as-you-go", "--coupling", "none", "--block-lr")
STATISTICS = ("num_batches_tracked", "running_mean", "running_var")
SINGLE = (
    "a rank's share of a batch is 1 image, too few for an auxiliary, where a batch norm gets 1 value a channel: "
    "take 2 images or more, or a head that has no such norm, as --head 0c1f"
)


def until_step(folder: Path, step: int) -> None:
    """Waits until the run has saved a step as late as that one."""
    assert wait_for(lambda: any(int(p.name[5:]) >= step for p in folder.glob("checkpoints/step-*[0-9]")))


def until_it_goes_on(start: Start, times: int) -> None:
    """Waits until the ranks have started again, so often."""
    assert wait_for(lambda: start.out.count("going on from") == times)


def kill_rank(rank: int, start: Start | subprocess.Popen) -> None:
    os.kill(children(start.pid)[rank], signal.SIGKILL)


def is_gone(start: Start) -> bool:
    return wait_for(lambda: group_is_gone(start.pid), 60)


def threads_left(folder: Path, ranks: int = 2) -> list[str]:
    """The threads of process groups with which each rank has ended. One aborts the process as it ends, if it is late
    to give back its last tensor."""
    return [Path(f"{folder}.threads-{rank}").read_text() for rank in range(ranks)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "run"
    start = Start(folder, *tiny(EPOCHS, *TWO))
    assert start.end() == 0, start.err
    assert read_environment(folder)["replicas"] == "2"
    assert start.out.count(f"epoch {EPOCHS}/{EPOCHS}:") == 1  # one rank speaks
    assert threads_left(folder) == ["", ""]
    return folder


def test_the_scores_are_those_of_all_test_images_once(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(undisturbed)]) == 0
    row = summary_rows(undisturbed)[-1]
    assert f"360 images of digits, float32: {scores(row)}" in capsys.readouterr().out


@pytest.mark.parametrize("kills", [[(10, 0)], pytest.param([(10, 1), (15, 0)], marks=pytest.mark.slow)])
def test_a_killed_rank_costs_nothing_with_restarts(
    kills: list[tuple[int, int]], tmp_path: Path, undisturbed: Path
) -> None:
    start = Start(tmp_path / "run", *tiny(EPOCHS, *TWO, "--restarts", "5"))
    for count, (step, rank) in enumerate(kills, 1):
        until_step(tmp_path / "run", step)
        kill_rank(rank, start)
        until_it_goes_on(start, count)  # the others are ended too, and all begin again
    assert start.end() == 0, start.err
    assert differences(tmp_path / "run", undisturbed) == []
    assert is_gone(start)


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_with_a_sentence(forked: bool, tmp_path: Path) -> None:
    start = Start(tmp_path / "run", *tiny(EPOCHS, *TWO), forked=forked)
    until_step(tmp_path / "run", 10)
    kill_rank(1, start)
    assert start.end() == 3
    assert "localgrad: rank 1 of 2 ended with SIGKILL: the same command goes on from the last save" in start.err
    assert "Traceback" not in "".join(start.err)
    assert is_gone(start)


def test_a_pipeline_that_is_killed_and_stopped_goes_on_as_one_process(tmp_path: Path) -> None:
    """The bits are those of a run that was on one process all the time."""
    flags = tiny(EPOCHS, "--save-every", "5", "--step-as-you-go", "--lag", "2")
    folder, alone = tmp_path / "run", tmp_path / "alone"
    start = Start(folder, *flags, "--pipeline", "2", "--restarts", "1")
    until_step(folder, 10)
    kill_rank(1, start)
    until_it_goes_on(start, 1)
    until_step(folder, 15)
    start.send(signal.SIGTERM)
    assert start.end() == 143, start.err
    assert start.out.count("pipeline: ") == 2
    assert start.out.count("going on from") == 1
    assert is_gone(start)
    for path in (folder, alone):
        once = Start(path, *flags)
        assert once.end() == 0, once.err
    assert differences(folder, alone, memory=False) == []


@pytest.mark.parametrize("shard", [pytest.param((), marks=pytest.mark.slow), ("--shard",)])
def test_a_mesh_that_is_killed_goes_on_and_so_does_one_process(shard: tuple[str, ...], tmp_path: Path) -> None:
    """A pipeline of two stages with two ranks each."""
    flags = tiny(2, "--save-every", "2", "--sync-batch-norm", "--lr", "0.01", "--step-as-you-go", "--lag", "2")
    mesh = ("--pipeline", "2", "--nproc", "2", *shard)
    folder, alone = tmp_path / "run", tmp_path / "alone"
    start = Start(folder, *flags, *mesh)
    until_step(folder, 2)
    kill_rank(3, start)
    assert start.end() == 3
    assert is_gone(start)
    shutil.copytree(folder, alone, symlinks=True)
    start = Start(folder, *flags, *mesh)
    assert [start.end(), Start(alone, *flags).end()] == [0, 0], start.err
    assert start.out.count("going on from") == start.out.count("each stage on 2 ranks") == 1
    assert read_environment(folder)["replicas"] == "2"
    assert threads_left(folder, 4) == [""] * 4
    for name in ("model", "auxiliaries"):
        mine, theirs = (load_file(last_checkpoint(run) / f"{name}.safetensors") for run in (folder, alone))
        # Replicas store these statistics after the next block has seen the batch. Nothing reads them.
        for key in [key for key in mine if "snapshots" in key and key.endswith(STATISTICS)]:
            del mine[key], theirs[key]
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_later_rank_says_what_it_alone_has_met(tmp_path: Path) -> None:
    start = Start(tmp_path / "run", *tiny(EPOCHS, *DIVERGES, "1,1,1,1e38", "--pipeline", "2"))
    assert start.end() == 3
    said = [line for line in start.err if line.startswith("localgrad: ")]
    assert len(said) == 1, start.err
    assert re.match(r"localgrad: the loss in block 3 \(layer3.2\) is (nan|inf) at step \d: ", said[0])
    assert is_gone(start)


def end_of(rank: int, port: int, folder: Path) -> None:
    """Ends as the ranks of a run do whose second meets a fault, and then takes long to go away."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2")
    try:
        with joined("cpu", 30) as ranks:
            if ranks.rank == 1:
                raise RunError("the loss is nan")
            dist.all_reduce(torch.ones(1))
    except (RunError, Stopped) as error:
        (folder / str(rank)).write_text(f"{type(error).__name__}: {error}")
    wait_for(lambda: (folder / "0").exists(), 20)


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
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "localgrad"]
    words = ["train", *tiny(EPOCHS, "--save-every", "5"), "--out", str(tmp_path / "run")]
    with subprocess.Popen([sys.executable, *torchrun, *words], start_new_session=True) as process:
        until_step(tmp_path / "run", 10)
        kill_rank(1, process)
        assert process.wait(120) == 0
    assert differences(tmp_path / "run", undisturbed) == []


@pytest.mark.slow  # a rank that does not hear its SIGTERM is given a minute and a half
@pytest.mark.parametrize(("share", "count", "hung"), [(("--nproc", "2"), 2, 1), (PIPELINE, 2, 1), (LONG, 3, 2)])
def test_a_rank_that_hangs_is_named(tmp_path: Path, share: tuple[str, ...], count: int, hung: int) -> None:
    start = Start(tmp_path / "run", *tiny(40, "--save-every", "5", *share, "--rank-timeout", "5"), forked=False)
    until_step(tmp_path / "run", 10)
    began = time.monotonic()
    os.kill(children(start.pid)[hung], signal.SIGSTOP)
    assert start.end() == 3
    assert time.monotonic() - began < 120
    said = f"rank {hung} of {count} died or did not answer for 5 s: the same command goes on from the last save"
    assert {line for line in start.err if "did not answer" in line} == {f"localgrad: {said}"}
    assert is_gone(start)


def test_a_rank_that_waits_a_little_later_is_not_laid_the_hang_to(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(run_ranks, "_store", lambda: store)
    monkeypatch.setattr(run_ranks, "PATIENCE", 0.01)
    assert "rank 1 and rank 2 of 3 died" in run_ranks._lost(0, 3, 5.0, 0.01)
    later = threading.Timer(0.5, store.set, ("localgrad/here/1", "1"))
    later.start()
    assert run_ranks._lost(0, 3, 5.0, 60.0).startswith("rank 2 of 3 died or did not answer for 5 s")
    later.join()


@pytest.mark.slow  # the pipeline's own test above is not
def test_sigterm_saves_once_and_the_same_command_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    start = Start(folder, *tiny(EPOCHS, *TWO))
    until_step(folder, 10)
    start.send(signal.SIGTERM)
    assert start.end() == 143, start.err
    stopped = [line for line in start.err if re.match(r"localgrad: stopped at step \d+ of 24, saved as", line)]
    assert len(stopped) == 1
    assert last_checkpoint(folder).name in stopped[0]
    assert is_gone(start)
    again = Start(folder, *tiny(EPOCHS, *TWO))
    assert again.end() == 0, again.err
    assert differences(folder, undisturbed) == []


@pytest.mark.slow
def test_a_run_moves_between_one_process_and_two(tmp_path: Path) -> None:
    """With batch norm over all ranks, two are one process up to rounding, and go on where one was."""

    def begin(name: str, epochs: int, nproc: str) -> None:
        start = Start(tmp_path / name, *tiny(epochs, "--sync-batch-norm", "--lr", "0.01"), "--nproc", nproc)
        assert start.end() == 0, start.err

    begin("one", 2, "1")
    shutil.copytree(tmp_path / "one", tmp_path / "moves", symlinks=True)
    begin("one", 4, "1")
    begin("moves", 4, "2")
    one, moves = (summary_rows(tmp_path / name) for name in ("one", "moves"))
    assert one[:2] == moves[:2]
    assert moves[3]["train_loss"] == pytest.approx(one[3]["train_loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--nproc", "2", *DIVERGES, "1e38,1,1,1"), 3), (PIPELINE, 0),
        (("--pipeline", "2", *DIVERGES, "1,1,1,1e38"), 3),
        (("--nproc", "2", "--shard"), 0), (("--nproc", "2", "--shard", *DIVERGES, "1e38,1,1,1"), 3),
    ],
)  # fmt: skip
def test_no_thread_of_the_group_outlives_it(flags: tuple[str, ...], code: int, tmp_path: Path) -> None:
    start = Start(tmp_path / "run", *tiny(1, *flags))
    assert start.end() == code, start.err
    assert threads_left(tmp_path / "run") == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(("times", "flags"), [(100, ("--nproc", "2")), (20, PIPELINE)])
def test_ranks_end_cleanly_beside_other_load(times: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        codes = collections.Counter(Start(tmp_path / str(i), *tiny(1, *flags)).end() for i in range(times))
    finally:
        for loop in loops:
            loop.kill()
    assert codes == {0: times}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nproc", "3", "--restarts", "2"), "3 ranks cannot share a batch of 16 images: take a multiple of 3"),
        (("--pipeline", "2"), "a pipeline steps each block as it goes: add --step-as-you-go"),
        (("--nproc", "2", "--batch-size", "2", "--restarts", "2", "--head", "dgl"), SINGLE),
        pytest.param(
            ("--nproc", "2", "--batch-size", "2", "--accumulate", "2", "--head", "dgl"), SINGLE, marks=pytest.mark.slow
        ),
        (("--nproc", "2", "--rank-timeout", "nan"), "--rank-timeout takes seconds above 0, not nan"),
    ],
)
def test_what_cannot_be_shared_is_refused_once(flags: tuple[str, ...], says: str, tmp_path: Path) -> None:
    start = Start(tmp_path / "run", *tiny(1, *flags))
    assert start.end() == 2
    assert start.err == [f"localgrad: {says}"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nproc", "0"), "--nproc takes 1 or more, not 0"),
        (("--pipeline", "-2"), "--pipeline takes 1 or more, not -2"),
        (("--nproc", "2", "--restarts", "-1"), "--restarts takes 0 or more, not -1"),
        (("--shard",), "--shard shares the weights among processes: add --nproc with 2 or more"),
        (("--shard", "--pipeline", "2"), "--shard shares the weights among processes: add --nproc with 2 or more"),
        (
            ("--shard", "--nproc", "2", "--precision", "fp16"),
            "shards have no common gradient scaler for fp16: take bf16",
        ),
    ],
)
def test_numbers_that_start_nothing_are_refused(
    flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"localgrad: {says}")
