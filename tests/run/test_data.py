"""Data sets: real digits and Fashion-MNIST, the other sets' formats on files written here, and what goes wrong."""

import gzip
import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localgrad.core.errors import RunError, UserError
from localgrad.run import data as D
from localgrad.run import readers

FASHION = readers.DEBIAN_FASHION
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="package dataset-fashion-mnist is not installed")
RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_fashion(folder: Path, zipped: bool = True, labels=None, count: int = 20) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split in ("train", "t10k"):
        arrays[f"{split}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = np.array(np.arange(20) % 10 if labels is None else labels, np.uint8)
    for name, array in arrays.items():
        content = gzip.compress(idx(array), 1) if zipped else idx(array)
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(content)
    return arrays


def write_cifar(folder: Path, name: str = "cifar10", first: int = 3) -> list[tuple[np.ndarray, list[int]]]:
    """The set's pickles, of 20 images each; `first` is each one's first label."""
    *batches, meta = (folder / file for file in readers.FILES[name])
    meta.parent.mkdir(parents=True)
    fine = "" if name == "cifar10" else "fine_"
    wrote = []
    for file in batches:
        images = RNG.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
        labels = [first, *RNG.integers(0, 100 if fine else 10, 19).tolist()]
        file.write_bytes(pickle.dumps({"data": images.reshape(20, -1), f"{fine}labels": labels}))
        wrote.append((images, labels))
    meta.write_bytes(pickle.dumps({f"{fine}label_names": ["a", "b"]}))
    return wrote


def write_tree(folder: Path) -> Path:
    for place in (folder / split / kind for split in ("train", "val") for kind in ("ant", "bee", "cat")):
        place.mkdir(parents=True)
        for i in range(5):
            image = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            image.save(place / (f"{i}.jpg" if i % 2 else f"{i}.png"))
    return folder


@pytest.fixture
def any_md5(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_, **__: True)


@pytest.fixture
def no_debian(monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "DEBIAN_FASHION", tmp_path / "nowhere")


def pixels(split) -> torch.Tensor:
    assert isinstance(split, D.Images)
    return split.images


def failure(kind: type[Exception], name: str, folder: Path | None = None, **how) -> str:
    """What `load` says when it refuses, in one line."""
    with pytest.raises(kind) as caught:
        D.load(name, data_dir=None if folder is None else str(folder), **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_table_is_consistent():
    assert list(D.DATASETS) == ["digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "stl10", "image-folder"]
    assert all(info.name == name for name, info in D.DATASETS.items())
    assert all(len(info.mean) == len(info.std) == info.channels for info in D.DATASETS.values())
    in_memory = [(info.pad, info.flip) for info in D.DATASETS.values()][:-1]
    assert in_memory == [(1, False), (2, True), (4, True), (4, True), (2, False), (4, True)]


def test_listing_data_sets_imports_neither_torchvision_nor_sklearn():
    code = (
        "import sys; from localgrad.run.data import DATASETS, present; [present(n) for n in DATASETS];"
        "sys.exit(any(m in sys.modules for m in ('torchvision', 'sklearn', 'scipy', 'PIL')))"
    )
    source = Path(readers.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}).returncode == 0


def test_digits_are_the_real_ones_split_by_class_and_independent_of_the_seed():
    from sklearn.datasets import load_digits

    data = D.load("digits")
    assert torch.equal(pixels(data.train), pixels(D.load("digits", seed=5).train))
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
def test_fashion_mnist_is_read_whole():
    data = D.load("fashion-mnist")
    assert pixels(data.train).shape == (60_000, 1, 28, 28)
    assert pixels(data.test).shape == (10_000, 1, 28, 28)
    assert [part.labels.bincount().tolist() for part in (data.train, data.test)] == [[6000] * 10, [1000] * 10]
    assert data.train.labels[:3].tolist() == [9, 0, 0]  # an ankle boot, two T-shirts
    # A folder that somebody named is the only one.
    assert "not found in no-such-folder" in failure(UserError, "fashion-mnist", Path("no-such-folder"))


@pytest.mark.parametrize("name", ["digits", pytest.param("fashion-mnist", marks=needs_fashion)])
def test_normalised_training_images_have_mean_0_and_deviation_1(name):
    data = D.load(name)
    x = D.normalize(pixels(data.train), data.info).double()
    assert abs(x.mean()) < 3e-4
    assert abs(x.std() - 1) < 3e-4


def test_normalize_is_the_formula_by_channel():
    info = D.DATASETS["cifar10"]
    images = torch.from_numpy(RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    for c, got in enumerate(D.normalize(images, info).unbind(1)):
        wanted = (images[:, c].double() / 255 - info.mean[c]) / info.std[c]
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_fashion_mnist_in_both_layouts_plain_or_zipped(tmp_path, zipped, layout, no_debian):
    wrote = write_fashion(tmp_path / layout, zipped)
    if zipped:  # a half-unpacked file beside it does no harm
        (tmp_path / layout / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08")
    assert D.present("fashion-mnist", str(tmp_path)) == str(tmp_path / layout)
    data = D.load("fashion-mnist", data_dir=str(tmp_path))
    np.testing.assert_array_equal(pixels(data.test)[:, 0], wrote["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.train.labels, wrote["train-labels-idx1-ubyte"])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pickles(tmp_path, name, any_md5):
    *train, test = write_cifar(tmp_path / "good", name)
    data = D.load(name, data_dir=str(tmp_path / "good"))
    np.testing.assert_array_equal(pixels(data.train), np.concatenate([images for images, _ in train]))
    assert data.train.labels.tolist() == [label for _, labels in train for label in labels]
    np.testing.assert_array_equal(pixels(data.test), test[0])
    assert data.test.labels.tolist() == test[1]
    write_cifar(tmp_path / "bad", name, first=-1)
    assert "holds the label -1" in failure(RunError, name, tmp_path / "bad")


def test_svhn_mat_files_where_ten_means_zero(tmp_path, any_md5):
    from scipy.io import savemat

    wrote = {}
    for split in ("train", "test"):
        wrote[split] = RNG.integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": wrote[split], "y": (np.arange(12) % 10 + 1)[:, None]})
    data = D.load("svhn", data_dir=str(tmp_path))
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    np.testing.assert_array_equal(pixels(data.train)[5], wrote["train"][:, :, :, 5].transpose(2, 0, 1))


def test_stl10_binaries_are_column_major_and_need_no_unlabelled_images(tmp_path, any_md5):
    place = tmp_path / "stl10_binary"
    place.mkdir()
    wrote = RNG.integers(0, 256, (10, 3, 96, 96), dtype=np.uint8)
    for split in ("train", "test"):
        (place / f"{split}_X.bin").write_bytes(wrote.transpose(0, 1, 3, 2).tobytes())
        (place / f"{split}_y.bin").write_bytes(bytes(range(1, 11)))
    assert D.present("stl10", str(tmp_path)) == str(tmp_path)
    data = D.load("stl10", data_dir=str(tmp_path))
    np.testing.assert_array_equal(pixels(data.test), wrote)
    assert data.train.labels.tolist() == list(range(10))


def test_an_unknown_set_names_the_nearest():
    for ask in (D.load, D.present):
        with pytest.raises(UserError, match="unknown data set 'cifar1O': did you mean 'cifar10'"):
            ask("cifar1O")


@pytest.mark.parametrize("incomplete", [False, True])
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "svhn", "stl10"])
def test_a_missing_set_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, name, incomplete, no_debian):
    for file in readers.FILES[name][:-1] if incomplete else ():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert D.present(name, str(tmp_path)) is None
    text = failure(UserError, name, tmp_path)
    assert text.startswith(f"{name} was not found in {tmp_path}")
    assert ("apt-get install dataset-fashion-mnist" in text) == (name == "fashion-mnist")
    assert all(word in text for word in ("--data-dir", "--download", readers.FILES[name][0]))


def test_without_a_folder_the_folder_data_is_meant(tmp_path, monkeypatch, no_debian):
    monkeypatch.chdir(tmp_path)
    assert "svhn was not found in data " in failure(UserError, "svhn")
    write_fashion(tmp_path / "data")
    assert D.present("fashion-mnist") == "data"


def test_an_image_folder_cannot_be_downloaded(tmp_path):
    texts = [failure(UserError, "image-folder", tmp_path, download=download) for download in (True, False)]
    assert all("train/CLASS/*.jpg" in text and "cannot be downloaded" in text for text in texts)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
def test_a_file_with_another_md5_is_named_and_never_unpickled(tmp_path, name):
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
def test_a_damaged_idx_file_is_named(tmp_path, content, reason):
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
def test_labels_that_cannot_be_right_name_the_file(tmp_path, labels, count, reason):
    write_fashion(tmp_path, labels=list(labels), count=count)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    assert failure(RunError, "fashion-mnist", tmp_path) == f"{file} {reason}"


def test_images_of_another_size_are_refused(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((20, 14, 14), np.uint8))))
    text = failure(RunError, "fashion-mnist", tmp_path)
    assert "uint8 (1, 14, 14), but those of fashion-mnist are uint8 (1, 28, 28)" in text


def test_another_image_size_is_refused_for_sets_in_memory():
    assert D.load("digits", image_size=8).info.size == 8
    assert "images of digits are 8 pixels wide" in failure(UserError, "digits", image_size=32)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "svhn"])
