"""The grid: its cells, one process each, going on after a stop, and the table's arithmetic."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import rows_of

from localgrad.cli import main
from localgrad.core.backbones import build
from localgrad.core.errors import UserError
from localgrad.run.arguments import Compare, parse_changes
from localgrad.run.compare import Cell, grid, run_all
from localgrad.run.folder import summary_rows
from localgrad.run.recipe import Recipe, as_dict, read_recipe
from localgrad.run.tables import conclusion, paired, row_of, summarize
from localgrad.run.train import train

SET = ("model=resnet20", "limit-train=64", "batch-size=16", "epochs=1", "precision=float32")


def test_the_grid_splits_method_and_coupling_at_the_first_plus() -> None:
    cells = grid(Compare(methods="bp,dgl,dgl+man++,infopro+deep-man", blocks="2,4", seeds="0,1", set=SET))
    assert len(cells) == 2 + 3 * 4
    by_name = {cell.name: cell.recipe for cell in cells}
    assert (by_name["bp_k1_s1"].blocks, by_name["bp_k1_s1"].seed) == ("1", 1)
    plus = by_name["dgl+man++_k4_s0"]
    assert (plus.method, plus.coupling, plus.blocks, plus.head, plus.epochs) == ("dgl", "man++", "4", "1c2f", 1)
    deep = by_name["infopro+deep-man_k2_s0"]
    assert (deep.method, deep.coupling, deep.head) == ("infopro", "deep-man", "auto")
    assert by_name["dgl_k2_s0"].coupling == "none"


def test_a_head_that_is_set_holds_for_deep_man_too() -> None:
    (cell,) = grid(Compare(methods="dgl+deep-man", set=("head=1c1f",)))
    assert cell.recipe.head == "1c1f"


def test_a_cut_can_be_named() -> None:
    cells = grid(Compare(methods="bp,dgl", blocks="2,layer1.0/layer2.0"))
    assert [(c.name, c.blocks, c.setting) for c in cells] == [
        ("bp_k1_s0", 1, ""),
        ("dgl_k2_s0", 2, ""),
        ("dgl_k3_s0_blocks-layer1.0-layer2.0", 3, "blocks=layer1.0,layer2.0"),
    ]
    assert cells[2].recipe.cut == ["layer1.0", "layer2.0"]


def test_each_value_of_a_varied_field_is_run() -> None:
    cells = grid(Compare(methods="dgl+man,infopro+man", blocks="2", seeds="0,1", vary=("momentum=0,0.9", "lr=0.1")))
    assert len(cells) == 8
    names = [cell.name for cell in cells]
    assert names[:2] == ["dgl+man_k2_s0_momentum-0.0_lr-0.1", "dgl+man_k2_s0_momentum-0.9_lr-0.1"]
    assert [(c.recipe.momentum, c.recipe.lr, c.setting) for c in cells[:2]] == [
        (0.0, 0.1, "momentum=0.0 lr=0.1"),
        (0.9, 0.1, "momentum=0.9 lr=0.1"),
    ]


def test_lists_to_vary_are_joined_by_slashes() -> None:
    cells = grid(Compare(methods="dgl", blocks="2", vary=("recompute=layer1.0/layer1.1,all", "block-lr=1/0.5")))
    assert [(c.name, c.recipe.recompute, c.recipe.block_lr) for c in cells] == [
        ("dgl_k2_s0_recompute-layer1.0-layer1.1_block_lr-1-0.5", "layer1.0,layer1.1", "1,0.5"),
        ("dgl_k2_s0_recompute-all_block_lr-1-0.5", "all", "1,0.5"),
    ]


@pytest.mark.filterwarnings("ignore:momentum has no effect")
def test_what_has_no_effect_on_a_run_does_not_repeat_it() -> None:
    cells = grid(Compare(methods="bp,dgl+man", blocks="2", vary=("momentum=0,0.9",)))
    assert [cell.name for cell in cells] == ["bp_k1_s0", "dgl+man_k2_s0_momentum-0.0", "dgl+man_k2_s0_momentum-0.9"]


def test_a_method_may_have_a_field_of_its_own() -> None:
    cells = grid(Compare(methods="bp,bp@recompute=all,dgl", blocks="2"))
    assert [cell.name for cell in cells] == ["bp_k1_s0", "bp_k1_s0_recompute-all", "dgl_k2_s0"]
    assert [cell.recipe.recompute for cell in cells] == [None, "all", None]
    assert [cell.setting for cell in cells] == ["", "recompute=all", ""]


def test_what_to_conclude_names_exact_training_too() -> None:
    same = {"n": 3, "error_std": 0.1, "seconds": 10.0, "setting": ""}
    bp = {**same, "method": "bp", "blocks": 1, "error_mean": 9.0, "peak_bytes": 2**30}
    man = {**same, "method": "dgl+man", "blocks": 4, "error_mean": 9.5, "peak_bytes": 2**29, "seconds": 12.0}
    exact = {**bp, "setting": "recompute=all", "peak_bytes": 2**28, "seconds": 13.0}
    assert "docs/memory.md" in conclusion([bp, man])
    said = conclusion([bp, exact, man])
    assert "docs/memory.md" not in said
    assert "- recomputation is exact, and has bp recompute=all: +0.00 points, 0.25 times the memory, 1.30" in said
    assert conclusion([bp]) == conclusion([man]) == ""


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"methods": "bp@seed=1"}, "--methods bp@seed is given otherwise too"),
        ({"methods": "bp@lr=0.1", "set": ("lr=0.2",)}, "--methods bp@lr is given otherwise too"),
        ({"methods": "bp@recomput=all"}, "did you mean 'recompute'"),
        ({"vary": ("momentum=0,x",)}, "--vary momentum=x"),
        ({"vary": ("momentun=0",)}, "did you mean 'momentum'"),
        ({"vary": ("seed=0,1",)}, "--vary seed is given otherwise too"),
        ({"vary": ("lr=0.1",), "set": ("lr=0.2",)}, "--vary lr is given otherwise too"),
        ({"vary": ("data=digits",), "data": "digits"}, "--vary data is given otherwise too"),
        ({"vary": ("momentum",)}, "--vary takes KEY=VALUE,VALUE, not 'momentum'"),
        ({"vary": ("block-lr=1,x",)}, "block-lr"),
        ({"vary": ("init=a/b.pt,a-b.pt",)}, "would both be called"),
        ({"methods": "dgl+mann"}, "did you mean 'man'"),
        ({"methods": ","}, "--methods takes names"),
        ({"seeds": ""}, "--seeds takes whole numbers"),
        ({"set": ("lr",)}, "KEY=VALUE"),
        ({"recipe": "demoo"}, "did you mean 'demo'"),
        ({"set": ("seed=7",)}, "the grid takes it from --seeds"),
        ({"set": ("coupling=man",)}, "the grid takes it from --methods"),
    ],
)
def test_a_wrong_grid_is_refused(wrong: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        grid(Compare(**wrong))


@pytest.mark.parametrize("missing", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_grid_runs_what_is_missing_and_shows_a_table(
    missing: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cells = grid(Compare(methods="bp,dgl+man", blocks="2", seeds="0,1", set=SET))
    for cell in cells[missing:]:
        train(cell.recipe, tmp_path / cell.name)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors")}
    flags = [word for value in SET for word in ("--set", value)]
    words = ["--methods", "bp,dgl+man", "--blocks", "2", "--seeds", "0,1", "--jobs", "2", *flags]
    assert main(["compare", *words, "--out", str(tmp_path)]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    rows = rows_of(tmp_path / "compare.csv")
    assert [(r["method"], r["blocks"], r["n"], r["seeds"]) for r in rows] == [
        ("bp", "1", "2", "0 1"),
        ("dgl+man", "2", "2", "0 1"),
    ]
    errors = [100 - summary_rows(tmp_path / f"bp_k1_s{seed}")[-1]["eval_top1"] for seed in (0, 1)]
    assert float(rows[0]["error_mean"]) == pytest.approx(statistics.mean(errors), abs=1e-3)
    assert float(rows[0]["error_std"]) == pytest.approx(statistics.stdev(errors), abs=1e-3)
    assert (rows[0]["torch"], rows[0]["threads"], rows[0]["precision"]) == (torch.__version__, "1", "float32")
    shown = capfd.readouterr().out
    assert f"4 runs, {4 - missing} of them finished" in shown
    assert "mean ± standard deviation" in shown
    assert "Against backpropagation (" in shown
    assert "- the smallest error has " in shown
    assert read_recipe(tmp_path / "bp_k1_s1" / "config.yaml").seed == 1


def test_a_grid_of_other_settings_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "grid"
    (out / "dgl_k4_s0").mkdir(parents=True)
    (out / "dgl_k4_s0" / "config.yaml").write_text(yaml.safe_dump({"recipe": as_dict(Recipe(lr=0.7))}))
    assert main(["compare", "--methods", "bp,dgl", "--out", str(out)]) == 2
    assert [p.name for p in out.iterdir()] == ["dgl_k4_s0"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "cifar10", "--set", "data-dir=nowhere"], "nowhere"),
        (["--data", "digitz"], "did you mean 'digits'"),
        (["--blocks", "4,99"], "blocks=99 is out of range"),
        (["--blocks", "2,x"], "unknown unit 'x'"),
        (["--set", "model=resnet21"], "unknown model 'resnet21'"),
        (["--set", "precision=fp16", "--set", "device=cpu"], "fp16 needs a CUDA device"),
    ],
)
def test_a_grid_that_cannot_run_starts_nothing(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *flags, "--out", str(tmp_path / "grid")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_options_without_effect_warn_once() -> None:
    with pytest.warns(UserWarning, match="momentum has no effect: there is no EMA"):
        grid(Compare(methods="dgl", set=("momentum=0.5",)))


@pytest.mark.slow
def test_sigterm_stops_the_run_with_the_grid(tmp_path: Path) -> None:
    out = tmp_path / "grid"
    flags = [f for value in (*SET, "epochs=500") for f in ("--set", value)]
    command = [sys.executable, "-m", "localgrad", "compare", "--methods", "dgl", *flags, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    summary = out / "dgl_k4_s0" / "summary.csv"
    deadline = time.monotonic() + 120
    while not summary.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.strip() == "localgrad: stopped"
    size = summary.stat().st_size
    time.sleep(1.5)
    assert summary.stat().st_size == size


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quick = parse_changes(SET)
    cells = [
        Cell("bad", 4, Recipe(**quick, data="cifar10", data_dir=str(tmp_path / "none"))),
        Cell("dgl+man", 4, Recipe(**quick)),
    ]
    done: list[Cell] = []
    assert run_all(cells, tmp_path, jobs=1, done=done.append) == ["bad_k4_s0"]
    assert "bad_k4_s0 failed (2): localgrad: " in capfd.readouterr().out
    assert done == cells[1:]
    row = row_of(tmp_path / done[0].name, "dgl+man", 4, done[0].setting, 0)
    backbone = build("resnet20", classes=10, in_channels=1)
    assert (row["method"], row["setting"]) == ("dgl+man", "")
    assert row["parameters"] == sum(p.numel() for p in backbone.parameters()) < row["parameters"] + row["added"]


def test_the_table_is_over_seeds() -> None:
    runs = [
        {"method": m, "blocks": 4, "seed": s, "error": e, "peak_bytes": 10 * s, "seconds": 2.0, "threads": s // 2}
        for m, s, e in (("dgl", 0, 1.0), ("man", 0, 5.0), ("dgl", 1, 3.0), ("dgl", 2, 8.0))
    ]
    dgl, man = summarize(runs)
    assert (dgl["n"], dgl["error_mean"], dgl["error_std"], dgl["peak_bytes"], dgl["seeds"]) == (
        3,
        4,
        3.606,
        10,
        "0 1 2",
    )
    assert (man["n"], man["error_std"]) == (1, "")
    assert (dgl["threads"], man["threads"]) == ("0 / 1", 0)


def test_a_table_has_what_any_of_its_runs_has_and_each_seed_once() -> None:
    old = {"method": "dgl", "blocks": 4, "seed": 0, "error": 1.0, "peak_bytes": 1, "seconds": 1.0}
    (row,) = summarize([old, {**old, "seed": 1, "added": 7}, {**old, "seed": 1, "error": 3.0, "added": 7}])
    assert (row["n"], row["error_mean"], row["added"]) == (2, 2, 7)


def test_differences_are_paired_by_seed() -> None:
    def runs(method: str, blocks: int, errors: dict[int, float], setting: str = "") -> list[dict]:
        same = {"method": method, "blocks": blocks, "setting": setting}
        return [{**same, "seed": s, "error": e} for s, e in errors.items()]

    table = paired(
        [
            *runs("bp", 1, {0: 9.0, 1: 9.5, 2: 10.0}),
            *runs("dgl", 16, {0: 12.0, 1: 13.5, 2: 13.0, 3: 99.0}),
            *runs("dgl", 4, {0: 11.0}),
            *runs("dgl+man", 16, {1: 12.5, 2: 12.5, 3: 98.0}),
            *runs("dgl", 16, {0: 1.0, 1: 1.0}, "epochs=15"),  # other conditions: no difference is of the method
            *runs("bp", 1, {0: 9.0, 3: 98.0}, "recompute=all"),  # which changes no error
        ]
    )
    table, again = (
        [p for p in table if "recompute" not in p["second"]],
        [p for p in table if "recompute" in p["second"]],
    )
    assert [(p["first"], p["seeds"]) for p in again] == [("dgl K=16", "0 3")]
    assert [(p["first"], p["second"], p["n"], p["seeds"]) for p in table] == [
        ("bp", "dgl K=16", 3, "0 1 2"),
        ("bp", "dgl+man K=16", 2, "1 2"),
        ("dgl K=16", "dgl+man K=16", 3, "1 2 3"),
    ]
    apart = [3.0, 4.0, 3.0]  # of the first pair
    half = 4.302653 * statistics.stdev(apart) / 3**0.5  # Student's t with two degrees of freedom, from its table
    assert table[0]["difference"] == pytest.approx(statistics.mean(apart), abs=1e-3)
    assert (table[0]["low"], table[0]["high"]) == pytest.approx((10 / 3 - half, 10 / 3 + half), abs=2e-3)
