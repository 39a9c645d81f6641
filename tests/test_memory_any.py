"""The memory of U-Nets and language models: what the script measures, and its table."""

from __future__ import annotations

from pathlib import Path

import common
import fill_tables
import memory_any
import pytest

from localgrad.run.tables import read_csv


def test_the_table_has_times_where_they_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, fill_tables):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    rows = [("A", "BP", "", 8), ("A", "DGL, 2 blocks", "a.1 a.2", 6), ("B", "BP", "", 4)]
    common.Table(tmp_path / "results" / "memory_any.csv").add(
        *({"network": network, "way": way, "cuts": cuts, "recomputed": 0, "peak_bytes": size * 2**20}
          for network, way, cuts, size in rows)
    )  # fmt: skip
    plain = ["| A | BP |  | 0 | 8 MiB | 100% |  |", "| A | DGL, 2 blocks | `a.1`, `a.2` | 0 | 6 MiB | 75% |  |"]
    last = "| B | BP |  | 0 | 4 MiB | 100% |  |"
    assert fill_tables.memory_any().splitlines()[2:] == [*plain, last]
    times = common.Table(tmp_path / "results" / "memory_any_times.csv")
    times.add(*({"network": "A", "way": row[1], "seconds_of_step": row[3] / 4} for row in rows[:2]))
    timed = [line.removesuffix(" |") + f"{time} |" for line, time in zip(plain, ("1.00", "0.75"), strict=True)]
    assert fill_tables.memory_any().splitlines()[2:] == [*timed, last]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # The libraries themselves warn.
@pytest.mark.parametrize(
    ("network", "library"),
    [("Unet", "segmentation_models_pytorch"), ("UNet 3D", "monai"), ("GPT-2", "transformers")],
)
def test_the_script_measures_what_was_predicted_and_goes_on_where_it_stopped(
    network: str, library: str, tmp_path: Path
) -> None:
    pytest.importorskip(library)
    settings = memory_any.Settings((network,), rounds=1, tiny=True, out=tmp_path / "any.csv")
    memory_any.main(settings)
    rows, times = read_csv(tmp_path / "any.csv"), read_csv(tmp_path / "any_times.csv")
    assert [row["way"] for row in rows] == ["BP", "exact", "DGL, 2 blocks", "DGL, 4 blocks"]
    assert [row["way"] for row in times] == [row["way"] for row in rows]
    for row in rows:
        assert int(row["predicted_peak_bytes"]) == pytest.approx(int(row["peak_bytes"]), rel=0.01)
    memory_any.main(settings)
    assert (read_csv(tmp_path / "any.csv"), read_csv(tmp_path / "any_times.csv")) == (rows, times)
