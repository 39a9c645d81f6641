"""Image files of unusual kinds: each is read right, or named once, whatever its name and wherever its folder lies."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.onnx
from numpy.typing import NDArray
from PIL import ExifTags, Image
from test_bad_images import TINY, encoded, listed, read_test, sigterm_in, write_split

from localgrad.cli import main
from localgrad.core.errors import RunError
from localgrad.run import readers
from localgrad.run.signals import Stopped
from localgrad.run.train import train


def rational_tiff() -> bytes:
    """A 1x1 TIFF whose StripOffsets are a fraction: PIL raises TypeError."""
    tags = [
        (256, 3, 1),
        (257, 3, 1),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 5, 200),
        (277, 3, 1),
        (278, 3, 1),
        (279, 3, 1),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags)
    return head.ljust(200, b"\0") + struct.pack("<II", 77, 1)


def test_typeerror(tmp_path: Path) -> None:
    path = write_split(tmp_path / "val", 2, {0: rational_tiff()})[0]
    bad: dict[str, str] = {}
    assert sum(map(len, read_test(tmp_path, 8, bad.__setitem__))) == 1
    assert list(bad) == [str(path.relative_to(tmp_path))]


def test_name_not_utf8(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 12)
    write_split(tmp_path / "val", 2)
    (tmp_path / "train" / "ant" / os.fsdecode(b"caf\xe9.jpg")).touch()
    assert (
        train(dataclasses.replace(TINY, data_dir=str(tmp_path), batch_size=13, epochs=1), tmp_path / "run")[
            "bad_images"
        ]
        == 1
    )


def test_name_with_newline(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 12)
    write_split(tmp_path / "val", 2)
    (tmp_path / "train/ant/a\nb\t.jpg").touch()
    train(dataclasses.replace(TINY, data_dir=str(tmp_path), batch_size=13, epochs=1), tmp_path / "run")
    assert len(listed(tmp_path / "run")) == 1


def test_thin_image_is_a_bomb_too(tmp_path: Path) -> None:
    write_split(tmp_path / "val", 2, {0: encoded(Image.new("L", (1, 60000)), "png")})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_test(tmp_path, 64, lambda *_: None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; 224 pixels would take 16 GiB


def test_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    path = write_split(tmp_path / "val", 2)[0]
    image.save(path, transparency=b"\0\x80")
    assert (read_test(tmp_path, 28)[0][0] == torch.tensor([40, 50, 60])[:, None, None]).all()


def test_32_bit_integers_are_not_16_bit(tmp_path: Path) -> None:
    path = write_split(
        tmp_path / "val", 2, {0: encoded(Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)), "tiff")}
    )[0]
    bad: dict[str, str] = {}
    read_test(tmp_path, 8, bad.__setitem__)
    assert list(bad) == [str(path.relative_to(tmp_path))]


def test_moved_data_lists_once(tmp_path: Path) -> None:
    write_split(tmp_path / "a" / "train", 24, {3: b"", 20: b""})
    write_split(tmp_path / "a" / "val", 2)
    recipe = dataclasses.replace(TINY, data_dir=str(tmp_path / "a"))
    with sigterm_in(2), pytest.raises(Stopped):
        train(recipe, tmp_path / "run")
    shutil.move(tmp_path / "a", tmp_path / "b")
    row = train(dataclasses.replace(recipe, data_dir=str(tmp_path / "b")), tmp_path / "run")
    assert row["bad_images"] == len(listed(tmp_path / "run")) == 2


def test_list_is_there_when_nothing_could_be_read(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 12, dict.fromkeys(range(12), b""))
    write_split(tmp_path / "val", 2)
    with pytest.raises(RunError):
        train(dataclasses.replace(TINY, data_dir=str(tmp_path), epochs=1), tmp_path / "run")
    assert len(listed(tmp_path / "run")) == 12


def test_sigterm_during_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [
        "--model",
        "resnet20",
        "--limit-train",
        "64",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--precision",
        "float32",
    ]
    assert main(["train", *quick, "--out", str(tmp_path / "r")]) == 0
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(["export", str(tmp_path / "r"), "--format", "onnx"]) == 143


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
