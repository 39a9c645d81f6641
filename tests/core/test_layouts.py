"""Maps of one row are told from tokens, and every method and coupling trains on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import auxiliaries
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.blocks import trace_units
from localgrad.core.decoder import Decoder
from localgrad.core.objectives import reconstruction


def row(channels: int, out: int = 12, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(channels, out, 3, stride, padding=1), nn.ReLU(), nn.Conv1d(out, out, 3, padding=1))


class NormFirst(nn.Module):
    """A residual unit of maps of one row, whose first layer is a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Conv1d(12, 12, 3, padding=1), nn.Conv1d(12, 12, 1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(self.a(self.norm(h)).relu())


class Turned(nn.Module):
    """A layer of tokens with a convolution over them, as a conformer has it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(features, features, 3, padding=1), nn.LayerNorm(features)
        self.linear = nn.Linear(features, features)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.convolution(h.mT).mT
        return h + self.linear(self.norm(h))


class Turn(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.mT


class Mean(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


def pooled(*units: nn.Module, features: int = 12) -> nn.Sequential:
    return nn.Sequential(*units, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(features, 10))


def encoder() -> nn.Sequential:
    return nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)))


def conformer(features: int) -> nn.Sequential:
    layers = (Turned(features) for _ in range(3))
    return nn.Sequential(Turn(), nn.Linear(5, features), *layers, Mean(), nn.Linear(features, 10))


ROWS = {
    "plain units": (lambda: pooled(row(5), row(12), row(12)), [(12, 40)] * 3),
    "fewer points, more channels": (
        lambda: pooled(row(5, 12), row(12, 16, 2), row(16, 20, 2), features=20), [(12, 40), (16, 20), (20, 10)]
    ),
    "as many points as channels": (lambda: pooled(row(5, 40), row(40, 40), row(40, 40), features=40), [(40, 40)] * 3),
    "norms first": (lambda: pooled(
            nn.Conv1d(5, 12, 3, 2, 1), NormFirst(nn.BatchNorm1d(12)), NormFirst(nn.InstanceNorm1d(12, affine=True)),
            NormFirst(nn.GroupNorm(3, 12)),
        ), [(12, 20)] * 4),
    "plain layers": (
        lambda: pooled(
            nn.Conv1d(5, 12, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(12, 12, 3), nn.ReLU(), nn.Conv1d(12, 12, 3)
        ),
        [(12, 19), (12, 17)],
    ),
    "no pool": (
        lambda: nn.Sequential(row(5), row(12), row(12, 16), nn.Flatten(), nn.Linear(640, 10)),
        [(12, 40), (12, 40), (16, 40)],
    ),
}  # fmt: skip
TOKENS = {
    "a transformer": (
        lambda: nn.Sequential(nn.Conv1d(5, 8, 4, 4), Turn(), encoder(), Mean(), nn.Linear(8, 10)), (10, 8)
    ),
    "a conformer": (lambda: conformer(8), (40, 8)),
    "as many tokens as features": (lambda: conformer(40), (40, 40)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_what_convolutions_read_is_a_map_of_one_row(kind: str) -> None:
    make, shapes = ROWS[kind]
    x = torch.randn(4, 5, 40)
    traced = trace_units(make(), x)
    assert [(u.output.layout, u.output.shape) for u in traced.units if len(u.output.shape) == 2] == [
        ("NCL", shape) for shape in shapes
    ]
    first = traced.units[0]
    assert (first.input.layout, first.input.channels, first.input.size) == ("NCL", 5, (1, 40))
    h = torch.randn(2, *first.output.shape)
    assert torch.equal(nn.Sequential(*first.output.to_map())(h), h[:, :, None])


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_stay_tokens_beside_convolutions(kind: str) -> None:
    make, shape = TOKENS[kind]
    traced = trace_units(make(), torch.randn(4, 5, 40))
    assert {(u.output.layout, u.output.shape) for u in traced.units} == {("NLC", shape)}


def test_recurrent_layers_read_tokens_unless_they_turn_what_they_get() -> None:
    class Recurrent(nn.Module):
        def __init__(self, turn: bool) -> None:
            super().__init__()
            self.turn, self.layer = turn, nn.LSTM(6, 6, batch_first=True)
            self.after = nn.Linear(6, 6)

        def forward(self, h: Tensor) -> Tensor:
            h = self.after(self.layer(h.mT if self.turn else h)[0])
            return h.mT if self.turn else h

    for turn, shape, layout in ((False, (9, 6), "NLC"), (True, (6, 9), "NCL")):
        network = nn.Sequential(*(Recurrent(turn) for _ in range(3)), nn.Flatten(), nn.Linear(54, 10))
        traced = trace_units(network, torch.randn(2, *shape))
        assert {u.output.layout for u in traced.units} == {layout}


@pytest.mark.parametrize("method", [lg.dgl(), lg.dgl("2c2f"), lg.predsim(), lg.infopro(), lg.auglocal()])
@pytest.mark.parametrize("coupling", [None, lg.MAN(), lg.DeepMAN()])
@pytest.mark.parametrize("make", [*(ROWS[k][0] for k in ("norms first", "no pool")), TOKENS["a conformer"][0]])
def test_every_method_and_coupling_trains_on_rows(make: Any, method: lg.Method, coupling: lg.MAN | None) -> None:
    x, y = torch.randn(4, 5, 40), torch.arange(4)
    model = lg.localize(make(), blocks=2, method=method, coupling=coupling, example=x)
    out = lg.local_backward(model, x, y)
    assert all(torch.isfinite(loss) for loss in out.losses)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", [lg.dgl(), lg.infopro(), lg.auglocal()])
@pytest.mark.parametrize("coupling", [None, lg.MAN()])
def test_each_position_of_a_row_is_classified(method: lg.Method, coupling: lg.MAN | None) -> None:
    units = [nn.Sequential(nn.Conv1d(a, 6, 3, padding=1), nn.ReLU()) for a in (2, 6, 6)]
    x, y = torch.rand(4, 2, 16), torch.randint(5, (4, 16))
    network = nn.Sequential(*units, nn.Conv1d(6, 5, 1))
    how = {"method": method, "coupling": coupling, "example": x, "criterion": nn.CrossEntropyLoss(), "targets": y}
    model = lg.localize(network, blocks=2, **how)
    assert auxiliaries(model)[0](torch.rand(4, 6, 16))["classifier"].shape == (4, 5, 16)
    lg.local_backward(model, x, y)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_images_of_one_row_tokens_and_vectors_are_compared_as_maps() -> None:
    rows, tokens, vectors = torch.rand(2, 3, 7), torch.rand(2, 7, 3), torch.rand(2, 3)
    row, upright, pixel = torch.randn(2, 3, 1, 7), torch.randn(2, 3, 7, 1), torch.randn(2, 3, 1, 1)
    for logits, images, naive in (
        (row, rows, row[:, :, 0]), (upright, tokens, upright[..., 0].mT), (pixel, vectors, pixel[..., 0, 0])
    ):  # fmt: skip
        expected = F.binary_cross_entropy_with_logits(naive, images)
        torch.testing.assert_close(reconstruction(logits, images), expected)


def test_infopro_recovers_a_row_from_its_mean_and_deviation() -> None:
    method = lg.infopro(mean=(0.5, 0.4), std=(0.2, 0.1))
    images = torch.rand(3, 2, 9)
    x = (images - torch.tensor([0.5, 0.4])[:, None]) / torch.tensor([0.2, 0.1])[:, None]
    torch.testing.assert_close(method.images(x), images)


def test_both_ways_to_decode_a_row_agree() -> None:
    traced = trace_units(ROWS["plain units"][0](), torch.randn(4, 5, 40))
    decoder = Decoder(traced.units[0].output, (5, 1, 40)).double()
    h = torch.randn(4, 12, 40, dtype=torch.float64)
    quick = decoder.quickly(h)
    decoder.fast = False
    torch.testing.assert_close(decoder(h), quick)


@pytest.mark.parametrize("length", [36, 48, 50, 53, 65])
@pytest.mark.parametrize("head", ["0c1f", "1c1f@4"])
def test_heads_read_all_tokens_of_a_text(length: int, head: str) -> None:
    """A text has no class tokens, also where its length is that of an image with some."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)]
    network = nn.Sequential(nn.Embedding(20, 16), *layers, nn.Flatten(), nn.Linear(16 * length, 4))
    x = torch.randint(20, (3, length))
    model = lg.localize(network, blocks=2, method=lg.dgl(head), example=x)
    h = torch.randn(3, length, 16, requires_grad=True)
    auxiliary: Any = model.auxiliaries[0]
    auxiliary.total(auxiliary.losses(auxiliary(h), torch.tensor([0, 1, 2]), None)).backward()
    assert h.grad is not None
    assert (h.grad.abs().sum(2) > 0).all()
