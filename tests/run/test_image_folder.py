"""Which classes and files an image folder has, what is left out, and the folders that are refused."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from localgrad.core.errors import UserError
from localgrad.core.task import Classification
from localgrad.run import data as datasets
from localgrad.run.image_folder import listed, read_folder


def write(place: Path, *files: str) -> Path:
    """Empty files: nothing is decoded here."""
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).touch()
    return place


def write_both(place: Path, *files: str) -> Path:
    """The same files in train/ and val/."""
    return write(place, *(f"{split}/{file}" for split in ("train", "val") for file in files))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of two images."""
    return write_both(tmp_path / "set", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in "12"))


def quietly(place: Path) -> tuple[list[str], list[bytes], list[bytes]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes, train, val = read_folder(place)
    return classes, train.paths.tolist(), val.paths.tolist()


def refusal(place: Path, *, only_val: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        datasets.load("image-folder", data_dir=str(place), only_test=only_val)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is there


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    names = ["1", "10", "2", "Zoo", "a b", "b\u00e4r", "ba\u0308r", "new\nline", os.fsdecode(b"caf\xe9")]
    inner = ["0.PNG", "1.jpeg", "10.tif", "2.webp", "deep/er/0.bmp", "deep/0.ppm", "deep-er/0.pgm"]
    place = write_both(tmp_path / "a", *(f"{name}/{file}" for name in names for file in inner))
    shutil.copytree(place / "train" / "1", tmp_path / "elsewhere")
    for split in ("train", "val"):
        (place / split / "link").symlink_to(tmp_path / "elsewhere")
        (place / split / "2" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    classes, *splits = read_folder(place)
    for split, files in zip(("train", "val"), splits, strict=True):
        wanted = ImageFolder(str(place / split))
        assert classes == wanted.classes
        assert files.labels.tolist() == wanted.targets
        paths = [os.path.join(place, os.fsdecode(path)) for path in files.paths.tolist()]
        assert paths == [path for path, _ in wanted.samples]
        assert (files.paths.dtype.kind, files.labels.dtype) == ("S", torch.int64)


def test_val_alone_is_enough_where_only_that_is_asked_for(tree: Path) -> None:
    whole = datasets.load("image-folder", data_dir=str(tree))
    shutil.rmtree(tree / "train")
    assert "does not hold train/CLASS/*.jpg and val/CLASS/*.jpg" in refusal(tree)
    data = datasets.load("image-folder", data_dir=str(tree), only_test=True)
    assert (len(data.train), data.names, data.info) == (0, ("cat", "dog"), whole.info)
    assert isinstance(data.test, datasets.Files)
    assert isinstance(whole.test, datasets.Files)
    np.testing.assert_array_equal(data.test.paths, whole.test.paths)
    (tree / "val").rename(tree / "train")
    assert refusal(tree, only_val=True).startswith(f"{tree} does not hold val/CLASS/*.jpg: name the folder")


def test_names_are_listed_on_one_line_and_many_are_shortened() -> None:
    assert listed(["b r", "a\nb", "\udce9"]) == "b r, a\\nb, \\udce9"
    assert listed(map(str, range(1000))) == "0, 1, 2, 3, 4, 5, 6, 7, ..., 999"
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"


# What is left out


HIDDEN = [".ipynb_checkpoints", ".git", ".net", "@eaDir", "__MACOSX", ".thumbnails", "$RECYCLE.BIN", "#recycle",
          ".AppleDouble", "System Volume Information", "lost+found"]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("where", ["", "cat/", "dog/deeper/"])
def test_hidden_folders_are_left_out_and_named(name: str, where: str, tree: Path) -> None:
    wanted = quietly(tree)
    write(tree, f"train/{where}{name}/0.png", f"train/{where}{name}/below/1.png")
    with pytest.warns(UserWarning, match="left out") as told:
        read_folder(tree)
    (line,) = [str(warning.message) for warning in told]
    assert line.startswith(f"left out 1 folder: train/{where}{name} (hidden, or made by a system")
    assert line.endswith("rename what is a class of yours)")
    write(tree, f"val/{where}{name}/0.png")
    with pytest.warns(UserWarning, match=re.escape(f"2 folders: train/{where}{name}, val/{where}{name} (hidden")):
        read_folder(tree)
    assert quietly(tree) == wanted
    for split in ("train", "val"):
        (tree / split / where / name).rename(tree / split / where / "emu")
    assert quietly(tree) != wanted


def test_names_that_only_resemble_hidden_ones_are_classes(tmp_path: Path) -> None:
    names = ["#tag", "@home", "C++", "__init__", "a.net", "macosx", "~"]
    assert read_folder(write_both(tmp_path, *(f"{name}/0.jpg" for name in names)))[0] == names


def test_a_set_whose_classes_all_begin_with_a_dot_is_told_why_it_has_none(tmp_path: Path) -> None:
    text = refusal(write_both(tmp_path, ".net/0.jpg", ".org/0.jpg"))
    assert text.startswith(f"{tmp_path / 'train'} holds no folder of a class")
    assert "left out: train/.net, train/.org (hidden" in text
    assert "rename what is a class of yours" in text
    assert "holds one class alone, com" in (text := refusal(write_both(tmp_path, "com/0.jpg")))
    assert "left out: train/.net, train/.org" in text


def test_files_that_are_left_out_are_counted_by_their_endings(tree: Path) -> None:
    wanted = quietly(tree)
    write(tree, *(f"train/dog/{i}.{e}" for i, e in enumerate(["gif", "jfif", "avif"] * 2)))
    write(tree, "train/cat/in/a.HEIC", "val/dog/README", "val/labels.csv", "val/3.jpg", "val/4.jpg")
    with pytest.warns(UserWarning, match="left out") as told:
        read_folder(tree)
    (line,) = [str(warning.message) for warning in told]
    assert line.startswith(
        "train: left out 7 files: 2 .gif, 2 .jfif, 2 .avif, 1 .heic; "
        "val: left out 4 files: 2 .jpg beside the classes, 1 .csv beside the classes, 1 without an ending (what is read"
    )
    assert quietly(tree) == wanted


def test_many_odd_endings_are_one_short_line(tree: Path) -> None:
    write(tree, *(f"val/cat/x.{i:03}" for i in range(300)), "val/cat/a.b\nc", os.fsdecode(b"val/dog/a.\xe9"))
    with pytest.warns(UserWarning, match=r"^val: left out 302 files: 1 \.b\\nc, 1 \.000, .*\.\.\., 1 \.") as told:
        read_folder(tree)
    assert len(str(told[0].message)) < 250


def test_what_systems_put_beside_images_is_not_worth_a_word(tree: Path) -> None:
    names = [".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.ini", "ehthumbs.db", ".gitkeep", ".directory", "Icon\r"]
    names += ["0.png:Zone.Identifier"]
    write_both(tree, *names, *(f"cat/{name}" for name in names))
    read_folder(tree)  # a warning is an error here


# What is refused


def test_one_class_is_none(tmp_path: Path) -> None:
    place = write_both(tmp_path, "images/dog/0.jpg", "images/cat/0.jpg", "images/.git/0.jpg")
    text = refusal(place)
    assert text.startswith(f"{place / 'train'} holds one class alone, images, and of one nothing can be learned: ")
    assert text.endswith(
        f"below it lie the folders cat, dog, and if these are the classes, move them up into {place}/train"
    )
    assert refusal(place, only_val=True).startswith(f"{place / 'val'} holds one class alone, images")


@pytest.mark.parametrize("file", ["0.jpg", "cat/0.jpg", "c\nt/0.jpg", "a/b/c/d/0.jpg"])
def test_fewer_than_two_classes_are_refused_in_either_split(file: str, tmp_path: Path) -> None:
    kind = "one class alone" if "/" in file else "no folder of a class"
    write(tmp_path, "val/cat/0.jpg", "val/dog/0.jpg", f"train/{file}")
    assert f"{tmp_path / 'train'} holds {kind}" in refusal(tmp_path)
    (tmp_path / "train").rename(tmp_path / "other")
    (tmp_path / "val").rename(tmp_path / "train")
    (tmp_path / "other").rename(tmp_path / "val")
    assert f"{tmp_path / 'val'} holds {kind}" in refusal(tmp_path)


def test_every_empty_class_is_named(tree: Path) -> None:
    for name in ("emu", "fox\n"):
        (tree / "val" / name).mkdir()
    write(tree, "val/emu/0.gif")
    assert f"{tree / 'val'} has no valid file for the classes emu, fox\\n: what is read ends in .jpg" in refusal(tree)


def test_what_cannot_be_looked_into_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    write(tree, "train/cat/secret/0.png")
    monkeypatch.setattr(os, "scandir", refuse)
    assert "secret" in (text := refusal(tree))
    assert "is no image folder: [Errno 13] Permission denied" in text


def test_classification_into_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 classes"):
        Classification(1)
    Classification(2)
