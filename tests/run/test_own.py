"""A network of one's own as --model PACKAGE.MODULE:FUNCTION: all commands take it, and a mistake is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import QUICK, noise

from localgrad.cli import main
from localgrad.core.errors import UserError
from localgrad.run.own import build_own, is_own
from localgrad.run.recipe import read_recipe

NETS = """
from torch import nn

answer = 42

def small(classes, in_channels, width=8):
    layers = [(in_channels, width), (width, width), (width, width)]
    units = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in layers]
    return nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

def table(classes, in_channels):
    return {"classes": classes}

def broken(classes, in_channels):
    return 1 / 0
"""


OWN = [*QUICK[2:], "--model", "my_package.nets:small", "--model-args", "width=6", "--blocks", "2", "--head", "0c1f"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a package of networks. What is imported from it is forgotten afterwards."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(NETS)
    (package / "unfinished.py").write_text("def f(:\n")
    (package / "needy.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("my_package"):
            del sys.modules[name]


def test_names_of_libraries_are_not_ones_own() -> None:
    assert [is_own(name) for name in ("resnet20", "timm:vit", "torchvision:vgg11", "nets:f", "a.b:f")] == [
        False, False, False, True, True,
    ]  # fmt: skip


def test_a_run_of_ones_own_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *OWN, "--out", "run"]) == 0
    recipe = read_recipe(here / "run" / "config.yaml")
    assert (recipe.model, recipe.arguments) == ("my_package.nets:small", {"width": 6})
    Image.fromarray(noise(8, 8)).save("a.png")
    again = ["train", *OWN, "--init", "run/model.safetensors", "--out", "again"]
    for command in (["eval", "run"], ["export", "run"], ["predict", "run", "a.png"], again):
        assert main(command) == 0, (command, capsys.readouterr().err)


@pytest.mark.slow
def test_other_processes_find_the_network_too(here: Path) -> None:
    sets = [f"--set={pair}" for pair in ("model=my_package.nets:small", "epochs=1", "head=0c1f", "limit_train=64")]
    compare = ["compare", "--methods", "bp,dgl", "--blocks", "2", *sets, "--out", "grid"]
    for command in (compare, ["probe", "grid/bp_k1_s0"], ["plan", *OWN], ["train", *OWN, "--nproc", "2", "--out", "r"]):
        done = subprocess.run([Path(sys.executable).parent / "localgrad", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nowhere:f", "no module 'nowhere' for the model 'nowhere:f': it must lie in the current directory or be inst"),
        ("my_package.nope:f", "no module 'my_package.nope' for the model"),
        ("my_package.nets:smal", "unknown function of my_package.nets 'smal': did you mean 'small'?"),
        ("my_package.nets:answer", "unknown function of my_package.nets 'answer'"),
        ("my_package.nets:table", "'my_package.nets:table' must return a network, an nn.Module, not dict"),
        ("my_package.nets:broken", "failed when it was called with classes=10, in_channels=1: ZeroDivisionError: "
         "division by zero (nets.py, line 15)"),
        ("my_package.unfinished:f", "'my_package.unfinished' cannot be imported: SyntaxError"),
        ("my_package.needy:f", "'my_package.needy' cannot be imported: ModuleNotFoundError: No module named 'no_such_"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(model: str, says: str, here: Path, fails: Callable[..., str]) -> None:
    before = sorted(os.listdir(here))
    for command in (["train", *QUICK[2:], "--out", "run"], ["plan"]):
        assert says in fails(*command, "--model", model)
    assert sorted(set(os.listdir(here)) - {"__pycache__"}) == before


def test_arguments_reach_the_function(here: Path) -> None:
    network = build_own("my_package.nets:small", classes=3, in_channels=2, width=4)
    assert network(torch.zeros(1, 2, 5, 5)).shape == (1, 3)
    with pytest.raises(UserError, match="unexpected keyword argument 'depth'"):
        build_own("my_package.nets:small", classes=3, in_channels=2, depth=4)
