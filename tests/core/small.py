"""Small networks and looks into a model that the tests of the core share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.couplings import Link, Momentum
from localgrad.scale import memory


def batch(count: int = 4, size: int = 8, channels: int = 3, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(count, channels, size, size), torch.arange(count) % classes


def resnet(depth: int = 20, **settings: Any) -> nn.Module:
    return lg.build(f"resnet{depth}", **{"classes": 10, **settings})


def vgg(channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Plain layers: units start at 0, 3, 7 and 11; linear layer 15 is the head."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


def pre_activation(channels: int, out: int, first: nn.Module | None = None) -> nn.Sequential:
    """A unit that begins in place, unless `first` says otherwise."""
    return nn.Sequential(first or nn.ReLU(inplace=True), nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out))


def composite(first: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True)) -> nn.Sequential:
    """A stem and three composite units that begin with `first`, then the head."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3, padding=1),
            a=pre_activation(4, 4, first()),
            b=pre_activation(4, 6, first()),
            c=pre_activation(6, 6, first()),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(6, 10),
        )
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 9), nn.Tanh(),
        nn.Linear(9, 5),
    )  # fmt: skip


class FunctionalDropout(nn.Module):
    """Drops features out in its own forward, by a function that is told whether this is training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        )
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.layers(x), 0.5, training=self.training)
        return self.fc(h.mean((2, 3)))


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h + self.b(F.relu(self.norm(self.a(h)))))


Between = Callable[[Any, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A stem, three units on maps of 8 x 8, something `between` them that may read the network's input, and a head."""

    def __init__(self, between: Between = lambda net, h, x: h, unit: Callable[[], nn.Module] = Unit) -> None:
        super().__init__()
        self.between = between
        self.stem, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 5)
        self.units = nn.ModuleList(unit() for _ in range(3))
        self.table = nn.Parameter(torch.randn(6, 8, 8))
        self.register_buffer("mean", torch.rand(6))
        self.register_buffer("var", torch.rand(6) + 1)

    def forward(self, x: Tensor) -> Any:
        return self.top(self.body(self.stem(x), x))

    def body(self, h: Tensor, x: Tensor) -> Tensor:
        for unit in self.units:
            h = self.between(self, unit(h), x)
        return h

    def top(self, h: Tensor) -> Any:
        return self.fc(h.mean((2, 3)))


UNITS_OF_NET = ["stem", "units.0", "units.1", "units.2"]


def cut(network: nn.Module, **how: Any) -> lg.LocalModel:
    """A network like `Net` in blocks of one unit each."""
    return lg.localize(network, **{"blocks": 4, "method": lg.dgl("0c1f"), "example": torch.zeros(2, 3, 8, 8), **how})


ALL_COUPLINGS = [None, lg.MAN(0.9), lg.MANPlusPlus(0.9), lg.DeepMAN(0.9), lg.MAN(0.9, form="pull")]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def local(coupling: lg.MAN | None = None, blocks: int = 4, backbone: nn.Module | None = None) -> lg.LocalModel:
    backbone = backbone or resnet(20)
    return lg.localize(backbone, blocks=blocks, method=lg.dgl("1c1f"), coupling=coupling, example=batch()[0])


def auxiliaries(model: lg.LocalModel) -> list[lg.Auxiliary]:
    return [cast(lg.Auxiliary, a) for a in model.auxiliaries]


def coupling_of(auxiliary: lg.Auxiliary) -> Momentum:
    assert auxiliary.coupling is not None
    return auxiliary.coupling


def links_of(auxiliary: lg.Auxiliary) -> list[Link]:
    return [cast(Link, link) for link in coupling_of(auxiliary).links]


def branches_of(link: Link) -> tuple[nn.Module, nn.Module]:
    assert link.learnable is not None
    assert link.ema is not None
    return link.learnable, link.ema


def averages_of(auxiliary: lg.Auxiliary) -> list[tuple[nn.Module, nn.Module]]:
    """Each EMA branch with its source."""
    pairs = zip(links_of(auxiliary), coupling_of(auxiliary).sources, strict=True)
    return [(branches_of(link)[1], source.module) for link, source in pairs]


def assert_chained(model: lg.LocalModel, x: Tensor) -> None:
    """The blocks, one after the other, are the backbone, bit for bit, in evaluation and in training."""
    for training in (False, True):
        model.train(training)
        torch.manual_seed(1)
        through_blocks = chain(model, x)
        torch.manual_seed(1)
        assert torch.equal(through_blocks, model.backbone(x))


def chain(model: lg.LocalModel, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def said(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises(lg.UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit, key for key."""
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


MOMENTUM = 0.9
ALL = (lg.MAN, lg.MANPlusPlus, lg.DeepMAN)


def build(coupling: lg.MAN, *, blocks: int | list[str] = 4, double: bool = True, depth: int = 20) -> lg.LocalModel:
    backbone = resnet(depth).double() if double else resnet(depth)
    return lg.localize(backbone, blocks=blocks, method=lg.dgl("0c1f"), coupling=coupling, example=batch()[0])


def assert_memory_is_predicted(model: lg.LocalModel, x: Tensor, y: Tensor) -> None:
    """To the byte, for SGD with momentum."""

    def optimizers(own: lg.LocalModel) -> list[torch.optim.Optimizer]:
        return [sgd(lg.param_groups(own))]

    made = optimizers(model)
    memory.training_step(model, made, x, y)
    measured = lg.measure_peak(lambda: memory.training_step(model, made, x, y), model=model, optimizers=made)
    assert lg.predict_peak(model, len(x), optimizers).total == measured.total
