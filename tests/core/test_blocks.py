"""Backbones are cut by the names of their own modules; chained, the blocks are the backbone bit for bit."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from small import (
    FunctionalDropout,
    assert_chained,
    assert_same,
    auxiliaries,
    batch,
    chain,
    composite,
    mlp,
    pre_activation,
    resnet,
    said,
    state,
    vgg,
)
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.blocks import Clone, split, trace_units

QUICK = lg.dgl("0c1f")


def cut(backbone: nn.Module, blocks: int | list[str], x: Tensor) -> lg.LocalModel:
    return lg.localize(backbone, blocks=blocks, method=QUICK, example=x)


def stages(*lengths: int) -> list[str]:
    return ["stem", *(f"layer{s}.{i}" for s, length in enumerate(lengths, 1) for i in range(length))]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet20", stages(3, 3, 3)),
        ("torchvision:resnet18", stages(2, 2, 2, 2)),
        ("torchvision:resnet50", stages(3, 4, 6, 3)),
        ("timm:resnet18", stages(2, 2, 2, 2)),
    ],
)
def test_units_of_resnets_are_the_stem_and_each_residual_unit(name: str, wanted: list[str]) -> None:
    assert lg.units(lg.build(name, classes=4), torch.zeros(1, 3, 32, 32)) == wanted


def test_units_of_sequentials() -> None:
    assert lg.units(vgg(), torch.zeros(1, 3, 8, 8)) == ["0", "3", "7", "11"]
    assert lg.units(composite(), torch.zeros(1, 3, 8, 8)) == ["stem", "a", "b", "c"]
    assert lg.units(mlp(), torch.zeros(1, 3, 4, 4)) == ["1", "3", "5"]
    assert lg.units(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3)) == ["0"]


def test_boundaries_say_shape_layout_and_stage() -> None:
    traced = trace_units(resnet(20), torch.zeros(2, 3, 12, 20))
    found = traced.units
    assert [u.output.shape for u in found[::3]] == [(16, 12, 20), (16, 12, 20), (32, 6, 10), (64, 3, 5)]
    assert [u.output.stage for u in found] == [0] * 4 + [1] * 3 + [2] * 3
    assert {u.output.layout for u in found} == {"NCHW"}
    assert all(a.output is b.input for a, b in pairwise(found))
    assert traced.head is not None
    vectors = trace_units(mlp(), torch.zeros(2, 3, 4, 4)).units
    assert [(u.output.shape, u.output.layout) for u in vectors] == [((20,), "NC"), ((20,), "NC"), ((9,), "NC")]
    assert vectors[0].output.size == (1, 1)


@pytest.mark.parametrize(("depth", "count"), [(32, 16), (110, 55)])
def test_every_number_of_blocks_gives_exactly_that_many(depth: int, count: int) -> None:
    traced = trace_units(resnet(depth), torch.zeros(1, 3, 8, 8))
    assert len(traced.units) == count
    for k in range(1, count + 1):
        groups = split(traced, k)
        assert len(groups) == k
        assert [unit for group in groups for unit in group] == traced.units
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_named_cuts_close_blocks_and_the_last_unit_need_not_be_named() -> None:
    backbone, x = resnet(20), torch.zeros(1, 3, 8, 8)
    model = cut(backbone, ["stem", "layer2.0"], x)
    assert [block.names for block in model.blocks] == [
        ("stem",),
        ("layer1.0", "layer1.1", "layer1.2", "layer2.0"),
        ("layer2.1", "layer2.2", "layer3.0", "layer3.1", "layer3.2"),
    ]
    assert [block.boundary.shape for block in model.blocks[:2]] == [(16, 8, 8), (32, 4, 4)]
    assert len(cut(backbone, ["stem", "layer2.0", "layer3.2"], x).blocks) == 3
    assert len(cut(backbone, ["layer3.2"], x).blocks) == 1


def test_an_uneven_split_gives_early_blocks_the_smaller_share() -> None:
    found = trace_units(resnet(32), torch.zeros(1, 3, 8, 8))
    assert [len(group) for group in split(found, 3)] == [5, 5, 6]
    assert [len(group) for group in split(found, 7)] == [2, 2, 2, 3, 2, 2, 3]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (0, "blocks=0 is out of range: this network has 10 units, so 1 to 10"),
        (-1, "blocks=-1 is out of range"),
        (11, "blocks=11 is out of range"),
        (["layer1.7"], "unknown unit 'layer1.7': did you mean 'layer1."),
        (["layer2.0", "layer1.0"], "blocks must list units in their order, each once: got layer2.0, layer1.0"),
        (["layer1.0", "layer1.0"], "in their order, each once"),
        ([], "got none"),
    ],
)
def test_impossible_cuts_are_refused_in_one_sentence(blocks: int | list[str], message: str) -> None:
    assert message in said(cut, resnet(20), blocks, torch.zeros(1, 3, 8, 8))


class Skipping(nn.Module):
    """The output of `a` goes past `b`, `c` and `d`, and is then changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.f(self.e(self.d(self.c(self.b(h))) + h.mul_(2))).mean((2, 3))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branching(), "Branching cannot be cut: its forward cannot be followed (it depends on the values of a tensor)"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "Sequential cannot be cut into units: it has no module with weights"),
    ],
)
def test_networks_that_are_no_chains_are_refused_in_one_sentence(network: nn.Module, message: str) -> None:
    assert message in said(lg.units, network, torch.zeros(1, 3, 8, 8))


