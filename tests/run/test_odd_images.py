"""Image files of unusual kinds: each is read right, or named once, whatever its name and wherever its folder lies."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.onnx
from PIL import Image
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
