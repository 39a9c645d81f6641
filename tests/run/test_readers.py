"""Sets in memory: their test split alone, the names of their classes, and those of one class."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from test_data import write_fashion

from localgrad.core.errors import RunError, UserError
from localgrad.run import data as D
from localgrad.run import readers


@pytest.fixture
def written_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may have any md5 sum, and Debian's do not count."""
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_, **__: True)
    monkeypatch.setattr(readers, "DEBIAN_FASHION", tmp_path / "nowhere")


def write_set(name: str, folder: Path, alone: int | None = None) -> None:
    """A small set in the files of a known one; alone: its only label."""
    labels = np.full(20, alone) if alone is not None else np.arange(20) % 10
    if name == "fashion-mnist":
        write_fashion(folder, labels=labels)
    for file in readers.FILES[name] if name != "fashion-mnist" else ():
        (folder / file).parent.mkdir(exist_ok=True)
        fine = "" if name == "cifar10" else "fine_"
        if name.startswith("cifar"):
            images = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
            content = {f"{fine}label_names": ["a", "b"], "data": images, f"{fine}labels": labels.tolist()}
            (folder / file).write_bytes(pickle.dumps(content))
        elif name == "svhn":
            images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
            savemat(folder / file, {"X": images, "y": np.where(labels == 0, 10, labels)[:, None]})
        else:
            size = 20 * 3 * 96 * 96 if "X" in file else 20
            (folder / file).write_bytes(bytes((labels + 1).tolist()) if size == 20 else bytes(size))


@pytest.mark.usefixtures("written_here")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "fashion-mnist"])
def test_the_test_split_of_arrays_needs_no_other_files(name: str, tmp_path: Path) -> None:
    write_set(name, tmp_path)
    whole = D.load(name, data_dir=str(tmp_path))
    gone = [path for path in tmp_path.rglob("*") if path.name.startswith(("train", "data_batch"))]
    assert gone
    for path in gone:
        path.unlink()
    alone = D.load(name, data_dir=str(tmp_path), only_test=True)
    assert isinstance(whole.test, D.Images)
    assert isinstance(alone.test, D.Images)
    assert torch.equal(alone.test.images, whole.test.images)
    assert torch.equal(alone.test.labels, whole.test.labels)
    assert (len(alone.train), alone.names, alone.info) == (0, whole.names, whole.info)
    with pytest.raises(UserError, match=f"^{name} was not found in "):
        D.load(name, data_dir=str(tmp_path))
    next(path for path in tmp_path.rglob("*") if path.name.startswith(("test", "t10k"))).unlink()
    with pytest.raises(UserError, match=f"^{name} was not found in ") as caught:
        D.load(name, data_dir=str(tmp_path), only_test=True)
    assert "train" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_damaged_test_file_is_named_where_the_training_files_are_gone(name: str, tmp_path: Path) -> None:
    files = readers.files_of(name, only_test=True)
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"no")
    with pytest.raises(RunError, match=f"^{tmp_path / files[0]} is damaged"):
        D.load(name, data_dir=str(tmp_path), only_test=True)


@pytest.mark.usefixtures("written_here")
def test_the_names_of_arrays_are_those_that_the_set_has(tmp_path: Path) -> None:
    write_set("stl10", tmp_path)
    assert D.load("stl10", data_dir=str(tmp_path)).names[:2] == ("airplane", "bird")
    write_set("svhn", tmp_path)
    assert D.load("svhn", data_dir=str(tmp_path)).names == tuple("0123456789")
    write_set("cifar10", tmp_path)
    assert D.load("cifar10", data_dir=str(tmp_path)).names == tuple("0123456789")  # it names two of ten
    meta = tmp_path / "cifar-10-batches-py" / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]}))
    assert D.load("cifar10", data_dir=str(tmp_path)).names == tuple(f"kind {i}" for i in range(10))


@pytest.mark.usefixtures("written_here")
@pytest.mark.parametrize("name", ["fashion-mnist", "svhn", "cifar10"])
def test_arrays_of_one_class_are_refused(name: str, tmp_path: Path) -> None:
    write_set(name, tmp_path, alone=3)
    what = {"fashion-mnist": "Dress"}.get(name, "3")
    with pytest.raises(UserError, match=f"holds one class alone, {what}, and of one nothing can be learned"):
        D.load(name, data_dir=str(tmp_path))
    assert D.load(name, data_dir=str(tmp_path), only_test=True).test.labels.unique().tolist() == [3]
