"""The benchmark of segmentation at a tiny size: each run has one row, and exact plans stand beside local rows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import segmentation
import torch

from localgrad.core.blocks import split, trace_units
from localgrad.run import readers
from localgrad.run.build import backbone_of
from localgrad.run.compare import Cell
from localgrad.run.data import DATASETS
from localgrad.run.tables import write_csv


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_cut_is_one_of_its_network() -> None:
    for network in segmentation.CUTS:
        found = list(segmentation.cells(network, 0))
        assert len({one.name for one in found}) == len(found) == 9
        few, many = segmentation.CUTS[network]
        assert few in many.split(",")
        recipe = found[-1].recipe
        backbone = backbone_of(recipe, DATASETS["fashion-scenes"])
        traced = trace_units(backbone, torch.zeros(1, 3, 96, 96), recipe.cut)
        assert len(split(traced, recipe.cut)) == found[-1].blocks == 4


def test_a_run_that_has_a_row_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def run_all(cells: Sequence[Cell], out: Path, jobs: int, *, done: Callable[[Cell], None]) -> list[str]:
        for one in cells[:5]:
            trained.append(one.name)
            (out / one.name).mkdir(parents=True)
            head = {"epoch": 1, "train_loss": 0.5, "eval_loss": 0.5, "eval_miou": 40.0, "lr": 0.1, "peak_bytes": 9}
            rest = {"peak_rss_bytes": 9, "seconds": 1.0, "skipped_steps": 0, "bad_images": 0}
            write_csv(out / one.name / "summary.csv", [head | rest])
            (out / one.name / "config.yaml").write_text("recipe: {}\n")
            done(one)
        return []

    monkeypatch.setattr(segmentation, "run_all", run_all)
    settings = segmentation.Settings(("unet",), (0,), tmp_path, tmp_path / "runs", repeats=0)
    segmentation.main(settings)
    segmentation.main(settings)
    assert len(trained) == len(set(trained)) == 9
    rows = read(tmp_path / segmentation.RUNS)
    assert {(row["score"], row["error"]) for row in rows} == {("miou", "60.0")}
    assert len(read(tmp_path / "accuracy_fashion_scenes.csv")) == 9


@pytest.mark.slow
@pytest.mark.skipif(not readers.DEBIAN_FASHION.is_dir(), reason="package dataset-fashion-mnist is not installed")
def test_exact_plans_stand_beside_local_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(segmentation.BASE, model_args="width=4", batch_size=4, limit_train=40)
    monkeypatch.setattr(segmentation, "BASE", small)
    segmentation.time_steps(segmentation.Settings(results=tmp_path, repeats=1), "unet")
    rows = read(tmp_path / "segmentation_times.csv")
    assert len(rows) == 9
    assert all(float(row["milliseconds"]) > 0 for row in rows)
    planned = [row for row in rows if row["exact_milliseconds"]]
    assert planned
    assert all(int(row["exact_peak_bytes"]) <= 1.02 * int(row["peak_bytes"]) for row in planned)
