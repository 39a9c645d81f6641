"""A forward is recorded as it runs: what Python asks of shapes, dtypes and constants stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import Net, assert_chained, chain, cut, said
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.steps import ShapesOfNorms

X = torch.randn(2, 3, 8, 8)


def by_positions(net: Net, h: Tensor, x: Tensor) -> Tensor:
    positions = torch.arange(h.shape[1]).unsqueeze(0)
    return h * 2 if bool((positions.diff() == 1).all()) else h


def least_number(net: Net, h: Tensor, x: Tensor) -> Tensor:
    return h.masked_fill(h < 0, torch.finfo(h.dtype).min).clamp(min=-1)


BETWEEN: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "values of constants": by_positions,
    "limits of a dtype": least_number,
    "a module made in the forward": lambda net, h, x: nn.AvgPool2d(1)(h),
    "a check of the type": lambda net, h, x: h + 1 if isinstance(h, Tensor) else h,
    "a size as an argument": lambda net, h, x: h + torch.ones(h.shape[0], 1, *[1] * (h.ndim - 2)),
    "a value put in its place": lambda net, h, x: _put(h.clone()),
    "a property": lambda net, h, x: h.mT.mT,
    "parts of a tensor": lambda net, h, x: torch.cat(h.chunk(2, dim=1)[::-1], dim=1),
}


def _put(h: Tensor) -> Tensor:
    h[:, 0] = 1
    h[:, 1] += 2
    return h


@pytest.mark.parametrize("name", BETWEEN)
def test_blocks_do_what_the_network_does(name: str) -> None:
    model = cut(Net(BETWEEN[name]), coupling=lg.MAN())
    assert_chained(model, X)
    assert torch.equal(chain(model, X[:1].repeat(3, 1, 1, 1)), model.backbone(X[:1].repeat(3, 1, 1, 1)))


def test_values_of_the_input_cannot_be_asked_for() -> None:
    with pytest.raises(lg.UserError, match="depends on the values of a tensor"):
        lg.units(Net(lambda net, h, x: h if h.sum() > 0 else -h), X)


class Masked(nn.Module):
    """Saves a mask where it knows that nothing is masked, as networks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        whole = not torch.compiler.is_compiling() and bool(mask.all())
        for unit in self.units:
            h = h + (unit(h) if whole else unit(h) * mask)
        return h


def test_a_network_that_may_not_ask_takes_the_way_that_is_right_for_all_values() -> None:
    h, mask = torch.randn(4, 4), torch.tensor([1.0, 0.0, 1.0, 1.0])
    how: dict[str, Any] = {"blocks": 3, "method": lg.dgl("0c1f"), "criterion": F.mse_loss}
    model = lg.localize(Masked(), example=(h, mask[:, None]), **how)
    found = lg.local_backward(model, (h, mask[:, None]), torch.zeros(4, 4)).logits
    torch.testing.assert_close(found, model.backbone(h, mask[:, None]))
    assert not torch.compiler.is_compiling()


class Shortcut(nn.Module):
    """A unit that asks for values to save work, where nothing is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        out = self.outer(self.inner(h).relu())
        if not torch.compiler.is_compiling() and mask.all():
            return h + out
        return h + out * mask[:, None]


class Shortcuts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(Shortcut() for _ in range(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clamp(0, 1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.last(x)


def test_a_unit_may_ask_for_values_where_nothing_is_compiled() -> None:
    x, y = torch.randn(4, 4), torch.arange(4) % 3
    model = lg.localize(Shortcuts(), blocks=4, method=lg.dgl(), coupling=lg.MAN(), example=(x, torch.ones(4)))
    for mask in (torch.ones(4), torch.tensor([1.0, 0, 1, 0])):
        assert torch.equal(lg.local_backward(model, (x, mask), y).logits, model.backbone(x, mask))


class Counting(nn.Module):
    """Counts its passes, and may compute with their number."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.layers, self.used, self.passes = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), used, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        for layer in self.layers:
            x = layer(x) / (self.passes if self.used else 1)
        return x


def test_a_number_that_each_pass_changes_may_not_go_into_what_is_computed() -> None:
    text = said(lg.units, Counting(used=True), torch.randn(2, 4))
    assert "(it computes with a number that it changes itself, which could be a buffer)" in text
    x = torch.randn(2, 4)
    model = lg.localize(Counting(used=False), blocks=2, method=lg.dgl("0c1f"), example=x)
    for _ in range(2):
        found = lg.local_backward(model, x, torch.tensor([0, 1])).logits
        assert torch.equal(found, model.backbone(x))


def test_a_network_that_divides_its_batch_into_samples_is_refused() -> None:
    def apart(net: Net, h: Tensor, x: Tensor) -> Tensor:
        return torch.stack(h.unbind(0))

    assert "it depends on the size of the batch" in said(lg.units, Net(apart), X)


class Halves(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h[: len(h) // 2], h[len(h) // 2 :]])


def test_a_number_that_no_block_could_compute_is_told_and_a_module_may_compute_it() -> None:
    text = said(lg.units, Net(lambda net, h, x: Halves.forward(net, h)), X)
    assert text.startswith(
        "the forward computes 2 from a batch of 5 and 3 from one of 7, which no block can follow: let a"
    )
    network = nn.Sequential(nn.Linear(4, 4), Halves(), nn.Linear(4, 4), Halves(), nn.Linear(4, 4))
    for count in (1, 4, 5):
        x = torch.randn(count, 4)
        model = lg.localize(network, blocks=2, method=lg.dgl("0c1f"), example=torch.randn(2, 4))
        assert torch.equal(lg.local_backward(model, x, torch.arange(count) % 4).logits, network(x))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_without_values_gives_what_pytorchs_own_gives(kind: Any, dtype: torch.dtype, training: bool) -> None:
    norm, sizes = kind(4).to("meta").train(training), {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]
    h = torch.empty(3, *[5] * sizes, 4, dtype=dtype, device="meta").movedim(-1, 1)  # Channels are last in memory.
    with torch.no_grad():
        own, versions = norm(h), [b._version for b in norm.buffers()]
        with ShapesOfNorms():
            quick = norm(h)
    assert (quick.shape, quick.dtype, quick.stride()) == (own.shape, own.dtype, own.stride())
    assert [b._version for b in norm.buffers()][:2] == versions[:2]  # The third one counts the calls.
    with ShapesOfNorms(), torch.no_grad(), pytest.raises(RuntimeError, match="should contain 5 elements not 4"):
        norm(torch.empty(3, 5, *[5] * sizes, device="meta"))
