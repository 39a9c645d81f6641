"""The tables of docs/tasks.md show what is in results/: means, differences paired by seed, and times over BP's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import task_tables

Row = dict[str, str]
MEAN = {"n": "2", "bits_mean": "2.5", "bits_std": "0.1", "exact_bits_mean": "", "exact_bits_std": ""}
STEP = {"peak_bytes": str(2**20), "milliseconds": "10", "exact_milliseconds": "", "exact_peak_bytes": "as BP"}
FILES: dict[str, list[Row]] = {
    "accuracy_fashion_scenes_runs.csv": [
        {"method": method, "blocks": blocks, "setting": f"model=fcn{cuts}", "seed": str(seed), "error": error}
        for method, blocks, cuts, errors in (("bp", "1", "", "60 62"), ("dgl+man", "2", " blocks=a", "61 65"))
        for seed, error in enumerate(errors.split())
    ],
    "segmentation_times.csv": [
        {"network": "fcn", "method": "bp", "blocks": "1", **STEP},
        {
            "network": "fcn",
            "method": "dgl+man",
            "blocks": "2",
            **STEP,
            "milliseconds": "15",
            "exact_milliseconds": "12",
        },
    ],
    "language_steps.csv": [
        {"method": "bp", "blocks": "1", "ms": "10", "peak_bytes": "0", "exact_ms": "", "exact": "no plan fits"},
        {"method": "own", "blocks": "4", "ms": "12", "peak_bytes": "0", "exact_ms": "11", "exact": ""},
    ],
    "language_means.csv": [
        {"method": "bp", "blocks": "1", **MEAN},
        {"method": "own", "blocks": "4", **MEAN, "exact_bits_mean": "2.4", "exact_bits_std": "0.2"},
        {"method": "lopt", "blocks": "4", **MEAN, "bits_mean": ""},  # It has not been trained yet.
    ],
    "detection_steps.csv": [
        {"method": method, "batch_size": "16", "peak_bytes": str(2**20), "cpu_ms": ms}
        for method, ms in (("bp", "10"), ("dgl", "11"), ("bp, recompute", "14"))
    ],
    "detection.csv": [
        {"method": method, "seed": seed, "map": score, "ap50": score}
        for method, seed, score in (("bp", "0", "20"), ("bp", "1", "22"), ("dgl", "0", "19"), ("dgl", "1", "23"))
    ],
}


@pytest.mark.parametrize(
    ("table", "lines"),
    [
        (
            task_tables.segmentation,
            ["| FCN | BP | 1 | 39.00 ± 1.41 |  | 2 | 1 MiB | 1.00 | as BP |",
             "| FCN | DGL + MAN | 2 | 37.00 ± 2.83 | -2.00 ± 1.41 | 2 | 1 MiB | 1.50 | 1.20 |"],
        ),
        (
            task_tables.language,
            ["| BP | 1 | 2.500 ± 0.100 | 2 | 0 MiB | 1.00 | no plan fits |  |",
             "| DGL, own readouts | 4 | 2.500 ± 0.100 | 2 | 0 MiB | 1.20 | 1.10 | 2.400 ± 0.200 |"],
        ),
        (
            task_tables.detection,
            ["| BP | 1 | 21.00 ± 1.41 | 21.00 ± 1.41 |  | 2 | 1 MiB, 1.00 |",
             "| DGL | 4 | 21.00 ± 2.83 | 21.00 ± 2.83 | 0.00 ± 1.41 | 2 | 1 MiB, 1.10 |",
             "| BP, all recomputed | 1 | as BP | as BP |  |  | 1 MiB, 1.40 |"],
        ),
    ],
    ids=["segmentation", "language", "detection"],
)  # fmt: skip
def test_a_table_shows_the_rows(table: Callable[[], str], lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_tables, "read_results", FILES.__getitem__)
    assert table().splitlines()[2:] == lines
