"""The study's book-keeping: each run has one row, and none that has one is trained again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import probes
import pytest
import study

from localgrad.run.checkpoint import MODEL
from localgrad.run.compare import Cell
from localgrad.run.tables import write_csv


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row_of(folder: Path, method: str, blocks: int, setting: str, seed: int) -> dict[str, Any]:
    row = {"method": method, "blocks": blocks, "setting": setting, "seed": seed, "error": 10.0 + blocks + seed}
    return {**row, "peak_bytes": 2**20, "seconds": 1.0, "added": 5, "machine": "one"}


def test_a_study_goes_on_where_its_rows_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def run_all(cells: Sequence[Cell], out: Path, jobs: int, *, done: Callable[[Cell], None]) -> list[str]:
        for cell in cells[:3]:
            trained.append(cell.name)
            done(cell)
        return [cell.name for cell in cells[3:]]

    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(study, "row_of", row_of)
    monkeypatch.setattr(study, "PARTS", {
        "a": [study._compare("bp,dgl", "2", "0,1"), study._compare("dgl", "layer1.0/layer2.0", "0,1", momentum="0.5")],
        "b": [study._compare("dgl", "2", "1")],  # a run of another part too
    })  # fmt: skip
    settings = study.Settings(results=tmp_path, out=tmp_path / "runs", parts="a,b")
    with (
        pytest.warns(UserWarning, match="momentum has no effect"),
        pytest.raises(SystemExit, match="these runs failed"),
    ):
        study.main(settings)
    with pytest.warns(UserWarning, match="momentum has no effect"):
        study.main(settings)
    names = ["bp_k1_s0", "bp_k1_s1", "dgl_k2_s0", "dgl_k2_s1"]
    assert sorted(trained) == sorted([*names, *(f"dgl_k3_s{s}_blocks-layer1.0-layer2.0" for s in (0, 1))])
    assert len(read(tmp_path / "accuracy_fashion_small_runs.csv")) == 6
    means = read(tmp_path / "accuracy_fashion_small.csv")
    assert [(r["method"], r["blocks"], r["setting"], r["n"], r["error_mean"]) for r in means] == [
        ("bp", "1", "", "2", "11.5"),
        ("dgl", "2", "", "2", "12.5"),
        ("dgl", "3", "blocks=layer1.0,layer2.0", "2", "13.5"),
    ]
    pairs = read(tmp_path / "accuracy_fashion_small_pairs.csv")
    assert [(p["first"], p["second"], p["difference"]) for p in pairs] == [
        ("bp", "dgl K=2", "1.0"),
        ("bp", "dgl K=3 blocks=layer1.0,layer2.0", "2.0"),
    ]


def test_what_starts_from_weights_waits_for_them_and_has_them_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues: list[list[str]] = []

    def run_all(cells: Sequence[Cell], out: Path, jobs: int, *, done: Callable[[Cell], None]) -> list[str]:
        queues.append([cell.name for cell in cells])
        for cell in cells[:1]:
            done(cell)
        return []

    weights = tmp_path / "bp_k1_s2" / MODEL
    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(study, "row_of", row_of)
    monkeypatch.setattr(study, "PARTS", {
        "exact": [study._compare("bp", "1", init=str(weights))],
        "main": [study._compare("bp", "1", "1,3")],
        "local": [study._compare("bp", "1", "2")],
    })  # fmt: skip
    settings = study.Settings(results=tmp_path, out=tmp_path, parts="exact,main,local")
    late = study.grid(study.PARTS["exact"][0])[0].name

    study.main(settings)
    assert queues == [["bp_k1_s1", "bp_k1_s3", "bp_k1_s2"], [late]]
    (tmp_path / "accuracy_fashion_small_runs.csv").unlink()
    study.main(replace(settings, parts="local"))
    study.main(replace(settings, parts="exact"))  # of which the weights are gone, though their run has a row
    assert queues[2:] == [["bp_k1_s2"], [], ["bp_k1_s2"], [late]]
    assert [row["seed"] for row in read(tmp_path / "accuracy_fashion_small_runs.csv")] == ["2", "0"]
    (tmp_path / "accuracy_fashion_small_runs.csv").unlink()
    weights.parent.mkdir()
    weights.touch()
    study.main(replace(settings, parts="exact"))
    assert queues[6:] == [[], [late]]


def test_every_part_is_a_grid_of_its_own_runs() -> None:
    names = [cell.name for part in study.PARTS.values() for compare in part for cell in study.grid(compare)]
    assert len(names) == len(set(names))
    assert {f"dgl+man_k16_s{s}" for s in range(5)} <= set(names)


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no part 'mian': take main, "):
        study.main(study.Settings(results=tmp_path, out=tmp_path, parts="mian"))


def test_each_finished_run_is_probed_once_against_bp_of_the_next_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed, units = [], ("stem", "layer1.0")

    def localgrad(words: list[str]) -> int:
        run, against = Path(words[1]), Path(words[3]).name
        probed.append((run.name, against))
        write_csv(run / "probe" / "separability.csv", [{"unit": unit, "top1": 50.0} for unit in units])
        pairs = [{"unit": a, "against": against, "against_unit": b, "cka": 0.5} for a in units for b in units]
        write_csv(run / "probe" / "cka.csv", pairs)
        return 0

    monkeypatch.setattr(probes, "localgrad", localgrad)
    monkeypatch.setattr(probes, "read_environment", lambda run: {"commit": "abc", "threads": 1})
    runs = tmp_path / "runs"
    bps = ("bp_k1_s0", "bp_k1_s1", "bp_k1_s10")
    names = (*bps, "dgl+man++_k16_s1", "dgl_k16_s12", "dgl_k4_s1_depth-2", "dgl_k4_s0")
    for name in names:
        (runs / name / "probe").mkdir(parents=True)
        if name != "dgl_k4_s0":  # which still trains
            (runs / name / MODEL).touch()
    for _ in range(2):
        probes.main(probes.Settings(tmp_path, runs))
    assert dict(probed) == {
        **dict(zip(bps, (*bps[1:], bps[0]), strict=True)),
        "dgl+man++_k16_s1": "bp_k1_s10", "dgl_k16_s12": "bp_k1_s0",
    }  # fmt: skip
    assert len(probed) == 5
    rows = [row for row in read(tmp_path / "probes_fashion_small.csv") if row["method"] == "dgl+man++"]
    assert [tuple(row.values()) for row in rows] == [
        ("dgl+man++", "16", "1", unit, "50.0", "0.5", "bp_k1_s10", "abc") for unit in units
    ]