def test_a_download_without_network_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, name, no_debian):
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
def mirror(tmp_path, monkeypatch, no_debian):
    """Fashion-MNIST's web server, played by one on this machine with small files; what it serves."""
    import torchvision.datasets as sets

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
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


def test_a_download_arrives_whole_once_and_speaks_on_standard_error(tmp_path, monkeypatch, mirror, capsys):
    root = tmp_path / "new"
    data = D.load("fashion-mnist", data_dir=str(root), download=True)
    np.testing.assert_array_equal(data.train.labels, mirror["train-labels-idx1-ubyte"])
    assert capsys.readouterr().out == ""
    assert [p.name for p in root.iterdir()] == ["FashionMNIST"]
    assert {p.name for p in (root / "FashionMNIST/raw").iterdir()} == {f"{name}.gz" for name in mirror}
    monkeypatch.setattr(readers, "fetch", None)  # a set that is there is not fetched again
    assert len(D.load("fashion-mnist", data_dir=str(root), download=True).train) == 20


def test_a_download_with_another_md5_leaves_nothing(tmp_path, mirror):
    (tmp_path / "mirror" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"half")
    assert "could not be downloaded" in failure(RunError, "fashion-mnist", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_image_folder_completes_what_is_known(tmp_path):
    write_tree(tmp_path)
    assert D.present("image-folder", str(tmp_path)) == str(tmp_path)
    data = D.load("image-folder", data_dir=str(tmp_path))
    assert data.info == replace(D.DATASETS["image-folder"], classes=3, size=224)
    assert D.load("image-folder", data_dir=str(tmp_path), image_size=32).info.size == 32
    assert (len(data.train), len(data.test)) == (15, 15)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert "at least 1 pixel, not 0" in failure(UserError, "image-folder", tmp_path, image_size=0)


def test_image_folder_limit_decodes_nothing(tmp_path):
    write_tree(tmp_path)
    for file in (tmp_path / "train").rglob("*.*"):
        file.write_bytes(b"not an image")
    data = D.load("image-folder", data_dir=str(tmp_path), limit_train=7)
    assert isinstance(data.train, D.Files)
    assert sorted(data.train.labels.bincount().tolist()) == [2, 2, 3]
    for path, label in zip(data.train.paths, data.train.labels.tolist(), strict=True):
        assert Path(os.fsdecode(bytes(path))).parent.name == ("ant", "bee", "cat")[label]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated jpeg", "truncated png", "text"])
def test_an_unreadable_image_is_named_in_one_sentence(tmp_path, workers, damage):
    write_tree(tmp_path)
    file = tmp_path / "val" / "bee" / ("2.png" if "png" in damage else "1.jpg")
    file.write_bytes(b"hello" if damage == "text" else file.read_bytes()[:700])
    data = D.load("image-folder", data_dir=str(tmp_path), image_size=16)
    with pytest.raises(RunError) as caught:
        list(D.eval_batches(data, batch_size=4, workers=workers))
    assert str(caught.value).startswith(f"{file} is not a readable image")
    assert "\n" not in str(caught.value)


def test_grey_images_become_rgb(tmp_path):
    write_tree(tmp_path)
    Image.new("L", (30, 30), 77).save(tmp_path / "val" / "ant" / "0.png")
    data = D.load("image-folder", data_dir=str(tmp_path), image_size=16)
    images, _ = next(iter(D.eval_batches(data, batch_size=1)))
    assert images.shape == (1, 3, 16, 16)
    assert (images == 77).all()


def test_image_folder_splits_must_agree_on_their_classes_and_have_no_empty_one(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    assert "must hold the same classes, but only one has cat" in failure(UserError, "image-folder", tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(UserError, match="no valid file for the classes eel"):
        D.load("image-folder", data_dir=str(tmp_path))


def test_data_load_no_model_code() -> None:
    code = "import sys, localgrad.run.data; print(*[m for m in sys.modules if m.startswith('localgrad.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] + "." + name.split(".")[2] for name in done.stdout.split() if name.count(".") > 1}
    assert loaded == {"core.errors", "run.augment", "run.data", "run.image_folder", "run.readers", "run.signals"}
