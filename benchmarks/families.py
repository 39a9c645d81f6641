"""Trains a small network of each family of timm for a few local steps, and checks that it stays that network.

    python benchmarks/families.py

Each network is trained at the smallest of the usual image sizes that it takes. Writes
results/families_timm-VERSION.csv, one row for each family, and goes on where it stopped. `tests/core/test_families.py`
makes the same checks.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
import tyro
from common import Table
from timm.models._registry import _model_to_module
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.run.checkpoint import save_weights

# A network with few parameters of each family, and the side of its images.
SMALL = {
    "beit_base_patch16_224": 32, "cait_xxs24_224": 32, "coat_lite_tiny": 32, "convit_tiny": 32,
    "convmixer_768_32": 32, "convnext_zepto_rms": 32, "cpubone_nano": 32, "cs3darknet_focus_s": 32, "csatv2": 64,
    "cspnext_tiny": 32, "davit_tiny": 32, "deit_tiny_patch16_224": 32, "densenet121": 32, "dla46x_c": 32,
    "dpn48b": 32, "edgenext_xx_small": 32, "efficientformer_l1": 224, "efficientformerv2_s0": 32,
    "efficientnet_b0": 32, "efficientvit_b0": 32, "efficientvit_m0": 32, "ese_vovnet19b_slim_dw": 32,
    "fasternet_t0": 32, "fastvit_t8": 32, "focalnet_tiny_srf": 32, "gcvit_xxtiny": 32, "ghostnet_050": 32,
    "gmlp_ti16_224": 32, "halonet_h1": 256, "hardcorenas_a": 32, "hgnetv2_b0": 32, "hiera_tiny_224": 32,
    "hrnet_w18_small_v2": 32, "iformer_t": 32, "inception_next_atto": 32, "inception_resnet_v2": 96,
    "inception_v3": 96, "inception_v4": 96, "lcnetv2_small": 32, "legacy_seresnet18": 32, "legacy_xception": 32,
    "levit_128s": 32, "lowformer_b0": 32, "mambaout_femto": 32, "maxvit_pico_rw_256": 32,
    "mobilenetv3_small_050": 32, "mobileone_s1": 32, "mobilevit_xxs": 32, "mvitv2_tiny": 32,
    "naflexvit_so150m2_patch16_reg1_gap": 32, "nest_tiny": 32, "nextvit_small": 32, "nf_regnet_b0": 32,
    "pit_ti_224": 32, "poolformerv2_s12": 32, "pvt_v2_b0": 32, "qwen3_vit_88m": 32, "rdnet_tiny": 32,
    "regnetx_002": 32, "repghostnet_050": 32, "repvit_m1": 32, "res2next50": 32, "resnest14d": 32, "resnet10t": 32,
    "resnetv2_18": 32, "rexnet_100": 32, "sam2_hiera_tiny": 32, "samvit_base_patch16_224": 32, "sequencer2d_s": 32,
    "shvit_s1": 32, "skresnet18": 32, "starnet_s050": 32, "swiftformer_xs": 32, "swin_tiny_patch4_window7_224": 32,
    "swinv2_cr_tiny_224": 32, "swinv2_tiny_window8_256": 32, "tiny_vit_5m_224": 32, "tresnet_m": 32,
    "twins_svt_small": 32, "vgg11": 32, "visformer_tiny": 32, "vit_relpos_small_patch16_224": 32,
    "vit_tiny_patch16_224": 32, "vit_tiny_patch16_dinov3_qkvb": 32, "vit_tiny_r_s16_p8_224": 32,
    "vitamin_small_224": 32, "volo_d1_224": 32, "xception41p": 32, "xcit_nano_12_p8_224": 32,
}  # fmt: skip
CLASSES = 5
CHECKS = ("eval", "train", "man", "deep_man", "export")


@dataclass(frozen=True)
class Settings:
    """Check one network of each family."""

    out: Path = Path(f"results/families_timm-{timm.__version__}.csv")


def built(name: str, size: int) -> nn.Module:
    """The network for images of this side. Not every constructor takes the size."""
    try:
        return timm.create_model(name, num_classes=CLASSES, img_size=size)
    except TypeError:
        return timm.create_model(name, num_classes=CLASSES)


def same(network: nn.Module, x: Tensor, *, training: bool) -> bool:
    """Whether the blocks, run one after the other, give the network's output and buffers bit for bit."""
    network.train(training)
    model = lg.localize(network, blocks=4, method=lg.dgl("0c1f"), example=x).train(training)
    state = copy.deepcopy(network.state_dict())
    torch.manual_seed(1)
    whole = network(x)
    moved = copy.deepcopy(network.state_dict())
    network.load_state_dict(state)
    torch.manual_seed(1)
    h = x
    for block in model.blocks:
        h = block(h)
    buffers = all(torch.equal(moved[key], value) for key, value in network.state_dict().items())
    return torch.equal(h, whole) and buffers


def trained(network: nn.Module) -> set[str]:
    """The names of the parameters that have a gradient."""
    return {name for name, p in network.named_parameters() if p.grad is not None}


def check(name: str, folder: Path) -> dict[str, Any]:
    """Trains one network and returns its row: what was cut and copied, and which of the `CHECKS` passed.

    Args:
        name: The network, one of `SMALL`.
        folder: Where the weights may be written.
    """
    began, size = time.perf_counter(), SMALL[name]
    torch.manual_seed(0)
    network = built(name, size)
    x, y = torch.randn(4, 3, size, size), torch.arange(4)
    row: dict[str, Any] = {"family": _model_to_module[name], "name": name, "image": size}
    row |= {"eval": same(network, x, training=False), "train": same(network, x, training=True)}
    F.cross_entropy(network(x), y).backward()
    under_bp = trained(network)
    network.zero_grad()
    for key, coupling in (("deep_man", lg.DeepMAN()), ("man", lg.MAN())):
        model = lg.localize(network, blocks=4, method=lg.dgl("0c1f"), coupling=coupling, example=x)
        copied = [[u.name for u in cast(Any, auxiliary).coupling.sources] for auxiliary in model.auxiliaries]
        row |= {f"{key}_copies": " | ".join(", ".join(names) for names in copied)}
        lg.local_backward(model, x, y)
        row |= {key: trained(network) == under_bp}
        network.zero_grad()
    row |= {"units": len(lg.units(network, x)), "layouts": " ".join(b.boundary.layout for b in model.blocks[:-1])}
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=1e-3, momentum=0.9)
    before = copy.deepcopy(network.state_dict())
    for _ in range(3):
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
    save_weights(folder / "model.safetensors", network.state_dict())
    fresh = built(name, size)
    fresh.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=True)
    moved = any(not torch.equal(before[key], value) for key, value in fresh.state_dict().items())
    with torch.no_grad():
        row |= {"export": moved and torch.equal(fresh.eval()(x), network.eval()(x))}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def main(settings: Settings) -> None:
    warnings.simplefilter("ignore")  # The constructors of the networks warn.
    table = Table(settings.out, key=("name",))
    with tempfile.TemporaryDirectory() as folder:
        for name in SMALL:
            if (name,) not in table:
                table.add(check(name, Path(folder)))
    passed = {name: sum(row[name] == "True" for row in table.rows) for name in CHECKS}
    for name, count in passed.items():
        print(f"{name}: {count} of {len(table.rows)}")
    sys.exit(any(count < len(table.rows) for count in passed.values()))


if __name__ == "__main__":
    main(tyro.cli(Settings))
