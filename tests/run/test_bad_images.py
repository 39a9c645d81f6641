"""Image folders with files that are no images: every sort is named or left out, and the run's bits do not waver.

The pictures are written here: small ones in each of PIL's modes, and files that are empty, cut off, text or bombs.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import io
import itertools
import os
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from tiny import Pixels, noise, tiny

from localgrad.cli import main
from localgrad.core.errors import RunError
from localgrad.run import data as datasets
from localgrad.run import readers
from localgrad.run import train as training
from localgrad.run.augment import permutation
from localgrad.run.folder import summary_rows
from localgrad.run.recipe import Recipe, Saving, differences, settle
from localgrad.run.signals import Stopped
from localgrad.run.step import Stepper
from localgrad.run.train import train

Figure = Callable[[str, int, int], None]
RECIPE = tiny(
    data="image-folder", image_size=16, limit_train=None, batch_size=12, epochs=2, on_bad_image="skip"
)  # fmt: skip


def on(folder: Path, **changes: Any) -> Recipe:
    return dataclasses.replace(RECIPE, data_dir=str(folder), **changes)


def encoded(image: Image.Image, kind: str, **how: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def png(width: int, height: int, depth: int, colours: int, rows: bytes) -> bytes:
    """A PNG file put together by hand: IHDR, one IDAT, IEND."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)


def bomb(side: int) -> bytes:
    """A whole PNG of side x side black pixels, one bit each."""
    return png(side, side, 1, 0, bytes((1 + side // 8) * side))


def rational_tiff() -> bytes:
    """A 1x1 TIFF whose StripOffsets are a fraction: PIL raises TypeError."""
    tags = sorted([*((tag, 3, 1) for tag in (256, 257, 259, 262, 277, 278, 279)), (258, 3, 8), (273, 5, 200)])
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags)
    return head.ljust(200, b"\0") + struct.pack("<II", 77, 1)


BAD = {
    "empty": (b"", "cannot identify image file"),
    "cut off": (encoded(Image.fromarray(noise(40, 40, 3)), "jpeg")[:-500], "image file is truncated"),
    "text": (b"no image\tat all\n", "cannot identify image file"),
    "large": (bomb(10_000), "exceeds limit of 89478485 pixels"),
    "huge": (bomb(20_000), "400000000 pixels"),
    "fractions": (rational_tiff(), ""),
    "integers": (encoded(Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)), "tiff"), ""),
    "floats": (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "tiff"), "its pixels are 32-bit numbers"),
}
NAMES = ("empty", "cut off", "text", "large", "huge", "floats")
CONTENTS = [BAD[name][0] for name in NAMES]


def write_split(folder: Path, count: int, bad: Mapping[int, bytes] | None = None, solid: bool = False) -> list[Path]:
    """`count` images of two classes, in the order in which they are read. Those of `bad` have this content instead;
    solid: number i is of one colour, whose red is i."""
    paths = []
    for i in range(count):
        wrong = None if bad is None else bad.get(i)
        path = folder / ("ant" if 2 * i < count else "bee") / f"{i:03}.{'png' if wrong is None else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40, 40, 3), (i, 9, 200), np.uint8) if solid else noise(40, 36, 3, seed=i)
        path.write_bytes(encoded(Image.fromarray(pixels), "png") if wrong is None else wrong)
        paths.append(path)
    return paths


def write_splits(folder: Path, bad: Mapping[int, bytes] | None = None) -> list[Path]:
    """12 training images, of which those of `bad` have this content instead, and 2 test images."""
    write_split(folder / "val", 2)
    return write_split(folder / "train", 12, bad)


def read_test(folder: Path, size: int, on_bad: Callable[[str, str], None] | None = None) -> list[torch.Tensor]:
    """The batches of the test split; a training split is added."""
    write_split(folder / "train", 2)
    data = datasets.load("image-folder", data_dir=str(folder), image_size=size)
    return [images for images, _ in datasets.eval_batches(data, batch_size=8, on_bad=on_bad)]


