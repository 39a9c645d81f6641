"""The names of the classes go with a run: into its files, and against data that have others."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from tiny import BP, contents, tiny

from localgrad.cli import main
from localgrad.core.backbones import build
from localgrad.core.errors import UserError
from localgrad.run import data as datasets
from localgrad.run.checkpoint import load_backbone, save_weights
from localgrad.run.folder import read_classes
from localgrad.run.recipe import Recipe
from localgrad.run.signals import Stopped
from localgrad.run.train import Run, train

# As text, 10 comes before 2; the last two are a name of two lines, and one that is no UTF-8.
NAMES = ["1", "10", "2", "B\u00e4r 7", "a\nb", os.fsdecode(b"caf\xe9")]
RECIPE = tiny(**BP, data="image-folder", image_size=32, limit_train=None, batch_size=6, epochs=2)


def on(folder: Path, **changes: Any) -> Recipe:
    return dataclasses.replace(RECIPE, data_dir=str(folder), **changes)


def write(place: Path, names: Sequence[str] = NAMES, count: int = 2) -> Path:
    """An image folder whose classes are of one colour each."""
    for split in ("train", "val"):
        for k, name in enumerate(names):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (40 * k, 255 - 40 * k, 9 * i)).save(place / split / name / f"{i}.png")
    return place


def rename(place: Path, old: str, new: str) -> None:
    for split in ("train", "val"):
        if (place / split).is_dir():
            (place / split / old).rename(place / split / new)


def forget(run: Path) -> None:
    """Makes a run's record that of an older version."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["classes"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on them."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    train(on(photos), folder)
    return folder


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may change."""
    return shutil.copytree(photos, tmp_path / "copied")


# Where they are


def test_each_file_of_a_run_that_holds_weights_names_the_classes(run: Path) -> None:
    assert read_classes(run) == NAMES
    (run / "config.yaml").read_bytes().decode("ascii")  # whatever the names are
    for place in (run, run / "checkpoints" / "step-2", run / "checkpoints" / "step-4"):
        with safe_open(place / "model.safetensors", "pt") as file:
            assert json.loads(file.metadata()["classes"]) == NAMES
            assert file.metadata()["format"] == "pt"


@pytest.mark.filterwarnings("ignore")  # the exporter warns about its own insides
def test_exports_need_no_data_and_name_the_classes(
    photos: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    hidden = photos.rename(photos.with_name("hidden"))
    try:
        monkeypatch.chdir(tmp_path)
        assert main(["export", str(run), "--format", "onnx", "--out", "w.onnx"]) == 0
        assert main(["export", str(run), "--out", "w.safetensors"]) == 0
        old = shutil.copytree(run, tmp_path / "old")
        forget(old)
        assert main(["export", "old", "--format", "onnx", "--out", "old.onnx"]) == 0
    finally:
        hidden.rename(photos)
    assert (tmp_path / "w.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    x = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    got = []
    for name, classes in (("w.onnx", NAMES), ("old.onnx", None)):
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        kept = session.get_modelmeta().custom_metadata_map
        assert (json.loads(kept["classes"]) if "classes" in kept else None) == classes
        assert classes is None or json.loads(kept["input"])["mean"] == [0.485, 0.456, 0.406]
        got.append(session.run(None, {"images": x})[0])
    np.testing.assert_array_equal(*got)
    backbone = build("resnet8", classes=6)
    load_backbone(backbone, run / "model.safetensors")
    with torch.no_grad():
        np.testing.assert_allclose(got[0], backbone.eval()(torch.from_numpy(x)), atol=1e-4)
    assert sorted(os.listdir(tmp_path)) == ["old", "old.onnx", "w.onnx", "w.safetensors"]


@pytest.mark.parametrize("names", [NAMES, ["a", "b"], [f"n{i:08}" for i in range(1000)], ['"', "\\", "\u4e2d", ""]])
def test_equal_weights_and_names_give_equal_bytes(names: list[str], tmp_path: Path) -> None:
    weights = {"b": torch.rand(3, 5), "a": torch.arange(7, dtype=torch.uint8), "\u00fc.bias": torch.rand(())}
    files = []
    for number in range(30):  # safetensors' own order of metadata is another one each time
        about = {"input": "{}", "classes": json.dumps(names)}
        save_weights(tmp_path / f"{number}.safetensors", weights, about)
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(set(files)) == 1
    assert int.from_bytes(files[0][:8], "little") % 8 == 0
    loaded = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == names
    save_weights(tmp_path / "bare.safetensors", weights)
    assert (tmp_path / "bare.safetensors").read_bytes() == serialize(weights, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_sets_in_memory_have_names_too(name: str) -> None:
    if datasets.present(name) is None:
        pytest.skip(f"{name} is not installed")
    data = datasets.load(name)
    wanted = {"digits": tuple("0123456789"), "fashion-mnist": ("T-shirt/top", "Trouser", "Pullover")}[name]
    assert len(data.names) == data.info.classes
    assert data.names[: len(wanted)] == wanted
    alone = datasets.load(name, only_test=True)
    assert (alone.names, len(alone.train)) == (data.names, 0)
    assert isinstance(alone.test, datasets.Images)
    assert isinstance(data.test, datasets.Images)
    assert torch.equal(alone.test.images, data.test.images)


def test_a_run_says_which_classes_it_has_found(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = on(photos, epochs=1, limit_train=7)
    train(recipe, tmp_path / "run")
    assert "\n6 classes: 1, 10, 2, B\u00e4r 7, a\\nb, caf\\udce9\n" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert main(["eval", str(tmp_path / "run"), "--data-dir", str(photos)]) == 0


# What is evaluated


def test_other_folders_of_the_same_classes_are_fine(
    copied: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run)]) == 0
    whole = capsys.readouterr()
    shutil.rmtree(copied / "train")
    rename(copied, "B\u00e4r 7", unicodedata.normalize("NFD", "B\u00e4r 7"))  # as macOS packs it
    assert main(["eval", str(run), "--data-dir", str(copied)]) == 0
    assert capsys.readouterr() == whole
    (copied / "val" / "1" / "0.png").unlink()
    assert main(["eval", str(run), "--data-dir", str(copied)]) == 0
    assert capsys.readouterr().out.startswith("11 images of image-folder")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("10", "9", "without '10' and with '9'"),
        ("2", "2 ", "without '2' and with '2 '"),
        ("a\nb", "a\nc", "without 'a\\nb' and with 'a\\nc'"),
        (NAMES[-1], "caf\u00e9", "without 'caf\\udce9' and with 'caf\u00e9'"),
        ("", "emu", "with 'emu'"),
        ("1", "", "without '1'"),
    ],
)
def test_eval_and_probe_refuse_other_classes(
    old: str, new: str, says: str, copied: Path, run: Path, fails: Callable[..., str]
) -> None:
    if not old:
        shutil.copytree(copied / "val" / "1", copied / "val" / new)
    elif not new:
        shutil.rmtree(copied / "val" / old)
    else:
        (copied / "val" / old).rename(copied / "val" / new)
    wanted = f"localgrad: the classes of image-folder are other than those of {run}: {says}; name the data that"
    for command in ("eval", "probe"):
        assert fails(command, run, "--data-dir", copied).startswith(wanted)
    assert not (run / "probe").exists()


def test_as_many_other_classes_are_refused_and_many_are_shortened(
    tmp_path: Path, run: Path, fails: Callable[..., str]
) -> None:
    others = write(tmp_path / "others", [f"n{i}" for i in range(40)], count=1)
    line = fails("eval", run, "--data-dir", others)
    assert "with 'n0', 'n1', 'n10', " in line
    assert "..., 'n9'; name the data" in line
    assert len(line) < 600


def test_the_same_classes_in_another_order_are_refused(photos: Path) -> None:
    data = datasets.load("image-folder", data_dir=str(photos))
    assert datasets.check_classes(data, NAMES, "r") is None
    with pytest.raises(UserError, match="in another order, class 0 is '1' instead of '2'; name the data"):
        datasets.check_classes(data, ["2", "10", "1", *NAMES[3:]], "r")
    for twice in (data, dataclasses.replace(data, names=(*NAMES, "Ba\u0308r 7"))):  # one name, written in two ways
        with pytest.raises(UserError, match=r"with 'B.r 7'; name the data"):
            datasets.check_classes(twice, [*NAMES[:3], *NAMES[4:]] if twice is data else NAMES, "r")
    with pytest.raises(UserError, match=r"class 3 is 'B.r 7' instead of 'a\\nb'"):
        datasets.check_classes(data, [*NAMES[:3], NAMES[4], NAMES[3], NAMES[5]], "r")


@pytest.mark.parametrize("names", [[1, 10, 2], "cat, dog", {"cat": 0}, 7])
def test_what_somebody_has_written_in_place_of_names_is_said(names: object, run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"classes": names}))
    with pytest.raises(UserError, match=r"the classes in .*config\.yaml are no list of names: put those in quotes"):
        read_classes(tmp_path)


# What goes on


@pytest.fixture
def stopped(copied: Path, tmp_path: Path, stop_after: Callable[[int], None]) -> Path:
    """A run on the copy that was stopped after its first step."""
    stop_after(1)
    with pytest.raises(Stopped):
        train(on(copied), tmp_path / "stopped")
    stop_after(0)
    return tmp_path / "stopped"


@pytest.mark.parametrize(("old", "new"), [("1", "zebra"), ("B\u00e4r 7", "B\u00e4r")])
def test_a_run_does_not_go_on_with_other_classes(old: str, new: str, copied: Path, stopped: Path) -> None:
    rename(copied, old, new)
    before = contents(stopped)
    with pytest.raises(UserError) as caught:
        train(on(copied), stopped)
    text = str(caught.value)
    assert text.startswith("the classes of image-folder are other than those of ")
    assert f"step-1: without '{old}' and with '{new}'; name the data" in text
    assert contents(stopped) == before
    rename(copied, new, old)
    train(on(copied), stopped)
    assert read_classes(stopped) == NAMES


def test_a_run_does_not_go_on_with_more_classes(copied: Path, stopped: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(copied / split / "1", copied / split / "emu")
    with pytest.raises(UserError, match="step-1: with 'emu'; name the data"):
        train(on(copied), stopped)


def test_runs_of_older_versions_go_on_and_are_evaluated_with_a_warning(
    photos: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = Run._state
    recipe = on(photos, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_state", lambda self: {k: v for k, v in state(self).items() if k != "classes"})
        train(recipe, tmp_path / "old")
    forget(tmp_path / "old")
    says = "has not recorded its classes: see that they were 1, 10, 2, B\u00e4r 7, a\\nb, caf\\udce9, in this order"
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["eval", str(tmp_path / "old")]) == 0
    assert capsys.readouterr().err == f"localgrad: warning: {tmp_path / 'old'} {says}\n"
    train(dataclasses.replace(recipe, epochs=2), tmp_path / "old")
    assert f"\n{tmp_path / 'old'}/checkpoints/step-2 {says}\n" in capsys.readouterr().out
    assert read_classes(tmp_path / "old") == NAMES
    assert main(["eval", str(tmp_path / "old")]) == 0  # a warning is an error here


def test_sets_in_memory_of_older_versions_have_nothing_to_warn_of() -> None:
    assert datasets.check_classes(datasets.load("digits"), [], "r") is None


# Under any locale


@pytest.mark.parametrize(
    "locale",
    [{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, pytest.param({"PYTHONUTF8": "1"}, marks=pytest.mark.slow)],
)
def test_names_are_the_same_under_a_locale_without_their_letters(locale: dict[str, str], photos: Path) -> None:
    code = "import json, sys; from localgrad.run.data import load; print(json.dumps(load('image-folder', "
    code += "data_dir=sys.argv[1]).names))"
    command, settings = [sys.executable, "-c", code, str(photos)], {**os.environ, "LC_ALL": "C", **locale}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120, check=True)
    assert json.loads(done.stdout) == NAMES


def test_a_terminal_without_their_letters_gets_them_escaped(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    terminal = io.TextIOWrapper(shown, encoding="ascii", write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        train(on(photos, epochs=1), tmp_path / "run")
    assert b"\n6 classes: 1, 10, 2, B\\xe4r 7, a\\nb, caf\\udce9\n" in shown.getvalue()
