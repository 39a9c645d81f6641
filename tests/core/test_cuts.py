"""Properties of cutting: random networks under random cuts, and the choice of a path of units."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_same, chain
from torch import nn

import localgrad as lg
from localgrad.core.blocks import Unit
from localgrad.core.boundary import Boundary
from localgrad.core.paths import select_path

LAYERS = ("convolution", "norm", "relu", "in place", "pool", "composite", "tanh")


def layer(kind: str, before: int, after: int) -> nn.Module:
    """`before` channels to `after`; only convolutions and composites change them."""
    if kind == "composite":
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
    made = {
        "convolution": lambda: nn.Conv2d(before, after, 1),
        "norm": lambda: nn.BatchNorm2d(before),
        "relu": nn.ReLU,
        "in place": lambda: nn.ReLU(inplace=True),
        "pool": lambda: nn.AvgPool2d(2, stride=1, padding=1),
        "tanh": nn.Tanh,
    }
    return made[kind]()


@st.composite
def sequentials(draw: st.DrawFn) -> nn.Sequential:
    plain = draw(st.booleans())
    kinds = [k for k in LAYERS if k != "composite"] if plain else LAYERS
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 1)] if draw(st.booleans()) or plain else [layer("composite", 2, 3)]
    channels = 3
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=8)):
        after = draw(st.integers(1, 4)) if kind in ("convolution", "composite") else channels
        layers.append(layer(kind, channels, after))
        channels = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


@settings(max_examples=25, deadline=None)
@given(network=sequentials(), data=st.data())
def test_any_sequential_under_any_cut_is_itself_bit_for_bit(network: nn.Sequential, data: st.DataObject) -> None:
    x = torch.linspace(-1, 1, 2 * 2 * 16).view(2, 2, 4, 4)
    names = lg.units(network, x)
    wanted = data.draw(st.one_of(st.integers(1, len(names)), st.sets(st.sampled_from(names), min_size=1)))
    blocks = wanted if isinstance(wanted, int) else sorted(wanted, key=names.index)
    alone = copy.deepcopy(network)
    model = lg.localize(network, blocks=blocks, method=lg.dgl("0c1f"), example=x)
    count = blocks if isinstance(blocks, int) else len({*blocks, names[-1]})
    assert len(model.blocks) == count
    assert [name for block in model.blocks for name in block.names] == names
    own = [id(p) for block in model.blocks for p in block.parameters()]
    assert sorted(own) == sorted(id(p) for p in network.parameters())  # each in exactly one block
    assert torch.equal(chain(model, x.clone()), alone(x.clone()))
    assert_same(network.state_dict(), alone.state_dict())
    assert torch.equal(chain(model.eval(), x.clone()), alone.eval()(x.clone()))  # pyright: ignore[reportArgumentType]


def fake_units(widths: list[int]) -> list[Unit]:
    """Units between boundaries of these widths."""
    ends = [Boundary((width, 4, 4), "NCHW", 0) for width in widths]
    return [Unit(str(i), nn.Identity(), a, b) for i, (a, b) in enumerate(pairwise(ends))]


@settings(max_examples=200, deadline=None)
@given(widths=st.lists(st.integers(1, 3), min_size=1, max_size=20), depth=st.integers(0, 25))
def test_a_selected_path_has_its_depth_keeps_the_order_and_chains(widths: list[int], depth: int) -> None:
    downstream = fake_units(widths)
    path = select_path(downstream, depth)
    assert len(path) == min(depth, len(downstream))
    places = [downstream.index(unit) for unit in path]
    assert places == sorted(set(places))
    shapes = [(widths[0], 4, 4), *(unit.output.shape for unit in path)]
    assert all(unit.input.shape == shape for unit, shape in zip(path, shapes, strict=False))
    changing = [unit for unit in downstream if unit.changes_shape]
    assert [unit for unit in path if unit.changes_shape] == changing[:depth]


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 30), data=st.data())
def test_units_that_keep_the_shape_are_spread_evenly(count: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, count))
    downstream = fake_units([2] * (count + 1))
    places = [downstream.index(unit) for unit in select_path(downstream, depth)]
    gaps = [b - a for a, b in zip(places, [*places[1:], count], strict=True)]
    assert places[0] == 0
    assert max(gaps) - min(gaps) <= 1
