"""What a network's own forward does beside its units stays what it does, or is refused in one sentence."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torchvision
from small import UNITS_OF_NET, Between, Net, Unit, assert_chained, composite, cut, gradients, said, state
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.task import Classification

X, Y = torch.zeros(2, 3, 8, 8), torch.arange(4)


class First(Classification):
    """Trains on the first of several outputs."""

    def criterion(self, logits: Any, targets: Tensor) -> Tensor:
        return super().criterion(logits if isinstance(logits, Tensor) else logits[0], targets)


def filled(net: Net, h: Tensor, x: Tensor) -> Tensor:
    mask = torch.zeros((h.shape[-1], h.shape[-1]))
    mask.fill_diagonal_(1.0)
    kept = mask + 1
    mask[0] = 2.0
    return h @ mask + kept


BETWEEN: dict[str, Between] = {
    "a buffer in an expression": lambda net, h, x: h - net.get_buffer("mean").view(1, 6, 1, 1),
    "functions of several schemas": lambda net, h, x: torch.where(h > 0, torch.clamp(h, -1, 1), 0.1 * h),
    "a function with weights": lambda net, h, x: F.conv2d(h, torch.ones(6, 6, 1, 1)),
    "a tensor filled in place": filled,
    "depth drawn by a function": lambda net, h, x: torchvision.ops.stochastic_depth(h, 0.5, "row"),
    "frozen statistics": lambda net, h, x: F.batch_norm(h, net.get_buffer("mean"), net.get_buffer("var")),
    "dropout in both modes": lambda net, h, x: F.dropout(h, 0.3, training=True),
    "dropout in training": lambda net, h, x: F.dropout(h, 0.3, net.training),
    "dropout told by its place": lambda net, h, x: torch.dropout(h, 0.3, net.training),
    "a constant by the mode": lambda net, h, x: h * (0.5 if net.training else 2.0),
    "training and more": lambda net, h, x: F.dropout(h, 0.3, training=net.training and h.shape[1] > 9),
    "a view by the size": lambda net, h, x: h.view(h.size(0), -1).view(h.shape),
    "a product of the shape": lambda net, h, x: h.reshape(h.shape[0], h.shape[1] * 64).reshape(h.shape),
    "an unpacked size": lambda net, h, x: h.reshape(h.size()[0], 384).view_as(h),
    "noise": lambda net, h, x: h + torch.randn(6, 1, 1),
    "two in one": lambda net, h, x: torch.cat([h, h], dim=1)[:, 3:9],
}


@pytest.mark.parametrize("name", BETWEEN)
def test_blocks_do_what_the_network_does(name: str) -> None:
    network = Net(BETWEEN[name])
    before = {key: value for key, value in state(network).items() if key in ("mean", "var")}
    model = cut(network, coupling=lg.MAN())
    assert lg.units(network, X) == UNITS_OF_NET
    for count in (1, 3):
        assert_chained(model, torch.randn(count, 3, 8, 8))
    lg.local_backward(model.train(), torch.randn(4, 3, 8, 8), Y)
    assert all(torch.equal(network.get_buffer(key), value) for key, value in before.items())


def test_a_blocks_constants_follow_the_backbones_own_mode() -> None:
    network = Net(BETWEEN["dropout in training"])
    model, x = cut(network), torch.randn(2, 3, 8, 8)
    network.eval()
    h = x
    for block in model.blocks:
        h = block(h)
    assert torch.equal(h, network(x))


class Frozen(Net):
    """Keeps its statistics, as people who fine-tune do."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for unit in self.units:
            unit.get_submodule("norm").eval()
        return self


def test_a_network_may_say_what_training_means() -> None:
    network = Frozen()
    before = state(network)
    lg.local_backward(cut(network, coupling=lg.MAN()), torch.randn(4, 3, 8, 8), Y)
    assert not network.units[0].get_submodule("norm").training
    assert network.units[0].training
    assert all(torch.equal(before[key], value) for key, value in state(network).items())


