"""The benchmark of scaling: its formulas against naive ones and what was measured, and its delays."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import devices
import pytest
import torch
import torch.distributed as dist
from common import read_results
from delays import delayed


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 2, 4, 9, 32])
def test_without_messages_both_orders_take_the_textbooks_time(count: int, micro: int) -> None:
    expected = (micro + count - 1) * 6.0 / micro
    assert devices.one_f_one_b(count, micro, 6.0, 0.0) == pytest.approx(expected)
    assert devices.gpipe(count, micro, 6.0, 0.0) == pytest.approx(expected)
    assert 1 - 6.0 / expected == pytest.approx(devices.bubble(count, micro))


def test_messages_are_waited_for() -> None:
    """Followed by hand, for two devices; c is 3 for each micro-batch, of which 1 is forward."""
    assert devices.gpipe(2, 2, 6.0, 1.0) == pytest.approx(9 + 2)
    assert devices.one_f_one_b(2, 2, 6.0, 1.0) == pytest.approx(9 + 2)
    assert devices.one_f_one_b(2, 4, 12.0, 1.0) == pytest.approx(15 + 4)  # of two round trips


@pytest.mark.parametrize("lag", [2, 4])
@pytest.mark.parametrize("message", [0.0, 0.3, 0.9, 2.0])
def test_the_local_pipeline_is_as_fast_as_its_messages_let_it(message: float, lag: int) -> None:
    """Two devices followed step by step: each batch waits for the one before, the first device for the state that the
    second had `lag` steps ago."""
    ends: tuple[list[float], list[float]] = ([], [])
    for step in range(400):
        source = ends[1][step - lag - 1] + message if step > lag else 0.0
        ends[0].append(max(ends[0][-1] if step else 0.0, source) + 1.0)
        ends[1].append(max(ends[1][-1] if step else 0.0, ends[0][-1] + message) + 1.0)
    each = (ends[1][-1] - ends[1][99]) / 300
    assert devices.local_pipeline(1.0, message, lag) == pytest.approx(each, rel=0.02)


def test_without_a_flush_the_round_trip_is_shared_by_all_that_is_underway() -> None:
    """Two devices, of which each computes 1 + 2 seconds for a batch. A round trip takes 6 s and two messages."""
    assert devices.two_versions(2, 1, 3.0, 0.0) == pytest.approx(3)
    assert devices.two_versions(2, 1, 3.0, 5.0) == pytest.approx((6 + 2 * 5.0) / 2)
    assert devices.two_versions(2, 4, 3.0, 5.0) == pytest.approx(4 * (6 / 4 + 2 * 5.0) / 5, rel=0.02)
    assert devices.two_versions(8, 8, 3.0, 0.0) == pytest.approx(3, rel=0.2)
    assert devices.two_versions(8, 32, 3.0, 9.0) < devices.one_f_one_b(8, 32, 3.0, 9.0)


def test_a_link_takes_one_message_after_the_other() -> None:
    """Two micro-batches of 1 + 2 seconds, and messages that keep the link for 4 of their 5 seconds. Followed by hand:
    outputs leave at 1 and 5, gradients leave at 9 and 13, and the first device has them at 14 and 18."""
    assert devices.one_f_one_b(2, 2, 6.0, 5.0, 4.0) == pytest.approx(20)
    assert devices.one_f_one_b(2, 2, 6.0, 5.0, 0.0) == pytest.approx(19)
    transfers = devices.gpipe(2, 100, 1e-6, 0.02, 0.02)
    assert transfers == pytest.approx(2 * 100 * 0.02, rel=0.02)  # of all outputs, and then of all gradients


def test_rare_averages_cost_their_share() -> None:
    assert devices.all_reduce(2, 8.0, 4.0, 0.5) == pytest.approx(8 / 4 + 2 * 0.5)
    cost = devices.Traced([1.0] * 4, [0.1] * 4, [8] * 4, [3] * 4, parameters=16)
    settings = devices.Settings(slow_devices=4, slow_link=4.0, slow_latency=0.25, every=(10,))
    rows = {
        (row["way"], row["micro_batches"], row["every"]): float(row["step_seconds"])
        for row in devices.over_slow_links(settings, {"none": cost, "man": cost})
    }
    average = 2 * 0.75 * 16 / 4 + 2 * 2 * 0.25
    assert rows["bp data parallel", 1, 1] == pytest.approx(1 + average)
    assert rows["bp data parallel", 1, 10] == pytest.approx(1 + average / 10)
    assert rows["local pipeline", 1, 1] == pytest.approx(2.0)  # A message keeps the link so long.
    assert rows["local pipeline, MAN", 1, 1] == pytest.approx(2 * (1.1 + 2.25) / 3, rel=1e-3)


def test_what_was_measured_is_near_the_formulas() -> None:
    written = read_results("scaling_check.csv")
    assert devices.check(read_results("scaling_resnet110.csv")) == written
    for row in written:
        if row["way"] == "local pipeline":
            assert float(row["measured_over_expected"]) == pytest.approx(1, abs=0.15), row


def test_messages_are_late_but_in_order() -> None:
    sent = []

    def instead(tensor: torch.Tensor, rank: int) -> Any:
        sent.append((time.monotonic(), int(tensor), rank))
        return SimpleNamespace(wait=lambda: True)

    plain, dist.isend = dist.isend, instead
    try:
        began = time.monotonic()
        with delayed(0.1):
            works = [dist.isend(torch.tensor(i), 1) for i in range(3)]
            assert time.monotonic() - began < 0.05
            assert all(cast(Any, work).wait() for work in works)
        assert dist.isend is instead
    finally:
        dist.isend = plain
    assert [(i, rank) for _, i, rank in sent] == [(0, 1), (1, 1), (2, 1)]
    assert sent[0][0] - began >= 0.1
    assert sent[-1][0] - sent[0][0] < 0.05
