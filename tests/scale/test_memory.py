"""Peak memory of a step, against cases whose bytes are known and against the published saving."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import localgrad as lg
from localgrad.scale.memory import MemoryMeter

CUTS = ["layer1.6", "layer1.14", "layer2.8"]


def peak(step: Callable[[], object]) -> int:
    return lg.measure_peak(step).total


# Known bytes: float32, 4 each


def test_what_is_freed_no_longer_counts() -> None:
    def freed() -> None:
        a = torch.zeros(256)
        del a
        torch.zeros(512)

    def kept() -> None:
        a = torch.zeros(256)
        torch.zeros(512)
        del a

    assert peak(freed) == 4 * 512
    assert peak(kept) == 4 * (256 + 512)


def test_views_count_as_their_storage_once_and_operations_in_place_make_nothing() -> None:
    def views() -> None:
        a = torch.zeros(256)
        assert len([a.view(16, 16), a[3:9], a.detach(), a.view(16, 16).t()]) == 4

    def small_view() -> None:
        a = torch.zeros(256)[:1]
        torch.zeros(100)
        del a

    p = torch.ones(100)
    assert peak(views) == 4 * 256
    assert peak(small_view) == 4 * 356
    assert peak(lambda: p.add_(1).mul_(2).relu_()) == 4 * 100


def test_what_lived_before_counts_from_the_start_even_if_it_is_used_late() -> None:
    p = torch.ones(100)

    def step() -> None:
        a = torch.zeros(256)
        del a
        p.sum()

    measured = lg.measure_peak(step)
    assert measured.total == 4 * (100 + 256)
    assert measured.timeline[0] == ("", 4 * 100)
    assert measured.reserved is None


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2), (torch.bool, 1)])
def test_other_types_have_their_own_bytes(dtype: torch.dtype, size: int) -> None:
    assert peak(lambda: torch.zeros(10, dtype=dtype)) == 10 * size


def test_parameters_gradients_and_optimizer_state_count() -> None:
    p = nn.Parameter(torch.ones(100))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, foreach=False)
    p.grad = torch.ones(100)
    optimizer.step()
    found = lg.measure_peak(optimizer.step, optimizers=[optimizer])
    assert (found.total, found.split["optimizer"]) == (3 * 400, 400)


def test_saved_activations_count_until_their_backward_pass() -> None:
    x = torch.ones(1000)
    w = nn.Parameter(torch.ones(()))

    def forward() -> Tensor:
        h = x
        for _ in range(5):
            h = (h * w).exp()  # saves its result, and the product saves h
        return h.sum()

    def unused() -> None:
        with torch.no_grad():
            forward()

    assert peak(lambda: forward().backward()) > 5 * 4000
    assert peak(unused) < 5 * 4000  # x, h, its successor, the product and a scalar
    live = lg.measure_peak(lambda: forward().backward()).timeline[-1][1]
    assert live < 2 * 4000  # x and the gradient of w


def test_the_timeline_is_labelled_by_marks_and_ends_with_what_is_left() -> None:
    meter = MemoryMeter()
    kept = []
    with meter:
        meter.mark("first")
        a = torch.zeros(10)
        meter.mark("second")
        kept.append(torch.zeros(20))
        del a
    result = meter.result()
    assert result.timeline == [("", 0), ("first", 40), ("second", 120), ("second", 80)]
    assert result.total == 120
    kept.clear()
    assert meter.result() == result  # what goes after the measurement is not part of it


def test_a_failing_step_passes_its_error_on() -> None:
    with pytest.raises(RuntimeError, match="size"):
        lg.measure_peak(lambda: torch.zeros(3) + torch.zeros(4))
    assert peak(lambda: torch.zeros(10)) == 40


def test_measuring_changes_no_number() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    model = lg.localize(lg.build("resnet20", classes=10), blocks=4, method=lg.dgl(), coupling=lg.MAN(), example=x)
    plain = lg.local_backward(model, x, y)
    model.zero_grad()
    seen = []
    lg.measure_peak(lambda: seen.append(lg.local_backward(model, x, y)))
    # Nothing has stepped, so the averages have moved nowhere, and running statistics do not enter a training step.
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, seen[0].losses, strict=True))
    assert torch.equal(plain.logits, seen[0].logits)


# Networks


def training_step(depth: int, blocks: int | list[str], size: int, count: int) -> Callable[[], None]:
    """A step of SGD with momentum whose state is made already; MAN with head 1c2f, or BP for one block."""
    torch.manual_seed(0)
    x, y = torch.randn(count, 3, size, size), torch.arange(count) % 10
    method, coupling = (lg.bp(), None) if blocks == 1 else (lg.dgl("1c2f"), lg.MAN())
    backbone = lg.build(f"resnet{depth}", classes=10)
    model = lg.localize(backbone, blocks=blocks, method=method, coupling=coupling, example=x)
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.1, momentum=0.9)

    def step() -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    for group in optimizer.param_groups:  # the momentum of a first step, without its time
        for p in cast(list[nn.Parameter], group["params"]):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return step


def savings(depth: int, cuts: list[int | list[str]], size: int, count: int) -> list[float]:
    """The share of BP's peak that each cut saves."""
    whole = peak(training_step(depth, 1, size, count))
    return [1 - peak(training_step(depth, cut, size, count)) / whole for cut in cuts]


