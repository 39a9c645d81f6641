"""What ranks of a pipeline agree on, without the ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import localgrad as lg
from localgrad.core.errors import RunError, UserError
from localgrad.run import data as data_room
from localgrad.run import stages
from localgrad.run.build import build_model, machine_for
from localgrad.run.recipe import Recipe, Saving
from localgrad.run.runlog import Done
from localgrad.run.stages import Meetings, advice, stage_of
from localgrad.run.step import Stepper
from localgrad.scale.memory import PeakBytes
from localgrad.scale.replicas import Ranks

RECIPE = Recipe(model="resnet20", limit_train=64, batch_size=16, precision="float32", step_as_you_go=True)


class TwoRanks(Ranks):
    """The first of two, of which the second always has the same to say."""

    def gathered(self, value: Any) -> list[Any]:
        theirs = [([3.0, 4.0], [{"classifier": 3.0}, {}], 50.0, 16)] * len(value[0])
        return [value, (theirs, 900, 12345)]


def meetings(save_every: str = "600s") -> tuple[Meetings, Stepper]:
    stepper = SimpleNamespace(step=7, peak=PeakBytes(100, timeline=[("block 1", 5)]))
    stage = SimpleNamespace(ranks=TwoRanks(0, 2))
    return Meetings(cast(lg.Stage, stage), Saving(save_every=save_every)), cast(Stepper, stepper)


def test_a_meeting_puts_the_ranks_steps_together() -> None:
    meeting, stepper = meetings()
    mine = [Done([1.0, 2.0 + i], [{"classifier": torch.tensor(1.0)}, {"classifier": torch.tensor(2.0)}], 0.0, 16)
            for i in range(2)]  # fmt: skip
    first, second = meeting.told(mine, stepper, 0)
    assert (first.losses, first.top1, first.images) == ([1.0, 2.0, 3.0, 4.0], 50.0, 16)
    assert first.parts == [*({"classifier": float(i)} for i in (1, 2, 3)), {}]
    assert second.losses == [1.0, 3.0, 3.0, 4.0]
    assert stepper.peak == PeakBytes(900, timeline=[("block 1", 5)])  # the fattest rank's


def test_the_first_rank_says_when_to_meet_next() -> None:
    meeting, stepper = meetings()
    assert meeting.due(1)
    meeting.told([], stepper, 0)
    assert not meeting.due(7 + 19)
    assert meeting.due(10**9)
    meeting, stepper = meetings("5")
    for saved, then in ((5, 10), (2, 12)):  # the last step that was saved; in the second case it is due now
        meeting.told([], stepper, saved)
        assert not meeting.due(then - 1)
        assert meeting.due(then)


def test_a_run_that_goes_on_knows_how_long_its_steps_take() -> None:
    """From those of this start: of the many before them it has not seen the time."""
    meeting, stepper = meetings()
    meeting._since -= 2.0
    stepper.step = 10**6
    meeting.told([Done([1.0], [{}], 0.0, 16)], stepper, 10**6)
    assert not meeting.due(10**6 + 19)
    assert meeting.due(10**6 + 20)


def test_advice_is_given_where_ranks_would_wait() -> None:
    stage = cast(lg.Stage, SimpleNamespace(shares=(3, 1), hops=1))
    alone = cast(lg.Stage, SimpleNamespace(shares=(3, 1), hops=0))  # what averages follow is on the same rank
    assert advice(RECIPE, alone) == ["pipeline: 3 + 1 blocks"]
    assert advice(replace(RECIPE, lag=2), stage) == ["pipeline: 3 + 1 blocks"]
    waits = "with --lag 0 ranks wait for the EMA's sources; they need not with --lag 2"
    assert advice(RECIPE, stage) == ["pipeline: 3 + 1 blocks", waits]


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
    machine, data = machine_for(RECIPE), data_room.load("digits", limit_train=64)
    with pytest.raises(UserError, match=says):
        stage_of(replace(RECIPE, **changes), build_model(RECIPE, data, machine), machine, Ranks(0, count), 16)


def test_memory_that_runs_out_as_blocks_are_timed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")

    machine, data = machine_for(RECIPE), data_room.load("digits", limit_train=64)
    monkeypatch.setattr(stages, "block_seconds", full)
    with pytest.raises(RunError, match="out of memory as rank 1 timed the blocks"):
        stage_of(RECIPE, build_model(RECIPE, data, machine), machine, Ranks(1, 2), 16)


def test_labels_alone_are_those_of_the_batches() -> None:
    data = data_room.load("digits", limit_train=70)
    which: dict[str, Any] = {"batch_size": 16, "seed": 3, "epoch": 2, "start": 1}
    labels = [y for _, y in data_room.train_batches(data, **which)]
    alone = list(data_room.train_labels(data, **which))
    assert len(alone) == 3
    assert all(torch.equal(a, b) for a, b in zip(labels, alone, strict=True))
