"""Averages beside their sources: how far they are, and how far behind."""

from __future__ import annotations

import pytest
import torch
from small import ALL, MOMENTUM, auxiliaries, averages_of, batch, build, coupling_of, resnet

import localgrad as lg


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(("lag", "every"), [(1, 1), (3, 1), (0, 2), (1, 3), (5, 2)])
def test_a_lagging_average_follows_the_source_of_so_many_steps_ago(make: type[lg.MAN], lag: int, every: int) -> None:
    coupling = make(momentum=MOMENTUM, lag=lag, ema_every=every)
    model = build(coupling)
    auxiliary = auxiliaries(model)[0]
    source = coupling_of(auxiliary).sources[0].module
    history = [[p.detach().clone() for p in source.parameters()]]
    naive = history[0]
    for n in range(9):
        if n == 4:  # what a run that goes on has loaded
            restored = build(coupling)
            restored.load_state_dict(model.state_dict())
            model, auxiliary = restored, auxiliaries(restored)[0]
            source = coupling_of(auxiliary).sources[0].module
        coupling_of(auxiliary).update()
        old = history[max(0, n - lag) // every * every]
        naive = [MOMENTUM * a + (1 - MOMENTUM) * s for a, s in zip(naive, old, strict=True)]
        averaged = averages_of(auxiliary)[0][0]
        torch.testing.assert_close([p.detach() for p in averaged.parameters()], naive, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            for p in source.parameters():
                p.mul_(1.1).add_(0.2)
        history.append([p.detach().clone() for p in source.parameters()])
    assert not any(p.requires_grad for p in coupling_of(auxiliary).snapshots.parameters())
    assert not {id(p) for p in coupling_of(auxiliary).snapshots.parameters()} & {
        id(p) for group in lg.param_groups(model) for p in group["params"]
    }


@pytest.mark.parametrize("make", ALL)
def test_the_distance_is_that_of_all_averaged_parameters(make: type[lg.MAN]) -> None:
    model = build(make())
    assert model.ema_distances() == [0, 0, 0]  # copies start at their sources
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.mul_(3).add_(0.1)
    for auxiliary, found in zip(auxiliaries(model), model.ema_distances(), strict=True):
        sides = zip(*averages_of(auxiliary), strict=True)
        a, s = (torch.cat([p.flatten() for m in side for p in m.parameters()]) for side in sides)
        assert found == pytest.approx(float(((a - s).norm() / s.norm()).detach()), rel=1e-5)


def test_without_an_average_there_is_no_distance() -> None:
    assert build(lg.MAN(ema=False)).ema_distances() == [None] * 3
    uncoupled = lg.localize(resnet(20), blocks=2, method=lg.dgl(), example=batch()[0])
    assert uncoupled.ema_distances() == [None]
    pulled = build(lg.MAN(form="pull"))
    assert pulled.ema_distances() == [0, 0, 0]