class Quiet(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.units[0](self.stem(x))
        return self.top(self.units[2](self.units[1](h)))


def test_what_has_no_gradient_under_bp_has_none_in_blocks() -> None:
    x, network = torch.randn(4, 3, 8, 8), Quiet()
    F.cross_entropy(network(x), Y).backward()
    learns = gradients(network).keys()
    network.zero_grad()
    lg.local_backward(cut(network, coupling=lg.MAN()), x, Y)
    assert gradients(network).keys() == learns
    assert not any(name.startswith(("stem", "units.0")) for name in learns)


def test_a_frozen_last_block_is_passed() -> None:
    network = Net()
    for module in (network.units[2], network.fc):
        module.requires_grad_(False)
    assert len(lg.local_backward(cut(network), torch.randn(4, 3, 8, 8), Y).losses) == 4
    assert network.units[1].get_submodule("a").weight.grad is not None


# Outputs


class Pair(Net):
    def top(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h.mean((2, 3))
        return self.fc(h), h


def test_a_network_of_several_outputs_needs_a_task_of_its_own() -> None:
    assert lg.units(Pair(), X) == UNITS_OF_NET
    with pytest.raises(UserError, match=r"gives \(\(5,\), \(6,\)\), not one vector of logits a sample"):
        cut(Pair())
    model = cut(Pair(), blocks=2, coupling=lg.MAN(), task=First(5))
    out = lg.local_backward(model, torch.randn(4, 3, 8, 8), Y, autocast=torch.bfloat16)
    assert [part.requires_grad for part in out.logits] == [False, False]
    assert all(p.grad is not None for name, p in model.backbone.named_parameters() if name != "table")


class Several(Net):
    """Logits, nothing, a number, and what its stem gave."""

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x)
        return self.top(self.body(h, x)), None, 3.0, h


def test_an_early_output_passes_through_the_blocks() -> None:
    network = Several()
    assert lg.units(network, X) == UNITS_OF_NET
    model = cut(network, task=First(5))
    x = torch.randn(4, 3, 8, 8)
    _, none, three, h = lg.local_backward(model, x, Y).logits
    assert (none, three) == (None, 3.0)
    assert torch.equal(h, network.stem(x))


def test_a_network_of_maps_needs_a_head() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(UserError, match="not one vector of logits"):
        cut(network, blocks=1)


def test_units_before_a_head_without_a_module_are_units() -> None:
    class Cosine(Net):
        def top(self, h: Tensor) -> Tensor:
            return h.mean((2, 3)) @ self.table[:, 0, :5]

    network = Cosine()
    assert lg.units(network, X) == UNITS_OF_NET
    assert len(cut(network, blocks=["units.1"]).blocks) == 2


# Where a cut cannot be


def test_a_weight_that_another_step_reads_is_shared() -> None:
    class Tied(Net):
        def top(self, h: Tensor) -> Tensor:
            return self.fc(F.linear(h.mean((2, 3)), self.units[0].b.weight[:, :, 0, 0]))  # pyright: ignore

    with pytest.raises(UserError, match=r"2 units, so 1 to 2 \(behind 'units.0', 'linear' shares parameters with 'un"):
        cut(Tied())


def test_no_cut_parts_what_shares_parameters() -> None:
    def tied(*layers: nn.Module) -> nn.Sequential:
        layers[2].weight = layers[0].weight  # pyright: ignore
        return nn.Sequential(*layers)

    how: dict[str, Any] = {"method": lg.dgl("0c1f"), "example": torch.zeros(1, 3)}
    network = tied(*(nn.Linear(3, 3) for _ in range(5)))
    assert lg.units(network, how["example"]) == ["2", "3"]
    with pytest.raises(
        UserError, match=r"^no cut behind '1': '2' shares parameters with '0'; the nearest is behind '2'$"
    ):
        lg.localize(network, blocks=["1"], **how)
    relu = nn.ReLU()  # A module without parameters may be used twice.
    network = tied(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu, nn.Linear(3, 2))
    assert lg.units(nn.Sequential(nn.Linear(3, 3), *network[1:]), how["example"]) == ["0", "2"]
    with pytest.raises(UserError, match=r"has 1 unit, so 1 to 1 \(behind '0', '2' shares parameters with '0'"):
        lg.localize(network, blocks=2, **how)


def test_a_unit_that_runs_twice_is_one() -> None:
    class Twice(Net):
        def body(self, h: Tensor, x: Tensor) -> Tensor:
            for unit in self.units:
                h = unit(unit(h))
            return h

    network = Twice()
    assert lg.units(network, X) == UNITS_OF_NET
    assert_chained(cut(network, blocks=["units.0", "units.1"]), torch.randn(2, 3, 8, 8))


def test_what_crosses_has_the_samples_first() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(3, 1, 6) for _ in range(3))
            self.fc = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = x.flatten(2).permute(2, 0, 1)
            for layer in self.layers:
                h = layer(h)
            return self.fc(h.mean(0))

    with pytest.raises(UserError, match=r"for 5 samples a tensor of shape \(64, 5, 3\) crosses, not one tensor whose"):
        cut(Sequence())


