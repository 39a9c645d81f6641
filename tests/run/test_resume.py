"""A run that is stopped and goes on ends in the bits of one that never stopped, and says what it goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import QUICK, tiny, write_photos
from torch import Tensor, nn

from localgrad.cli import main
from localgrad.core.errors import RunError, UserError
from localgrad.run import build
from localgrad.run.checkpoint import read_checkpoint, saved
from localgrad.run.folder import claim, summary_rows
from localgrad.run.recipe import Recipe, Saving
from localgrad.run.signals import Stopped
from localgrad.run.step import Stepper
from localgrad.run.train import train

RECIPE = tiny(limit_train=80, epochs=2, warmup=0.2)  # 10 steps
FLAGS = [*QUICK, "--limit-train", "80"]
Stop = Callable[[int], None]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images to train on, 8 to test with."""
    return write_photos(tmp_path_factory.mktemp("photos"), {"train": 40, "val": 4})


def digest(tree: Any) -> str:
    """SHA-256 of a tree of tensors and plain values, their memory formats included."""
    sha = hashlib.sha256()

    def add(node: Any) -> None:
        match node:
            case Tensor():
                sha.update(repr((node.shape, node.stride(), node.dtype)).encode())
                sha.update(node.contiguous().numpy().tobytes())
            case dict():
                for key, value in node.items():
                    sha.update(repr(key).encode())
                    add(value)
            case list() | tuple():
                for value in node:
                    add(value)
            case _:
                sha.update(repr(node).encode())

    add(tree)
    return sha.hexdigest()


def fate(folder: Path) -> dict[str, str]:
    """What a run has come to: weights, EMA, optimizer, statistics, random state, and its record without the clock."""
    checkpoint = read_checkpoint(saved(folder / "checkpoints")[-1])
    state = checkpoint.state
    clock = ("seconds", "peak_rss_bytes")
    rows = [{k: v for k, v in row.items() if k not in clock} for row in summary_rows(folder)]
    return {
        "model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "checkpoint": digest([checkpoint.model, checkpoint.auxiliaries]),
        "stepper": digest(state["stepper"]),
        "random": digest(state["random"]),
        "rows": digest(rows),
    }


def run_with_stops(recipe: Recipe, folder: Path, stops: Iterable[int], stop_after: Stop) -> dict[str, str]:
    for step in stops:
        stop_after(step)
        with pytest.raises(Stopped) as stopped:
            train(recipe, folder)
        assert stopped.value.exit_code == 143
        assert f"stopped at step {step} of" in str(stopped.value)
        assert saved(folder / "checkpoints")[-1].name == f"step-{step}"
    stop_after(0)
    train(recipe, folder)
    return fate(folder)


KINDS = [("bp", "1", "none"), *(("dgl", "4", coupling) for coupling in ("none", "man", "deep-man"))]
GRID = [(workers, *kind) for workers in (0, 2) for kind in KINDS]
FEW = [(0, "bp", "1", "none"), (0, "dgl", "4", "deep-man"), (2, "dgl", "4", "man")]


def on_photos(photos: Path, workers: int = 0, method: str = "dgl", blocks: str = "4", coupling: str = "man") -> Recipe:
    return dataclasses.replace(
        RECIPE, data="image-folder", data_dir=str(photos), image_size=16, limit_train=None, workers=workers,
        method=method, blocks=blocks, coupling=coupling, head="1c2f" if coupling in ("none", "man") else "auto",
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "epochs", "count"), [
    *(pytest.param(kind, 2, 2, marks=() if kind in FEW else pytest.mark.slow) for kind in GRID),
    *(pytest.param(kind, 5, 20, marks=pytest.mark.slow) for kind in GRID),  # 25 steps, almost each of which is drawn
])  # fmt: skip
def test_a_run_that_is_stopped_at_any_steps_ends_in_the_same_bits(
    kind: tuple[int, str, str, str], epochs: int, count: int, photos: Path, stop_after: Stop, tmp_path: Path,
    figure: Any,
) -> None:  # fmt: skip
    recipe = dataclasses.replace(on_photos(photos, *kind), epochs=epochs)
    name = "{1}+{3}, K={2}, {0} workers".format(*kind)
    stops = sorted(random.Random(name).sample(range(1, 5 * epochs + 1), count))
    straight = run_with_stops(recipe, tmp_path / "straight", [], stop_after)
    stopped = run_with_stops(recipe, tmp_path / "stopped", stops, stop_after)
    figure(f"stops and resumes, {name}", count, count if stopped == straight else 0)
    assert stopped == straight


