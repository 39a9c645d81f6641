"""Predicts the classes of image files by the trained network of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from localgrad.core.engine import autocasting
from localgrad.core.errors import RunError, UserError
from localgrad.run.arguments import Predict
from localgrad.run.build import Machine, backbone_of, check_of_images, info_of, machine_for
from localgrad.run.checkpoint import load_backbone
from localgrad.run.data import DataInfo
from localgrad.run.evaluation import to_device
from localgrad.run.files import MODEL, check_folder
from localgrad.run.folder import evaluated, read_classes
from localgrad.run.image_folder import Files, listed, printable
from localgrad.run.readers import decoded
from localgrad.run.tables import write_csv

BATCH = 64
GREY = (19595, 38470, 7471)  # Red, green and blue in a grey image, in 1/65536 (ITU-R BT.601, as in PIL).


def predict(args: Predict) -> int:
    """Runs the command. Images that cannot be read are named at its end.

    Raises:
        UserError: The run is not finished, or an argument is wrong.
        RunError: An image cannot be read. The other images are predicted before.
    """
    recipe = evaluated(args.run, args.device)
    check_of_images(recipe, "predict")
    if args.top < 1:
        raise UserError(f"--top takes 1 or more, not {args.top}")
    if not args.files:
        raise UserError(f"there is no image to look at: name files behind {args.run}")
    for path in args.files:
        if not path.is_file():
            what = "is a folder: name the files in it" if path.is_dir() else "is not there"
            raise UserError(f"{printable(str(path))} {what}")
    if args.out is not None:
        check_folder(args.out)
    info, machine = info_of(args.run, recipe), machine_for(recipe)
    names = read_classes(args.run) or list(map(str, range(info.classes)))
    backbone = backbone_of(recipe, info)
    load_backbone(backbone, args.run / MODEL)
    machine.place(backbone.eval())
    bad: dict[str, str] = {}
    rows = _rows(backbone, args.files, info, machine, names, args.top, bad)
    if args.out is not None:
        write_csv(args.out, rows)
        print(f"wrote {args.out}")
    elif rows:
        _show(rows)
    if bad:
        which = listed(f"{path} ({reason})" for path, reason in bad.items())
        raise RunError(f"{len(bad)} of {len(args.files)} files are no readable images: {which}")
    return 0


@torch.no_grad()
def _rows(
    backbone: torch.nn.Module,
    files: Sequence[Path],
    info: DataInfo,
    machine: Machine,
    names: Sequence[str],
    top: int,
    bad: dict[str, str],
) -> list[dict[str, Any]]:
    """A row for each readable file and each of its `top` likeliest classes. `bad` gets the reasons of the others."""
    # A label is the number of the file, because unreadable ones are left out.
    split = Files(Path(), np.array([os.fsencode(path) for path in files], np.bytes_), torch.arange(len(files)))
    chunks = np.split(np.arange(len(files)), range(BATCH, len(files), BATCH))
    whole = info.name != "image-folder"
    rows = []
    for images, numbers in decoded(split, info.size, chunks, whole=whole, on_bad=bad.__setitem__):
        x, _ = to_device((images if info.channels == 3 else _grey(images), numbers), info, machine)
        with autocasting(x, machine.autocast):
            logits = backbone(x)
        shares, classes = logits.double().softmax(1).topk(min(top, len(names)), dim=1)
        for number, own, which in zip(numbers.tolist(), shares.tolist(), classes.tolist(), strict=True):
            for rank, (share, k) in enumerate(zip(own, which, strict=True), 1):
                row = {"file": str(files[number]), "rank": rank, "class": names[k], "probability": round(share, 6)}
                rows.append(row)
    return rows


def _grey(images: Tensor) -> Tensor:
    """Makes one channel of three: uint8 [B, 3, H, W] -> uint8 [B, 1, H, W]. Grey images keep their values."""
    weights = torch.tensor(GREY)[:, None, None]
    return (((images.int() * weights).sum(1, keepdim=True) + 2**15) >> 16).to(torch.uint8)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("file", "class", "probability")
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    for row in rows:
        first = escape(printable(row["file"])) if row["rank"] == 1 else ""
        table.add_row(first, escape(printable(row["class"])), f"{100 * row['probability']:.1f}%")
    Console().print(table, highlight=False)
