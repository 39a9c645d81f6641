"""What ranks of a pipeline agree on, without the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import localgrad as lg
from localgrad.core.errors import RunError, UserError
from localgrad.run import data as datasets
from localgrad.run import modes
from localgrad.run.build import build_model, machine_for
from localgrad.run.modes import Alone, Pipeline, mode_for, stage_for
from localgrad.run.recipe import Recipe, Saving
from localgrad.run.runlog import StepRecord
from localgrad.scale.groups import Ranks
from localgrad.scale.held import Held

RECIPE = Recipe(model="resnet8", limit_train=64, batch_size=16, precision="float32", step_as_you_go=True)
TARGETS = torch.zeros(16, dtype=torch.int64)


def made(recipe: Recipe) -> Callable[[], lg.LocalModel]:
    return partial(build_model, recipe, datasets.load("digits", limit_train=64), machine_for(recipe))


class TwoRanks(Ranks):
    """The first of two, of which the second always has the same to say."""

    def all_gather_object(self, value: Any) -> list[Any]:
        theirs = [([3.0, 4.0], [{"classifier": 3.0}, {}], 50.0, 16)] * len(value[0])
        return [value, (theirs, 900, 12345)]


def stage(**known: Any) -> lg.Stage:
    given = {"model": SimpleNamespace(blocks=[0, 1, 2, 3]), "blocks": range(2), "reads_images": True, **known}
    return cast(lg.Stage, SimpleNamespace(**given))


def pipeline(save_every: str = "600s", **known: Any) -> Pipeline:
    own = stage(**known)
    return Pipeline(own, Alone(own.model, Ranks()), TwoRanks(0, 2), Saving(save_every=save_every))


def test_the_records_of_all_ranks_are_put_together() -> None:
    mine = [StepRecord([1.0, 2.0 + i], [{"classifier": torch.tensor(1.0)}, {"classifier": torch.tensor(2.0)}], 0.0, 16)
            for i in range(2)]  # fmt: skip
    (first, second), peak = pipeline().merge(mine, 100, step=7, since_save=7)
    assert (first.losses, first.score, first.images) == ([1.0, 2.0, 3.0, 4.0], 50.0, 16)
    assert first.parts == [*({"classifier": float(i)} for i in (1, 2, 3)), {}]
    assert second.losses == [1.0, 3.0, 3.0, 4.0]
    assert peak == 900  # of the rank that needs the most


def test_the_first_rank_says_when_to_synchronise_next() -> None:
    mode = pipeline()
    assert mode.is_sync_due(1)
    mode.merge([], 100, step=7, since_save=7)
    assert not mode.is_sync_due(7 + 19)
    assert mode.is_sync_due(10**9)
    mode = pipeline("5")
    for saved, then in ((5, 10), (2, 12)):  # the last step that was saved; in the second case it is due now
        mode.merge([], 100, step=7, since_save=7 - saved)
        assert not mode.is_sync_due(then - 1)
        assert mode.is_sync_due(then)


def test_a_run_that_goes_on_knows_how_long_its_steps_take() -> None:
    """From those of this start: of the many before them it has not seen the time."""
    mode = pipeline()
    mode._last_sync -= 2.0
    mode.merge([StepRecord([1.0], [{}], 0.0, 16)], 100, step=10**6, since_save=0)
    assert not mode.is_sync_due(10**6 + 19)
    assert mode.is_sync_due(10**6 + 20)


def test_notes_tell_where_ranks_would_wait() -> None:
    alone, waiting = (pipeline(shares=(3, 1), hops=hops) for hops in (0, 1))  # 0: averages follow units of their rank
    assert alone.notes(RECIPE) == ["pipeline: 3 + 1 blocks"]
    assert waiting.notes(replace(RECIPE, lag=2)) == ["pipeline: 3 + 1 blocks"]
    waits = "with --lag 0 ranks wait for the EMA's sources; they need not with --lag 2"
    assert waiting.notes(RECIPE) == ["pipeline: 3 + 1 blocks", waits]


def test_alone_is_what_all_modes_share() -> None:
    """Each mode has the interface of the plainest one, and one process alone exchanges nothing."""
    how: Any = {"share": "batches", "stages": 1, "targets": TARGETS}
    mode = mode_for(RECIPE, made(RECIPE), machine_for(RECIPE), Ranks(), Saving(), **how)
    assert type(mode) is Alone
    assert (mode.blocks, mode.shard, mode.replicas, mode.notes(RECIPE)) == (range(4), (0, 1), 1, [])
    record = StepRecord([1.0], [{}], 0.0, 16)
    assert mode.merge([record], 100, step=1, since_save=1) == ([record], 100)
    assert (mode.total([1.0, 2.0], torch.device("cpu")), mode.gather_states([3])) == ([1.0, 2.0], [3])


@pytest.mark.parametrize(
    ("changes", "count", "says"),
    [
        ({"step_as_you_go": False}, 2, "add --step-as-you-go"),
        ({"precision": "fp16"}, 2, "bf16 or float32"),
        ({"method": "bp", "coupling": "none", "blocks": "1"}, 2, "take another --method than bp"),
        ({}, 5, "4 blocks cannot be dealt out to 5 ranks"),
    ],
)
def test_what_no_pipeline_can_follow_is_refused(changes: dict[str, Any], count: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        stage_for(replace(RECIPE, **changes), Held(made(RECIPE)), machine_for(RECIPE), Ranks(0, count), TARGETS, count)


def test_memory_that_runs_out_as_blocks_are_timed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(modes, "block_seconds", full)
    with pytest.raises(RunError, match="out of memory as rank 1 timed the blocks"):
        stage_for(RECIPE, Held(made(RECIPE)), machine_for(RECIPE), Ranks(1, 2), TARGETS, 2)


def test_labels_alone_are_those_of_the_batches() -> None:
    data = datasets.load("digits", limit_train=70)
    which: dict[str, Any] = {"batch_size": 16, "seed": 3, "epoch": 2, "start": 1}
    labels = [y for _, y in datasets.train_batches(data, **which)]
    alone = list(datasets.train_labels(data, **which))
    assert len(alone) == 3
    assert all(torch.equal(a, b) for a, b in zip(labels, alone, strict=True))