def test_a_cut_behind_which_a_tensor_is_changed_in_place_is_refused_and_the_nearest_offered() -> None:
    x = torch.zeros(1, 3, 8, 8)
    assert lg.units(Skipping(), x) == ["a", "d", "e"]
    for name, nearest in (("b", "a"), ("c", "d")):
        text = (
            f"no cut behind '{name}': the tensor of 'a' is read later, and 'mul_' changes it in place before that; the "
            f"nearest is behind '{nearest}'"
        )
        assert said(cut, Skipping(), [name], x) == text
    assert "has 3 units, so 1 to 3 (behind 'b', the tensor of 'a' is" in said(cut, Skipping(), 4, x)


def test_a_boundary_that_is_neither_map_nor_vector_is_refused() -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    text = "behind '0', (1, 1, 4, 5, 6) crosses: neither a map, nor tokens, nor a vector"
    assert text in said(lg.units, network, torch.zeros(1, 1, 1, 4, 5, 5))


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 1), ("resnet20", 10), ("torchvision:resnet18", 5)])
def test_chained_blocks_equal_the_backbone_bit_for_bit(name: str, blocks: int) -> None:
    x, _ = batch(size=16)
    backbone = lg.build(name, classes=10)
    alone = copy.deepcopy(backbone)
    model = cut(backbone, blocks, x)
    assert torch.equal(chain(model, x), alone.train()(x))  # in training mode, with its own batch statistics
    assert_same(backbone.state_dict(), alone.state_dict())  # and so are the running statistics
    model.eval()
    with torch.no_grad():
        assert torch.equal(chain(model, x), alone.eval()(x))
        assert torch.equal(model(x), alone(x))


def test_the_backbone_keeps_its_keys_and_is_stored_once() -> None:
    x, _ = batch()
    backbone = resnet(20)
    before = state(backbone)
    model = lg.localize(backbone, blocks=4, method=lg.infopro(), coupling=lg.MAN(), example=x)
    assert_same(backbone.state_dict(), before)
    stored = model.state_dict()
    assert {k for k in stored if k.startswith("backbone.")} == {f"backbone.{k}" for k in before}
    assert all(k.startswith(("backbone.", "auxiliaries.")) for k in stored)
    places = [value.untyped_storage().data_ptr() for value in stored.values()]
    assert len(set(places)) == len(places)
    assert model.backbone is backbone


def test_tracing_leaves_flags_statistics_example_and_random_state_as_they_were() -> None:
    x, _ = batch()
    backbone = resnet(20).train()
    backbone.get_submodule("layer2").eval()
    flags, stored, given = {n: m.training for n, m in backbone.named_modules()}, state(backbone), x.clone()
    draws = torch.get_rng_state()
    lg.units(backbone, x)
    assert torch.equal(torch.get_rng_state(), draws)
    assert {n: m.training for n, m in backbone.named_modules()} == flags
    assert_same(backbone.state_dict(), stored)
    lg.units(nn.Sequential(nn.ReLU(inplace=True), *vgg()), x)
    assert torch.equal(x, given)
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_train_and_eval_however_it_was_traced(training: bool) -> None:
    x, _ = batch()
    model = cut(FunctionalDropout().train(training), 2, x)
    assert_chained(model, x)
    assert not torch.equal(chain(model.train(), x), chain(model.eval(), x))


def test_copies_have_storage_of_their_own_and_fresh_ones_are_drawn_anew() -> None:
    unit = trace_units(resnet(20), torch.zeros(1, 3, 8, 8)).units[1]
    same, fresh = unit.copy(fresh=False), unit.copy(fresh=True)
    assert_same(same.state_dict(), unit.module.state_dict())
    for (name, own), drawn in zip(unit.module.named_parameters(), fresh.parameters(), strict=True):
        assert own.data_ptr() != drawn.data_ptr()
        assert torch.equal(own, drawn) == (own.ndim == 1), name  # norms start at 1 and 0 either way
    assert own.data_ptr() not in {p.data_ptr() for p in same.parameters()}


def test_a_bare_parameter_of_a_fresh_copy_keeps_its_value() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((3,), 0.25))
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.gain

    unit = trace_units(nn.Sequential(Scaled(), Scaled(), nn.Linear(3, 2)), torch.zeros(1, 3)).units[0]
    fresh = unit.copy(fresh=True)
    assert torch.equal(fresh.get_parameter("gain"), unit.module.get_parameter("gain"))
    assert not torch.equal(fresh.get_parameter("linear.weight"), unit.module.get_parameter("linear.weight"))


@pytest.mark.parametrize("coupling", [lg.MAN(), lg.MANPlusPlus(), lg.DeepMAN()])
def test_copies_of_units_that_begin_in_place_leave_what_crosses_alone(coupling: lg.MAN) -> None:
    x, y = batch()
    backbone = composite()
    first = [next(iter(u.module.children()), None) for u in trace_units(backbone, x).units]
    assert [isinstance(module, Clone) for module in first] == [False, True, True, True]
    model = lg.localize(backbone, blocks=4, method=lg.infopro(), coupling=coupling, example=x)
    h = x
    for k, auxiliary in enumerate(auxiliaries(model)):
        h = model.blocks[k](h).detach()
        kept = h.clone()
        auxiliary(h)
        assert torch.equal(h, kept)
    alone = copy.deepcopy(backbone)
    logits = lg.local_backward(model, x, y).logits
    assert torch.equal(logits, alone(x))


def test_a_copy_of_a_unit_follows_its_source_in_place_or_not() -> None:
    unit = trace_units(composite(), torch.zeros(1, 3, 8, 8)).units[1]
    h = torch.randn(2, 4, 8, 8)
    plain = pre_activation(4, 4, nn.ReLU())
    plain.load_state_dict(unit.module.get_submodule("1").state_dict())
    assert torch.equal(unit.copy(fresh=False).train()(h), plain(h))