def listed(run: Path) -> list[tuple[str, str]]:
    """(path, reason) of each line of bad_images.txt."""
    lines = (run / "bad_images.txt").read_text(encoding="utf-8").splitlines()
    return [(path, reason) for path, _, reason in (line.partition("\t") for line in lines)]


def outcome(run: Path) -> tuple[bytes, bytes, list[dict[str, float]]]:
    """What must be equal to the bit: the weights, the list of bad images, the summary but for its times."""
    rows = [{name: row[name] for name in row if name not in ("seconds", "peak_rss_bytes")} for row in summary_rows(run)]
    return (run / "model.safetensors").read_bytes(), (run / "bad_images.txt").read_bytes(), rows


@contextlib.contextmanager
def sigterm_in(step: int) -> Iterator[None]:
    """A SIGTERM comes while that step is taken; step 0: in the first evaluation."""
    call, score = Stepper.__call__, training.evaluate

    def stopping(self: Stepper, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> object:
        done = call(self, batches)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return done

    def scoring(*args: Any, **how: Any) -> object:
        signal.raise_signal(signal.SIGTERM)
        return score(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((Stepper, "__call__", stopping) if step else (training, "evaluate", scoring)))
        yield


# What a file is decoded to


RAMP = (np.arange(1024).reshape(32, 32) * 64).astype(np.uint16)  # its upper bytes are 0 .. 255, four of each
WIDE = np.arange(32 * 32 * 3, dtype=np.uint16).reshape(32, 32, 3) * 21
WIDE_ROWS = b"".join(b"\0" + row.astype(">u2").tobytes() for row in WIDE)
RGBA, PALETTE, BITS = noise(32, 32, 4), noise(16, 3), noise(32, 32) > 127


def grey(pixels: NDArray[np.generic]) -> Pixels:
    return np.repeat(pixels.astype(np.uint8)[:, :, None], 3, axis=2)


def palette() -> Image.Image:
    image = Image.fromarray(noise(32, 32) % 16)
    image.putpalette(PALETTE.tobytes())
    return image


FORMATS: dict[str, tuple[str, bytes, Pixels]] = {
    "grey": ("png", encoded(Image.fromarray(noise(32, 32)), "png"), grey(noise(32, 32))),
    "grey and alpha": ("png", encoded(Image.fromarray(noise(32, 32, 2), "LA"), "png"), grey(noise(32, 32, 2)[:, :, 0])),
    "1 bit": ("png", encoded(Image.fromarray(BITS), "png"), grey(BITS * 255)),
    "palette": ("png", encoded(palette(), "png"), PALETTE[noise(32, 32) % 16]),
    "RGBA": ("png", encoded(Image.fromarray(RGBA), "png"), RGBA[:, :, :3]),
    "16-bit grey PNG": ("png", encoded(Image.fromarray(RAMP), "png"), grey(RAMP // 256)),
    "16-bit grey TIFF": ("tif", encoded(Image.fromarray(RAMP), "tiff"), grey(RAMP // 256)),
    "16-bit grey TIFF, >": ("tif", encoded(Image.fromarray(RAMP.astype(">u2")), "tiff"), grey(RAMP // 256)),
    "16-bit grey PGM": ("pgm", b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes(), grey(RAMP // 256)),
    "16-bit RGB": ("png", png(32, 32, 16, 2, WIDE_ROWS), (WIDE // 256).astype(np.uint8)),
}  # fmt: skip


@pytest.mark.parametrize(("ending", "content", "wanted"), FORMATS.values(), ids=FORMATS)
def test_every_sort_of_image_comes_out_as_rgb(ending: str, content: bytes, wanted: Pixels, tmp_path: Path) -> None:
    write_split(tmp_path / "val", 2)[0].unlink()
    (tmp_path / "val" / "ant" / f"0.{ending}").write_bytes(content)
    # The test split is resized to 28 * 256 / 224 = 32, which these images are, and cropped to the middle 28.
    first = read_test(tmp_path, 28)[0][0]
    np.testing.assert_array_equal(first.permute(1, 2, 0).numpy(), wanted[2:30, 2:30])


def test_cmyk_jpegs_are_inks_and_not_light(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:32, :32].astype(np.uint8)
    inks = np.stack([rows * 4, columns * 4, 200 - rows - columns, rows * 2 + columns], axis=2)
    write_split(tmp_path / "val", 2, {0: encoded(Image.fromarray(inks, "CMYK"), "jpeg", quality=100, subsampling=0)})
    paper = 255 - inks.astype(np.float64)
    wanted = (paper[:, :, :3] * paper[:, :, 3:] / 255)[2:30, 2:30]
    got = read_test(tmp_path, 28)[0][0].permute(1, 2, 0).numpy()
    assert np.abs(got - wanted).max() <= 4  # the JPEG's loss


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_each_sort_of_bad_image_has_its_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    write_split(tmp_path / "val", 4, {1: content})
    bad: dict[str, str] = {}
    assert sum(map(len, read_test(tmp_path, 8, bad.__setitem__))) == 3
    assert list(bad) == ["val/ant/001.jpg"]
    assert reason in bad["val/ant/001.jpg"]


@pytest.mark.parametrize("kind", [SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError])
def test_what_a_decoder_raises_is_a_reason(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def confused(path: Path) -> Image.Image:
        raise kind("two\nlines,\ta tab")

    monkeypatch.setattr(Image, "open", confused)
    write_split(tmp_path / "val", 2)
    bad: dict[str, str] = {}
    assert read_test(tmp_path, 8, bad.__setitem__) == []
    assert bad["val/ant/000.png"] == "two lines, a tab"


@pytest.mark.parametrize("error", [MemoryError("no more"), OSError(errno.EMFILE, "Too many open files")])
def test_want_of_memory_or_handles_is_no_bad_image(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(tmp_path / "val", 2)

    def refuse(path: Path) -> None:
        raise error

    monkeypatch.setattr(readers, "decode", refuse)
    bad: dict[str, str] = {}
    with pytest.raises(RunError, match=r"000\.png cannot be read now: "):
        read_test(tmp_path, 8, bad.__setitem__)
    assert bad == {}


def test_a_thin_image_takes_no_more_memory_than_a_square_one(tmp_path: Path) -> None:
    write_split(tmp_path / "val", 2, {0: encoded(Image.new("L", (1, 60000)), "png")})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_test(tmp_path, 64, lambda *_: None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; 224 pixels would take 16 GiB


def test_a_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    path = write_split(tmp_path / "val", 2)[0]
    image.save(path, transparency=b"\0\x80")
    assert (read_test(tmp_path, 28)[0][0] == torch.tensor([40, 50, 60])[:, None, None]).all()


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the right to read a file away, and not by chmod, which does not bind root."""
    opens = builtins.open

    def refusing(file: str | Path, *rest: Any, **how: Any) -> object:
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opens(file, *rest, **how)

    monkeypatch.setattr(builtins, "open", refusing)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_or_may_not_be_read_are_bad(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(tmp_path / "train", 4)
    gone, secret, *_ = write_split(tmp_path / "val", 5)
    data = datasets.load("image-folder", data_dir=str(tmp_path), image_size=8)
    gone.unlink()
    forbid(secret, monkeypatch)
    bad: dict[str, str] = {}
    batches = list(datasets.eval_batches(data, batch_size=2, workers=workers, on_bad=bad.__setitem__))
    assert [len(labels) for _, labels in batches] == [2, 1]  # the first batch of two is left out whole
    assert list(bad) == ["val/ant/000.png", "val/ant/001.png"]
    assert ["No such file" in bad["val/ant/000.png"], "Permission denied" in bad["val/ant/001.png"]] == [True, True]
    with pytest.raises(RunError, match=f"{gone} is not a readable image: .*No such file"):
        list(datasets.eval_batches(data, batch_size=2, workers=workers))


# What takes its place


def stand_ins(data: datasets.Data, seed: int, epoch: int, batch_size: int, workers: int) -> dict[int, tuple[int, int]]:
    """Which image, by its red, and which label came for each index, in one epoch."""
    order = permutation(len(data.train), seed, epoch).tolist()
    batches = datasets.train_batches(
        data, batch_size=batch_size, seed=seed, epoch=epoch, workers=workers, on_bad=lambda *_: None
    )
    came = [(int(x[0, 0, 0]), int(y)) for images, labels in batches for x, y in zip(images, labels, strict=True)]
    return dict(zip(order[: len(came)], came, strict=True))


def test_what_replaces_an_image_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    bad = dict.fromkeys(range(1, 24, 2), b"")  # half of them, so that many a replacement needs another one
    write_split(tmp_path / "train", 24, bad, solid=True)
    write_split(tmp_path / "val", 2)
    data = datasets.load("image-folder", data_dir=str(tmp_path), image_size=8)
    whole = stand_ins(data, 0, 0, 4, 0)
    assert sorted(whole) == list(range(24))
    assert all(image == index for index, (image, _) in whole.items() if index not in bad)
    assert all(image not in bad and label == (image >= 12) for image, label in whole.values())
    assert len({whole[index] for index in bad}) > 4
    for epoch, batch_size, workers in [(1, 4, 0), (2, 7, 0), (5, 24, 2), (0, 3, 2)]:
        again = stand_ins(data, 0, epoch, batch_size, workers)
        assert again == {index: whole[index] for index in again}
    other = stand_ins(data, 1, 0, 4, 0)
    assert sum(other[index] != whole[index] for index in bad) > 4


# Whole runs


def test_a_run_over_many_sorts_of_images_names_each_bad_one_once(tmp_path: Path, figure: Figure) -> None:
    content = dict(zip((3, 120, 251, 377, 430, 499), CONTENTS, strict=True))
    good = dict(zip(itertools.count(10, 23), (file for _, file, _ in FORMATS.values()), strict=False))
    good[5] = encoded(Image.new("CMYK", (40, 40), (9, 99, 199, 9)), "jpeg")
    paths = write_split(tmp_path / "train", 500, content | good)
    write_split(tmp_path / "val", 20, {7: b""})
    bad = [str(paths[i].relative_to(tmp_path)) for i in content]
    recipe = on(tmp_path, batch_size=125, epochs=1)
    row = train(recipe, tmp_path / "0")
    train(dataclasses.replace(recipe, workers=2), tmp_path / "2")
    names = [path for path, _ in listed(tmp_path / "0")]
    once = sum(names.count(path) == 1 for path in bad)
    figure("500 images, 1% bad", len(bad), once)
    assert once == len(bad)
    assert sorted(names) == sorted([*bad, "val/ant/007.jpg"])
    assert row["bad_images"] == summary_rows(tmp_path / "0")[0]["bad_images"] == 7
    assert outcome(tmp_path / "0") == outcome(tmp_path / "2")
    reasons = dict(listed(tmp_path / "0"))
    assert all(reason in reasons[path] for path, (_, reason) in zip(bad, (BAD[name] for name in NAMES), strict=True))
    # With "error" the run ends at the first that it meets, in whichever process.
    first = next(paths[i] for i in permutation(500, recipe.seed, 0) if i in content)
    for workers in (0, 2):
        with pytest.raises(RunError) as caught:
            train(dataclasses.replace(recipe, on_bad_image="error", workers=workers), tmp_path / "error")
        assert str(caught.value).startswith(f"{first} is not a readable image: ")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "error" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training images, of which steps 1, 2 and 4 of the first epoch meet a bad one, and 8 test images, one bad."""
    folder = tmp_path_factory.mktemp("tree")
    order = permutation(48, RECIPE.seed, 0)
    write_split(folder / "train", 48, {int(order[place]): CONTENTS[k] for k, place in enumerate((0, 13, 47))})
    write_split(folder / "val", 8, {2: b"text"})
    return folder


@pytest.fixture(scope="module")
def straight(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the tree that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(on(tree), folder)
    return folder


def test_a_bad_image_that_is_met_in_each_epoch_is_listed_and_counted_once(tree: Path, straight: Path) -> None:
    found = listed(straight)
    assert len({path for path, _ in found}) == len(found) == 4
    assert all(reason for _, reason in found)
    assert [row["bad_images"] for row in summary_rows(straight)] == [4, 4]
    assert found[-1][0] == "val/ant/002.jpg"


@pytest.mark.parametrize(("step", "met", "workers"), [
    (3, 2, 2), (0, 4, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1, 0), (4, 3, 0), (7, 4, 0)))
])  # fmt: skip
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    step: int, met: int, workers: int, tree: Path, straight: Path, tmp_path: Path
) -> None:
    recipe = on(tree, workers=workers)
    with sigterm_in(step), pytest.raises(Stopped, match=f"stopped at step {step or 4} of 8, saved as"):
        train(recipe, tmp_path)
    assert listed(tmp_path) == listed(straight)[:met]
    train(recipe, tmp_path)
    assert outcome(tmp_path) == outcome(straight)


def test_one_may_choose_to_skip_when_a_run_has_ended_at_a_bad_image(
    tree: Path, straight: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    assert differences(on(tree), on(tree, on_bad_image="error")) == []
    flags = ["--model", "resnet8", "--data", "image-folder", "--data-dir", str(tree), "--image-size", "16", "--epochs"]
    flags += ["2", "--batch-size", "12", "--precision", "float32", "--head", "1c2f", "--lr", "0.02"]
    command = ["train", *flags, "--out", str(tmp_path / "run"), "--on-bad-image"]
    line = fails(*command, "error", code=3)
    assert line.startswith(f"localgrad: {tree / listed(straight)[0][0]} is not a readable image")
    assert not (tmp_path / "run" / "bad_images.txt").exists()
    assert main([*command, "skip"]) == 0
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_run_that_skipped_may_go_on_strictly(tree: Path, straight: Path, tmp_path: Path) -> None:
    recipe = on(tree)
    with sigterm_in(2), pytest.raises(Stopped):
        train(recipe, tmp_path)
    with pytest.raises(RunError, match=f"{tree / listed(straight)[2][0]} is not a readable image"):
        train(dataclasses.replace(recipe, on_bad_image="error"), tmp_path)


def test_data_that_were_moved_are_listed_once(tmp_path: Path) -> None:
    write_split(tmp_path / "a" / "train", 24, {3: b"", 20: b""})
    write_split(tmp_path / "a" / "val", 2)
    with sigterm_in(2), pytest.raises(Stopped):
        train(on(tmp_path / "a"), tmp_path / "run")
    shutil.move(tmp_path / "a", tmp_path / "b")
    row = train(on(tmp_path / "b"), tmp_path / "run")
    assert row["bad_images"] == len(listed(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9.jpg"), "a\nb\t.jpg"], ids=["not UTF-8", "two lines"])
def test_a_bad_image_of_an_odd_name_is_listed_once(name: str, tmp_path: Path) -> None:
    write_splits(tmp_path)
    (tmp_path / "train" / "ant" / name).touch()
    assert train(on(tmp_path, batch_size=13, epochs=1), tmp_path / "run")["bad_images"] == 1
    assert len((tmp_path / "run" / "bad_images.txt").read_bytes().splitlines()) == 1


def test_eval_says_how_many_were_left_out(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(straight)]) == 0
    scores, left_out = capsys.readouterr().out.splitlines()
    row = summary_rows(straight)[-1]
    assert scores.startswith("7 images of image-folder, float32: ")
    assert f"top1 {row['eval_top1']:.2f}%" in scores
    assert left_out == f"1 that cannot be read were left out, {listed(straight)[-1][0]} among them"


def test_a_new_run_forgets_the_list_of_the_old_one(tmp_path: Path) -> None:
    (path, *_) = write_splits(tmp_path, {0: b""})
    recipe = on(tmp_path, epochs=1)
    assert train(recipe, tmp_path / "run")["bad_images"] == 1
    path.write_bytes(encoded(Image.new("RGB", (9, 9)), "jpeg"))
    assert train(recipe, tmp_path / "run", saving=Saving(resume="never"))["bad_images"] == 0
    assert not (tmp_path / "run" / "bad_images.txt").exists()


@pytest.mark.parametrize(
    ("split", "says"), [("train", "and others .* are no readable images"), ("val", "no image of the test set")]
)
def test_a_split_without_a_readable_image_ends_the_run_with_a_sentence(split: str, says: str, tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_split(tmp_path / name, 12, dict.fromkeys(range(12), b"") if name == split else None)
    with pytest.raises(RunError, match=says) as caught:
        train(on(tmp_path, epochs=1), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert len(listed(tmp_path / "run")) == 12


def test_skipping_images_that_lie_in_memory_has_no_effect_and_warns() -> None:
    with pytest.warns(UserWarning, match="on-bad-image has no effect: this data set is checked as it is read"):
        assert settle(Recipe(on_bad_image="skip")).on_bad_image == "error"
    assert settle(on(Path("here"))).on_bad_image == "skip"


# How a camera was held

# What a viewer does for each orientation that EXIF knows.
TURNS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
# Squares of 8 x 8, which a JPEG keeps; no turn leaves them as they were.
PIXELS = np.kron(np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8), np.ones((8, 8), np.uint8))


def held(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize(
    ("kind", "mode", "how"),
    [
        ("jpeg", "RGB", {"quality": 95}), ("jpeg", "L", {"quality": 95}), ("jpeg", "CMYK", {"quality": 95}),
        ("mpo", "RGB", {"quality": 95}), ("png", "RGB", {}), ("png", "P", {}), ("png", "RGBA", {}), ("png", "I;16", {}),
        ("webp", "RGB", {"lossless": True}), ("tiff", "RGB", {}), ("tiff", "L", {}), ("tiff", "I;16", {}),
        ("tiff", "L", {"compression": "tiff_lzw"}),
    ],
)  # fmt: skip
def test_images_are_turned_as_their_exif_data_say(kind: str, mode: str, how: dict[str, Any], tmp_path: Path) -> None:
    picture = Image.fromarray(PIXELS.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(PIXELS)
    picture = picture if mode == "I;16" else picture.convert(mode)
    for orientation, turn in TURNS.items():
        picture.save(tmp_path / "a.img", kind, exif=held(orientation), **how)
        got = np.asarray(readers.decode(tmp_path / "a.img")).astype(int)
        wanted = turn(PIXELS)[:, :, None].astype(int)
        assert got.shape == (*wanted.shape[:2], 3)
        assert np.abs(got - wanted).mean() < (3 if "quality" in how else 0.5), orientation


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_exif_does_not_know_mean_nothing(orientation: int, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=held(orientation))
    assert (np.asarray(readers.decode(tmp_path / "a.png")) == PIXELS[:, :, None]).all()


def test_batches_hold_turned_images(tmp_path: Path) -> None:
    top = np.zeros((64, 64, 3), np.uint8)
    top[:32] = 255  # turned by a quarter to the right, the upper half is the right one
    path = write_split(tmp_path / "val", 2)[0]
    Image.fromarray(top).save(path, "png", exif=held(6))
    image = read_test(tmp_path, 56)[0][0]
    assert (image[:, :, 28:] == 255).all()
    assert (image[:, :, :28] == 0).all()


EXIF = held(6).tobytes()


@pytest.mark.parametrize(
    "damaged",
    [
        b"Exif\0\0", EXIF[:9], EXIF[:-3], b"Exif\0\0" + b"\xff" * 60, EXIF[:10] + b"\xff" * 4 + EXIF[14:],
        EXIF[:14] + b"\xff\xff" + EXIF[16:], b"Exif\0\0" + b"MM\0*\0\0\0\x08", b"\0" * 50,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_damaged_exif_data_do_not_spoil_an_image(kind: str, damaged: bytes, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.img", kind, exif=damaged)
    assert readers.decode(tmp_path / "a.img").size in ((56, 40), (40, 56))


def test_what_pil_raises_on_exif_data_is_forgiven_but_not_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=held(6))
    for error in (SyntaxError("x"), struct.error("x"), ValueError("x"), TypeError("x"), OSError("x"), MemoryError()):
        monkeypatch.setattr(Image.Image, "getexif", Mock(side_effect=error))
        if isinstance(error, MemoryError):
            with pytest.raises(MemoryError):
                readers.decode(tmp_path / "a.png")
        else:
            assert readers.decode(tmp_path / "a.png").size == (56, 40)
