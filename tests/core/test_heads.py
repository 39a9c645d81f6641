"""Heads: what each gives for each boundary, and the rules by which it is built from that boundary."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from localgrad.core import heads
from localgrad.core.boundary import Boundary
from localgrad.core.decoder import Decoder
from localgrad.core.errors import UserError
from localgrad.core.task import Classification

TASK = Classification(7)
SIZES = (32, 16, 8, 7, 4, 2, 1)


def square(channels: int, side: int) -> Boundary:
    return Boundary((channels, side, side), "NCHW", 0)


BOUNDARIES = [*(square(6, side) for side in SIZES), Boundary((6, 12, 5), "NCHW", 0), Boundary((6,), "NC", 1)]


def crossing(boundary: Boundary, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *boundary.shape)


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=lambda b: "x".join(map(str, b.shape)))
def test_every_classifier_gives_one_logit_a_class_at_every_boundary(boundary: Boundary) -> None:
    h = crossing(boundary)
    for name in heads.HEADS:
        head = heads.classifier(name, boundary, TASK, width=24)
        assert head(h).shape == (3, 7), name
    assert heads.predsim_classifier(boundary, TASK)(h).shape == (3, 7)
    assert heads.similarity(boundary)(h).shape == (3, *(boundary.shape if boundary.layout == "NCHW" else (6, 1, 1)))
    assert Decoder(boundary, (2, 12, 10))(h).shape == (3, 2, 12, 10)
    assert heads.imagenet_classifier(boundary, TASK)(h).shape == (3, 7)
    assert heads.imagenet_decoder(boundary, (2, 33, 32))(h).shape == (3, 2, 33, 32)


def of(head: nn.Module, kind: type[nn.Module]) -> list:
    return [m for m in head.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("name", heads.CONVOLUTIONAL)
@pytest.mark.parametrize("channels", [16, 48, 64, 80])
@pytest.mark.parametrize("side", SIZES)
def test_convolutional_heads_follow_the_rule(name: str, channels: int, side: int) -> None:
    convolutions, linears = int(name[0]), int(name[2])
    head = heads.classifier(name, square(channels, side), TASK, width=64)
    wanted, before, size = [], channels, side
    for _ in range(convolutions):
        after, stride = max(before, min(2 * before, 64)), 2 if size > 8 else 1  # Never beyond the last stage's width.
        wanted.append((before, after, (3, 3), (stride, stride)))
        before, size = after, -(-size // stride)
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in of(head, nn.Conv2d)] == wanted
    layers = [(m.in_features, m.out_features) for m in of(head, nn.Linear)]
    widths = [before, *[128] * (linears - 1), 7]
    assert layers == list(pairwise(widths))
    assert len(of(head, nn.BatchNorm2d)) == convolutions


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=lambda b: "x".join(map(str, b.shape)))
@pytest.mark.parametrize("name", heads.HEADS)
def test_a_side_changes_only_the_pooling_and_the_first_linear_layer(name: str, boundary: Boundary) -> None:
    plain, head = (heads.classifier(n, boundary, TASK, width=24) for n in (name, f"{name}@4"))
    assert head(crossing(boundary)).shape == (3, 7)
    sizes: list[torch.Size] = []
    of(head, nn.Flatten)[0].register_forward_hook(lambda m, args, out: sizes.append(args[0].shape))
    head(crossing(boundary))
    (first, *others), (first_plain, *others_plain) = of(head, nn.Linear), of(plain, nn.Linear)
    assert sizes[0][2] <= 4
    assert sizes[0][3] <= 4
    assert first.in_features == sizes[0][1:].numel()
    assert first.in_features == first_plain.in_features * sizes[0][2] * sizes[0][3]
    assert [m.weight.shape for m in others] == [m.weight.shape for m in others_plain]
    assert [m.weight.shape for m in of(head, nn.Conv2d)] == [m.weight.shape for m in of(plain, nn.Conv2d)]


def test_a_side_tells_positions_apart() -> None:
    h = torch.randn(3, 6, 8, 8, requires_grad=True)
    head = heads.classifier("0c1f@4", square(6, 8), TASK, width=24)
    logits = head(h)
    (linear,) = of(head, nn.Linear)
    cells = torch.stack(
        [h[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)) for i in range(4) for j in range(4)], 2
    )
    torch.testing.assert_close(logits, cells.flatten(1) @ linear.weight.T + linear.bias)
    (gradient,) = torch.autograd.grad(logits.sum(), h)
    assert len(gradient[0, 0].unique()) == 16
    (gradient,) = torch.autograd.grad(heads.classifier("0c1f", square(6, 8), TASK, width=24)(h).sum(), h)
    assert len(gradient[0, 0].unique()) == 1


def test_a_side_reads_the_grid_of_tokens_and_not_the_class_token() -> None:
    tokens = Boundary((1 + 16, 6), "NLC", 0, prefix=1, grid=(4, 4))
    for name, class_token in (("0c1f", True), ("0c1f@1", False), ("1c2f@2", False), ("dgl@4", False)):
        h = crossing(tokens).requires_grad_()
        (gradient,) = torch.autograd.grad(heads.classifier(name, tokens, TASK, width=24)(h)[:, 0].sum(), h)
        assert bool(gradient[:, 0].any()) == class_token
        assert bool(gradient[:, 1:].any()) != class_token


@pytest.mark.parametrize("name", ["1c2f@", "1c2f@0", "1c2f@-1", "1c2f@4x4", "1c2f@4@4"])
def test_a_side_is_a_number_from_1_on(name: str) -> None:
    with pytest.raises(UserError, match="head takes the side of a pooled map behind @, as in 1c2f@4"):
        heads.classifier(name, square(6, 8), TASK, width=24)


@pytest.mark.parametrize("side", SIZES)
def test_dgls_head_is_the_papers(side: int) -> None:
    head = heads.dgl_classifier(square(16, side), TASK, channels=32, hidden=20)
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in of(head, nn.Conv2d)] == [
        (16, 32, (1, 1)), (32, 32, (1, 1)), (32, 32, (1, 1)),
    ]  # fmt: skip
    assert [(m.in_features, m.out_features) for m in of(head, nn.Linear)] == [(32, 20), (20, 20), (20, 20), (20, 7)]
    assert len(of(head, nn.BatchNorm2d)) == len(of(head, nn.BatchNorm1d)) == 3
    seen: list[torch.Size] = []
    of(head, nn.Conv2d)[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    head(torch.randn(2, 16, side, side))
    assert seen == [(2, 16, min(side, 8), min(side, 8))]


@pytest.mark.parametrize("size", [(32, 32), (16, 8), (9, 20), (8, 8), (3, 40)])
def test_pooling_is_the_adaptive_average(size: tuple[int, int]) -> None:
    h = torch.randn(2, 3, *size, dtype=torch.float64)
    target = (min(8, size[0]), min(8, size[1]))
    pooled = nn.Sequential(*heads._pool_to(8, size))(h)
    torch.testing.assert_close(pooled, nn.functional.adaptive_avg_pool2d(h, target))


def test_predsims_classifier_reads_at_most_4096_features_unless_one_pixel_has_more() -> None:
    for channels, side, features in ((16, 32, 4096), (32, 16, 2048), (64, 2, 256), (5000, 3, 5000)):
        (linear,) = of(heads.predsim_classifier(square(channels, side), TASK), nn.Linear)
        assert linear.in_features == features
    (convolution,) = of(heads.similarity(square(6, 4)), nn.Conv2d)
    assert (convolution.in_channels, convolution.out_channels, convolution.kernel_size) == (6, 6, (3, 3))


def test_infopros_decoder_is_the_published_one() -> None:
    resize, first, _, _, last = Decoder(square(16, 8), (3, 32, 32))
    assert isinstance(resize, nn.Upsample)
    assert (resize.size, resize.mode, resize.align_corners) == ((32, 32), "bilinear", True)
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    assert (first.in_channels, first.out_channels, last.in_channels, last.out_channels) == (16, 12, 12, 3)


def test_imagenet_heads_are_the_published_ones() -> None:
    boundary = square(8, 56)
    h = crossing(boundary, 2)
    classify = heads.imagenet_classifier(boundary, TASK)
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in of(classify, nn.Conv2d)] == [
        (2, 1, 1), (256, 3, 2), (512, 3, 2), (2048, 1, 1),
    ]  # fmt: skip
    assert classify(h).shape == (2, 7)
    decode = heads.imagenet_decoder(boundary, (3, 224, 224))
    assert [up.size for up in of(decode, nn.Upsample)] == [(112, 112), (224, 224)]
    assert decode(h).shape == (2, 3, 224, 224)
    widths = {28: [128, 32, 12, 3], 14: [128, 128, 32, 12, 3], 56: [128, 12, 3], 224: [128, 3]}
    for size, wanted in widths.items():
        deep = heads.imagenet_decoder(square(256, size), (3, 224, 224))
        assert [c.out_channels for c in of(deep, nn.Conv2d)] == wanted
        assert [type(m) for m in deep][-1] is nn.Conv2d


@pytest.mark.parametrize(("name", "near"), [("1c2g", "1c2f"), ("dlg", "dgl"), ("3c1f", "1f")])
def test_an_unknown_head_is_named_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown head '{name}': did you mean '.*{near}'"):
        heads.classifier(name, square(4, 4), TASK, width=8)
