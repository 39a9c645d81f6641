"""What is changed after `localize` and would not reach the blocks is refused or told, and nothing else is."""

from __future__ import annotations

import copy
import re
import timeit
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import batch, resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import localgrad as lg
from localgrad.core.errors import UserError

X, Y = batch()


class Scale(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source

    def forward(self, h: Tensor) -> Tensor:
        return self.source(h)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def unit() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, bias=True))


class Net(nn.Module):
    """Reads attributes, holds a parameter, and has a child that nobody calls."""

    rate = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.unread, self.calls, self.axes, self.act = 1.0, 3, 0, [2, 3], F.relu
        self.stem, self.norm, self.spare = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Linear(2, 2)
        self.units = nn.ModuleList(unit() for _ in range(4))
        self.table = nn.Parameter(torch.randn(6, 8, 8))
        self.shapes, self.counts, self.factors = list[Any](), dict[str, int](), {"last": 1.0}
        self.last = self.top = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 10))

    def scaled(self, h: Tensor) -> Tensor:
        return h * getattr(self, "rate") / self.temperature  # noqa: B009

    def count(self) -> None:
        self.counts["all"] = self.counts.get("all", 0) + 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x)) + self.table
        for part in self.units:
            h = self.act(part(h))
        self.calls = self.calls + 1
        self.shapes.append(tuple(h.shape))
        self.count()
        return self.last(self.scaled(h.mean(self.axes))) * self.factors["last"]


Change = Callable[[Any, lg.LocalModel], object]


