"""Calibration: speeds that are positive and explain times that follow from them."""

from __future__ import annotations

import pytest
import torch

import localgrad as lg
from localgrad.scale import speed as room
from localgrad.scale.costs import Work


def test_a_time_is_arithmetic_and_bytes_moved_and_calls() -> None:
    assert lg.Speed(2.0, 4.0, 3.0).seconds(Work(6, 8, 2)) == 11


@pytest.mark.parametrize(
    "true", [lg.Speed(1e11, 1e10, 0.0), lg.Speed(1e12, 3e9, 1e-4), lg.Speed(3e10, float("inf"), 1e-5)], ids=str
)
def test_the_speed_behind_the_times_is_found(true: lg.Speed, monkeypatch: pytest.MonkeyPatch) -> None:
    works = iter([Work(1e9, 4e8, 9), Work(3e9, 6e8, 20), Work(4e9, 2e8, 12), Work(1e7, 3e8, 7), Work(2e8, 1e7, 30)] * 9)

    def timed(*_: object) -> list[list[tuple[Work, float]]]:
        return [[(work, true.seconds(work)) for work in (next(works), next(works))] for _ in range(2)]

    monkeypatch.setattr(room, "_timed", timed)
    found = lg.calibrate(lg.build("resnet20", classes=10), torch.zeros(2, 3, 16, 16))
    assert found.flops == pytest.approx(true.flops, rel=1e-6)
    assert 1 / found.moved == pytest.approx(1 / true.moved, rel=1e-6, abs=1e-15)
    assert found.call == pytest.approx(true.call, abs=1e-12)
    assert set(found.factors) == set(lg.units(lg.build("resnet20", classes=10), torch.zeros(2, 3, 16, 16)))
    assert all(factor == pytest.approx(1) for ways in found.factors.values() for factor in ways)


def test_what_a_unit_took_longer_than_its_work_says_is_its_own_factor() -> None:
    planner = lg.Planner(lg.build("resnet20", classes=10), torch.zeros(2, 3, 16, 16), method=lg.bp())
    slow = lg.Speed(factors={"layer1.0": (3.0, 2.0)})
    forward, backward = planner.costs.units[0][1].seconds
    found = slow.timed(planner.costs).units[0]
    assert found[1].seconds == (3 * forward, 2 * backward)
    assert found[2].seconds == planner.costs.units[0][2].seconds


def test_a_real_network_is_timed_and_left_as_it_was() -> None:
    backbone = lg.build("resnet20", classes=10)
    before = [t.clone() for t in backbone.state_dict().values()]
    found = lg.calibrate(backbone, torch.randn(8, 3, 32, 32))
    assert found.seconds(Work(1e9, 1e9)) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.state_dict().values(), strict=True))
    assert all(p.grad is None for p in backbone.parameters())
