"""A pipeline of three ranks against one process that steps as it goes, bit for bit."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale import deferred

GREEDY, LAG = partial(lg.dgl, "0c1f"), 2
WORDS = 20
CASES: dict[str, tuple[int, Any, Any]] = {  # blocks, method, coupling
    "infopro": (4, lg.infopro, None),
    "man++": (4, GREEDY, partial(lg.MANPlusPlus, 0.9, lag=LAG)),
    "man++ without lag": (4, GREEDY, partial(lg.MANPlusPlus, 0.9)),
    "man of two units": (4, GREEDY, partial(lg.MAN, 0.9, learnable_units=2, buffers=True, lag=1)),
    "man every 3": (4, GREEDY, partial(lg.MAN, 0.9, lag=LAG, ema_every=3)),
    "deep-man every 2": (4, lg.dgl, partial(lg.DeepMAN, 0.9, lag=5, ema_every=2)),
    "man, frozen": (4, GREEDY, partial(lg.MAN, 0.9, lag=LAG)),  # The first rank has nothing to train.
}
LONG: dict[str, tuple[int, Any, Any]] = {
    "dgl, long": (4, lg.dgl, None),
    "dgl 8, long": (8, lg.dgl, None),
    "predsim, long": (4, lg.predsim, None),
    "man 8, long": (8, GREEDY, partial(lg.MAN, 0.9, lag=LAG)),
    "man every 2 without lag, long": (4, GREEDY, partial(lg.MAN, 0.9, ema_every=2)),
    "deep-man 8, long": (8, lg.dgl, partial(lg.DeepMAN, 0.9, lag=3)),
}
SHARES = {4: (2, 1, 1), 8: (3, 2, 3)}
MOVED, STOPS = ("man++", "man++ without lag", "deep-man every 2"), (1, 7)  # Runs that move after so many steps.
STEPS, MANY = max(STOPS) + 3, 50


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


class UNet(nn.Module):
    """Hands the maps of its first two layers on to the last ones, past the layers between."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 6), (6, 6), (6, 6), (6, 6), (12, 6), (12, 6))
        self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in sizes)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth, sixth = self.layers
        kept = [early := torch.relu(first(x)), later := torch.relu(second(F.max_pool2d(early, 2)))]
        x = torch.relu(fourth(torch.relu(third(F.max_pool2d(later, 2)))))
        for layer in (fifth, sixth):
            x = torch.relu(layer(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1)))
        return self.head(x.mean((2, 3)))


def gpt2(*, tied: bool) -> nn.Module:
    """GPT-2 without dropout, whose random numbers each rank would draw by itself."""
    from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": WORDS, "n_positions": 8}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**config, tie_word_embeddings=tied))


def texts() -> dict[str, Tensor]:
    """Four texts, one of which is shorter, with the next words as labels."""
    words = torch.randint(WORDS, (4, 9))
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": words[:, :-1], "attention_mask": mask, "labels": words[:, 1:]}


