"""The loop: it learns, its folder is whole, its faults say where, and its variants agree with the plain form."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import TINY, rows_of, tiny
from torch import nn

from localgrad.core.backbones import build
from localgrad.core.errors import RunError, UserError
from localgrad.run import data as datasets
from localgrad.run import step
from localgrad.run.build import build_model, machine_for
from localgrad.run.folder import SUMMARY, claim, read_environment, summary_rows
from localgrad.run.modes import Alone
from localgrad.run.step import Stepper, rate
from localgrad.run.train import evaluate, to_device, train
from localgrad.scale.groups import Ranks


def test_learns_digits(tmp_path: Path) -> None:
    row = train(tiny(limit_train=None, epochs=3, batch_size=64, lr=0.05), tmp_path / "r")
    assert row["eval_top1"] > 75
    assert row["eval_top5"] > 97


def test_the_folder_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(dataclasses.replace(TINY, epochs=3), folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "memory_timeline.csv", "metrics.jsonl", "model.safetensors",
        "summary.csv",
    ]  # fmt: skip
    best = max(summary_rows(folder), key=lambda row: row["eval_top1"])["epoch"] * 4
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best", "step-12", "step-8", f"step-{best:.0f}"}
    assert (folder / "checkpoints" / "best").resolve().name == f"step-{best:.0f}"
    with (folder / "summary.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == (*SUMMARY[:3], "eval_top1", "eval_top5", *SUMMARY[3:])
    rows = summary_rows(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["eval_top1"] <= row["eval_top5"] <= 100 for row in rows)
    assert rows[-1]["peak_rss_bytes"] > rows[-1]["peak_bytes"] > 0
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [e for e in entries if "eval_top1" in e]
    assert [e["losses"][-1] for e in epochs] == [e["train_loss"] for e in epochs]
    assert all(len(e["ema_distance"]) == 3 and all(0 < d < 1.5 for d in e["ema_distance"]) for e in epochs)
    last = [e for e in entries if "parts" in e][-1]
    assert len(last["losses"]) == 4
    assert last["parts"][0]["classifier"] == pytest.approx(last["losses"][0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch, which no test changes."""
    folder = tmp_path_factory.mktemp("train") / "run"
    train(tiny(device="auto"), folder)
    return folder


def test_the_timeline_peaks_at_the_summarys_bytes(run: Path) -> None:
    timeline = rows_of(run / "memory_timeline.csv")
    assert max(int(line["live_bytes"]) for line in timeline) == summary_rows(run)[0]["peak_bytes"]
    assert [*dict.fromkeys(line["during"] for line in timeline)] == [*(f"block {k}" for k in range(4)), "update"]
    assert {line["rank"] for line in timeline} == {"0"}


def test_the_peak_is_the_steps_and_not_the_data_sets(tmp_path: Path) -> None:
    rows = [train(dataclasses.replace(TINY, limit_train=n), tmp_path / str(n)) for n in (64, 640)]
    assert rows[0]["peak_bytes"] == rows[1]["peak_bytes"]


def test_the_trained_backbone_loads_strictly_and_evaluates_alike(run: Path) -> None:
    backbone = build("resnet8", classes=10, in_channels=1)
    backbone.load_state_dict(load_file(run / "model.safetensors"), strict=True)
    machine = machine_for(TINY)
    again = evaluate(backbone.to(memory_format=machine.memory_format), datasets.load("digits"), TINY, machine)  # pyright: ignore[reportCallIssue]
    assert again["eval_top1"] == pytest.approx(summary_rows(run)[0]["eval_top1"], abs=1e-4)


