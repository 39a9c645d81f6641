"""Data sets: real digits and Fashion-MNIST, the other sets' formats on files written here, and what goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from tiny import write_photos, write_tree

from localgrad.core.errors import RunError, UserError
from localgrad.run import data as datasets
from localgrad.run import readers

FASHION = readers.DEBIAN_FASHION
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="package dataset-fashion-mnist is not installed")
RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_fashion(
    folder: Path, zipped: bool = True, labels: Sequence[int] | None = None, count: int = 20
) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split in ("train", "t10k"):
        arrays[f"{split}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = np.array(np.arange(20) % 10 if labels is None else labels, np.uint8)
    for name, array in arrays.items():
        content = gzip.compress(idx(array), 1) if zipped else idx(array)
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(content)
    return arrays


def write_set(name: str, folder: Path, alone: int | None = None) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """A small set in the files of a known one: images and labels of each file, by the split. alone: the only label."""
    labels = np.full(20, alone) if alone is not None else np.arange(20) % 10
    wrote: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
    if name == "fashion-mnist":
        write_fashion(folder, labels=labels.tolist())
    for file in (folder / file for file in readers.FILES[name] if name != "fashion-mnist"):
        file.parent.mkdir(parents=True, exist_ok=True)
        side = 96 if name == "stl10" else 32
        images, fine = RNG.integers(0, 256, (20, 3, side, side), dtype=np.uint8), "" if name == "cifar10" else "fine_"
        if file.name.endswith(("meta", "y.bin")):
            names = pickle.dumps({f"{fine}label_names": ["a", "b"]})
            file.write_bytes(names if "meta" in file.name else bytes((labels + 1).tolist()))
            continue
        if name.startswith("cifar"):
            file.write_bytes(pickle.dumps({"data": images.reshape(20, -1), f"{fine}labels": labels.tolist()}))
        elif name == "svhn":
            savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        else:
            file.write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        wrote["test" if file.name.startswith("test") else "train"].append((images, labels))
    return wrote


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_, **__: True)


@pytest.fixture
def no_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readers, "DEBIAN_FASHION", tmp_path / "nowhere")


def pixels(split: datasets.Split) -> torch.Tensor:
    assert isinstance(split, datasets.Images)
    return split.images


def failure(kind: type[Exception], name: str, folder: Path | None = None, **how: Any) -> str:
    """What `load` says when it refuses, in one line."""
    with pytest.raises(kind) as caught:
        datasets.load(name, data_dir=None if folder is None else str(folder), **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_table_is_consistent() -> None:
    assert list(datasets.DATASETS) == [
        "digits",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "svhn",
        "stl10",
        "fashion-scenes",
        "image-folder",
        "mask-folder",
    ]
    assert all(info.name == name for name, info in datasets.DATASETS.items())
    assert all(len(info.mean) == len(info.std) == info.channels for info in datasets.DATASETS.values())
    in_memory = [(info.pad, info.flip) for info in datasets.DATASETS.values() if info.classes]
    assert in_memory == [(1, False), (2, True), (4, True), (4, True), (2, False), (4, True), (4, True)]


def test_listing_data_sets_loads_no_model_code_and_no_large_package() -> None:
    code = (
        "import sys; from localgrad.run.data import DATASETS, present; [present(name) for name in DATASETS];"
        "large = ('torchvision', 'sklearn', 'scipy', 'PIL');"
        "print(*[name for name in sys.modules if name.startswith('localgrad.') or name in large])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("localgrad.") for name in done.stdout.split()} - {"core", "run"}
    modules = "augment data fields image_folder mask_folder readers recipe scenes sets signals"
    assert loaded == {"core.errors", *(f"run.{name}" for name in modules.split())}


def test_digits_are_the_real_ones_split_by_class_and_independent_of_the_seed() -> None:
    from sklearn.datasets import load_digits

    data = datasets.load("digits")
    assert torch.equal(pixels(data.train), pixels(datasets.load("digits", seed=5).train))
    assert (pixels(data.train).shape, pixels(data.test).shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (pixels(data.train).dtype, data.train.labels.dtype) == (torch.uint8, torch.int64)
    real, target = load_digits(return_X_y=True)
    assert np.abs(np.bincount(data.test.labels) - np.bincount(target) * 0.2).max() < 1
    wanted = np.floor(real.reshape(-1, 8, 8) * 255 / 16 + 0.5).astype(np.uint8)
    together = [
        (x.numpy().tobytes(), int(y))
        for split in (data.train, data.test)
        for x, y in zip(pixels(split), split.labels, strict=True)
    ]
    assert sorted(together) == sorted((x.tobytes(), int(y)) for x, y in zip(wanted, target, strict=True))


@needs_fashion
def test_fashion_mnist_is_read_whole() -> None:
    data = datasets.load("fashion-mnist")
    assert pixels(data.train).shape == (60_000, 1, 28, 28)
    assert pixels(data.test).shape == (10_000, 1, 28, 28)
    assert [part.labels.bincount().tolist() for part in (data.train, data.test)] == [[6000] * 10, [1000] * 10]
    assert data.train.labels[:3].tolist() == [9, 0, 0]  # an ankle boot, two T-shirts
    # A folder that somebody named is the only one.
    assert "not found in no-such-folder" in failure(UserError, "fashion-mnist", Path("no-such-folder"))


@pytest.mark.parametrize("name", ["digits", pytest.param("fashion-mnist", marks=needs_fashion)])
def test_normalised_training_images_have_mean_0_and_deviation_1(name: str) -> None:
    data = datasets.load(name)
    x = datasets.normalize(pixels(data.train), data.info).double()
    assert abs(x.mean()) < 3e-4
    assert abs(x.std() - 1) < 3e-4


def test_normalize_is_the_formula_by_channel() -> None:
    info = datasets.DATASETS["cifar10"]
    images = torch.from_numpy(RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    for c, got in enumerate(datasets.normalize(images, info).unbind(1)):
        wanted = (images[:, c].double() / 255 - info.mean[c]) / info.std[c]
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
@pytest.mark.usefixtures("no_debian")
def test_fashion_mnist_in_both_layouts_plain_or_zipped(tmp_path: Path, zipped: bool, layout: str) -> None:
    wrote = write_fashion(tmp_path / layout, zipped)
    if zipped:  # a half-unpacked file beside it does no harm
        (tmp_path / layout / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08")
    assert datasets.present("fashion-mnist", str(tmp_path)) == str(tmp_path / layout)
    data = datasets.load("fashion-mnist", data_dir=str(tmp_path))
    np.testing.assert_array_equal(pixels(data.test)[:, 0], wrote["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.train.labels, wrote["train-labels-idx1-ubyte"])


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
def test_sets_are_read_as_their_files_hold_them(name: str, tmp_path: Path) -> None:
    """Of SVHN the label 10 means zero; STL-10 is column-major, begins to count at 1, and needs no unlabelled images."""
    wrote = write_set(name, tmp_path)
    assert datasets.present(name, str(tmp_path)) == str(tmp_path)
    data = datasets.load(name, data_dir=str(tmp_path))
    for split, files in ((data.train, wrote["train"]), (data.test, wrote["test"])):
        np.testing.assert_array_equal(pixels(split), np.concatenate([images for images, _ in files]))
        np.testing.assert_array_equal(split.labels, np.concatenate([labels for _, labels in files]))


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_label_that_cannot_be_is_named(name: str, tmp_path: Path) -> None:
    write_set(name, tmp_path, alone=-1)
    assert "holds the label -1" in failure(RunError, name, tmp_path)


def test_an_unknown_set_names_the_nearest() -> None:
    for ask in (datasets.load, datasets.present):
        with pytest.raises(UserError, match="unknown data set 'cifar1O': did you mean 'cifar10'"):
            ask("cifar1O")


@pytest.mark.parametrize("incomplete", [False, True])
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "svhn", "stl10"])
@pytest.mark.usefixtures("no_debian")
def test_a_missing_set_says_where_it_was_looked_for_and_how_to_get_it(
    tmp_path: Path, name: str, incomplete: bool
) -> None:
    for file in readers.FILES[name][:-1] if incomplete else ():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert datasets.present(name, str(tmp_path)) is None
    text = failure(UserError, name, tmp_path)
    assert text.startswith(f"{name} was not found in {tmp_path}")
    assert ("apt-get install dataset-fashion-mnist" in text) == (name == "fashion-mnist")
    assert all(word in text for word in ("--data-dir", "--download", readers.FILES[name][0]))


@pytest.mark.usefixtures("no_debian")
def test_without_a_folder_the_folder_data_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "svhn was not found in data " in failure(UserError, "svhn")
    write_fashion(tmp_path / "data")
    assert datasets.present("fashion-mnist") == "data"


def test_an_image_folder_cannot_be_downloaded(tmp_path: Path) -> None:
    texts = [failure(UserError, "image-folder", tmp_path, download=download) for download in (True, False)]
    assert all("train/CLASS/*.jpg" in text and "cannot be downloaded" in text for text in texts)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
def test_a_file_with_another_md5_is_named_and_never_unpickled(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    files = [tmp_path / file for file in readers.FILES[name]]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(Trap()))
    assert failure(RunError, name, tmp_path).startswith(f"{files[0]} is damaged")
    assert not (tmp_path / "sprung").exists()


WHOLE = idx(np.zeros((20, 28, 28), np.uint8))
DAMAGED = {
    "truncated gzip": (gzip.compress(RNG.bytes(16_000), 1)[:9000], "cannot be read"),
    "not gzip": (WHOLE, "cannot be read"),
    "broken deflate": (gzip.compress(WHOLE, 1)[:10] + b"\xff" * 40, "cannot be read"),
    "short": (gzip.compress(WHOLE[:-1], 1), "holds 15679 bytes of data where its header announces 15680"),
    "long": (gzip.compress(WHOLE + b"x", 1), "holds 15681 bytes"),
    "wrong magic": (gzip.compress(b"\0\0\x0d\x03" + WHOLE[4:], 1), "begins with 0x00000d03"),
    "labels for images": (gzip.compress(idx(np.zeros(20, np.uint8)), 1), "begins with 0x00000801"),
    "empty": (gzip.compress(b"", 1), "is not an idx file"),
    "huge header": (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12, 1), "header announces"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    write_fashion(tmp_path)
    damaged = tmp_path / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(content)
    text = failure(RunError, "fashion-mnist", tmp_path)
    assert text.startswith(str(damaged))
    assert reason in text


@pytest.mark.parametrize(
    ("labels", "count", "reason"),
    [
        ([*range(10), *range(1, 11)], 20, "holds the label 10, but fashion-mnist has classes 0 to 9"),
        (range(10), 11, "holds 10 labels for 11 images"),
        ([], 0, "holds 0 labels for 0 images"),
    ],
)
def test_labels_that_cannot_be_right_name_the_file(tmp_path: Path, labels: list[int], count: int, reason: str) -> None:
    write_fashion(tmp_path, labels=list(labels), count=count)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    assert failure(RunError, "fashion-mnist", tmp_path) == f"{file} {reason}"


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((20, 14, 14), np.uint8))))
    text = failure(RunError, "fashion-mnist", tmp_path)
    assert "uint8 (1, 14, 14), but those of fashion-mnist are uint8 (1, 28, 28)" in text


def test_another_image_size_is_refused_for_sets_in_memory() -> None:
    assert datasets.load("digits", image_size=8).info.size == 8
    assert "images of digits are 8 pixels wide" in failure(UserError, "digits", image_size=32)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "svhn"])
@pytest.mark.usefixtures("no_debian")
def test_a_download_without_network_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import torchvision.datasets as sets

    dead = "http://127.0.0.1:9/"  # the discard port: nothing listens
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sets.FashionMNIST, "mirrors", [dead])
    monkeypatch.setattr(sets.CIFAR10, "url", dead + "cifar-10-python.tar.gz")
    monkeypatch.setattr(sets.SVHN, "split_list", {k: (dead, *v[1:]) for k, v in sets.SVHN.split_list.items()})
    text = failure(RunError, name, tmp_path / "new", download=True)
    assert text.startswith(f"{name} could not be downloaded into {tmp_path}")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_debian: None) -> Iterator[dict[str, np.ndarray]]:
    """Fashion-MNIST's web server, played by one on this machine with small files; what it serves."""
    import torchvision.datasets as sets

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "mirror"
    wrote = write_fashion(folder)
    sums = [(f"{name}.gz", hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest()) for name in wrote]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sets.FashionMNIST, "resources", sums)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        monkeypatch.setattr(sets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield wrote
        server.shutdown()


def test_a_download_arrives_whole_once_and_speaks_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new"
    data = datasets.load("fashion-mnist", data_dir=str(root), download=True)
    np.testing.assert_array_equal(data.train.labels, mirror["train-labels-idx1-ubyte"])
    assert capsys.readouterr().out == ""
    assert [p.name for p in root.iterdir()] == ["FashionMNIST"]
    assert {p.name for p in (root / "FashionMNIST/raw").iterdir()} == {f"{name}.gz" for name in mirror}
    monkeypatch.setattr(readers, "fetch", None)  # a set that is there is not fetched again
    assert len(datasets.load("fashion-mnist", data_dir=str(root), download=True).train) == 20


def test_a_download_with_another_md5_leaves_nothing(tmp_path: Path, mirror: dict[str, np.ndarray]) -> None:
    (tmp_path / "mirror" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"half")
    assert "could not be downloaded" in failure(RunError, "fashion-mnist", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_image_folder_completes_what_is_known(tmp_path: Path) -> None:
    write_tree(tmp_path)
    assert datasets.present("image-folder", str(tmp_path)) == str(tmp_path)
    data = datasets.load("image-folder", data_dir=str(tmp_path))
    assert data.info == replace(datasets.DATASETS["image-folder"], classes=3, size=224)
    assert datasets.load("image-folder", data_dir=str(tmp_path), image_size=32).info.size == 32
    assert (len(data.train), len(data.test)) == (15, 15)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert "at least 1 pixel, not 0" in failure(UserError, "image-folder", tmp_path, image_size=0)


def test_image_folder_limit_decodes_nothing(tmp_path: Path) -> None:
    write_tree(tmp_path)
    for file in (tmp_path / "train").rglob("*.*"):
        file.write_bytes(b"not an image")
    data = datasets.load("image-folder", data_dir=str(tmp_path), limit_train=7)
    assert isinstance(data.train, datasets.Files)
    assert sorted(data.train.labels.bincount().tolist()) == [2, 2, 3]
    for path, label in zip(data.train.paths, data.train.labels.tolist(), strict=True):
        assert Path(os.fsdecode(bytes(path))).parent.name == ("ant", "bee", "cat")[label]


def test_image_folder_splits_must_agree_on_their_classes_and_have_no_empty_one(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    assert "must hold the same classes, but only one has cat" in failure(UserError, "image-folder", tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(UserError, match="no valid file for the classes eel"):
        datasets.load("image-folder", data_dir=str(tmp_path))


# The test split alone, the names of classes, and sets of one class


@pytest.mark.usefixtures("any_md5", "no_debian")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "fashion-mnist"])
def test_the_test_split_of_arrays_needs_no_other_files(name: str, tmp_path: Path) -> None:
    write_set(name, tmp_path)
    whole = datasets.load(name, data_dir=str(tmp_path))
    gone = [path for path in tmp_path.rglob("*") if path.name.startswith(("train", "data_batch"))]
    assert gone
    for path in gone:
        path.unlink()
    alone = datasets.load(name, data_dir=str(tmp_path), only_test=True)
    assert isinstance(whole.test, datasets.Images)
    assert isinstance(alone.test, datasets.Images)
    assert torch.equal(alone.test.images, whole.test.images)
    assert torch.equal(alone.test.labels, whole.test.labels)
    assert (len(alone.train), alone.names, alone.info) == (0, whole.names, whole.info)
    with pytest.raises(UserError, match=f"^{name} was not found in "):
        datasets.load(name, data_dir=str(tmp_path))
    next(path for path in tmp_path.rglob("*") if path.name.startswith(("test", "t10k"))).unlink()
    with pytest.raises(UserError, match=f"^{name} was not found in ") as caught:
        datasets.load(name, data_dir=str(tmp_path), only_test=True)
    assert "train" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_damaged_test_file_is_named_where_the_training_files_are_gone(name: str, tmp_path: Path) -> None:
    files = readers.files_of(name, only_test=True)
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"no")
    with pytest.raises(RunError, match=f"^{tmp_path / files[0]} is damaged"):
        datasets.load(name, data_dir=str(tmp_path), only_test=True)


@pytest.mark.usefixtures("any_md5", "no_debian")
def test_the_names_of_arrays_are_those_that_the_set_has(tmp_path: Path) -> None:
    write_set("stl10", tmp_path)
    assert datasets.load("stl10", data_dir=str(tmp_path)).names[:2] == ("airplane", "bird")
    write_set("svhn", tmp_path)
    assert datasets.load("svhn", data_dir=str(tmp_path)).names == tuple("0123456789")
    write_set("cifar10", tmp_path)
    assert datasets.load("cifar10", data_dir=str(tmp_path)).names == tuple("0123456789")  # it names two of ten
    meta = tmp_path / "cifar-10-batches-py" / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]}))
    assert datasets.load("cifar10", data_dir=str(tmp_path)).names == tuple(f"kind {i}" for i in range(10))


