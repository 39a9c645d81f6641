"""Data parallel over two ranks against one process with both halves of the batch, in float64."""

from __future__ import annotations

import copy
import io
import re
import runpy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from spawned import CASES, on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.language_model import SharedReadout
from localgrad.core.methods import METHODS
from localgrad.scale.groups import Ranks
from localgrad.scale.replicas import Replicas, SyncBatchNorm, _buckets, share_values, sync_batch_norm

STEPS, HALF = 3, 4


def network(*, synced: bool) -> nn.Module:
    """A ResNet-8 in float64, always the same, with or without synchronised batch norms."""
    torch.manual_seed(0)
    backbone = lg.CifarResNet(8).double()
    return sync_batch_norm(backbone) if synced else backbone


def model_of(case: str, *, synced: bool) -> lg.LocalModel:
    method, coupling = CASES[case]
    backbone, x = network(synced=synced), torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)  # Fresh copies draw their weights.
    model = lg.localize(backbone, method=method(), coupling=coupling and coupling(), example=x)
    if synced:  # The heads and decoders have batch norms too.
        sync_batch_norm(model.auxiliaries)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return [(torch.randn(2 * HALF, 3, 8, 8, dtype=torch.float64), torch.randint(10, (2 * HALF,))) for _ in range(STEPS)]


def optimizer_of(model: lg.LocalModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(lg.param_groups(model, weight_decay=1e-4), lr=0.05, momentum=0.9, nesterov=True)


def alone(case: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One process, whole batches."""
    model = model_of(case, synced=False)
    optimizer, losses = optimizer_of(model), []
    for x, y in batches():
        losses.append(torch.stack(lg.local_backward(model, x, y).losses))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), losses


def together() -> dict[str, Any]:
    """What this rank has after the steps on its half of each batch, case by case."""
    found = {}
    rank = dist.get_rank()
    for case in CASES:
        model = model_of(case, synced=True)
        if rank:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)  # the first rank's weights are those that count
        replicas, losses = Replicas(model, bucket=100_000), []
        optimizer = optimizer_of(model)
        for x, y in batches():
            half = slice(rank * HALF, (rank + 1) * HALF)
            model.move_averages(stepped=True)
            done = []
            for block in lg.block_steps(model, x[half], y[half]):
                replicas.start(block.block, block.loss)
                done.append(block.loss)
            replicas.finish()
            model.move_averages()
            losses.append(torch.stack(done))
            optimizer.step()
            optimizer.zero_grad()
        found[case] = {"state": model.state_dict(), "losses": losses}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(all_of_it, tmp_path_factory.mktemp("ranks"))


def all_of_it() -> dict[str, Any]:
    calls = (together, at_the_door, with_units_left_out, with_models_that_differ, said_and_twice, the_example)
    return {call.__name__: call() for call in calls}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_both_halves_and_agree_to_the_bit(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    state, losses = alone(case)
    first, second = (rank["together"][case] for rank in ranks)
    torch.testing.assert_close(first["losses"], losses, rtol=1e-9, atol=1e-9)
    assert first["state"].keys() == state.keys() == second["state"].keys()
    torch.testing.assert_close(first["state"], state, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(first["losses"], second["losses"], strict=True))
    assert any(".ema." in name for name in state) == ("man" in case and "pull" not in case)
    assert set(METHODS) <= {case.split()[0] for case in CASES}


def the_example() -> list[float]:
    """How far the weights of examples/two_processes.py are from those of one process."""
    example, states = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "two_processes.py")), []
    for train in ("alone", "replicas", "shards", "pipeline"):
        SyncBatchNorm.ranks = Ranks() if train == "alone" else None
        states.append(example[train](2))
    torch.set_default_dtype(torch.float32)
    apart = [[float((found[name] - states[0][name]).abs().max()) for name in found] for found in states[1:]]
    return [max(own, default=-1.0) for own in apart]


def test_the_example_of_two_processes_trains_what_one_does(ranks: list[dict[str, Any]]) -> None:
    for rank, nothing in zip(ranks, (0, -1), strict=True):  # A pipeline's weights are on the first rank.
        replicas, shards, pipeline = rank["the_example"]
        assert replicas < 1e-12
        assert shards < 1e-12
        assert pipeline == nothing


def test_a_synchronised_layer_has_the_weights_of_the_plain_one() -> None:
    plain = network(synced=False)
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    synced = sync_batch_norm(plain)
    assert synced is plain
    assert not any(type(m) is nn.BatchNorm2d for m in synced.modules())
    assert synced.state_dict().keys() == state.keys()
    synced.load_state_dict(state)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    wanted = network(synced=False)
    for mode in (True, False):  # Without a process group it is the plain layer.
        assert torch.equal(synced.train(mode)(x), wanted.train(mode)(x))
    assert sum(isinstance(m, SyncBatchNorm) for m in synced.modules()) == 7 + 2  # One a layer, and two in shortcuts.


class Scaled(nn.BatchNorm2d):
    """Does more than a batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_a_layer_does_after_its_norm_is_kept_or_refused() -> None:
    plain, synced = (lg.build("timm:mobilenetv3_small_050", classes=10) for _ in range(2))
    state = plain.state_dict()
    synced.load_state_dict(state)
    sync_batch_norm(synced)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synced.modules())
    assert list(synced.state_dict()) == list(state)
    x = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        assert torch.equal(synced.train(mode)(x), plain.train(mode)(x))
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Scaled(3)))
    with pytest.raises(UserError, match=r"'1\.0' is a Scaled, which does more than a batch norm"):
        sync_batch_norm(network)
    assert type(network[0]) is nn.BatchNorm2d


