"""A run whose ranks hold shards is killed, and goes on as shards, on one process, and on more ranks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ends import differences, last_checkpoint
from safetensors.torch import load_file
from starts import Start, children, tiny, wait_for

from localgrad.run.folder import summary_rows

# With batch norm over all ranks, any number of them is one process up to rounding.
FLAGS = tiny(2, "--save-every", "2", "--sync-batch-norm", "--lr", "0.01", "--coupling", "man++", "--clip", "1")
TWO = ("--nproc", "2", "--shard")


def ended(folder: Path, *more: str) -> Path:
    start = Start(folder, *FLAGS, *more)
    assert start.end() == 0, start.err
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ended(tmp_path_factory.mktemp("shards") / "run", *TWO)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which a rank was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("shards") / "run"
    start = Start(folder, *FLAGS, *TWO)
    assert wait_for(lambda: any(folder.glob("checkpoints/step-*[0-9]")))
    os.kill(children(start.pid)[1], signal.SIGKILL)
    assert start.end() == 3
    assert int(last_checkpoint(folder).name.removeprefix("step-")) < 8
    return folder


def test_a_killed_run_goes_on_with_the_same_bits(killed: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "run", symlinks=True)
    assert differences(ended(tmp_path / "run", *TWO), undisturbed) == []


@pytest.mark.parametrize("ranks", [(), pytest.param(("--nproc", "4", "--shard"), marks=pytest.mark.slow),
                                   pytest.param(("--nproc", "2"), marks=pytest.mark.slow)])  # fmt: skip
def test_it_goes_on_otherwise(ranks: tuple[str, ...], killed: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Checkpoints are whole, so they tell nothing of how many ranks have written them."""
    shutil.copytree(killed, tmp_path / "run", symlinks=True)
    ended(tmp_path / "run", *ranks)
    found, wanted = (summary_rows(folder)[-1] for folder in (tmp_path / "run", undisturbed))
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-4)
    for name in ("model", "auxiliaries"):
        mine, theirs = (load_file(last_checkpoint(f) / f"{name}.safetensors") for f in (tmp_path / "run", undisturbed))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