@pytest.mark.usefixtures("any_md5", "no_debian")
@pytest.mark.parametrize("name", ["fashion-mnist", "svhn", "cifar10"])
def test_arrays_of_one_class_are_refused(name: str, tmp_path: Path) -> None:
    write_set(name, tmp_path, alone=3)
    what = {"fashion-mnist": "Dress"}.get(name, "3")
    with pytest.raises(UserError, match=f"holds one class alone, {what}, and of one nothing can be learned"):
        datasets.load(name, data_dir=str(tmp_path))
    assert datasets.load(name, data_dir=str(tmp_path), only_test=True).test.labels.unique().tolist() == [3]


# What ranks share


@pytest.mark.parametrize("name", ["digits", "image-folder"])
def test_shards_are_the_parts_of_each_batch_and_every_test_image_once(tmp_path: Path, name: str) -> None:
    data = datasets.load(name, data_dir=str(write_photos(tmp_path, {"train": 7, "val": 7})))
    batches = partial(datasets.train_batches, data, batch_size=4, seed=1, epoch=2)
    for whole, *halves in zip(batches(), batches(shard=(0, 2)), batches(shard=(1, 2)), strict=True):
        for k in range(2):
            assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
    tests = [[y for _, y in datasets.eval_batches(data, batch_size=4, shard=(i, 3))] for i in range(3)]
    whole = [y for _, y in datasets.eval_batches(data, batch_size=4)]
    assert sum(map(len, tests)) == len(whole)
    assert all(torch.equal(labels, tests[i % 3][i // 3]) for i, labels in enumerate(whole))
    with pytest.raises(UserError, match="3 ranks cannot share a batch of 4 images"):
        next(iter(batches(shard=(0, 3))))