def test_buckets_keep_order_and_size_and_dtype() -> None:
    tensors = [torch.zeros(n) for n in (10, 10, 30, 5, 100, 1)]
    assert [[t.numel() for t in group] for group in _buckets(tensors, 4 * 40)] == [[10, 10], [30, 5], [100], [1]]
    mixed = [torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    assert [len(group) for group in _buckets(mixed, 1000)] == [1, 2]


def test_one_rank_needs_no_group() -> None:
    ranks = Ranks()
    tensor = torch.ones(2)
    ranks.broadcast([tensor])
    assert (ranks.first, ranks.broadcast_object(3), ranks.all_gather_object("a")) == (True, 3, ["a"])
    assert (ranks.gather_object("a"), ranks.all_reduce_sum([1.5]), ranks.all_reduce_max([1.5])) == (["a"], [1.5], [1.5])


def at_the_door() -> list[torch.Tensor]:
    """Another model is named; a batch of one on each rank is a batch of two to a norm over the ranks; what `Replicas`
    has changed in a model can be pickled."""
    x, y = torch.randn(1, 3, 4, 4), torch.tensor([dist.get_rank()])  # Its last maps have one pixel.
    backbone = lg.sync_batch_norm(lg.CifarResNet(8))
    model = lg.localize(backbone, blocks=2, method=lg.predsim("1c2f"), example=x)
    lg.sync_batch_norm(model.auxiliaries)
    wrapped: Any = DistributedDataParallel(model)
    calls = (
        lambda: lg.local_backward(wrapped, x, y),
        lambda: lg.Replicas(wrapped),
        lambda: lg.Stage(wrapped, (1, 1)),
        lambda: lg.localize(wrapped, method=lg.bp(), example=x),
    )
    for call in calls:
        with pytest.raises(UserError, match="averages nothing of K separate backward passes"):
            call()
    replicas = lg.Replicas(model)
    torch.save(model, io.BytesIO())
    for done in lg.block_steps(model, x, y):
        replicas.start(done.block, done.loss)
    replicas.finish()
    return [cast(Tensor, p.grad) for p in model.parameters() if p.grad is not None]


def test_the_door_stands_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    one, other = (rank["at_the_door"] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def said_and_twice() -> dict[str, Any]:
    """What is said of slips, and the losses of a model that was given to one `Replicas` and to two."""
    found: dict[str, Any] = {"said": []}
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    for case in ("predsim", "infopro contrast"):
        for times in (1, 2):
            model = model_of(case, synced=False).float()
            replicas = [Replicas(model) for _ in range(times)][-1]
            torch.manual_seed(dist.get_rank())
            x = torch.randn(4, 3, 8, 8)
            for done in lg.block_steps(model, x, y):
                replicas.start(done.block, done.loss)
            replicas.finish()
            found[f"{case} {times}"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    done = next(iter(lg.block_steps(model, x, y)))
    number: Any = 0.5
    calls = (
        lambda: replicas.finish(0),
        lambda: replicas.start(0, number),
        lambda: replicas.start(0, done.loss, torch.tensor(3)),
    )
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        found["said"].append(str(error.value))
    return found


def test_a_second_replicas_of_a_model_changes_nothing_and_slips_are_named(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["said_and_twice"]
        for case in ("predsim", "infopro contrast"):
            torch.testing.assert_close(found[f"{case} 2"], found[f"{case} 1"], rtol=0, atol=0)
        assert found["said"][0].startswith("nothing of block 0 is being averaged: call replicas.start(0, loss)")
        assert "averages tensors of floating-point numbers, as done.loss, not float" in found["said"][1]
        assert "averages tensors of floating-point numbers, as done.loss, not torch.int64" in found["said"][2]


def test_replicas_without_a_group_beside_others_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dgl", synced=False)
    Replicas(model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 2, but there is no process group"):
        Replicas(model)


class Units(nn.Module):
    """An embedding of each pixel's sign, and units of which some are left out: all of them have equal sizes."""

    def __init__(self, left_out: tuple[int, ...], *, sparse: bool = False, seldom: torch.dtype | None = None) -> None:
        super().__init__()
        self.signs = nn.Embedding(2, 8, sparse=sparse)
        self.units = nn.Sequential(*[Skipping(i in left_out) for i in range(4)])
        self.head = nn.Linear(8, 10)
        self.unused = nn.Linear(8, 8)
        if seldom is not None:
            self.units[0].a.to(seldom)

    def forward(self, x: Tensor) -> Tensor:
        h = self.signs((x[:, 0] > 0).long()).permute(0, 3, 1, 2)
        return self.head(self.units(h).mean((2, 3)))


class Skipping(nn.Module):
    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skips, self.a, self.b = skips, nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        if self.skips and self.training:
            return h
        return h + self.b(torch.relu(self.a(h.to(self.a.weight.dtype))).to(h.dtype))


LEFT_OUT: dict[str, Any] = {
    "one each": {"left_out": ((1,), (2,))},
    "on one rank alone": {"left_out": ((), (0, 2))},
    "on both": {"left_out": ((1,), (1, 3))},
    "sparse": {"left_out": ((1,), (2,)), "sparse": True},
    "mixed dtypes": {"left_out": ((0,), (3,)), "seldom": torch.float64},
}
CUTS: dict[str, Any] = {"bp": (1, lg.bp, None), "dgl": (2, lg.dgl, None), "man": (2, lg.dgl, lg.MAN)}


def with_units_left_out() -> dict[str, Any]:
    """This rank's gradients before and after the averaging, case by case."""
    found = {}
    rank = dist.get_rank()
    for cut, (blocks, method, coupling) in CUTS.items():
        for case, how in LEFT_OUT.items():
            torch.manual_seed(0)
            x = torch.zeros(2, 3, 8, 8)
            network = Units(how["left_out"][rank], **{n: v for n, v in how.items() if n != "left_out"})
            model = lg.localize(network, blocks=blocks, method=method(), coupling=coupling and coupling(), example=x)
            replicas = Replicas(model, bucket=3000)
            torch.manual_seed(rank)
            halves = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(2)]
            for x, y in halves:
                lg.local_backward(model, x, y)
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            parameters = dict(model.named_parameters())
            own = {n: None if (g := parameters[n].grad) is None else g.to_dense().clone() for n in names}
            model.zero_grad()
            lg.local_backward(model, *halves[0])  # micro-batches: only the last one's gradients travel
            for done in lg.block_steps(model, *halves[1]):
                replicas.start(done.block, done.loss)
            replicas.finish()
            found[f"{cut}, {case}"] = {"own": own, "averaged": {n: parameters[n].grad for n in names}}
    return found


@pytest.mark.parametrize("case", LEFT_OUT)
@pytest.mark.parametrize("cut", CUTS)
def test_a_parameter_that_a_rank_leaves_out_counts_as_zero_there(
    cut: str, case: str, ranks: list[dict[str, Any]]
) -> None:
    found = [rank["with_units_left_out"][f"{cut}, {case}"] for rank in ranks]
    nowhere = 0
    for name, first in found[0]["own"].items():
        both = [g for g in (first, found[1]["own"][name]) if g is not None]
        nowhere += not both
        for rank in found:
            averaged = rank["averaged"][name]
            assert (averaged is None) == (not both), name
            if both:
                torch.testing.assert_close(averaged, sum(both) / 2)  # pyright: ignore[reportArgumentType]
    # The layer that is never used; the unit that both ranks leave out, and its copy in the coupling.
    assert nowhere == 2 + (case == "on both") * (8 if cut == "man" else 4)


def with_models_that_differ() -> dict[str, Any]:
    rank, x, said = dist.get_rank(), torch.zeros(2, 3, 8, 8), {}
    networks = {
        "width": lambda: lg.CifarResNet(20, 10 + rank),
        "depth": lambda: lg.CifarResNet(32 if rank else 20),
        "frozen": lambda: lg.CifarResNet(20).requires_grad_(not rank),
        "dtype": lambda: lg.CifarResNet(20).to(torch.float64 if rank else torch.float32),
        "cut": lambda: lg.CifarResNet(20),
    }
    for case, build in networks.items():
        network = build()
        image = x.to(next(network.parameters()).dtype)
        blocks = ["layer2.0" if rank and case == "cut" else "layer1.2", "layer3.2"]
        model = lg.localize(network, blocks=blocks if case != "depth" else 2, method=lg.dgl("0c1f"), example=image)
        before = [p.clone() for p in model.parameters()]
        for make in (Replicas, lambda model: lg.Stage(model, (1, 1))):
            try:
                make(model)
            except UserError as error:
                said.setdefault(case, []).append(str(error))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return said


def test_models_that_differ_are_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["with_models_that_differ"] for rank in ranks)
    assert first == second
    for case, where in {
        "width": r"backbone.fc.weight \(10, 64\) .* rank 1 has backbone.fc.weight \(11, 64\)",
        "depth": r"rank 0 has block 0 of .*, rank 1 has block 0 of .*layer1.3",
        "frozen": r"conv1.weight \(16, 3, 3, 3\) torch.float32 trained, rank 1 has backbone.conv1.*torch.float32:",
        "dtype": r"float32 trained, rank 1 has backbone.conv1.weight \(16, 3, 3, 3\) torch.float64",
        "cut": r"block 0 of ",
    }.items():
        assert len(first[case]) == 2
        assert re.search(where, first[case][0]), first[case][0]


def test_all_ranks_refresh_a_shared_readout_in_the_same_steps() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    network = nn.Sequential(nn.Embedding(12, 8), *layers, lg.Readout(8, 12))
    task = lg.LanguageModel(12, cast(nn.Module, network[-1]))
    x = torch.zeros(2, 5, dtype=torch.int64)
    first = lg.localize(network, blocks=2, method=lg.dgl(), example=x, task=task)
    first.move_averages()
    other = copy.deepcopy(first)
    first.move_averages()

    class FromFirst:
        """The messages of two ranks, as the second one gets them."""

        def broadcast(self, tensors: list[Tensor]) -> None:
            assert len(tensors) == len([*first.parameters(), *first.buffers()])

        def broadcast_object(self, value: list[int]) -> list[int]:
            assert value == [1]
            return [m.turn for m in first.modules() if isinstance(m, SharedReadout)]

    share_values(other, cast(Ranks, FromFirst()))
    assert [m.turn for m in other.modules() if isinstance(m, SharedReadout)] == [2]
