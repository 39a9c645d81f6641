"""InfoPro's decoder: both ways of computing it agree, and the quick one is taken where it is one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from localgrad.core.boundary import Boundary
from localgrad.core.decoder import Decoder, is_worth_it, resized_convolution
from localgrad.scale.memory import measure_peak

sizes = st.integers(1, 9)


@given(channels=st.integers(1, 5), height=sizes, width=sizes, rows=sizes, columns=sizes, out=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_resizing_and_convolving_at_once_is_the_one_after_the_other(
    channels: int, height: int, width: int, rows: int, columns: int, out: int
) -> None:
    torch.manual_seed(channels + height)
    h = torch.randn(2, channels, height, width, dtype=torch.float64)
    weight, bias = torch.randn(out, channels, 3, 3, dtype=h.dtype), torch.randn(out, dtype=h.dtype)
    resized = F.interpolate(h, (rows, columns), mode="bilinear", align_corners=True)
    found = resized_convolution(h, weight, bias, (rows, columns))
    torch.testing.assert_close(found, F.conv2d(resized, weight, bias, padding=1), rtol=1e-11, atol=1e-11)


def both(h: torch.Tensor) -> tuple[Decoder, Decoder]:
    torch.manual_seed(0)
    quick = Decoder(Boundary(tuple(h.shape[1:]), "NCHW", 0), (3, 32, 32)).to(h.dtype)
    plain = copy.deepcopy(quick)
    plain.fast = False
    return quick, plain


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_quick_decoder_trains_like_the_plain_one(layout: torch.memory_format, training: bool, size: int) -> None:
    h = torch.randn(4, 24, size, size, dtype=torch.float64).contiguous(memory_format=layout)
    quick, plain = both(h)
    quick.train(training)
    plain.train(training)
    results = []
    for decoder in (quick, plain):
        own = h.clone().requires_grad_()
        out = decoder(own)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        names = [
            name for name, _ in decoder.named_parameters() if name != "1.bias" or not training
        ]  # A norm cancels it.
        results.append([out, own.grad, *(decoder.get_parameter(name).grad for name in names), *decoder.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [True, False])
def test_it_is_taken_in_full_precision_alone(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    taken = []
    monkeypatch.setattr(Decoder, "quickly", lambda self, h: taken.append(1) or h)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        both(torch.randn(2, 64, 8, 8))[0](torch.randn(2, 64, 8, 8))
    assert bool(taken) != autocast


def test_another_norm_goes_the_plain_way() -> None:
    quick, plain = both(torch.randn(2, 64, 8, 8))
    for decoder in (quick, plain):
        decoder[2] = nn.GroupNorm(3, 12)
    h = torch.randn(2, 64, 8, 8)
    assert torch.equal(quick(h), plain(h))


def test_small_maps_are_convolved_before_they_are_resized_and_the_resized_map_is_never_made() -> None:
    sizes = ((64, 8), (32, 16), (16, 32))
    assert [is_worth_it(torch.empty(1, c, s, s), (32, 32)) for c, s in sizes] == [True, False, False]
    h = torch.randn(16, 64, 8, 8)
    quick, plain = (measure_peak(lambda d=decoder: d(h).sum().backward()).total for decoder in both(h))
    assert plain - quick > 16 * 64 * 32 * 32 * 4 / 2


def test_its_layers_are_those_of_a_sequence() -> None:
    decoder = Decoder(Boundary((8,), "NC", 2), (1, 4, 4))
    assert [type(m) for m in decoder] == [nn.Unflatten, nn.Upsample, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert decoder(torch.randn(3, 8)).shape == (3, 1, 4, 4)