def test_blocks_need_less_than_backpropagation_and_more_blocks_need_less() -> None:
    # At batch 128 the auxiliaries' own parameters weigh less than here, so that more is saved: see below.
    four, eight = savings(32, [4, 8], 16, 32)
    assert 0.15 < four < eight < 0.5


@pytest.mark.slow
def test_the_published_saving_of_resnet110_at_batch_128() -> None:
    four, most = savings(110, [CUTS, 55], 32, 128)
    assert four >= 0.6
    assert most >= 0.8


# CUDA


@pytest.mark.gpu
def test_on_cuda_the_allocators_peak_counts() -> None:
    before = torch.cuda.memory_allocated()

    def step() -> None:
        a = torch.zeros(1 << 20, device="cuda")
        del a
        torch.zeros(2 << 20, device="cuda")

    measured = lg.measure_peak(step, device="cuda")
    assert measured.total - before == 8 << 20
    assert measured.reserved is not None
    assert measured.reserved >= measured.total
    assert measured.timeline == []


@pytest.mark.gpu
def test_four_blocks_save_on_cuda_too() -> None:
    x, y = torch.randn(64, 3, 32, 32, device="cuda"), torch.arange(64, device="cuda") % 10
    peaks = []
    for blocks, method, coupling in ((1, lg.bp(), None), (4, lg.dgl("1c2f"), lg.MAN())):
        backbone = lg.build("resnet110", classes=10).to("cuda")
        model = lg.localize(backbone, blocks=blocks, method=method, coupling=coupling, example=x)
        lg.local_backward(model, x, y)
        model.zero_grad()
        peaks.append(lg.measure_peak(lambda m=model: lg.local_backward(m, x, y), device="cuda").total)
        del model, backbone
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("how", ["slice", "index", "split"])
def test_data_that_only_lives_in_the_closure_does_not_count(how: str) -> None:
    layer, data = nn.Linear(16, 4), torch.randn(1000, 16)
    alone, batch = data[:8].clone(), data[:8]

    def step(x: Tensor) -> None:
        layer(x).sum().backward()
        layer.zero_grad()

    taken = {
        "slice": lambda: step(batch),
        "index": lambda: step(data[torch.arange(8)]),
        "split": lambda: [step(part) for part in data[:8].chunk(2)],
    }
    wanted = lg.measure_peak(lambda: step(alone)).total
    found = lg.measure_peak(taken[how]).total
    assert wanted - 8 * 16 * 4 < found <= wanted + 8 * 8  # An index is a tensor too.