def next_words(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def language_model(*, tied: bool, coupling: lg.MAN | None = None) -> lg.LocalModel:
    how: dict[str, Any] = {"coupling": coupling, "example": texts(), "criterion": next_words}
    return lg.localize(gpt2(tied=tied), blocks=4, method=GREEDY(), **how)


# Each with the shape of an image.
NETWORKS = {"follows": (Follows, (12,)), "tokens": (Tokens, (3, 8, 8)), "u-net": (UNet, (3, 8, 8))}
LANGUAGE = {"gpt-2": None, "gpt-2 and man": lg.MAN(0.9, lag=LAG)} if find_spec("transformers") else {}


def network(case: str) -> nn.Module:
    backbone = lg.CifarResNet(20 if case in LONG else 8)
    return backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def model_of(case: str) -> lg.LocalModel:
    torch.manual_seed(0)
    if case in LANGUAGE:
        return language_model(tied=False, coupling=LANGUAGE[case])
    if case in NETWORKS:
        make, shape = NETWORKS[case]
        return lg.localize(make(), blocks=4, method=GREEDY(), example=torch.zeros(2, *shape))
    blocks, method, coupling = (CASES | LONG)[case]
    backbone = network(case)
    for name in ("conv1", "bn1", "layer1") if "frozen" in case else ():
        backbone.get_submodule(name).requires_grad_(False)
    x = torch.zeros(2, 3, 8, 8)
    model = lg.localize(backbone, blocks=blocks, method=method(), coupling=coupling and coupling(), example=x)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def batches(case: str) -> list[tuple[Any, Any]]:
    torch.manual_seed(1)
    if case in LANGUAGE:
        return [(texts(), None) for _ in range(STEPS)]
    shape = NETWORKS[case][1] if case in NETWORKS else (3, 8, 8)
    found = [(torch.randn(4, *shape), torch.randint(10, (4,))) for _ in range(MANY if case in LONG else STEPS)]
    return found if len(shape) == 1 else [(x.contiguous(memory_format=torch.channels_last), y) for x, y in found]


def sgd(members: list[nn.Parameter]) -> torch.optim.Optimizer:
    """It takes the members of a wholly frozen block, too, which are none."""
    return torch.optim.SGD([{"params": members}], lr=0.05, weight_decay=1e-4)


def changed(case: str) -> lg.LocalModel:
    """The model of a case, in a first state that differs from that of `localize`."""
    model = model_of(case)
    with torch.no_grad():
        next(model.blocks[-1].parameters()).mul_(1.1)
    return model


class Loop:
    """Steps through a case's batches, on one process or as a rank of a pipeline."""

    def __init__(self, case: str, *, piped: bool) -> None:
        self.case, self.stage = case, None
        if piped:
            self.stage = lg.Stage(lambda: changed(case), SHARES[8 if "8" in case else 4])
        self.model = self.stage.model if self.stage else changed(case)
        blocks = self.stage.blocks if self.stage else range(len(self.model.blocks))
        # Without momentum, because this loop has no checkpoint of optimizers.
        self.optimizers = {k: sgd(self.model.members(k)) for k in blocks}
        self.losses: list[list[float]] = []

    def run(self, first: int = 0, end: int | None = None) -> None:
        for x, y in batches(self.case)[first:end]:
            if self.stage is None:
                steps = lg.block_steps(self.model, x, y)
            else:
                steps = self.stage.block_steps(x if self.stage.reads_images or y is None else None, y)
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
        with self.stage.gathered() if self.stage else contextlib.nullcontext():
            return {name: t.clone() for name, t in self.model.state_dict().items()}


@cache
def alone(case: str) -> tuple[list[dict[str, Tensor]], Tensor, Loop]:
    """One process: its state before each step and at the end, its losses, and its loop."""
    loop = Loop(case, piped=False)
    states = [loop.state()]
    for step in range(len(batches(case))):
        loop.run(step, step + 1)
        states.append(loop.state())
    return states, torch.tensor(loop.losses), loop


# On the ranks


def piped(cases: Sequence[str]) -> dict[str, Any]:
    deferred.SMALL = 1  # All numbers of these small networks come later.
    found = {}
    for case in cases:
        loop = Loop(case, piped=True)
        assert loop.stage is not None
        before = held(loop.model)
        loop.run()
        found[case] = {"state": loop.state(), "losses": torch.tensor(loop.losses), "held": before}
        loop.stage.finish()
        found[case] |= {"output": seen(loop), "saved": loop.stage.state_dict()}
        if case == "follows":  # In evaluation mode it leaves its statistic alone, which its blocks would move.
            loop.model.eval()
            with pytest.raises(UserError, match="Follows takes other steps in evaluation mode than in training"):
                loop.stage.forward(batches(case)[0][0])
        found[case]["distances"] = [-1.0 if d is None else d for d in loop.stage.ema_distances()]
        assert held(loop.model) == before
    return found


def held(model: lg.LocalModel) -> list[str]:
    """The names of the tensors that this rank holds."""
    return [name for name, tensor in model.state_dict().items() if not tensor.is_meta]


def seen(loop: Loop) -> Tensor | None:
    """What the network gives for the first batch in an evaluation, where there is one."""
    x, _ = batches(loop.case)[0]
    loop.model.eval()
    with torch.no_grad():
        if loop.stage and loop.case != "follows":
            output = loop.stage.forward(x)
        elif loop.stage:
            with loop.stage.gathered():
                output = loop.model(x) if loop.stage.ranks.rank == 2 else None
        else:
            output = loop.model(**x) if isinstance(x, dict) else loop.model(x)
    loop.model.train()
    return output["logits"] if isinstance(output, dict) else output


def there_and_back(file: Path) -> dict[str, Any]:
    """A pipeline resumes where one process was, and returns what one process would resume from."""
    deferred.SMALL = 1
    found: dict[str, Any] = {}
    for (case, stop), before in torch.load(file, weights_only=True).items():
        loop = Loop(case, piped=True)
        assert loop.stage is not None
        loop.stage.load_state_dict(before)
        loop.stage.go_on(stop)
        loop.run(stop, stop + 1)
        loop.state()  # A checkpoint, after which it goes on.
        loop.run(stop + 1, stop + 3)
        found[f"{case} {stop}"] = loop.state()
        loop.stage.finish()
    return found


def refused() -> list[str]:
    x, said = torch.zeros(2, 3, 8, 8), []
    pull = lg.localize(network("man++"), blocks=4, method=GREEDY(), coupling=lg.MAN(form="pull"), example=x)
    shared = lg.localize(Shares(), blocks=4, method=GREEDY(), example=torch.zeros(2, 12))
    models: list[tuple[Any, tuple[int, ...]]] = [(pull, (2, 1, 1)), (shared, (2, 1, 1))]
    plain = model_of("follows")
    if LANGUAGE:
        models.append((language_model(tied=True), (2, 1, 1)))
    torch.manual_seed(dist.get_rank())
    models.append((lambda: lg.localize(Follows(), blocks=4, method=GREEDY(), example=torch.zeros(2, 12)), (2, 1, 1)))
    for model, shares in ((plain, (2, 1)), (plain, (2, 2, 0)), *models):
        with pytest.raises(UserError) as told:
            lg.Stage(model, shares)
        said.append(str(told.value))
    return said


def linear(coupling: lg.MAN | None = None) -> lg.LocalModel:
    torch.manual_seed(0)
    return lg.localize(Follows(), blocks=4, method=GREEDY(), coupling=coupling, example=torch.zeros(2, 12))


def shares_differ() -> str:
    with pytest.raises(UserError) as told:
        lg.Stage(linear, (2, 1, 1) if dist.get_rank() else (1, 2, 1))
    return str(told.value)


def stepped(stage: lg.Stage, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for done in stage.block_steps(torch.randn(4, 12), torch.randint(10, (4,))):
            stage.model.move_averages(done.block)
            for p in stage.model.members(done.block):
                if p.grad is not None:
                    p.data.sub_(0.1 * p.grad)
                    p.grad = None


def taken_back() -> list[list[str]]:
    """The names of what differs between a run and one of which some steps were taken back, case by case."""
    found = []
    for coupling in (None, lg.MAN(0.5), lg.MAN(0.5, lag=2), lg.MAN(0.5, lag=3, ema_every=2)):
        stages = [lg.Stage(lambda coupling=coupling: linear(coupling), (2, 1, 1)) for _ in range(2)]
        for stage in stages:
            stepped(stage, range(4))
        box = [stages[1].state_dict()]
        dist.broadcast_object_list(box)
        before = {name: t.clone() for name, t in box[0].items()}
        stepped(stages[1], range(10, 13))
        found.append(unlike(box[0], before))  # A state is no part of the model.
        if coupling is not None and coupling.lag:
            fresh = lg.Stage(lambda coupling=coupling: linear(coupling), (2, 1, 1))
            fresh.load_state_dict(box[0])
            with pytest.raises(UserError, match=r"after 4 steps, .* has taken 0: call stage.go_on\(4\)"):
                stepped(fresh, range(1))
        stages[1].load_state_dict(box[0])
        stages[1].go_on(4)
        for stage in stages:
            stepped(stage, range(4, 9))
            stage.finish()
        one, other = (stage.state_dict() for stage in stages)
        found.append(unlike(one, other))
    return found


def beside_others() -> list[list[str]]:
    """Two stages that take turns, and messages of the user's own; then groups that end."""
    stages, rank = [lg.Stage(lambda: linear(lg.MAN(0.5)), (2, 1, 1)) for _ in range(3)], dist.get_rank()
    for step in range(3):
        for stage in stages[:2]:
            stepped(stage, range(step, step + 1))
        own = torch.full((4, 12), 99.0)
        if rank < 2:
            dist.send(own, rank + 1)
        if rank:
            dist.recv(own.zero_(), rank - 1)
        assert own.eq(99).all()
    stepped(stages[2], range(3))
    for stage in stages:
        stage.finish()
    states = [stage.state_dict() for stage in stages]
    with pytest.raises(UserError, match="so no other stage can be made of it: give"):
        lg.Stage(stages[0].model, (1, 1, 2))
    del stage
    tasks = Path("/proc/self/task")  # Linux has a folder there for each thread.
    before = len(list(tasks.iterdir())) if tasks.exists() else 0
    while stages:
        stages.pop().close()
    gc.collect()
    assert not before or len(list(tasks.iterdir())) <= before - 6
    return [unlike(states[2], other) for other in states[:2]]


def all_of_it(file: Path) -> dict[str, Any]:
    more = {call.__name__: call() for call in (shares_differ, taken_back, beside_others)}
    return {"refused": refused(), "moved": there_and_back(file), **more, **piped([*CASES, *NETWORKS, *LANGUAGE])}


# Against one process


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("ranks")
    torch.save({(case, stop): alone(case)[0][stop] for case in MOVED for stop in STOPS}, place / "before.pt")
    return on_ranks(all_of_it, place, place / "before.pt", count=3)


def unlike(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def check(case: str, ranks: list[dict[str, Any]]) -> None:
    states, losses, loop = alone(case)
    for rank in ranks:
        assert unlike(rank[case]["state"], states[-1]) == []
        distances = [-1.0 if d is None else d for d in loop.model.ema_distances()]
        assert rank[case]["distances"] == distances
    assert unlike(ranks[0][case]["saved"], states[-1]) == []
    assert [rank[case]["saved"] for rank in ranks[1:]] == [{}] * (len(ranks) - 1)
    assert [rank[case]["output"] for rank in ranks[:-1]] == [None] * (len(ranks) - 1)
    output = seen(loop)
    assert output is not None
    assert torch.equal(ranks[-1][case]["output"], output)
    assert torch.equal(torch.cat([rank[case]["losses"] for rank in ranks], 1), losses)
    assert any("ema" in name for name in states[-1]) == ("man" in case)


@pytest.mark.parametrize("case", [*CASES, *NETWORKS, *LANGUAGE])
def test_a_pipeline_is_one_process_that_steps_as_it_goes(case: str, trained: list[dict[str, Any]]) -> None:
    check(case, trained)


@pytest.mark.parametrize("case", ["infopro", "man++"])
def test_a_rank_holds_what_it_trains_and_what_its_averages_follow(case: str, trained: list[dict[str, Any]]) -> None:
    model = model_of(case)
    for rank, blocks in zip(trained, (range(2), range(2, 3), range(3, 4)), strict=True):
        parts = [part for k in blocks for part in model.parts(k)]
        for k in (k for k in blocks if k < 3 and model.auxiliaries[k].coupling is not None):
            coupling: Any = model.auxiliaries[k].coupling
            parts += [source.module for source in coupling.sources]
        own = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
        expected = [name for name, t in model.state_dict(keep_vars=True).items() if id(t) in own]
        assert rank[case]["held"] == expected
        assert len(expected) < 0.75 * len(model.state_dict())


def test_steps_that_were_taken_back_leave_nothing(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert rank["taken_back"] == [[]] * 8


def test_a_stage_has_messages_and_groups_of_its_own(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert rank["beside_others"] == [[], []]


@pytest.mark.slow
def test_so_is_a_pipeline_of_many_steps(tmp_path: Path) -> None:
    ranks = on_ranks(piped, tmp_path, list(LONG), count=3)
    for case in LONG:
        check(case, ranks)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("case", MOVED)
def test_a_run_moves_between_one_process_and_a_pipeline(case: str, stop: int, trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert unlike(rank["moved"][f"{case} {stop}"], alone(case)[0][stop + 3]) == []


def test_the_lag_shows() -> None:
    """Otherwise the cases with and without one would test the same."""
    lagging, other = (alone(case)[0][-1] for case in ("man++", "man++ without lag"))
    assert any(not torch.equal(lagging[name], other[name]) for name in other)


def test_what_cannot_be_a_pipeline_is_refused(trained: list[dict[str, Any]]) -> None:
    said = [
        "shares [2, 1] do not deal 4 blocks out to 3 ranks",
        "shares [2, 2, 0] do not deal 4 blocks out to 3 ranks",
        'form="pull" follows its sources at once, which lie on another rank: take branches',
        "blocks 0 and 2 read the same parameters, which ranks of a pipeline cannot share: put them on one rank, with "
        "fewer blocks or ranks, or give each block its own",
    ]
    if LANGUAGE:
        said.append(said[-1].replace("blocks 0 and 2", "blocks 0 and 3"))
    said.append(
        "ranks must make the same model, but have drawn other random numbers: call torch.manual_seed with the same "
        "seed on each rank before"
    )
    assert [rank["refused"] for rank in trained] == [said] * 3
    said_of_shares = "all ranks take the same shares, not [1, 2, 1] and [2, 1, 1]"
    assert [rank["shares_differ"] for rank in trained] == [said_of_shares] * 3
    assert (lg.least_lag(), lg.least_lag(0), lg.least_lag(3)) == (2, 0, 6)
