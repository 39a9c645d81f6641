"""The papers' CIFAR ResNets, and the lookup of torchvision and timm networks by name."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.core.errors import UserError, unknown

CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)
CIFAR_RESNETS = tuple(f"resnet{depth}" for depth in CIFAR_DEPTHS)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, C, H, W] -> [B, out, H / stride, W / stride]."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, h: Tensor) -> Tensor:
        shortcut = h if self.downsample is None else self.downsample(h)
        h = F.relu(self.bn1(self.conv1(h)), inplace=True)
        h = self.bn2(self.conv2(h))
        h += shortcut
        return F.relu(h, inplace=True)


class CifarResNet(nn.Module):
    """A ResNet for small images: 3x3 stem, then three stages of 16, 32 and 64 channels.

    [B, in_channels, H, W] -> [B, classes]. Source: "Deep residual learning" (CVPR 2016), section 4.2. As in the
    published code for local learning, a unit that changes the shape has a 1x1 convolution as its shortcut.

    Args:
        depth: The number of layers, 6n + 2.
        classes: The number of logits. Default: 10.
        in_channels: The channels of the images. Default: 3.

    Raises:
        UserError: No ResNet of this kind has so many layers.
    """

    def __init__(self, depth: int, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"a CIFAR ResNet has 6n + 2 layers, so not {depth}")
        units = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, units, stride=1)
        self.layer2 = self._stage(16, 32, units, stride=2)
        self.layer3 = self._stage(32, 64, units, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(channels: int, out: int, units: int, stride: int) -> nn.Sequential:
        rest = [ResidualUnit(out, out, 1) for _ in range(units - 1)]
        return nn.Sequential(ResidualUnit(channels, out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.fc(torch.flatten(self.avgpool(h), 1))


def build(
    name: str, *, classes: int, in_channels: int = 3, pretrained: bool | str = False, **arguments: Any
) -> nn.Module:
    """Makes a backbone by its name.

    Args:
        name: A CIFAR ResNet, such as "resnet32", or a network of a library: "torchvision:resnet50", "timm:resnet101",
            "torchvision:fcn_resnet50".
        classes: The number of logits, of each pixel if it is a network for segmentation.
        in_channels: The channels of the images. Default: 3.
        pretrained: Whether the library loads trained weights. For torchvision, it may also be the name of weights, such
            as "IMAGENET1K_V1", and True is "DEFAULT". The layer that gives the logits is new where their number is
            another one. For other channels, torchvision's first layer is new, and timm converts it. Default: False.
        **arguments: Arguments of the network's own constructor in its library, such as `img_size=28, patch_size=7` for
            timm's vision transformers.

    Raises:
        UserError: The name is unknown, the arguments are wrong, or there are no trained weights of the network.
    """
    if arguments.pop("weights", None):
        raise UserError(f"'{name}' cannot be built with weights: say pretrained instead, which all libraries share")
    if pretrained and name in CIFAR_RESNETS:
        raise UserError(f"there are no trained weights of '{name}': leave pretrained out, and load a file of your own")
    for taken, ours in (("num_classes", "classes"), ("in_chans", "in_channels")):
        if taken in arguments:
            raise UserError(f"'{name}' cannot be built with {taken}: say {ours} instead, which all networks share")
    try:
        return _build(name, classes, in_channels, pretrained, arguments)
    except UserError:
        raise
    except Exception as error:  # Constructors raise many kinds of errors for wrong arguments.
        if not arguments:
            raise
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"'{name}' cannot be built with {given}: {reason}") from error


def _build(name: str, classes: int, in_channels: int, pretrained: bool | str, arguments: dict[str, Any]) -> nn.Module:
    source, _, model = name.rpartition(":")
    if source == "torchvision":
        return _torchvision(name, model, classes, in_channels, pretrained, arguments)
    if source == "timm":
        return _timm(name, model, classes, in_channels, pretrained, arguments)
    if name not in CIFAR_RESNETS:
        error = unknown("model", name, [*CIFAR_RESNETS, "torchvision:NAME", "timm:NAME"])
        raise UserError(f"{error}; a network of your own is --model PACKAGE.MODULE:FUNCTION on the command line")
    return CifarResNet(int(name.removeprefix("resnet")), classes, in_channels, **arguments)


def _torchvision(
    name: str, model: str, classes: int, in_channels: int, pretrained: bool | str, arguments: dict[str, Any]
) -> nn.Module:
    import torchvision

    pixels = torchvision.models.list_models(module=torchvision.models.segmentation)
    names = torchvision.models.list_models(module=torchvision.models) + pixels
    if model not in names:
        raise _no_such(name, "torchvision", model, names)
    if pretrained:  # Trained weights are those of a network with their own number of classes.
        weights = "DEFAULT" if pretrained is True else pretrained
        backbone: Any = torchvision.models.get_model(model, weights=weights, **arguments)
        if model in pixels:  # Trained weights bring a second output, which no criterion here reads.
            backbone.aux_classifier = None
        _change_output(backbone, classes)
    else:
        # These two networks build auxiliary logits and warn about their initialisation, unless told otherwise.
        extra = {"aux_logits": False, "init_weights": True} if model in ("googlenet", "inception_v3") else {}
        extra |= {"weights_backbone": None} if model in pixels else {}
        backbone = torchvision.models.get_model(model, weights=None, num_classes=classes, **extra, **arguments)
    if in_channels != 3:
        _change_input(backbone, in_channels)
    return backbone


def _timm(
    name: str, model: str, classes: int, in_channels: int, pretrained: bool | str, arguments: dict[str, Any]
) -> nn.Module:
    import timm

    if not timm.is_model(model):
        raise _no_such(name, "timm", model, timm.list_models())
    return timm.create_model(model, pretrained=bool(pretrained), num_classes=classes, in_chans=in_channels, **arguments)


def _no_such(name: str, source: str, model: str, names: list[str]) -> UserError:
    near = difflib.get_close_matches(model, names, n=1)
    hint = f": did you mean '{source}:{near[0]}'?" if near else f": {source} has none of that name"
    return UserError(f"unknown model '{name}'{hint}")


def _change_input(backbone: nn.Module, in_channels: int) -> None:
    """Replaces the first convolution by one for `in_channels`, because torchvision's constructors only take 3."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            new = nn.Conv2d(
                in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,  # pyright: ignore[reportArgumentType]
                bias=module.bias is not None,
            )  # fmt: skip
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            backbone.set_submodule(name, new)
            return


def _change_output(backbone: nn.Module, classes: int) -> None:
    """Replaces the last layer by one for `classes`, if it has another number of outputs."""
    name, last = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if isinstance(last, nn.Linear) and last.out_features != classes:
        backbone.set_submodule(name, nn.Linear(last.in_features, classes, bias=last.bias is not None))
    elif isinstance(last, nn.Conv2d) and last.out_channels != classes:
        backbone.set_submodule(name, nn.Conv2d(last.in_channels, classes, last.kernel_size))  # pyright: ignore[reportArgumentType]
