"""Networks as people bring them: tokens, maps with their channels last, tables beside the chain, control flow."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from small import assert_chained, chain, said
from timm.models.beit import Beit
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

import localgrad as lg
from localgrad.core.blocks import trace_units

TINY: dict[str, Any] = {"img_size": 16, "num_classes": 5, "embed_dim": 16}
LAYERS: dict[str, Any] = {**TINY, "patch_size": 4, "depth": 4, "num_heads": 2}


def vit(**how: Any) -> nn.Module:
    return VisionTransformer(**LAYERS, drop_path_rate=0.2, **how)


def swin() -> nn.Module:
    return SwinTransformer(**TINY, patch_size=2, depths=(2, 2), num_heads=(2, 2), window_size=4)


def shared_table() -> nn.Module:
    """Every layer reads one table of relative positions, which belongs to none of them."""
    network = Beit(**LAYERS, use_abs_pos_emb=False, use_shared_rel_pos_bias=True)
    nn.init.normal_(network.get_parameter("rel_pos_bias.relative_position_bias_table"))
    return network


class Unit(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(features, 2 * features), nn.Linear(2 * features, features)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(F.gelu(self.a(h)))


class Own(nn.Module):
    """What people write at the top of a network: options, control flow over shapes, sizes that follow the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.units = nn.ModuleList(Unit(8) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pool: str = "mean") -> Tensor:
        if x.shape[-1] > 4:
            x = F.avg_pool2d(x, 2)
        if mask is not None:
            x = x * mask
        count, channels, height, width = x.shape
        h = self.stem(x.permute(0, 2, 3, 1).reshape(count * height * width, channels)).view(count, height * width, -1)
        h = F.dropout(h, 0.1, self.training)
        for unit in self.units:
            h = unit(h)
        assert len(h.shape) == 3
        h = h + torch.arange(h.size(1), device=h.device)[None, :, None] / 100
        return self.head(h.mean(1) if pool == "mean" else h[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit, mean of tokens": lambda: vit(class_token=False, global_pool="avg"),
    "vit with registers": lambda: vit(reg_tokens=3),
    "swin": swin,
    "mixer": lambda: MlpMixer(img_size=16, patch_size=4, num_blocks=4, embed_dim=16, num_classes=5),
    "shared table": shared_table,
    "own": Own,
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]()


@pytest.mark.parametrize("count", [1, 4])
def test_chained_blocks_are_the_network_bit_for_bit(network: nn.Module, count: int) -> None:
    x = torch.randn(count, 3, 16, 16)
    model = lg.localize(network, blocks=4, method=lg.dgl("0c1f"), example=torch.zeros(2, 3, 16, 16))
    assert_chained(model, x)


@pytest.mark.parametrize("coupling", [None, lg.DeepMAN(depth=2)], ids=str)
@pytest.mark.parametrize("method", [lg.dgl("0c1f"), lg.infopro(), lg.predsim(), lg.auglocal()], ids=lambda m: m.name)
def test_every_parameter_that_learns_under_bp_learns(
    network: nn.Module, method: lg.Method, coupling: lg.MAN | None
) -> None:
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    alone = copy.deepcopy(network)
    F.cross_entropy(alone(x), y).backward()
    learns = {name for name, p in alone.named_parameters() if p.grad is not None}
    if method.name == "infopro":  # whose own weights end at nothing
        method = lg.infopro(weights=[(1.0, 1.0)] * 3)
    model = lg.localize(network, blocks=4, coupling=coupling, example=x, method=method)
    lg.local_backward(model, x, y)
    assert {name for name, p in network.named_parameters() if p.grad is not None} == learns
    owned = [p for group in lg.param_groups(model) for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert set(network.parameters()) <= set(owned)


@pytest.mark.parametrize(
    ("name", "layout", "shape", "prefix", "size"),
    [
        ("vit", "NLC", (17, 16), 1, (4, 4)),
        ("vit with registers", "NLC", (20, 16), 4, (4, 4)),
        ("vit, mean of tokens", "NLC", (16, 16), 0, (4, 4)),
        ("swin", "NHWC", (8, 8, 16), 0, (8, 8)),
        ("own", "NLC", (64, 8), 0, (8, 8)),
    ],
)
def test_a_boundary_knows_its_layout(
    name: str, layout: str, shape: tuple[int, ...], prefix: int, size: tuple[int, int]
) -> None:
    boundary = trace_units(NETWORKS[name](), torch.zeros(1, 3, 16, 16)).units[1].output
    assert (boundary.layout, boundary.shape, boundary.prefix, boundary.size) == (layout, shape, prefix, size)
    h = torch.randn(2, *shape)
    as_map = nn.Sequential(*boundary.to_map())(h)
    assert as_map.shape == (2, boundary.channels, *size)
    grid = h[:, prefix:].reshape(2, *size, boundary.channels)
    assert torch.equal(as_map, grid.permute(0, 3, 1, 2))
    layers, summary = boundary.summary()
    normed = F.layer_norm(h, (boundary.channels,))
    assert torch.equal(nn.Sequential(*layers)(h), normed[:, 0] if prefix else normed)
    assert (summary.layout == "NC") == bool(prefix)


def test_a_table_beside_the_chain_is_trained_by_the_first_block_that_reads_it() -> None:
    network = shared_table()
    model = lg.localize(network, blocks=4, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=torch.zeros(1, 3, 16, 16))
    table = network.get_parameter("rel_pos_bias.relative_position_bias_table")
    assert [k for k in range(4) if any(p is table for p in model.members(k))] == [1]  # Block 0 is the stem alone.
    moved = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(chain(moved.eval(), x), moved.backbone(x))


class Stage(nn.Module):
    """Units in a module of its own, as timm's RegNets have them."""

    def __init__(self, features: int, count: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(f"b{i}", Unit(features))

    def forward(self, h: Tensor) -> Tensor:
        for unit in self.children():
            h = unit(h)
        return h


class Strict(Stage):
    """Asks for the size of a batch, so its own forward cannot be followed."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) if len(h) % 5 else h


class Curious(Stage):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) if h.sum() > 0 else h


def test_a_stage_of_any_class_is_opened() -> None:
    network = nn.Sequential(nn.Flatten(), Stage(12, 3), nn.Linear(12, 12), Stage(12, 2), nn.Linear(12, 5))
    names = ["1.b0", "1.b1", "1.b2", "3.b0", "3.b1"]
    assert lg.units(network, torch.zeros(1, 3, 2, 2)) == names


def test_a_module_that_cannot_be_followed_is_named_where_it_leaves_too_few_units() -> None:
    network, x = nn.Sequential(nn.Flatten(), Strict(12, 3), nn.Linear(12, 5)), torch.zeros(1, 3, 2, 2)
    assert said(lg.localize, network, blocks=3, method=lg.dgl("0c1f"), example=x) == (
        "blocks=3 is out of range: this network has 1 unit, so 1 to 1 ('1' cannot be followed: it depends on the size "
        "of the batch; give its parts by hand, as nn.Sequential(part, part, ...))"
    )
    text = said(lg.units, nn.Sequential(nn.Flatten(), Curious(12, 3), nn.Linear(12, 5)), x)
    assert text.startswith("Sequential cannot be cut: '1' asks for the values of a tensor, and a network")
    text = said(lg.units, TwoInputs(), torch.zeros(1, 3, 8, 8))
    assert text.startswith("example is not what the forward of TwoInputs takes (missing a required argument: 'other')")


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_backbone_of_a_segmentation_network_is_cut(auxiliary: bool) -> None:
    taken = {"layer4": "out", "layer2": "aux"} if auxiliary else {"layer4": "out"}
    backbone = IntermediateLayerGetter(torchvision.models.resnet18(), taken)
    network = FCN(backbone, FCNHead(512, 5), FCNHead(128, 5) if auxiliary else None)
    x = torch.randn(2, 3, 32, 32)
    traced = trace_units(network, x)
    names = [u.name for u in traced.units]
    assert names[:5] == ["stem", *(f"backbone.layer{i}.{k}" for i in (1, 2) for k in (0, 1))]
    assert len(names) == (11 if auxiliary else 10)
    assert traced.cut.gives == {"out": (5, 32, 32)} | ({"aux": (5, 32, 32)} if auxiliary else {})
    beside = [[p.made_by for p in unit.output.passengers] for unit in traced.units[5:7]]
    assert beside == ([["backbone.layer2.1"]] * 2 if auxiliary else [[], []])  # Its map is read again at the end.
    for training in (False, True):
        network.train(training)
        torch.manual_seed(1)
        h: Any = x
        for module in [*(u.module for u in traced.units), *([traced.head] if traced.head else [])]:
            h = module(h)
        torch.manual_seed(1)
        whole = network(x)
        assert h.keys() == whole.keys()
        assert all(torch.equal(h[key], value) for key, value in whole.items())


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


@pytest.mark.parametrize(("name", "count"), [("torchvision:resnet152", 51), ("timm:vit_large_patch16_224", 25)])
def test_deep_networks_are_cut_within_seconds(name: str, count: int) -> None:
    with torch.device("meta"):
        network = lg.build(name, classes=1000)
    began = time.process_time()
    assert len(lg.units(network, torch.zeros(1, 3, 224, 224))) == count
    assert time.process_time() - began < 5
