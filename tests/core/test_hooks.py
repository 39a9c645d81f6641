"""A person's hooks: none runs while a network is cut that could see it, and those on units stay what they were."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.modules.module as everywhere
from small import Net, assert_chained, batch, local, resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.hooks import is_of_torch

X, Y = batch()
SEEN: list[Any] = []


class Recorder:
    """Cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        SEEN.append(float(out.detach().std()))


def keep(*what: Any) -> None:
    SEEN.append(what[-1])


KEEPERS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(keep),
    "forward with keywords": lambda m: m.register_forward_hook(keep, with_kwargs=True),
    "always": lambda m: m.register_forward_hook(keep, always_call=True),
    "before": lambda m: m.register_forward_pre_hook(keep),
    "before with keywords": lambda m: m.register_forward_pre_hook(keep, with_kwargs=True),
    "object": lambda m: m.register_forward_hook(Recorder()),
    "backward": lambda m: m.register_full_backward_hook(keep),
    "before backward": lambda m: m.register_full_backward_pre_hook(keep),
}


@pytest.mark.parametrize("place", ["", "layer1", "layer1.0", "layer2.1.conv1"])
@pytest.mark.parametrize("kind", KEEPERS)
def test_no_hook_sees_the_cut(kind: str, place: str) -> None:
    SEEN.clear()
    backbone = resnet(20)
    KEEPERS[kind](backbone.get_submodule(place))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = local(blocks=3, backbone=backbone)
    assert not SEEN
    lg.local_backward(model, X, Y)
    if place in ("", "layer1"):
        (warning,) = caught
        title = f"'{place}'" if place else "the network itself"
        assert f"does not call the hooks of {title}" in str(warning.message)
        assert not SEEN
    else:
        assert not caught
        assert len(SEEN) == 1


CHANGERS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda m: m.register_forward_hook(lambda m, args, out: out.mul(2)),
    "keeps as well": lambda m: m.register_forward_hook(lambda m, args, out: (keep(out), out * 2)[1]),
    "input": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
    "with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0].mul(2),), kwargs), with_kwargs=True
    ),
}


@pytest.mark.parametrize("place", ["layer1.1", "layer2.0", "layer2", ""])
@pytest.mark.parametrize("kind", CHANGERS)
def test_hooks_that_change_what_passes_are_kept_on_units_and_told_on_containers(kind: str, place: str) -> None:
    SEEN.clear()
    backbone = resnet(20)
    CHANGERS[kind](backbone.get_submodule(place))
    if place in ("", "layer2"):
        with pytest.warns(UserWarning, match=f"does not call the hooks of {place and repr(place)}"):
            model = local(lg.MAN(), blocks=3, backbone=backbone)
    else:
        model = local(lg.MAN(), blocks=3, backbone=backbone)
        assert not SEEN
        assert_chained(model, X)
    lg.local_backward(model.train(), X, Y)


def test_a_shape_that_only_a_hook_knows_is_refused_with_a_sentence() -> None:
    backbone = resnet(20)
    backbone.get_submodule("layer1.1").register_forward_hook(lambda m, args, out: out[:, :, ::2])
    model = local(blocks=["layer1.1"], backbone=backbone)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"'layer1.1' hands on \(16, 4, 8\) and not \(16, 8, 8\)"):
        lg.local_backward(model, X, Y)
    assert all(p.grad is None for p in model.parameters())


def test_a_hook_without_which_the_network_cannot_be_cut_runs() -> None:
    network = nn.Sequential(*(nn.GRU(8, 8, batch_first=True) for _ in range(3)), nn.Flatten(), nn.Linear(40, 4))
    for module in network[:3]:
        module.register_forward_hook(lambda m, args, out: out[0])
    handle = network.register_forward_hook(lambda m, args, out: torch.mul(out, 2))  # pyright: ignore  # The blocks have it, too.
    x = torch.randn(4, 5, 8)
    model = lg.localize(network, blocks=3, method=lg.dgl("0c1f"), example=x)
    assert_chained(model, x)
    handle.remove()
    with pytest.warns(UserWarning, match="the hooks of the network itself were changed after the network was cut"):
        lg.local_backward(model, x, Y)


def test_hooks_for_all_modules_see_no_cut() -> None:
    SEEN.clear()
    backbone = resnet(20)
    CHANGERS["output"](backbone.get_submodule("layer1.0"))
    handles = [everywhere.register_module_forward_hook(keep), everywhere.register_module_forward_pre_hook(keep)]
    try:
        model = local(blocks=3, backbone=backbone)
        assert not SEEN
        lg.local_backward(model, X, Y)
        assert SEEN
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_of_pytorch_that_compute_parameters_are_followed() -> None:
    backbone = Net(lambda net, h, x: h + net.table)
    prune.random_unstructured(backbone, "table", 0.5)
    model = local(blocks=3, backbone=backbone)
    assert_chained(model, X)
    for _ in range(2):
        lg.local_backward(model, X, Y)
    assert backbone.get_parameter("table_orig").grad is not None


def test_pytorchs_own_hooks_are_told_from_a_persons() -> None:
    class Own(prune.BasePruningMethod):
        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask

    class Counts(nn.Module):
        def forward(self, *given: Any) -> None: ...

    layers = [nn.utils.spectral_norm(nn.Linear(2, 2)), prune.identity(nn.Linear(2, 2), "weight")]
    theirs = [hook for layer in layers for hook in layer._forward_pre_hooks.values()]
    assert all(map(is_of_torch, [*theirs, Own(), torch.relu, F.relu]))
    assert not any(map(is_of_torch, [keep, print, partial(keep), Recorder(), Recorder().__call__, Counts()]))
