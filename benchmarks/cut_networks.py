"""Tries to cut networks into four blocks.

    python benchmarks/cut_networks.py

It tries every classification network of timm and torchvision, with MAN, and torchvision's segmentation networks, with
backbones of torchvision and of timm. No weights are made. Writes results/coverage_timm-VERSION.csv, one row for each
network, and goes on where it stopped.

It also tries the small networks of `small_networks.py`: whether they can be cut into four blocks, and whether
backpropagation can be planned, with a loss that reads all that the network gives. Writes results/coverage_networks.csv
in the same way. `--begins "gpt2" --networks other.csv` tries those with such names again. This part needs
pip install 'localgrad[families]'.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import tyro
from common import Table
from small_networks import Small, networks
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import segmentation
from torchvision.models.segmentation.fcn import FCN, FCNHead

import localgrad as lg
from localgrad.core.blocks import Traced, split, trace_units
from localgrad.core.errors import UserError

# Networks of timm whose last map is the input of torchvision's FCN.
SEGMENTATION = (
    "resnet50", "resnext50_32x4d", "res2net50d", "seresnet50", "regnety_032", "efficientnet_b0", "tf_efficientnetv2_s",
    "mobilenetv2_100", "mobilenetv3_large_100", "ghostnet_100", "convnext_tiny", "densenet121", "dla34",
    "ese_vovnet39b", "cspdarknet53", "nfnet_f0", "repvgg_a0", "hrnet_w18", "poolformer_s12", "edgenext_small",
)  # fmt: skip
SOURCES = ("torchvision", "segmentation", "timm")


@dataclass(frozen=True)
class Settings:
    """Cut every network."""

    begins: str = ""
    """Only networks whose names begin with this."""
    out: Path = Path(f"results/coverage_timm-{timm.__version__}.csv")
    networks: Path = Path("results/coverage_networks.csv")
    """The table of the small networks of other libraries."""


def registered() -> Iterator[tuple[str, str]]:
    """The name and the source of each network."""
    yield from ((name, "torchvision") for name in torchvision.models.list_models(module=torchvision.models))
    yield from ((name, "segmentation") for name in torchvision.models.list_models(module=segmentation))
    yield from ((f"fcn:{name}", "segmentation") for name in SEGMENTATION)
    yield from ((name, "timm") for name in timm.list_models())


class LastMap(nn.Module):
    """A network of timm that gives its last map in the form that torchvision's segmentation networks read."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.features = timm.create_model(name, features_only=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.features(x)[-1]}


def segmenter(name: str) -> nn.Module:
    """The segmentation network of torchvision that has this name. "fcn:NAME" is FCN on a network of timm."""
    if name in torchvision.models.list_models(module=segmentation):
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=21)
    backbone = LastMap(name.removeprefix("fcn:"))
    return FCN(backbone, FCNHead(backbone.features.feature_info.channels()[-1], 21))  # pyright: ignore


def built(name: str, source: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Builds the network without values. Returns it with the shape of its images."""
    build = (
        partial(segmenter, name) if source == "segmentation" else partial(lg.build, f"{source}:{name}", classes=1000)
    )
    try:
        with torch.device("meta"):
            network = build()
    except UserError:
        raise
    except Exception:  # Some constructors compute with values, which the meta device has not.
        network = build().to("meta")
    if source != "timm":
        return network, (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    return network, getattr(network, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)


def cut(name: str, source: str) -> tuple[int, str]:
    """Cuts the network. Returns the number of its units, and why it cannot be four blocks ("" if it can)."""
    network, shape = built(name, source)
    example = torch.zeros(2, *shape, device="meta")
    traced = trace_units(network, example)
    try:
        if source == "segmentation":  # The library has no task for segmentation yet.
            split(traced, 4)
        else:
            lg.localize(network, blocks=4, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=example)
    except UserError as error:
        return len(traced.units), str(error)
    return len(traced.units), ""


def reason_of(error: Exception) -> str:
    """Why a network is refused. Other errors than UserError are faults of the library, and count as refused too."""
    fault = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{fault}{error}".splitlines()[0]


def mean_of_all(output: Any, _: Any) -> Tensor:
    """A loss that reads every tensor of real numbers that a network gives."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.float().mean() for leaf in leaves]).sum()


def largest_share(traced: Traced, network: nn.Module) -> float:
    """The parameters of the largest unit, or of the head, over those of the network."""
    pieces = [unit.module for unit in traced.units] + ([traced.head] if traced.head is not None else [])
    most = max(sum(p.numel() for p in piece.parameters()) for piece in pieces)
    return most / sum(p.numel() for p in network.parameters())


def tried(small: Small) -> dict[str, Any]:
    """Cuts a small network into four blocks and plans backpropagation for it.

    Returns:
        What came of both. "largest_percent" is the share of the parameters that the largest unit or the head has: near
        100, the four blocks are cut off the ends of a network that is still one piece.
    """
    torch.manual_seed(0)
    row: dict[str, Any] = {"units": 0, "largest_percent": "", "cut": False, "bp": False, "reason": "", "bp_reason": ""}
    try:
        network, example = small.build(), small.example()
        traced = trace_units(network, example, 4)
        row |= {"units": len(traced.units), "largest_percent": round(100 * largest_share(traced, network))}
        split(traced, 4)
        row["cut"] = True
    except Exception as error:
        row["reason"] = reason_of(error)
    try:
        planner = lg.Planner(small.build(), small.example(), method=lg.bp(), criterion=mean_of_all)
        row["bp"] = planner.exactly(planner.bp).peak > 0
    except Exception as error:
        row["bp_reason"] = reason_of(error)
    return row


def try_registered(settings: Settings) -> None:
    """Fills the table of the networks of timm and torchvision."""
    table = Table(settings.out, key=("name", "source"))
    for name, source in registered():
        if (name, source) in table or not name.startswith(settings.begins):
            continue
        began = time.perf_counter()
        try:
            count, reason = cut(name, source)
        except Exception as error:
            count, reason = 0, reason_of(error)
        seconds = f"{time.perf_counter() - began:.1f}"
        table.add({
            "name": name, "source": source, "units": count, "ok": not reason, "reason": reason, "seconds": seconds,
        })  # fmt: skip
    for source in SOURCES:
        results = [row["ok"] == "True" for row in table.rows if row["source"] == source]
        share = 100 * sum(results) / max(1, len(results))
        print(f"{source}: {sum(results)} of {len(results)} cut ({share:.1f}%)")


def try_small(settings: Settings) -> None:
    """Fills the table of the small networks of other libraries."""
    table = Table(settings.networks, key=("library", "name"))
    for name, small in networks().items():
        if (small.library, name) in table or not name.startswith(settings.begins):
            continue
        began = time.perf_counter()
        row = {"library": small.library, "version": version(small.library), "name": name, **tried(small)}
        table.add(row | {"seconds": f"{time.perf_counter() - began:.1f}"})
    for library in dict.fromkeys(row["library"] for row in table.rows):
        rows = [row for row in table.rows if row["library"] == library]
        cut_rows, planned = (sum(row[key] == "True" for row in rows) for key in ("cut", "bp"))
        print(f"{library}: {cut_rows} of {len(rows)} cut, backpropagation planned for {planned}")


def main(settings: Settings) -> None:
    warnings.simplefilter("ignore")  # The constructors of the networks warn.
    try_registered(settings)
    try_small(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
