"""`localgrad predict`: the classes of image files, in a table and as CSV, and files that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import QUICK, noise, rows_of, write_tree

import localgrad as lg
from localgrad.cli import main
from localgrad.run import data as datasets
from localgrad.run.checkpoint import load_backbone
from localgrad.run.folder import read_classes, read_input
from localgrad.run.predict import _grey

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "run"
    assert main(["train", *QUICK, "--method", "bp", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    write_tree(folder / "data")
    data = ["--data", "image-folder", "--data-dir", str(folder / "data"), "--image-size", "32", "--batch-size", "8"]
    flags = ["--model", "resnet8", "--method", "bp", "--epochs", "1", "--precision", "float32", *data]
    assert main(["train", *flags, "--out", str(folder / "run")]) == 0
    return folder


def test_digits_are_predicted_as_the_network_does(digits: Path, tmp_path: Path) -> None:
    """Files of the test images themselves: what the network says to their tensors, to the last digit of the CSV."""
    test = datasets.load("digits").test
    files = [tmp_path / f"{i}.png" for i in range(70)]  # more than one batch
    for i, file in enumerate(files):
        Image.fromarray(np.asarray(test.images[i, 0])).save(file)  # pyright: ignore[reportAttributeAccessIssue]
    out = tmp_path / "p.csv"
    assert main(["predict", str(digits), *map(str, files), "--top", "3", "--out", str(out)]) == 0
    network = lg.build("resnet8", classes=10, in_channels=1)
    load_backbone(network, digits / "model.safetensors")
    x = datasets.normalize(test.images[:70], datasets.DATASETS["digits"])  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        shares, classes = network.eval()(x).double().softmax(1).topk(3)
    rows = rows_of(out)
    assert [row["file"] for row in rows] == [str(file) for file in files for _ in range(3)]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 70
    assert [int(row["class"]) for row in rows] == classes.flatten().tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], shares.flatten(), atol=2e-6)


def test_photos_are_cut_as_test_images_are(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The share of files whose first class is right is the top-1 of `localgrad eval`."""
    files = sorted((photos / "data" / "val").glob("*/*"))
    out = tmp_path / "p.csv"
    assert main(["predict", str(photos / "run"), *map(str, files), "--top", "9", "--out", str(out)]) == 0
    rows = rows_of(out)
    assert len(rows) == 3 * len(files)  # there are three classes, whatever --top says
    first = [row for row in rows if row["rank"] == "1"]
    right = sum(row["class"] == Path(row["file"]).parent.name for row in first)
    capsys.readouterr()
    assert main(["eval", str(photos / "run")]) == 0
    assert f"top1 {100 * right / len(files):.2f}%" in capsys.readouterr().out


def test_the_table_has_names_and_probabilities(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = photos / "data" / "val" / "ant" / "0.png"
    assert main(["predict", str(photos / "run"), str(file)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("probability", "ant", "bee", "cat", "%"))
    assert len(out.splitlines()) >= 7  # three lines of head, three classes, one of foot


def test_files_that_cannot_be_read_are_named(photos: Path, tmp_path: Path, fails: Fails) -> None:
    run, good = photos / "run", photos / "data" / "val" / "ant" / "0.png"
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    out = tmp_path / "p.csv"
    said = fails("predict", run, bad, good, "--out", out, code=3)
    assert said.startswith(f"localgrad: 1 of 2 files are no readable images: {bad} (cannot identify image file")
    assert {row["file"] for row in rows_of(out)} == {str(good)}
    assert "1 of 1 files are no readable images" in fails("predict", run, bad, code=3)


def test_mistakes_get_one_sentence(photos: Path, tmp_path: Path, fails: Fails) -> None:
    run, good = photos / "run", photos / "data" / "val" / "ant" / "0.png"
    assert "nowhere.png is not there" in fails("predict", run, good, tmp_path / "nowhere.png")
    assert f"{tmp_path} is a folder: name the files in it" in fails("predict", run, tmp_path)
    assert "there is no image to look at" in fails("predict", run)
    assert "--top takes 1 or more, not 0" in fails("predict", run, good, "--top", "0")
    assert "is no run folder" in fails("predict", tmp_path, good)
    assert "cannot write" in fails("predict", run, good, "--out", tmp_path / "no" / "p.csv")


def test_grey_images_keep_their_values() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(_grey(levels.expand(1, 3, 16, 16)), levels)
    photo = noise(5, 7, 3)
    grey = _grey(torch.from_numpy(photo).permute(2, 0, 1)[None])[0, 0]
    assert np.array_equal(grey, np.asarray(Image.fromarray(photo).convert("L")))


def test_run_folder_and_files_say_what_an_input_is(photos: Path, digits: Path, tmp_path: Path) -> None:
    assert main(["export", str(photos / "run"), "--out", str(tmp_path / "e.safetensors")]) == 0
    expected = {"channels": 3, "size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert read_input(photos / "run") == expected
    for file in (photos / "run" / "model.safetensors", tmp_path / "e.safetensors"):
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        assert json.loads(about["input"]) == expected
        assert json.loads(about["classes"]) == ["ant", "bee", "cat"] == read_classes(photos / "run")
    assert read_input(digits)["mean"] == [0.3054]
