"""A pipeline of two ranks against one process that steps as it goes, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import on_ranks
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError

LONG, SHORT = 50, 12  # steps
LAG = 2
CASES: dict[str, tuple[int, Any, Any]] = {  # blocks, method, coupling
    "dgl 4": (4, lg.dgl, None),
    "dgl 8": (8, lg.dgl, None),
    "predsim 4": (4, lg.predsim, None),
    "infopro 4": (4, lg.infopro, None),
    "man 4": (4, partial(lg.dgl, "0c1f"), partial(lg.MAN, 0.9, lag=LAG)),
    "man 8": (8, partial(lg.dgl, "0c1f"), partial(lg.MAN, 0.9, lag=LAG)),
    "man++ 4": (4, partial(lg.dgl, "0c1f"), partial(lg.MANPlusPlus, 0.9, lag=LAG)),
    "man++ 4 without lag": (4, partial(lg.dgl, "0c1f"), partial(lg.MANPlusPlus, 0.9)),
    "man 4 of two units": (4, partial(lg.dgl, "0c1f"), partial(lg.MAN, 0.9, learnable_units=2, buffers=True, lag=1)),
    "man 4 every 3": (4, partial(lg.dgl, "0c1f"), partial(lg.MAN, 0.9, lag=LAG, ema_every=3)),
    "man 4 every 2 without lag": (4, partial(lg.dgl, "0c1f"), partial(lg.MAN, 0.9, ema_every=2)),
    "deep-man 8": (8, lg.dgl, partial(lg.DeepMAN, 0.9, lag=3)),
    "deep-man 8 every 2": (8, lg.dgl, partial(lg.DeepMAN, 0.9, lag=5, ema_every=2)),
}
SHARES = {4: (1, 3), 8: (5, 3)}
STOPS = (1, 7)  # steps after which a run moves


class Follows(nn.Module):
    """Keeps a statistic of its own, behind the cut."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.register_buffer("mean", torch.zeros(12))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        return self.head(x)


class Shares(Follows):
    """Reads one parameter everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) * torch.tanh(self.table)
        return self.head(x)


class Tokens(nn.Module):
    """Hands on tokens whose channels lie first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean(1))


NETWORKS = {"follows": (Follows, (12,)), "tokens": (Tokens, (3, 8, 8))}  # with the shape of an image


def model_of(case: str) -> lg.LocalModel:
    torch.manual_seed(0)
    if case in NETWORKS:
        make, shape = NETWORKS[case]
        return lg.localize(make(), blocks=4, method=lg.dgl("0c1f"), example=torch.zeros(2, *shape))
    blocks, method, coupling = CASES[case]
    torch.manual_seed(0)
    backbone = lg.build("resnet20", classes=10).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.zeros(2, 3, 8, 8)
    model = lg.localize(backbone, blocks=blocks, method=method(), coupling=coupling and coupling(), example=x)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def batches(case: str) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    if case in NETWORKS:
        return [(torch.randn(4, *NETWORKS[case][1]), torch.randint(10, (4,))) for _ in range(SHORT)]
    steps = LONG if case in ("dgl 4", "dgl 8", "man 4", "man 8") else SHORT
    return [
        (torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.randint(10, (4,)))
        for _ in range(steps)
    ]


class Loop:
    """Steps through a case's batches, on one process or, with `shares`, as a rank of a pipeline."""

    def __init__(self, case: str, shares: tuple[int, ...] = ()) -> None:
        self.case, self.model = case, model_of(case)
        with torch.no_grad():  # a first state that is not that of `localize`
            next(self.model.blocks[-1].parameters()).mul_(1.1)
        self.stage = lg.Stage(self.model, shares) if shares else None
        blocks = self.stage.blocks if self.stage else range(len(self.model.blocks))
        # Without momentum, as this has no checkpoint of optimizers.
        self.optimizers = {k: torch.optim.SGD(self.model.members(k), lr=0.05, weight_decay=1e-4) for k in blocks}
        self.losses: list[list[float]] = []

    def run(self, first: int = 0, end: int | None = None) -> None:
        for x, y in batches(self.case)[first:end]:
            if self.stage is None:
                steps = lg.block_steps(self.model, x, y)
            else:
                steps = self.stage.block_steps(x if self.stage.reads_images else None, y)
            losses = []
            for done in steps:
                self.model.move_averages(done.block)
                self.optimizers[done.block].step()
                self.optimizers[done.block].zero_grad()
                losses.append(float(done.loss))
            assert len(losses) == len(self.optimizers)
            self.losses.append(losses)

    def state(self) -> dict[str, Tensor]:
        """All that training changes, as one process has it."""
        if self.stage is not None:
            self.stage.gather()
        return {name: t.clone() for name, t in self.model.state_dict().items()}


