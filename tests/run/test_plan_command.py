"""`localgrad plan`: what it prints and writes, that training follows it, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import QUICK

from localgrad.cli import main
from localgrad.core.errors import UserError
from localgrad.core.sizes import parse_bytes
from localgrad.run.folder import summary_rows
from localgrad.run.recipe import Recipe, read_plan, read_recipe

FLAGS = ["--model", "resnet20", "--batch-size", "64", "--precision", "float32", "--head", "1c2f"]
AUTO = ["train", *FLAGS, "--blocks", "auto", "--limit-train", "256", "--epochs", "1"]


@pytest.fixture(scope="module")
def ways() -> list[dict[str, Any]]:
    """What `plan` says about a budget that backpropagation fits."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["plan", *FLAGS, "--budget", "1GiB", "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.mark.parametrize("share", [0.7, pytest.param(0.9, marks=pytest.mark.slow)])
def test_a_run_follows_the_plan_and_takes_what_was_predicted(
    share: float, ways: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = {row["name"]: row for row in ways}
    parts = [f"BP in {n} parts" for n in (2, 4, 8)]
    assert list(rows) == ["BP", *parts, "checkpointing", "exact", "exact, fits 1GiB", "dgl+man", "dgl+man, fits 1GiB"]
    bp, chosen = rows["BP"], rows["exact, fits 1GiB"]
    assert chosen["blocks"] == bp["blocks"] == ["layer3.2"]  # nothing is faster than backpropagation, if it fits
    assert len(rows["dgl+man, fits 1GiB"]["blocks"]) > 1
    budget, plan = int(share * bp["peak"]), tmp_path / "plan.yaml"
    assert main(["plan", *FLAGS, "--budget", str(budget), "--out", str(plan)]) == 0
    command = ["train", *FLAGS[:-2], "--limit-train", "256", "--epochs", "1", "--plan", str(plan)]
    assert main([*command, "--out", str(tmp_path / "r")]) == 0
    recipe = read_recipe(tmp_path / "r" / "config.yaml")
    assert {name: getattr(recipe, name) for name in read_plan(plan)} == read_plan(plan)
    peak = summary_rows(tmp_path / "r")[0]["peak_bytes"]
    assert peak <= 1.01 * budget
    predicted = next(line for line in plan.read_text().splitlines() if "peak_bytes" in line)
    assert peak == pytest.approx(int(predicted.split()[1]), rel=0.01)


def test_the_table_names_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *QUICK[:2], "--budget", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert "1.00 x BP" in out
    assert "Peaks and times are predicted, nothing was trained." in out


def test_an_image_size_alone_means_images_as_of_imagenet(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "timm:resnet10t", "--image-size", "32", "--batch-size", "8", "--head", "0c1f"]
    assert main(["plan", *flags, "--budget", "4GiB", "--json"]) == 0
    bp = json.loads(capsys.readouterr().out)[0]
    assert bp["lasting"] > 5_400_000 * 4 * 2  # all parameters of the network with 1000 classes, and their momenta


def test_the_table_is_printed_where_no_plan_fits_a_share_of_bp(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *QUICK[:2], "--budget", "1%"]) == 2
    said = capsys.readouterr()
    assert "1.00 x BP" in said.out
    assert "no plan fits" in said.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--budget", "8 apples"], "--budget takes bytes as 8GiB or 500MiB, not '8 apples'"),
        (["--budget", "1MiB"], "no plan fits 1 MiB: the least is"),
        (["--out", "nowhere/plan.yaml"], "cannot write to nowhere"),
        (["--model", "resnet21"], "unknown model 'resnet21'"),
    ],
)
def test_what_cannot_be_planned(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *QUICK[:2], *flags]) == 2
    assert says in capsys.readouterr().err


def test_a_file_that_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "plan: 3", "plan: {blocks: 4}", "{"):
        (tmp_path / "plan.yaml").write_text(text)
        assert main(["train", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "r")]) == 2
        assert "holds no plan: let localgrad plan --out write one" in capsys.readouterr().err
    assert main(["train", "--plan"]) == 2
    assert not (tmp_path / "r").exists()


def test_one_call_plans_trains_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*AUTO, "--budget", "5.2MiB", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    recipe = read_recipe(tmp_path / "config.yaml")
    # Which kind is faster depends on the machine.
    kind = f"{len(recipe.cut)} blocks" if isinstance(recipe.cut, list) else "exact training"
    assert f"fits 5.2MiB: {kind}" in out
    assert recipe.recompute or isinstance(recipe.cut, list)
    assert summary_rows(tmp_path)[0]["peak_bytes"] <= 1.01 * 5.2 * 2**20
    assert main(command) == 0  # the plan of the run, not a new one
    assert "holds this run, finished" in capsys.readouterr().out


def test_backpropagation_fits_itself_by_recomputing(tmp_path: Path) -> None:
    flags = ["--method", "bp", "--coupling", "none", "--head", "auto", "--budget", "7MiB"]
    assert main([*AUTO, *flags, "--out", str(tmp_path)]) == 0
    recipe = read_recipe(tmp_path / "config.yaml")
    assert (recipe.method, recipe.blocks) == ("bp", "1")
    assert recipe.recompute
    assert summary_rows(tmp_path)[0]["peak_bytes"] <= 1.01 * 7 * 2**20


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--blocks", "auto"], "--blocks auto and --budget belong together"),
        (["--blocks", "4", "--budget", "1GiB"], "--blocks auto and --budget belong together"),
        (["--blocks", "auto", "--budget", "1MiB"], "no plan fits 1 MiB"),
        (["--blocks", "auto", "--budget", "one"], "--budget takes bytes"),
    ],
)
def test_a_budget_needs_auto_blocks(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *QUICK, *flags, "--out", str(tmp_path / "r")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_bytes_in_words() -> None:
    sizes = {"8GiB": 2**33, "500 MiB": 500 * 2**20, "1.5g": 3 * 2**29, "1e6": 10**6, "12KB": 12 * 10**3}
    sizes |= {"10 MB": 10**7, "10 mb": 10**7, "10M": 10 * 2**20, "0.5 TB": 5 * 10**11, "2Ki": 2**11, "7b": 7}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for wrong in ("", "GiB", "-1GiB", "inf", "0"):
        with pytest.raises(UserError, match="--budget takes bytes"):
            parse_bytes(wrong)


def test_what_is_recomputed_is_named_in_the_recipe() -> None:
    assert Recipe(recompute="all").recomputed == {"units": True, "couplings": []}
    assert Recipe(recompute="layer1.0, coupling.2").recomputed == {"units": ["layer1.0"], "couplings": [2]}
    assert Recipe().recomputed == {"units": [], "couplings": []}
    with pytest.raises(UserError, match=r"recompute takes names of units, all, and coupling\.K"):
        Recipe(recompute="coupling.x")
