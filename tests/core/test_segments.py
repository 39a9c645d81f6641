"""What flows beside the chain: parameters, buffers, constants, sizes and dtypes that more than one unit reads."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small import Between, Net, assert_same, chain, composite, cut, gradients
from test_networks import shared_table
from timm.models.cait import Cait
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.costs import looks

X, Y = torch.zeros(2, 3, 8, 8), torch.arange(4)


class Layers(Net):
    """Holds parameters that several units may read, a buffer and a tensor that is neither."""

    def __init__(self, between: Between) -> None:
        super().__init__(between)
        self.p, self.q = nn.Parameter(torch.rand(6, 1, 1)), nn.Parameter(torch.rand(6, 1, 1))
        self.register_buffer("row", torch.rand(6, 1, 1), persistent=False)
        self.row: Tensor
        self.plain = torch.rand(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(self.stem(x) * self.p, x))


BETWEEN: dict[str, Between] = {
    "parameters of two owners": lambda net, h, x: h + net.p * net.q,
    "a buffer": lambda net, h, x: h + net.row,
    "a plain tensor": lambda net, h, x: h + net.plain,
    "a constant": lambda net, h, x: h + torch.ones(6, 1, 1),
    "the dtype": lambda net, h, x: h + h.double().tanh().to(x.dtype),
    "the batch's size": lambda net, h, x: h.reshape(x.shape[0] * 6, -1).reshape(x.size(0), 6, *x.shape[2:]),
    "the batch's length": lambda net, h, x: h * len(x),
    "a number of dimensions": lambda net, h, x: h * len(x.shape) * h.ndim,
}


@pytest.mark.parametrize("case", BETWEEN)
def test_what_units_read_beside_the_chain_is_the_networks_own(case: str) -> None:
    network, x = Layers(BETWEEN[case]), torch.randn(4, 3, 8, 8)
    keys = list(network.state_dict())
    model = cut(network, example=x, coupling=lg.MAN())
    assert list(network.state_dict()) == keys
    lg.local_backward(model, x, Y)
    used = case == "parameters of two owners"
    assert (network.q.grad is not None) == used
    owned = [p for group in lg.param_groups(model) for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert any(p is network.q for p in owned) == used
    other = copy.deepcopy(model)
    other.backbone.load_state_dict({k: v + 1 for k, v in network.state_dict().items()})
    with torch.no_grad():
        other.backbone.get_buffer("row").add_(1)
    for changed in (other.eval(), copy.deepcopy(model).double().eval()):
        z = x.to(next(changed.parameters()).dtype)
        assert torch.equal(chain(changed, z), changed.backbone(z))


@pytest.mark.parametrize(
    "between",
    [
        lambda net, h, x: h * (1.0 / x.shape[0]),
        lambda net, h, x: h / math.sqrt(x.shape[0]),
        lambda net, h, x: h if x.shape[0] % 5 else 2 * h,
        lambda net, h, x: h + h[: x.shape[0] // 2].mean(),
    ],
    ids=["share", "root", "if", "half"],
)
def test_what_follows_the_batch_in_another_way_is_refused(between: Between) -> None:
    with pytest.raises(UserError, match="batch"):
        lg.units(Net(between), X)


def test_a_class_token_that_joins_late_is_trained_where_it_joins() -> None:
    network = Cait(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5)
    x = torch.randn(4, 3, 16, 16)
    model = cut(network, example=x)
    lg.local_backward(model, x, Y)
    token = network.get_parameter("cls_token")
    assert token.grad is not None
    assert sum(any(p is token for p in model.members(k)) for k in range(4)) == 1


def test_a_copy_reads_its_own_table() -> None:
    network, x = shared_table(), torch.randn(4, 3, 16, 16)
    model = copy.deepcopy(cut(network, example=x))
    with torch.no_grad():
        model.backbone.get_parameter("rel_pos_bias.relative_position_bias_table").add_(1)
    model.eval()
    assert torch.equal(chain(model, x), model.backbone(x))


@pytest.mark.slow
def test_a_network_with_a_shared_table_can_be_planned() -> None:
    planner = lg.Planner(shared_table(), torch.randn(4, 3, 16, 16), method=lg.dgl("0c1f"), coupling=lg.MAN())
    assert planner.even(3).peak == pytest.approx(planner.exactly(planner.even(3)).peak, rel=0.02)


def test_a_head_that_shares_with_a_unit_stays_with_it() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    network[4].weight = network[0].weight
    assert len(lg.units(network, torch.zeros(1, 3))) == 1


def test_units_that_begin_in_place_can_be_recomputed_and_planned() -> None:
    x = torch.randn(4, 3, 8, 8)
    plain = cut(composite())
    recomputed = lg.recompute(copy.deepcopy(plain), units=True)
    for model in (plain, recomputed):
        torch.manual_seed(0)
        lg.local_backward(model, x, Y)
    assert len(gradients(plain.backbone)) == len(list(plain.backbone.parameters()))
    assert_same(gradients(plain.backbone), gradients(recomputed.backbone))
    planner = lg.Planner(composite(), x, method=lg.dgl("0c1f"), coupling=lg.MAN())
    # The fast prediction does not know that the cloned input is freed.
    assert planner.exactly(planner.bp).peak <= planner.bp.peak


def test_units_of_other_sizes_look_different() -> None:
    def bare(size: int) -> nn.Module:
        module = nn.Module()
        module.gain = nn.Parameter(torch.ones(size))
        return module

    assert looks(bare(3)) == looks(bare(3)) != looks(bare(4))


def test_a_network_of_vectors_is_planned_and_impossible_numbers_are_refused() -> None:
    units = [nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(4)]
    planner = lg.Planner(nn.Sequential(*units, nn.Linear(8, 3)), torch.zeros(256, 8), method=lg.dgl("0c1f"))
    assert planner.exactly(planner.even(2)).peak < planner.exactly(planner.bp).peak
    for ask in (planner.balanced, planner.even, lambda k: planner.fastest(1, k)):
        with pytest.raises(UserError, match="blocks=9 is out of range: this network has 4 units, so 1 to 4"):
            ask(9)
