"""What a user's own forward may do between its units, and what is refused, in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import assert_chained, chain, composite
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.task import Classification


class Tail(nn.Module):
    """Two units, then whatever `tail` does with their map [B, 8, 4, 4], and a linear layer of `features`."""

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        unit = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.body = nn.Sequential(unit, nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
        self.fc = nn.Linear(features, 10)

    def tail(self, h: Tensor) -> Tensor:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tail(self.body(x)))


class ViewBySize(Tail):
    def tail(self, h: Tensor) -> Tensor:
        return h.view(h.size(0), -1)


class ReshapeByShape(Tail):
    def tail(self, h: Tensor) -> Tensor:
        return h.reshape(h.shape[0], h.shape[1] * 16)


class UnpackedSize(Tail):
    def tail(self, h: Tensor) -> Tensor:
        return h.reshape(h.size()[0], 128)


class Doubled(Tail):
    def __init__(self) -> None:
        super().__init__(16)

    def tail(self, h: Tensor) -> Tensor:
        h = h.mean((2, 3))
        return torch.cat([h, h], dim=1)


class PlacedDropout(Tail):
    def tail(self, h: Tensor) -> Tensor:
        return F.dropout(h.flatten(1), 0.5, self.training)


class Pair(Tail):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h = self.body(x).flatten(1)
        return self.fc(h), h


@pytest.mark.parametrize("kind", [ViewBySize, ReshapeByShape, UnpackedSize, Doubled, PlacedDropout])
@pytest.mark.parametrize("count", [1, 3])
def test_a_chain_may_read_the_shape_of_what_crosses(kind: type[Tail], count: int) -> None:
    backbone, x = kind(), torch.randn(count, 3, 8, 8)
    model = lg.localize(backbone, blocks=2, method=lg.dgl("0c1f"), example=torch.zeros(2, 3, 8, 8))
    assert_chained(model, x)


def test_dropout_by_its_place_is_off_in_evaluation() -> None:
    backbone = PlacedDropout()
    model = lg.localize(backbone, blocks=2, method=lg.dgl("0c1f"), example=torch.zeros(2, 3, 8, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(chain(model, x), chain(model, x))


def test_a_network_of_several_outputs_needs_a_task_of_its_own() -> None:
    x = torch.zeros(1, 3, 8, 8)
    assert lg.units(Pair(), x) == ["body.0", "body.1"]
    with pytest.raises(UserError, match=r"gives \(\(10,\), \(\d+,\)\), not one vector of logits a sample"):
        lg.localize(Pair(), blocks=2, method=lg.dgl("0c1f"), example=x)

    class First(Classification):
        def criterion(self, logits: Any, targets: Tensor) -> Tensor:
            return super().criterion(logits if isinstance(logits, Tensor) else logits[0], targets)

    model = lg.localize(Pair(), blocks=2, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=x, task=First(10))
    out = lg.local_backward(model, torch.randn(4, 3, 8, 8), torch.arange(4), autocast=torch.bfloat16)
    assert [part.requires_grad for part in out.logits] == [False, False]
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_no_cut_parts_what_shares_parameters() -> None:
    x = torch.zeros(1, 3)
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    network[2].weight = network[0].weight
    assert lg.units(network, x) == ["2", "3"]
    with pytest.raises(UserError) as caught:
        lg.localize(network, blocks=["1"], method=lg.dgl("0c1f"), example=x)
    assert str(caught.value) == "no cut behind '1': '2' shares parameters with '0'; the nearest is behind '2'"
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    tied[2].weight = tied[0].weight
    with pytest.raises(
        UserError, match=r"this network has 1 unit, so 1 to 1 \(behind '0', '2' shares parameters with '0'"
    ):
        lg.localize(tied, blocks=2, method=lg.dgl("0c1f"), example=x)


def test_a_reused_module_without_parameters_is_no_matter() -> None:
    relu = nn.ReLU()
    network = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu, nn.Linear(3, 2))
    assert lg.units(network, torch.zeros(1, 3)) == ["0", "2"]


def test_an_example_that_does_not_pass_names_the_unit() -> None:
    with pytest.raises(UserError, match=r"example of \(2, 4, 8, 8\) does not pass 'body.0'"):
        lg.units(ViewBySize(), torch.zeros(2, 4, 8, 8))


def test_dropout_that_begins_a_unit_in_place_leaves_what_crosses_alone() -> None:
    network = composite(lambda: nn.Dropout(0.5, inplace=True))
    x = torch.randn(4, 3, 8, 8)
    model = lg.localize(network, blocks=4, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=x)
    h = model.blocks[0](x).detach()
    before = h.clone()
    model.auxiliaries[0](h)
    assert torch.equal(h, before)


def test_a_network_of_maps_needs_a_head() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(UserError, match="not one vector of logits"):
        lg.localize(network, blocks=1, method=lg.dgl("0c1f"), example=torch.zeros(1, 3, 8, 8))


def test_one_name_is_a_cut() -> None:
    x = torch.zeros(2, 3, 8, 8)
    model = lg.localize(ViewBySize(), blocks="body.0", method=lg.dgl("0c1f"), example=x)
    assert [block.names for block in model.blocks] == [("body.0",), ("body.1",)]