# Before and at the measured step, at an epoch's end, within the second epoch.
@pytest.mark.parametrize("stops", [(2, 8), pytest.param((1, 2, 5, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "coupling": "man++"},
        {"optimizer": "adamw", "decay_norms": False, "lr": 0.002},
        {"accumulate": 2, "batch_size": 8, "form": "pull"},
        {"step_as_you_go": True, "clip": 0.5, "block_lr": "1,0.5,1,2"},
        {"method": "infopro", "head": "auto", "channels_last": False},
        {"method": "auglocal", "head": "auto", "label_smoothing": 0.1},
        {"skip_nonfinite": True, "momentum": 0.5},
    ],
    ids=str,
)
def test_every_kind_of_step_goes_on_exactly(
    changes: dict[str, Any], stops: tuple[int, ...], stop_after: Stop, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    straight = run_with_stops(recipe, tmp_path / "straight", [], stop_after)
    assert run_with_stops(recipe, tmp_path / "stopped", stops, stop_after) == straight


def test_random_draws_of_the_network_go_on_exactly(
    stop_after: Stop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noise(nn.Module):
        """Draws from all three global generators."""

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand()) if self.training else x  # noqa: NPY002

    def with_dropout(*_: Any, in_channels: int, **__: Any) -> nn.Module:
        units = [
            nn.Sequential(nn.Conv2d(c, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), Noise()) for c in (in_channels, 8)
        ]
        return nn.Sequential(*units, nn.Sequential(nn.Flatten(), nn.Linear(128, 10)))

    monkeypatch.setattr(build, "build", with_dropout)
    recipe = dataclasses.replace(RECIPE, blocks="2", coupling="none")
    straight = run_with_stops(recipe, tmp_path / "straight", [], stop_after)
    assert run_with_stops(recipe, tmp_path / "stopped", (3, 5), stop_after) == straight


def test_a_stop_during_evaluation_is_saved_and_repeats_the_evaluation(
    stop_after: Stop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localgrad.core.task import Classification

    straight = run_with_stops(RECIPE, tmp_path / "straight", [], stop_after)
    metrics, calls = Classification.metrics, []

    def stopping(self: Classification, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        calls.append(len(targets))
        if len(targets) == 256 and calls.count(256) == 1:  # the first batch of the first evaluation
            os.kill(os.getpid(), signal.SIGINT)
        return metrics(self, logits, targets)

    monkeypatch.setattr(Classification, "metrics", stopping)
    with pytest.raises(Stopped, match="stopped at step 5 of 10") as stopped:
        train(RECIPE, tmp_path / "stopped")
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "stopped" / "summary.csv").exists()
    assert run_with_stops(RECIPE, tmp_path / "stopped", [], stop_after) == straight


def test_the_record_goes_on_without_repeats(
    stop_after: Stop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    stop_after(7)
    with pytest.raises(Stopped):
        train(RECIPE, folder, saving=Saving(save_every="3"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epoch": 2}\n{"torn')  # what a kill leaves of steps after the checkpoint
    (folder / "model.safetensors.part").touch()
    stop_after(0)
    train(RECIPE, folder)
    assert f"going on from {folder / 'checkpoints' / 'step-7'}, at step 7 of 10" in capsys.readouterr().out
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(steps)
    assert [e["epoch"] for e in entries if "eval_top1" in e] == [1, 2]
    assert [e["step"] for e in entries if "note" in e] == [7]
    assert 9 not in steps
    seconds = [row["seconds"] for row in summary_rows(folder)]
    assert seconds == sorted(seconds)
    assert not list(folder.glob("*.part"))


def test_saves_come_every_so_many_steps_and_after_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from localgrad.run import checkpoint

    names: list[int] = []
    save = checkpoint.save_checkpoint

    def spy(folder: Path, step: int, **parts: Any) -> Path:
        names.append(step)
        return save(folder, step, **parts)

    monkeypatch.setattr(checkpoint, "save_checkpoint", spy)
    train(RECIPE, tmp_path / "steps", saving=Saving(save_every="2", keep_last=3))
    assert names == [2, 4, 5, 7, 9, 10]
    assert [p.name for p in saved(tmp_path / "steps" / "checkpoints")][-3:] == ["step-7", "step-9", "step-10"]
    names.clear()
    train(dataclasses.replace(RECIPE, epochs=1), tmp_path / "seconds", saving=Saving(save_every="3600s"))
    assert names == [5]


@pytest.mark.parametrize("wrong", [{"save_every": "0"}, {"save_every": "x"}, {"save_every": "1.5s"}, {"keep_last": 1}])
def test_savings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"save-every takes|keep-last must be"):
        Saving(**wrong)


def test_only_epochs_may_grow(stop_after: Stop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, longer = tmp_path / "run", dataclasses.replace(RECIPE, epochs=3)
    train(RECIPE, folder)
    assert claim(folder, RECIPE) is True
    with pytest.raises(UserError, match=r"different run .epochs 2 against 3"):
        claim(folder, longer)
    assert claim(folder, longer, may_grow=True) is False
    with pytest.raises(UserError, match=r"different run .epochs 2 against 1"):
        claim(folder, dataclasses.replace(RECIPE, epochs=1), may_grow=True)
    with pytest.raises(UserError, match=r"different run .lr 0.02 against 0.5"):
        claim(folder, dataclasses.replace(longer, lr=0.5), may_grow=True)
    stop_after(12)
    with pytest.raises(Stopped):
        train(longer, folder)
    assert "3 epochs instead of 2" in capsys.readouterr().out
    assert claim(folder, longer) is False  # the weights of two epochs do not count as finished
    stop_after(0)
    train(longer, folder)
    assert [row["epoch"] for row in summary_rows(folder)] == [1, 2, 3]
    assert claim(folder, longer) is True


def test_another_set_up_is_said(
    stop_after: Stop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3)
    with pytest.raises(Stopped):
        train(RECIPE, tmp_path / "run")
    stop_after(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    row = train(RECIPE, tmp_path / "run")
    assert "may differ in its last bits: threads 7, was 1\n" in capsys.readouterr().out
    assert row["epoch"] == 2


def test_another_training_set_is_refused(photos: Path, stop_after: Stop, tmp_path: Path) -> None:
    stop_after(3)
    with pytest.raises(Stopped):
        train(on_photos(photos), tmp_path / "run")
    fewer = shutil.copytree(photos, tmp_path / "fewer", ignore=shutil.ignore_patterns("39.png"))
    with pytest.raises(UserError, match=r"the training set has 78 images, but .*step-3 was made with 80"):
        train(on_photos(fewer), tmp_path / "run")


def test_a_killed_decoder_ends_the_run_with_a_sentence(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Stepper.__call__

    def killing(self: Stepper, batches: Any) -> Any:
        if self.step == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join()
        return call(self, batches)

    monkeypatch.setattr(Stepper, "__call__", killing)
    with pytest.raises(RunError, match="a process that decodes images was killed: with fewer --workers less"):
        train(on_photos(photos, workers=2), tmp_path / "run")


def test_resume_never_begins_anew(stop_after: Stop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", *FLAGS, "--out", str(tmp_path / "run")]
    stop_after(3)
    assert main(command) == 143
    stop_after(0)
    assert main([*command, "--resume", "never"]) == 0
    assert "going on" not in capsys.readouterr().out
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main([*command, "--resume", "never"]) == 0  # a finished run too
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert "epoch 1/1" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_is_named(stop_after: Stop, tmp_path: Path, fails: Callable[..., str]) -> None:
    command = ["train", *FLAGS, "--out", str(tmp_path / "run")]
    stop_after(3)
    assert main(command) == 143
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("resnet8", "resnet20"))
    assert "step-3 does not fit this run" in fails(*command, "--model", "resnet20", code=3)
