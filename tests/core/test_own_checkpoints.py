"""A network's own activation checkpoints become recomputed units: no more memory than the plain loop's, and nothing is
detached."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small import assert_memory_is_predicted
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import localgrad as lg

X, Y = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(1)), torch.arange(8)
Run = Callable[["Network", Tensor], Tensor]
HOW = [{"method": lg.bp()}, {"method": lg.dgl("0c1f"), "blocks": 3}]


def unit(channels: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())


class Network(nn.Module):
    """A stem, then `run` with six layers, then a head."""

    def __init__(self, run: Run = lambda net, h: net.layers(h), reentrant: bool = False) -> None:
        super().__init__()
        self.run, self.checkpoint = run, partial(checkpoint, use_reentrant=reentrant)
        self.stem, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 10)
        self.layers: Any = nn.Sequential(*[unit() for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, self.stem(x)).mean((2, 3)))


class Around(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.checkpoint(super().forward, x)


def each_layer(net: Network, h: Tensor) -> Tensor:
    for layer in net.layers:
        h = net.checkpoint(layer, h)
    return h


def in_segments(net: Network, h: Tensor) -> Tensor:
    return checkpoint_sequential(net.layers, 3, h, **net.checkpoint.keywords)


def skips(net: Network, h: Tensor) -> Tensor:
    """Makes one unit of all layers, as each tensor is read again at the end."""
    kept = []
    for layer in net.layers[:3]:
        h = net.checkpoint(layer, h)
        kept.append(h)
    for layer in net.layers[3:]:
        h = net.checkpoint(lambda a, b, layer=layer: functional.gelu(layer(a + b)) + a, h, kept.pop())
    return h


def nested(net: Network, h: Tensor) -> Tensor:
    return net.checkpoint(each_layer, net, h)


class Layer(nn.Module):
    """Enters a checkpoint when it is called, as layers of transformers do."""

    own: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.unit = unit()

    def __call__(self, h: Tensor) -> Tensor:
        return self.own(super().__call__, h) if self.own and self.training else super().__call__(h)

    def forward(self, h: Tensor) -> Tensor:
        return self.unit(h) + h


class Stage(Layer):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


def each_stage(net: Network, h: Tensor) -> Tensor:
    for stage in net.layers:
        h = stage(h)
    return h


def gradients(net: nn.Module) -> list[Tensor | None]:
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    return found


def check(net: nn.Module, x: Tensor = X) -> list[lg.LocalModel]:
    """Backpropagation has the gradients and the memory of the plain loop, and a cut into blocks no more of it."""
    models = [lg.localize(copy.deepcopy(net), example=x, **how) for how in HOW]
    net.train()
    torch.manual_seed(2)
    plain = lg.measure_peak(lambda: functional.cross_entropy(net(x), Y[: len(x)]).backward()).total
    expected = gradients(net)
    for model in models:
        torch.manual_seed(2)
        assert (
            lg.measure_peak(lambda model=model: lg.local_backward(model, x, Y[: len(x)])).total < 1.001 * plain + 1000
        )
        found = gradients(model.backbone)
        assert all(g is not None for g in found)
        if model is models[0]:
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))  # pyright: ignore
    return models


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", [each_layer, in_segments, skips])
def test_in_a_forward_of_ones_own(run: Run, reentrant: bool) -> None:
    check(Network(run, reentrant))


@pytest.mark.parametrize("make", [Around, partial(Network, nested)])
def test_one_around_the_network_or_around_others(make: Callable[[], Network]) -> None:
    check(make())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kinds", [(Layer,), (Stage,), (Layer, Stage)])
@pytest.mark.filterwarnings("ignore:None of the inputs")  # the plain loop's, of one reentrant checkpoint in another
def test_entered_by_the_call_of_a_layer(kinds: tuple[type, ...], reentrant: bool) -> None:
    net = Network(each_stage, reentrant)
    net.layers = nn.ModuleList([Stage(), Stage()])
    for module in net.modules():
        if type(module) in kinds:
            module.own = net.checkpoint  # pyright: ignore
    ranges = [found for block in check(net)[1].blocks for found in block.ranges]
    assert bool(ranges) == (Stage in kinds)  # A layer's own checkpoint stays the layer's own.


def test_units_of_one_checkpoint_run_again_together_and_an_explicit_choice_replaces_it() -> None:
    model = check(Network(in_segments))[0]
    assert model.blocks[0].ranges == ((1, 2), (3, 4))
    assert "7 recomputed" not in repr(model)
    assert "4 recomputed" in repr(model)
    lg.recompute(model, units=["layers.5"])
    assert model.blocks[0].ranges == ((6, 6),)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_networks_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 64, "window_size": 2, "embed_dim": 24} if "swin" in name else {}
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **small)
    net.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 64, 64)
    assert "recomputed" in repr(lg.localize(net, method=lg.bp(), example=x))
    check(net, x)


def test_statistics_move_once_and_memory_is_predicted() -> None:
    net = Network(each_layer)
    for i, layer in enumerate(net.layers):
        layer.insert(1, nn.BatchNorm2d(32))  # pyright: ignore
        layer.append(nn.Dropout(0.1 * i))  # pyright: ignore
    model = check(net)[1]
    assert {int(b) for name, b in model.backbone.named_buffers() if "batches" in name} == {1}
    assert_memory_is_predicted(model, X, Y)


def offloads(net: Network, h: Tensor) -> Tensor:
    with save_on_cpu():
        return net.layers(h)


def packs_around_checkpoints(net: Network, h: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return each_layer(net, h)


@pytest.mark.parametrize("run", [offloads, packs_around_checkpoints])
def test_other_hooks_on_saved_tensors_warn(run: Run) -> None:
    with pytest.warns(UserWarning, match=r"save_on_cpu, around 'layers.0': .* lg.recompute\(model\)"):
        lg.localize(Network(run), example=X, **HOW[1])


def test_hooks_of_whoever_cuts_are_not_the_network_s() -> None:
    with warnings.catch_warnings(), save_on_cpu():
        warnings.simplefilter("error")
        models = [checkpoint(lambda: lg.localize(Network(), example=X, **HOW[1]), use_reentrant=False)]
    assert not any(block.ranges for model in models for block in model.blocks)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -ctx.factor * gradients[0], None


def reverses(net: Network, h: Tensor) -> Tensor:
    for layer in net.layers:
        h = layer(Reversed.apply(h, 0.5))
    return h


def test_a_function_with_a_backward_of_its_own_is_not_followed_into() -> None:
    check(Network(reverses))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler asks for it
@pytest.mark.parametrize("run", [None, each_layer, in_segments, skips])
def test_blocks_can_be_compiled(run: Run | None) -> None:
    model = lg.localize(Network(run) if run else Network(), example=X, **HOW[0])
    lg.local_backward(model, X, Y)
    expected = gradients(model.backbone)
    model.blocks[0].compile(backend="eager", fullgraph=run is None)
    lg.local_backward(model, X, Y)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model.backbone), strict=True))  # pyright: ignore