def refused() -> list[str]:
    said = []
    for shares in ((2, 1), (4, 0)):
        with pytest.raises(UserError) as told:
            lg.Stage(model_of("dgl 4"), shares)
        said.append(str(told.value))
    x = batches("dgl 4")[0][0]
    pull = lg.localize(
        lg.build("resnet20", classes=10), blocks=4, method=lg.dgl(), coupling=lg.MAN(form="pull"), example=x
    )
    shared = lg.localize(Shares(), blocks=4, method=lg.dgl("0c1f"), example=torch.zeros(2, 12))
    for model in (pull, shared):
        with pytest.raises(UserError) as told:
            lg.Stage(model, (2, 2))
        said.append(str(told.value))
    return said


def piped(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"refused": refused(), "moved": there_and_back(place)}
    for case in [*CASES, *NETWORKS]:
        loop = Loop(case, SHARES[CASES.get(case, (4,))[0]])
        loop.run()
        found[case] = {"state": loop.state(), "losses": torch.tensor(loop.losses)}
        assert loop.stage is not None
        loop.stage.finish()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, before: dict[str, Any]) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("ranks")
    torch.save(before, place / "before.pt")
    return on_ranks(piped, place, place / "before.pt")


@pytest.mark.parametrize("case", [*CASES, *NETWORKS])
def test_a_pipeline_is_one_process_that_steps_as_it_goes(case: str, trained: list[dict[str, Any]]) -> None:
    alone = Loop(case)
    alone.run()
    for rank in trained:
        assert unlike(rank[case]["state"], alone.state()) == []
    assert torch.equal(torch.cat([rank[case]["losses"] for rank in trained], 1), torch.tensor(alone.losses))
    assert any("ema" in name for name in alone.state()) == ("man" in case)


def unlike(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


MOVED = ("man++ 4", "man++ 4 without lag", "deep-man 8 every 2")


def there_and_back(place: Path) -> dict[str, Any]:
    """A pipeline goes on from where one process was, and gives what one process goes on from."""
    before = torch.load(place, weights_only=True)
    found: dict[str, Any] = {}
    for case in MOVED:
        for stop in STOPS:
            loop = Loop(case, SHARES[CASES.get(case, (4,))[0]])
            assert loop.stage is not None
            loop.model.load_state_dict(before[case][stop])
            loop.stage.go_on(stop)
            loop.run(stop, stop + 1)
            loop.state()  # a checkpoint, after which it goes on
            loop.run(stop + 1, stop + 3)
            found[f"{case} {stop}"] = loop.state()
            loop.stage.finish()
    return found


@pytest.fixture(scope="module")
def before() -> dict[str, dict[int, dict[str, Tensor]]]:
    """The states of one process after each step."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for case in MOVED:
        alone, found[case] = Loop(case), {}
        for step in range(max(STOPS) + 4):
            found[case][step] = alone.state()
            alone.run(step, step + 1)
    return found


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("case", MOVED)
def test_a_run_moves_between_one_process_and_a_pipeline(
    case: str, stop: int, trained: list[dict[str, Any]], before: dict[str, dict[int, dict[str, Tensor]]]
) -> None:
    for rank in trained:
        assert unlike(rank["moved"][f"{case} {stop}"], before[case][stop + 3]) == []


def three() -> dict[str, Tensor]:
    loop = Loop("deep-man 8", shares=(2, 3, 3))
    loop.run()
    state = loop.state()
    assert loop.stage is not None
    loop.stage.finish()
    return state


def test_averages_follow_units_of_all_later_ranks(tmp_path_factory: pytest.TempPathFactory) -> None:
    alone = Loop("deep-man 8")
    alone.run()
    for state in on_ranks(three, tmp_path_factory.mktemp("ranks"), count=3):
        assert unlike(state, alone.state()) == []


def test_the_lag_shows() -> None:
    """Else the cases with and without one would test the same."""
    states = []
    for case in ("man++ 4", "man++ 4 without lag"):
        alone = Loop(case)
        alone.run()
        states.append(alone.state())
    with_lag, without = states
    assert any(not torch.equal(with_lag[name], without[name]) for name in without)


def test_what_cannot_be_a_pipeline_is_refused(trained: list[dict[str, Any]]) -> None:
    said = [
        "shares [2, 1] do not deal 4 blocks out to 2 ranks",
        "shares [4, 0] do not deal 4 blocks out to 2 ranks",
        'form="pull" follows its sources at once, which lie on another rank: take branches',
        "blocks 0 and 2 read the same parameters, which ranks of a pipeline cannot share: put them on one rank, with "
        "fewer blocks or ranks",
    ]
    assert [rank["refused"] for rank in trained] == [said, said]
    assert (lg.least_lag(), lg.least_lag(0), lg.least_lag(3)) == (2, 0, 6)
