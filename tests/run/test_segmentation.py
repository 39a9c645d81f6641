"""The command line on masks: the data set tells the task, and every command follows or says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import rows_of, write_masks

from localgrad.cli import main
from localgrad.core.errors import UserError
from localgrad.run.arguments import Compare
from localgrad.run.checkpoint import MODEL
from localgrad.run.compare import check, grid
from localgrad.run.tables import row_of, show, summarize

UNET = "benchmarks.pixel_networks:unet"
CUTS = "down.1,up.0"  # Passengers cross both.


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The flags of a run of four steps on a folder of masks."""
    folder = write_masks(tmp_path / "set", size=32)
    return [
        "--data", "mask-folder", "--data-dir", str(folder), "--image-size", "32", "--model", UNET, "--model-args",
        "width=4", "--batch-size", "2", "--epochs", "2", "--precision", "float32", "--lr", "0.02",
    ]  # fmt: skip


def train(words: list[str], out: Path, *more: str) -> int:
    return main(["train", *words, "--blocks", CUTS, "--method", "infopro", *more, "--out", str(out)])


def test_a_run_on_masks_is_scored_by_miou_and_resumes_to_the_same_bits(
    words: list[str], tmp_path: Path, stop_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(words, tmp_path / "a") == 0
    assert "test loss" in capsys.readouterr().out
    rows = rows_of(tmp_path / "a" / "summary.csv")
    assert list(rows[0])[:5] == ["epoch", "train_loss", "eval_loss", "eval_miou", "eval_pixel_accuracy"]
    assert 0 <= float(rows[-1]["eval_miou"]) <= 100
    stop_after(3)
    assert train(words, tmp_path / "b") == 143
    stop_after(0)
    assert train(words, tmp_path / "b") == 0
    whole, parts = (load_file(tmp_path / name / MODEL) for name in "ab")
    assert all(parts[name].equal(value) for name, value in whole.items())
    same = ("train_loss", "eval_loss", "eval_miou", "eval_pixel_accuracy", "peak_bytes")
    again = rows_of(tmp_path / "b" / "summary.csv")
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in again]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "a")]) == 0
    assert f"miou {float(rows[-1]['eval_miou']):.2f}%" in capsys.readouterr().out
    row = row_of(tmp_path / "a", "infopro+man", 3, "", 0)
    assert row["score"] == "miou"
    assert row["error"] == pytest.approx(100 - float(rows[-1]["eval_miou"]), abs=1e-3)
    show([*summarize([row])])
    assert "100 - miou %" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "report.html")]) == 0
    assert "100 - miou, %" in (tmp_path / "report.html").read_text()


def test_a_grid_and_a_plan_follow_the_task(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("data=mask-folder", f"data_dir={tmp_path / 'set'}", "image_size=32", f"model={UNET}", "head=auto")
    args = Compare(methods="bp,dgl", blocks="down.1/up.0", seeds="0", set=(*data, "model_args=width=4"))
    check(grid(args))  # The run of each cell could begin.
    with pytest.raises(UserError, match="take a network such as torchvision:fcn_resnet50"):
        check(grid(replace(args, set=(*data, "model=resnet8"), blocks="2")))
    at = words.index("--epochs")
    assert main(["plan", *words[:at], "--method", "bp", "--budget", "100%", "--json"]) == 0
    assert '"exact, fits 100%"' in capsys.readouterr().out


def test_what_masks_do_not_take_is_refused_before_a_run_begins(
    words: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = ("--out", tmp_path / "out")
    for more, sentence in (
        (("--mixup", "0.2"), "the masks of mask-folder give each pixel one: drop them"),
        (("--method", "predsim"), "similarity matching compares samples by their classes"),
        (("--method", "infopro", "--contrast"), "leave contrast out"),
    ):
        assert sentence in fails("train", *words, "--blocks", CUTS, *more, *out)
    other = [word for word in words if word not in ("--model-args", "width=4")]
    assert "take a network such as torchvision:fcn_resnet50" in fails("train", *other, "--model", "resnet8", *out)
    assert not (tmp_path / "out").exists()


def test_commands_about_whole_images_say_that_masks_are_none(
    words: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *words, "--method", "bp", "--epochs", "1", "--out", str(run)]) == 0
    picture = tmp_path / "set/images/val/0.png"
    for command in (("predict", run, picture), ("probe", run)):
        assert "needs one class for each image, and a run on mask-folder gives each pixel one" in fails(*command)
