"""The papers' CIFAR ResNets, and the lookup of others by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import resnet, said
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.backbones import CIFAR_DEPTHS, ResidualUnit
from localgrad.core.errors import UserError


def parameters_by_arithmetic(depth: int, classes: int, channels: int) -> int:
    units = (depth - 2) // 6
    total = channels * 16 * 9 + 2 * 16  # the stem and its norm
    before = 16
    for width in (16, 32, 64):
        total += before * width * 9 + (2 * units - 1) * width * width * 9 + 2 * units * 2 * width
        total += before * width + 2 * width if before != width else 0  # the projection shortcut and its norm
        before = width
    return total + 64 * classes + classes


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_resnets_have_the_layers_and_parameters_of_their_depth(depth: int) -> None:
    with torch.device("meta"):
        backbone = resnet(depth)
    assert sum(p.numel() for p in backbone.parameters()) == parameters_by_arithmetic(depth, 10, 3)
    weighted = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(weighted) + 1 == depth  # and the linear layer


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameters_are_the_papers(depth: int, millions: float) -> None:
    assert parameters_by_arithmetic(depth, 10, 3) == pytest.approx(millions * 1e6, rel=0.03)


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "timm:resnet18", "torchvision:mobilenet_v2"])
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (4, 45)])
def test_backbones_take_any_channels_and_image_size(name: str, channels: int, size: int) -> None:
    backbone = lg.build(name, classes=5, in_channels=channels).eval()
    with torch.no_grad():
        logits = backbone(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 5)
    assert float(logits.std()) > 0
    if name != "torchvision:mobilenet_v2":
        assert lg.units(backbone, torch.zeros(1, channels, size, size))[0] == "stem"


def test_one_channel_changes_the_first_convolution_only() -> None:
    grey, colour = (lg.build("torchvision:resnet18", classes=5, in_channels=c).state_dict() for c in (1, 3))
    assert grey.keys() == colour.keys()
    assert [k for k in grey if grey[k].shape != colour[k].shape] == ["conv1.weight"]
    assert grey["conv1.weight"].shape == (64, 1, 7, 7)


@pytest.mark.parametrize(("channels", "out", "stride"), [(4, 4, 1), (4, 6, 2), (4, 6, 1)])
def test_a_residual_unit_is_two_convolutions_and_a_shortcut(channels: int, out: int, stride: int) -> None:
    unit = ResidualUnit(channels, out, stride).eval()
    weights = unit.state_dict()
    for name, value in weights.items():
        if name.endswith(("running_mean", "bias")):
            value.normal_()

    def normed(h: Tensor, convolution: str, norm: str, stride: int = 1, padding: int = 1) -> Tensor:
        h = F.conv2d(h, weights[f"{convolution}.weight"], None, stride, padding)
        mean, var, gain, bias = (
            weights[f"{norm}.{k}"].view(-1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (h - mean) / (var + 1e-5).sqrt() * gain + bias

    h = torch.randn(2, channels, 8, 8)
    shortcut = h if unit.downsample is None else normed(h, "downsample.0", "downsample.1", stride, 0)
    inside = normed(h, "conv1", "bn1", stride).clamp(min=0)
    wanted = (normed(inside, "conv2", "bn2") + shortcut).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(unit(h.clone()), wanted, rtol=1e-4, atol=1e-5)
    assert (unit.downsample is None) == (channels == out and stride == 1)


def test_the_network_is_stem_stages_and_head() -> None:
    backbone, x = lg.CifarResNet(20).eval(), torch.randn(2, 3, 8, 8)
    h = backbone.layer3(backbone.layer2(backbone.layer1(backbone.bn1(backbone.conv1(x)).clamp(min=0))))
    torch.testing.assert_close(backbone(x), backbone.fc(h.mean((2, 3))))
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.stride == (2, 2) for m in convolutions) == 4  # a convolution and a shortcut at two stages
    for m in convolutions:  # normal, of the variance that keeps gradients: 2 / fan out
        fan = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
        assert m.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.2)


@pytest.mark.parametrize("depth", [7, 2, 33, 0])
def test_a_depth_that_is_no_cifar_resnet_is_refused(depth: int) -> None:
    with pytest.raises(UserError, match=f"6n \\+ 2 layers, so not {depth}"):
        lg.CifarResNet(depth)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet33", "unknown model 'resnet33': did you mean 'resnet"),
        ("resnet18", "unknown model 'resnet18'"),
        ("mynet", "NAME); a network of your own is --model PACKAGE.MODULE:FUNCTION on the command line"),
        ("torchvison:resnet18", "unknown model 'torchvison:resnet18'"),
        ("torchvision:resnet181", "unknown model 'torchvision:resnet181': did you mean 'torchvision:resnet1"),
        ("timm:resnext51_32x4d", "unknown model 'timm:resnext51_32x4d': did you mean 'timm:resnext50_32x4d'?"),
        ("torchvision:", "unknown model 'torchvision:': torchvision has none of that name"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, message: str) -> None:
    assert message in said(lg.build, name, classes=3)


def test_further_arguments_go_to_the_networks_constructor() -> None:
    vit = lg.build("timm:vit_tiny_patch16_224", classes=5, in_channels=1, img_size=28, patch_size=7, depth=2)
    assert vit(torch.randn(2, 1, 28, 28)).shape == (2, 5)
    assert lg.units(vit, torch.zeros(1, 1, 28, 28)) == ["stem", "blocks.0", "blocks.1"]
    assert lg.build("torchvision:resnet18", classes=5, width_per_group=64)(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm:resnet18", {"wide": 2}, "'timm:resnet18' cannot be built with wide=2: "),
        ("torchvision:resnet18", {"norm_layer": 3}, "'torchvision:resnet18' cannot be built with norm_layer=3: "),
        ("resnet20", {"a": 1, "b": "c"}, "'resnet20' cannot be built with a=1, b=c: "),
        ("resnet21", {"a": 1}, "unknown model 'resnet21'"),
    ],
)
def test_arguments_that_the_constructor_does_not_take_are_refused(name: str, arguments: dict, message: str) -> None:
    assert said(lg.build, name, classes=3, **arguments).startswith(message)


@pytest.mark.parametrize("name", ["resnet20", "timm:resnet18", "torchvision:resnet18"])
def test_networks_of_all_libraries_are_built_with_the_same_names(name: str) -> None:
    text = said(lg.build, name, classes=3, weights="DEFAULT")
    assert text.startswith(f"'{name}' cannot be built with weights: say pretrained instead")
    allowed: list[dict[str, Any]] = [{"pretrained": False}, {"weights": None}]
    for arguments in allowed:
        assert lg.build(name, classes=3, **arguments)(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    for taken, ours in (("num_classes", "classes"), ("in_chans", "in_channels")):
        text = said(lg.build, name, classes=3, **{taken: 3})
        assert text.startswith(f"'{name}' cannot be built with {taken}: say {ours} instead")


# Trained weights


@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_is_asked_for_trained_weights(monkeypatch: pytest.MonkeyPatch, pretrained: bool) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("timm.create_model", lambda name, **how: asked.update(name=name, **how) or nn.Identity())
    lg.build("timm:resnet18", classes=7, in_channels=1, pretrained=pretrained)
    assert asked == {"name": "resnet18", "pretrained": pretrained, "num_classes": 7, "in_chans": 1}


@pytest.mark.parametrize("model", ["resnet18", "squeezenet1_1", "vit_b_32", "googlenet"])
@pytest.mark.parametrize("pretrained", [True, "IMAGENET1K_V1"])
def test_torchvision_is_asked_for_trained_weights(
    monkeypatch: pytest.MonkeyPatch, model: str, pretrained: bool | str
) -> None:
    import torchvision

    asked: dict[str, Any] = {}
    plain = torchvision.models.get_model(model, **({"init_weights": False} if model == "googlenet" else {}))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    monkeypatch.setattr("torchvision.models.get_model", lambda name, **how: asked.update(name=name, **how) or plain)
    built = lg.build(f"torchvision:{model}", classes=7, pretrained=pretrained)
    assert asked == {"name": model, "weights": "DEFAULT" if pretrained is True else pretrained}
    changed = {n for n, v in built.state_dict().items() if v.shape != before[n].shape or not torch.equal(v, before[n])}
    assert {name.rpartition(".")[0] for name in changed} == {
        {"resnet18": "fc", "squeezenet1_1": "classifier.1", "vit_b_32": "heads.head", "googlenet": "fc"}[model]
    }
    assert all(built.state_dict()[name].shape[0] == 7 for name in changed)


def test_a_cifar_resnet_has_no_trained_weights() -> None:
    text = said(lg.build, "resnet20", classes=10, pretrained=True)
    assert text.startswith("there are no trained weights of 'resnet20': leave pretrained out")
