"""Recomputing changes memory and nothing else: gradients, statistics, averages and draws are the plain step's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.blocks import plain_call
from localgrad.core.couplings import Link
from localgrad.core.errors import UserError
from localgrad.core.recomputation import recomputed

COUPLINGS = [None, lg.MAN(), lg.MANPlusPlus(), lg.DeepMAN(), lg.MAN(form="pull"), lg.MAN(ema=False)]
METHODS = [lg.dgl("1c2f"), lg.infopro(), lg.auglocal(), lg.predsim()]


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 3, 16, 16), torch.randint(10, (size,))


def local(method: lg.Method, coupling: lg.MAN | None, blocks: int = 4) -> lg.LocalModel:
    torch.manual_seed(0)
    return lg.localize(
        lg.build("resnet20", classes=10), blocks=blocks, method=method, coupling=coupling, example=batch()[0]
    )


def steps(model: lg.LocalModel, count: int = 2, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Losses of some steps, then gradients and state, then where the random generator stands."""
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.1, momentum=0.9)
    torch.manual_seed(2)
    seen: list[Tensor] = []
    for _ in range(count):
        optimizer.zero_grad()
        seen += lg.local_backward(model, *batch(), autocast=autocast).losses
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return [*seen, *model.state_dict().values(), torch.get_rng_state()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_step_is_the_plain_one_bit_for_bit(method: lg.Method, coupling: lg.MAN | None) -> None:
    model = local(method, coupling)
    again = lg.recompute(copy.deepcopy(model), couplings=True)
    assert_same(steps(model), steps(again))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_backpropagation_too_and_under_autocast(dtype: torch.dtype | None) -> None:
    model = local(lg.bp(), None, blocks=1)
    again = lg.recompute(copy.deepcopy(model))
    assert_same(steps(model, autocast=dtype), steps(again, autocast=dtype))


def test_random_draws_are_replayed_and_statistics_move_once() -> None:
    def unit(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.4)
        )

    torch.manual_seed(0)
    backbone = nn.Sequential(*[unit(c) for c in (3, 8, 8, 8)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model = lg.localize(backbone, blocks=2, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=batch()[0])
    again = lg.recompute(copy.deepcopy(model), couplings=True)
    assert_same(steps(model, 3), steps(again, 3))
    counts = [b for name, b in again.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(b) for b in counts} == {3}


def test_only_what_is_chosen_is_recomputed_and_it_can_be_undone() -> None:
    model = local(lg.dgl("1c2f"), lg.MAN())
    runs: list[str] = []
    for block in model.blocks:
        for name, module in zip(block.names, block, strict=False):
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    lg.recompute(model, units=["layer1.1", "layer3.0"])
    lg.local_backward(model, *batch())
    assert {name for name in runs if runs.count(name) == 2} == {"layer1.1", "layer3.0"}
    links = [m for m in model.modules() if isinstance(m, Link)]
    assert all(link.call is links[0].call for link in links)
    runs.clear()
    lg.recompute(model, units=False)
    lg.local_backward(model, *batch())
    assert len(runs) == len(set(runs))


def test_a_name_that_is_no_unit_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown unit 'layer1.9': did you mean"):
        lg.recompute(local(lg.dgl(), None), units=["layer1.9"])


def test_it_saves_memory_in_a_block_and_in_a_coupling() -> None:
    def peak(units: bool, couplings: bool) -> int:
        model = lg.recompute(local(lg.dgl("1c2f"), lg.DeepMAN(), blocks=2), units=units, couplings=couplings)
        return lg.measure_peak(lambda: lg.local_backward(model, *batch(64))).total

    plain, units, couplings, both = (
        peak(u, c) for u, c in ((False, False), (True, False), (False, True), (True, True))
    )
    assert both < 0.7 * plain
    assert both < min(units, couplings)
    assert max(units, couplings) < plain


def test_a_state_fits_whether_it_is_recomputed_or_not() -> None:
    model = local(lg.dgl("1c2f"), lg.MAN())
    again = lg.recompute(local(lg.dgl("1c2f"), lg.MAN()), couplings=True)
    assert again.state_dict().keys() == model.state_dict().keys()
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"units": 5}, "units takes True, False, or a list of names"),
        ({"units": [3]}, 'units lists names such as "layer1.0"'),
        ({"units": ["layer1.0", "layer2.1:layer3.0"]}, "goes over the end of a block"),
        ({"couplings": 1}, "couplings takes True, False, or a list of numbers of blocks, not 1"),
        ({"couplings": [0, 7]}, "there is no coupling of block 7: 3 blocks have an auxiliary"),
        ({"couplings": "all"}, "couplings takes True, False, or a list"),
    ],
)
def test_wrong_arguments_change_nothing(how: Any, words: str) -> None:
    model = lg.recompute(local(lg.dgl("0c1f"), lg.MAN()), couplings=[0])
    before = [block.ranges for block in model.blocks]
    with pytest.raises(UserError, match=words):
        lg.recompute(model, **how)
    assert [block.ranges for block in model.blocks] == before
    calls = [link.call for link in model.modules() if isinstance(link, Link)]
    assert recomputed in calls
    assert plain_call in calls


def test_one_name_alone_is_a_list_of_one() -> None:
    model = lg.recompute(local(lg.dgl("0c1f"), None), units="layer1.0")
    assert sum(len(block.ranges) for block in model.blocks) == 1
