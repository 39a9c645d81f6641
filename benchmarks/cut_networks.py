"""Cuts every network of timm and torchvision's classification models into four blocks with MAN, and segmentation
networks of torchvision's, with its own backbones and timm's, into four blocks; no weights in memory.

    python benchmarks/cut_networks.py

Writes results/coverage_timm-VERSION.csv a row at a time, and goes on where it stopped.
"""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
import tyro
from torch import nn
from torchvision.models import segmentation
from torchvision.models.segmentation.fcn import FCN, FCNHead

import localgrad as lg
from localgrad.core.blocks import split, trace_units
from localgrad.core.errors import UserError

COLUMNS = ("name", "source", "units", "ok", "reason", "seconds")


@dataclass(frozen=True)
class Settings:
    """Cut networks, all or those whose name begins so."""

    begins: str = ""
    out: Path = Path(f"results/coverage_timm-{timm.__version__}.csv")


# timm's networks that give their last map to torchvision's FCN.
SEGMENTATION = (
    "resnet50", "resnext50_32x4d", "res2net50d", "seresnet50", "regnety_032", "efficientnet_b0", "tf_efficientnetv2_s",
    "mobilenetv2_100", "mobilenetv3_large_100", "ghostnet_100", "convnext_tiny", "densenet121", "dla34",
    "ese_vovnet39b", "cspdarknet53", "nfnet_f0", "repvgg_a0", "hrnet_w18", "poolformer_s12", "edgenext_small",
)  # fmt: skip


def networks() -> Iterator[tuple[str, str]]:
    yield from ((name, "torchvision") for name in torchvision.models.list_models(module=torchvision.models))
    yield from ((name, "segmentation") for name in torchvision.models.list_models(module=segmentation))
    yield from ((f"fcn:{name}", "segmentation") for name in SEGMENTATION)
    yield from ((name, "timm") for name in timm.list_models())


class LastMap(nn.Module):
    """timm's features as torchvision's segmentation networks read them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.features = timm.create_model(name, features_only=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.features(x)[-1]}


def segmenter(name: str) -> nn.Module:
    """A torchvision segmentation network by its name, or fcn:NAME with a network of timm's as the backbone."""
    if name in torchvision.models.list_models(module=segmentation):
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=21)
    backbone = LastMap(name.removeprefix("fcn:"))
    return FCN(backbone, FCNHead(backbone.features.feature_info.channels()[-1], 21))  # pyright: ignore


def built(name: str, source: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network, and the shape of its images."""
    build = (
        partial(segmenter, name) if source == "segmentation" else partial(lg.build, f"{source}:{name}", classes=1000)
    )
    try:
        with torch.device("meta"):
            network = build()
    except UserError:
        raise
    except Exception:  # some constructors compute with values
        network = build().to("meta")
    if source != "timm":
        return network, (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    return network, getattr(network, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)


def cut(name: str, source: str) -> tuple[int, str]:
    """How many units, and why it cannot be four blocks, if it cannot."""
    network, shape = built(name, source)
    example = torch.zeros(2, *shape, device="meta")
    traced = trace_units(network, example)
    try:
        if source == "segmentation":  # whose task is not the library's yet
            split(traced, 4)
        else:
            lg.localize(network, blocks=4, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=example)
    except UserError as error:
        return len(traced.units), str(error)
    return len(traced.units), ""


def main(settings: Settings) -> None:
    warnings.simplefilter("ignore")  # those of the networks' own constructors
    done: set[tuple[str, str]] = set()
    if settings.out.is_file():
        with settings.out.open(newline="") as file:
            done = {(row["name"], row["source"]) for row in csv.DictReader(file)}
    with settings.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            writer.writerow(COLUMNS)
        for name, source in networks():
            if (name, source) in done or not name.startswith(settings.begins):
                continue
            began = time.perf_counter()
            try:
                count, reason = cut(name, source)
            except Exception as error:  # what is no UserError is a fault of ours: it counts as refused too
                fault = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                count, reason = 0, f"{fault}{error}".splitlines()[0]
            writer.writerow([name, source, count, not reason, reason, f"{time.perf_counter() - began:.1f}"])
            file.flush()
    with settings.out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for source in ("torchvision", "segmentation", "timm"):
        mine = [row for row in rows if row["source"] == source]
        good = sum(row["ok"] == "True" for row in mine)
        print(f"{source}: {good} of {len(mine)} cut ({100 * good / max(1, len(mine)):.1f}%)")


if __name__ == "__main__":
    main(tyro.cli(Settings))
