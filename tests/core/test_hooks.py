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
from small import assert_chained, batch, local, resnet
from torch import Tensor, nn
from torch.nn.utils import prune

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.hooks import touches_nothing

X, Y = batch()
SEEN: list[Any] = []
FACTOR = 3.0


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
    "of a name": lambda m: m.register_forward_hook(lambda m, args, out: SEEN.append(float(out.detach().std()))),
    "by default": lambda m: m.register_forward_hook(lambda m, args, out, seen=SEEN: seen.append(out)),
    "partial": lambda m: m.register_forward_hook(partial(keep, "layer")),
    "object": lambda m: m.register_forward_hook(Recorder()),
    "method": lambda m: m.register_forward_hook(Recorder().__call__),
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
    "by a constant": lambda m: m.register_forward_hook(lambda m, args, out: torch.relu(out) * FACTOR),
    "input": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
    "with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0].mul(2),), kwargs), with_kwargs=True
    ),
    "shape": lambda m: m.register_forward_hook(lambda m, args, out: out[:, :, ::2]),
}


@pytest.mark.parametrize("place", ["layer1.1", "layer2.0", "layer2", ""])
@pytest.mark.parametrize("kind", CHANGERS)
def test_hooks_that_change_what_passes_are_kept(kind: str, place: str) -> None:
    if kind == "shape" and not place:
        pytest.skip("logits have no third dimension")
    backbone = resnet(20)
    CHANGERS[kind](backbone.get_submodule(place))
    model = local(lg.MAN(), blocks=3, backbone=backbone)
    assert_chained(model, X)
    lg.local_backward(model.train(), X, Y)


def test_a_hook_that_keeps_and_changes_is_kept_where_it_can_be() -> None:
    SEEN.clear()
    backbone = resnet(20)
    backbone.get_submodule("layer1.1").register_forward_hook(lambda m, args, out: (keep(out), out * 2)[1])
    model = local(blocks=["layer1.1"], backbone=backbone)  # pyright: ignore[reportArgumentType]
    assert not SEEN
    assert_chained(model, X)


def test_a_shape_that_only_such_a_hook_knows_is_refused_with_a_sentence() -> None:
    backbone = resnet(20)
    backbone.get_submodule("layer1.1").register_forward_hook(lambda m, args, out: (keep(out), out[:, :, ::2])[1])
    model = local(blocks=["layer1.1"], backbone=backbone)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"'layer1.1' hands on \(16, 4, 8\) and not \(16, 8, 8\)"):
        lg.local_backward(model, X, Y)
    assert all(p.grad is None for p in model.parameters())


def test_a_hook_without_which_the_network_cannot_be_cut_runs() -> None:
    network = nn.Sequential(*(nn.GRU(8, 8, batch_first=True) for _ in range(3)), nn.Flatten(), nn.Linear(40, 4))
    for module in network[:3]:
        module.register_forward_hook(lambda m, args, out: (len(SEEN), out[0])[1])
    x = torch.randn(4, 5, 8)
    assert_chained(lg.localize(network, blocks=3, method=lg.dgl("0c1f"), example=x), x)


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


class Table(nn.Module):
    """Holds a parameter itself, beside units."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 8, 8))
        self.units = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)) for _ in range(3)))
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(x + self.table).mean((2, 3)))


def test_hooks_of_pytorch_that_compute_parameters_are_followed() -> None:
    backbone = Table()
    prune.random_unstructured(backbone, "table", 0.5)
    model = local(blocks=3, backbone=backbone)
    assert_chained(model, X)
    for _ in range(2):
        lg.local_backward(model, X, Y)
    assert backbone.get_parameter("table_orig").grad is not None


def test_a_hook_that_is_harmless_can_reach_nothing() -> None:
    factor, scale, kept, counts = 2.0, nn.Linear(2, 2), {}, [0]

    def counted(m: Any, args: Any, out: Any) -> None:
        nonlocal factor
        factor += 1

    def imported(m: Any, args: Any, out: Any) -> None:
        import logging

        logging.info(out)

    harmless = [lambda m, args, out: out * FACTOR, lambda m, args: (torch.relu(args[0]),), lambda m, args, out: out[0]]
    others = [keep, counted, imported, Recorder(), print, partial(keep), lambda m, a, out: scale(out)]
    others += [lambda m, a, out: kept.update(x=out), lambda m, a, out: [counts.append(v) for v in out]]
    assert [touches_nothing(hook) for hook in harmless] == [True] * 3
    assert [touches_nothing(hook) for hook in others] == [False] * 9