def test_an_example_that_does_not_pass_names_the_unit() -> None:
    with pytest.raises(UserError, match=r"example of \(2, 4, 8, 8\) does not pass 'stem'"):
        lg.units(Net(), torch.zeros(2, 4, 8, 8))


# Chance


def dropped_layer(net: Net, h: Tensor, x: Tensor) -> Tensor:
    return h if net.training and random.random() < 0.5 else h + 1


def test_chance_that_would_be_frozen_is_refused() -> None:
    plain = Net(BETWEEN["dropout in training"])
    with pytest.raises(UserError, match=r"Net cannot be cut: .*draws random numbers that do not follow its input"):
        lg.units(Net(dropped_layer), X)
    before = torch.get_rng_state()
    lg.units(plain, X)
    assert torch.equal(before, torch.get_rng_state())


class Made(Net):
    """Its units share a table that is computed with dropout, by a function or by a module."""

    def __init__(self, rate: float, function: bool) -> None:
        super().__init__()
        self.rate, self.function = rate, function
        self.make = nn.Sequential(nn.Linear(8, 8), nn.Dropout(rate), nn.Linear(8, 8))

    def body(self, h: Tensor, x: Tensor) -> Tensor:
        table = F.dropout(self.table, self.rate, self.training) if self.function else self.make(self.table)
        for unit in self.units:
            h = unit(h) + table
        return h


def test_chance_that_several_units_share_is_drawn_once() -> None:
    assert_chained(cut(Made(0.5, function=True), blocks=["units.0", "units.1"]), torch.randn(2, 3, 8, 8))
    assert lg.units(Made(0.5, function=False), X) == ["stem", "make", *UNITS_OF_NET[1:]]
    assert lg.units(Made(0.0, function=False), X) == UNITS_OF_NET  # It drops nothing out.


def test_a_passenger_that_no_head_reads_may_not_be_the_only_way_to_parameters() -> None:
    text = said(cut, Made(0.5, function=False))
    assert text.startswith("no cut behind 'make': parameters before it reach only the tensor of 'make', which no head ")
    model = cut(Made(0.5, function=False), blocks=["stem", "units.0"])
    assert_chained(model, torch.randn(2, 3, 8, 8))


# Tensors of their own, and other inputs


class Makes(Unit):
    """Makes a tensor on no device in particular, and holds one that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.rand(6, 1, 1)

    def forward(self, h: Tensor) -> Tensor:
        return (super().forward(h) + torch.arange(h.shape[-1])) * self.gain


def test_units_may_make_and_hold_tensors_of_their_own() -> None:
    assert_chained(cut(Net(unit=Makes)), torch.randn(2, 3, 8, 8))


def test_numbers_of_tokens_are_an_example_too() -> None:
    network = nn.Sequential(nn.Embedding(9, 8), *(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)))
    assert lg.units(network, torch.zeros(2, 6, dtype=torch.long)) == ["stem", "1", "2"]


def test_dropout_that_begins_a_unit_in_place_leaves_what_crosses_alone() -> None:
    model = cut(composite(lambda: nn.Dropout(0.5, inplace=True)), coupling=lg.MAN())
    h = model.blocks[0](torch.randn(4, 3, 8, 8)).detach()
    before = h.clone()
    model.auxiliaries[0](h)
    assert torch.equal(h, before)


# Arguments of localize


def test_one_name_is_a_cut() -> None:
    model = cut(Net(), blocks="units.1")
    assert [block.names for block in model.blocks] == [("stem", "units.0", "units.1"), ("units.2",)]


def test_wrong_kinds_of_arguments_get_one_sentence() -> None:
    wrong: dict[str, Any] = {"method": "dgl", "coupling": lg.MAN}
    for name, value in wrong.items():
        with pytest.raises(
            UserError, match=rf"{name} takes what its function gives, such as lg.dgl\(\) or lg.MAN\(\), not"
        ):
            cut(Net(), **{name: value})