def test_timm_loads_the_trained_backbone(tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, model="timm:test_resnet", blocks="2", limit_train=32, head="auto")
    train(recipe, tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1, checkpoint_path=str(path))
    assert all(torch.equal(t, load_file(path)[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("coupling", ["none", "man", "deep-man"])
def test_step_as_you_go_is_the_plain_step(coupling: str, tmp_path: Path) -> None:
    plain = tiny(model="resnet14", coupling=coupling)
    rows = [train(dataclasses.replace(plain, step_as_you_go=go), tmp_path / str(go)) for go in (False, True)]
    a, b = ((tmp_path / str(go) / "model.safetensors").read_bytes() for go in (False, True))
    assert a == b
    assert rows[1]["peak_bytes"] < rows[0]["peak_bytes"]


def test_accumulation_steps_once_for_several_batches() -> None:
    recipe = dataclasses.replace(TINY, accumulate=2, warmup=0.0)
    machine, data = machine_for(recipe), datasets.load("digits", limit_train=64)
    stream = datasets.train_batches(data, batch_size=16, seed=0, epoch=0)
    batches = [to_device(batch, data.info, machine) for batch in stream][:2]
    model = build_model(recipe, data, machine)
    stepper = Stepper(recipe, Alone(model, Ranks()), machine, total=10)
    before = [p.detach().clone() for p in model.backbone.parameters()]
    with torch.no_grad():
        first = [float(model.task.criterion(model(x), y)) for x, y in batches]  # in training mode, as the step is
    done = stepper(iter(batches))
    assert stepper.step == 1
    assert done.images == 32
    assert done.losses[-1] == pytest.approx(sum(first) / 2, rel=1e-4)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True)]
    assert all(changed)


def test_the_schedule_rises_then_falls() -> None:
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[9] == rates[10] == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert rate(0, 1, 0.0) == 1.0


def test_clip_bounds_each_blocks_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    norms: list[float] = []
    clip = step.clip_gradients

    def spy(parameters: list[nn.Parameter], limit: float) -> None:
        clip(parameters, limit)
        norms.append(float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()))

    monkeypatch.setattr(step, "clip_gradients", spy)
    train(dataclasses.replace(TINY, clip=0.05), tmp_path / "run")
    assert len(norms) == 4 * 4
    assert max(norms) <= 0.05 * 1.001


def test_a_loss_that_is_not_finite_names_block_and_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from localgrad.core import task

    calls: list[int] = []
    criterion = task.Classification.criterion

    def poisoned(self: task.Classification, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = criterion(self, logits, targets)
        return loss * float("nan") if len(calls) == 4 + 3 else loss  # the third block of the second step

    monkeypatch.setattr(task.Classification, "criterion", poisoned)
    with pytest.raises(RunError, match=r"block 2 \(layer\d\.\d\) is nan at step 2"):
        train(TINY, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_nothing_is_written_when_the_recipe_cannot_run(tmp_path: Path) -> None:
    for bad in ({"blocks": "99"}, {"model": "resnet21"}, {"data": "cifar10", "data_dir": str(tmp_path)}):
        with pytest.raises(UserError):
            train(dataclasses.replace(TINY, **bad), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_is_claimed_by_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert claim(folder, TINY) is False
    train(TINY, folder)
    assert claim(folder, TINY) is True
    with pytest.raises(UserError, match=r"different run \(lr 0.02 against 0.5\)"):
        claim(folder, dataclasses.replace(TINY, lr=0.5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="something else"):
        claim(tmp_path / "other", TINY)
    with pytest.raises(UserError, match="is not a folder that you may write to"):
        claim(tmp_path / "other" / "file" / "run", TINY)
    (folder / "model.safetensors").unlink()
    assert claim(folder, TINY) is False  # the same run, unfinished: it starts again
    train(TINY, folder)
    assert claim(folder, TINY) is True


def test_a_damaged_summary_is_a_fault_of_the_run(tmp_path: Path) -> None:
    for text in ("", "epoch,train_loss\n1,2\n", "nonsense\n"):
        (tmp_path / "summary.csv").write_text(text)
        with pytest.raises(RunError, match="is damaged"):
            summary_rows(tmp_path)


def test_what_was_used_is_recorded(run: Path) -> None:
    environment = read_environment(run)
    assert environment["precision"] == "float32"
    assert environment["device"] in ("cpu", "cuda")
    assert environment["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"precision": "fp16", "device": "cpu"}, "fp16 needs a CUDA device"), ({"device": "gpu"}, "unknown device")],
)
def test_a_device_that_cannot_be_is_refused(fields: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        machine_for(tiny(**fields))


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    row = train(TINY, tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("eval_top1", "lr", "peak_bytes"):
        assert events.Scalars(f"epoch/{name}")[0].value == pytest.approx(row[name])
    assert len(events.Scalars("loss/block 3")) == 1
    assert events.Scalars("epoch losses/block 3")[0].value == pytest.approx(row["train_loss"])
    tags = events.Tags()["scalars"]
    assert [t for t in tags if "ema_distance" in t] == [f"epoch ema_distance/block {k}" for k in range(3)]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32"])
def test_trains_on_cuda(precision: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, device="cuda", epochs=3, limit_train=640, precision=precision)
    row = train(recipe, tmp_path / "run")
    assert row["eval_top1"] > 30
    assert row["peak_bytes"] > 0
