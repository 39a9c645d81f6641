"""Calibration: speeds that are positive and explain times that follow from them."""

from __future__ import annotations

import pytest
import torch

import localgrad as lg
from localgrad.scale import speed as room
from localgrad.scale.costs import Work


def test_a_time_is_arithmetic_and_bytes_moved() -> None:
    assert lg.Speed(2.0, 4.0).seconds(Work(6, 8)) == 5


@pytest.mark.parametrize("true", [lg.Speed(1e11, 1e10), lg.Speed(1e12, 3e9), lg.Speed(3e10, float("inf"))])
def test_the_speed_behind_the_times_is_found(true: lg.Speed, monkeypatch: pytest.MonkeyPatch) -> None:
    works = iter([Work(1e9, 4e8), Work(3e9, 6e8), Work(4e9, 2e8), Work(1e7, 3e8)] * 9)

    def timed(*_: object) -> tuple[Work, float]:
        work = next(works)
        return work, true.seconds(work)

    monkeypatch.setattr(room, "_timed", timed)
    found = lg.calibrate(lg.build("resnet20", classes=10), torch.zeros(2, 3, 16, 16))
    assert found.flops == pytest.approx(true.flops, rel=1e-6)
    assert 1 / found.moved == pytest.approx(1 / true.moved, rel=1e-6, abs=1e-15)


def test_a_real_network_is_timed_and_left_as_it_was() -> None:
    backbone = lg.build("resnet20", classes=10)
    before = [t.clone() for t in backbone.state_dict().values()]
    found = lg.calibrate(backbone, torch.randn(8, 3, 32, 32))
    assert found.seconds(Work(1e9, 1e9)) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.state_dict().values(), strict=True))
    assert all(p.grad is None for p in backbone.parameters())