def put(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


def clones(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


REFUSED: dict[str, tuple[Change, str]] = {
    "a head": (lambda net, m: put(net, "last", nn.Linear(6, 4)), "'last' was replaced"),
    "its other name": (lambda net, m: put(net, "top", nn.Linear(6, 4)), "'top' was replaced"),
    "a unit": (lambda net, m: net.units.__setitem__(1, unit()), "'units.1' was replaced"),
    "a wrapped unit": (lambda net, m: net.units.__setitem__(0, Scale(net.units[0])), "'units.0' was replaced"),
    "a unit less": (lambda net, m: net.units.__delitem__(3), "'units.3' was taken away"),
    "a unit more": (lambda net, m: net.units.append(unit()), "modules in 'units' was changed from 4 to 5"),
    "all units": (lambda net, m: put(net, "units", copy.deepcopy(net.units)), "'units' was replaced"),
    "batch norms": (lambda net, m: nn.SyncBatchNorm.convert_sync_batchnorm(net), "'norm' was replaced"),
    "the same of the model": (lambda net, m: nn.SyncBatchNorm.convert_sync_batchnorm(m), "'norm' was replaced"),
    "a parameter": (lambda net, m: put(net, "table", nn.Parameter(torch.zeros(6, 8, 8))), "'table' was replaced"),
    "weights": (lambda net, m: net.load_state_dict(clones(net), assign=True), "'table' was replaced"),
    "pruned": (lambda net, m: prune.random_unstructured(net, "table", 0.5), "'table' was taken away"),
    "parametrized": (
        lambda net, m: parametrize.register_parametrization(net, "table", Double()), "'table' was taken away"
    ),
    "old norm": (lambda net, m: nn.utils.spectral_norm(net, "table"), "'table' was taken away"),
    "a copied unit": (
        lambda net, m: prune.random_unstructured(net.units[1][2], "weight", 0.5), "a coupling has copied 'units.1'"
    ),
    "a copied unit's norm": (
        lambda net, m: parametrizations.weight_norm(net.units[1][0]), "a coupling has copied 'units.1'"
    ),
    "within a copied unit": (
        lambda net, m: net.units[0].__setitem__(1, nn.Identity()), "a coupling has copied 'units.0'"
    ),
    "the backbone": (lambda net, m: put(m, "backbone", Net()), "the model's backbone was replaced"),
}  # fmt: skip
TOLD: dict[str, tuple[Change, str]] = {
    "a number": (lambda net, m: put(net, "temperature", 9), "'temperature' was 1.0 as the network was cut, and is 9"),
    "of the class": (lambda net, m: put(net, "rate", 0.1), "'rate' was 0.5"),
    "a function": (lambda net, m: put(net, "act", torch.tanh), "'act' was relu as the network was cut, and is tanh"),
    "a list": (lambda net, m: net.axes.pop(), r"'axes' was \[2, 3\]"),
    "a dictionary": (lambda net, m: net.factors.update(last=3.0), r"'factors' was \{'last': 1.0\}.*is \{'last': 3.0\}"),
    "a method": (lambda net, m: put(net, "scaled", torch.tanh), "'scaled' was that of its class"),
    "forward": (lambda net, m: put(net, "forward", torch.tanh), "'forward' was that of its class"),
    "hooks": (lambda net, m: net.register_forward_hook(lambda *_: None), "the hooks of the network itself"),
}
FINE: dict[str, Change] = {
    "a hook less, which had no effect": lambda net, m: net.handle.remove(),
    "nothing": lambda net, m: None,
    "what the forward fills": lambda net, m: (m(X), net.shapes.append(3), net.counts.update(all=9)),
    "an attribute that is not read": lambda net, m: put(net, "unread", 4),
    "a child that is not called": lambda net, m: put(net, "spare", nn.Linear(3, 3)),
    "a child more": lambda net, m: put(net, "probe", nn.Linear(3, 3)),
    "calls, which count themselves": lambda net, m: (m(X), m.train(False)(X), m.train()),
    "types": lambda net, m: m.double().float(),
    "weights in place": lambda net, m: (net.load_state_dict(clones(net)), m.load_state_dict(clones(m))),
    "frozen": lambda net, m: net.table.requires_grad_(False),
    "compiled blocks": lambda net, m: [block.compile(backend="eager") for block in m.blocks],
    "a compiled backbone": lambda net, m: put(m, "backbone", torch.compile(net, backend="eager")),
    "hooks of a unit": lambda net, m: net.units[0].register_forward_hook(lambda *_: None),
    "within a unit": lambda net, m: net.units[2].__setitem__(1, nn.Identity()),
    "within the head": lambda net, m: net.top.__setitem__(1, nn.Linear(6, 12)),
    "another norm within a copied unit": lambda net, m: net.units[0].__setitem__(1, nn.BatchNorm2d(6, eps=0.1)),
    "a pruned layer": lambda net, m: prune.random_unstructured(net.units[2][2], "weight", 0.5),
    "a parametrized stem": lambda net, m: parametrize.register_parametrization(net.stem, "weight", Double()),
}


def cut(backbone: Net) -> lg.LocalModel:
    """With a hook that has no part in the blocks."""
    backbone.handle = backbone.register_forward_hook(lambda m, args, out: print(end=""))  # pyright: ignore
    blocks = ["stem", "units.0", "units.3"]
    with pytest.warns(UserWarning, match="does not call the hooks of the network itself"):
        return lg.localize(backbone, blocks=blocks, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=X)


def step(model: lg.LocalModel) -> list[str]:
    """The warnings of two steps, each of which names a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            lg.local_backward(model, X, Y)
    found = [warning for warning in caught if "local_backward" in str(warning.message)]
    assert {warning.filename for warning in found} <= {__file__}
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_blocks_would_not_see_is_refused_before_the_step(case: str, copied: bool) -> None:
    change, sentence = REFUSED[case]
    first = cut(Net())
    model = copy.deepcopy(first) if copied else first
    change(model.backbone, model)
    with pytest.raises(UserError, match=rf"{sentence}.*: call localize again$"):
        lg.local_backward(model, X, Y)
    assert all(p.grad is None for p in model.parameters())
    if copied:
        lg.local_backward(first, X, Y)


@pytest.mark.parametrize("case", TOLD)
def test_attributes_that_the_blocks_do_not_see_are_told_once(case: str) -> None:
    change, sentence = TOLD[case]
    model = cut(Net())
    change(model.backbone, model)
    (told,) = step(model)
    assert re.match(sentence, told)
    assert told.endswith("which local_backward does not see: call localize again")


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("case", FINE)
def test_what_the_blocks_see_or_nobody_reads_is_no_matter(case: str, copied: bool) -> None:
    model = copy.deepcopy(cut(Net())) if copied else cut(Net())
    FINE[case](model.backbone, model)
    assert not step(model)


def test_a_wrapped_network_is_cut_as_it_is_and_a_prediction_tells_nothing_of_hooks() -> None:
    backbone = Net()
    backbone.units[1] = Scale(backbone.units[1])
    model = cut(backbone)
    assert not step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lg.predict_peak(model, 4, lambda copied: [torch.optim.SGD(lg.param_groups(copied))])


@pytest.mark.slow
def test_networks_of_others_tell_nothing_by_themselves() -> None:
    x = torch.randn(4, 3, 32, 32)
    for name in ("timm:resnet18", "timm:vit_tiny_patch16_224", "torchvision:mobilenet_v3_small"):
        small: dict[str, Any] = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
        backbone = lg.build(name, classes=10, **small)
        model = lg.localize(backbone, blocks=3, method=lg.dgl("0c1f"), example=x)
        model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lg.local_backward(model, x, Y)
    vit: Any = lg.build("timm:vit_tiny_patch16_224", classes=10, img_size=32, patch_size=8)
    model = lg.localize(vit, blocks=3, method=lg.dgl("0c1f"), example=x)
    vit.set_grad_checkpointing(True)
    with pytest.warns(UserWarning, match="'grad_checkpointing' was False as the network was cut, and is True"):
        lg.local_backward(model, x, Y)
    vit.reset_classifier(4)
    with pytest.raises(UserError, match="'head' was replaced"):
        lg.local_backward(model, x, Y)


def test_a_check_is_cheap() -> None:
    model = lg.localize(resnet(110), blocks=8, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=X)
    seconds = timeit.repeat(lambda: model.watch.check(model.backbone), number=1, repeat=50)
    assert min(seconds) < 0.001  # A step takes 1 s at batch 128.
