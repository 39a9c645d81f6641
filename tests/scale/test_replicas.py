"""Data parallel over two ranks against one process with both halves of the batch, in float64."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from spawned import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.methods import METHODS
from localgrad.scale.replicas import Ranks, Replicas, SyncBatchNorm, _buckets, sync_batch_norm

STEPS, HALF = 3, 4
CASES: dict[str, tuple[Any, Any]] = {
    "bp": (lg.bp, None),
    "dgl": (lambda: lg.dgl("1c2f"), None),
    "predsim": (lg.predsim, None),
    "infopro": (lg.infopro, None),
    "infopro contrast": (lambda: lg.infopro(contrast=True), None),
    "auglocal": (lambda: lg.auglocal(depth=3), None),
    "man": (lg.dgl, lg.MAN),
    "man pull": (lg.dgl, lambda: lg.MAN(form="pull")),
    "man++": (lg.dgl, lg.MANPlusPlus),
    "deep-man": (lg.predsim, lg.DeepMAN),
}


def network(*, synced: bool) -> nn.Module:
    """A ResNet-20 in float64, always the same; of its batch norms either all are synchronised or none."""
    torch.manual_seed(0)
    backbone = lg.build("resnet20", classes=10).double()
    return sync_batch_norm(backbone) if synced else backbone


def model_of(case: str, *, synced: bool) -> lg.LocalModel:
    method, coupling = CASES[case]
    backbone, x = network(synced=synced), torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    blocks = None if case == "bp" else 4
    torch.manual_seed(1)  # fresh copies draw their weights
    model = lg.localize(backbone, blocks=blocks, method=method(), coupling=coupling and coupling(), example=x)
    # The heads and decoders have batch norms too.
    if synced:
        sync_batch_norm(model.auxiliaries)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return [
        (torch.randn(2 * HALF, 3, 16, 16, dtype=torch.float64), torch.randint(10, (2 * HALF,))) for _ in range(STEPS)
    ]


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
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(together, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_both_halves(case: str, trained: list[dict[str, Any]]) -> None:
    state, losses = alone(case)
    for rank in trained:
        torch.testing.assert_close(rank[case]["losses"], losses, rtol=1e-9, atol=1e-9)
        assert rank[case]["state"].keys() == state.keys()
        torch.testing.assert_close(rank[case]["state"], state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_to_the_bit_averages_too(case: str, trained: list[dict[str, Any]]) -> None:
    first, second = (rank[case]["state"] for rank in trained)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if "man" in case and "pull" not in case:
        assert any(".ema." in name for name in first)


def test_every_method_is_among_the_cases() -> None:
    assert set(METHODS) <= {case.split()[0] for case in CASES} | {"dgl"}


def test_a_synchronised_layer_has_the_weights_of_the_plain_one() -> None:
    plain = network(synced=False)
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    synced = sync_batch_norm(plain)
    assert synced is plain
    assert not any(type(m) is nn.BatchNorm2d for m in synced.modules())
    assert synced.state_dict().keys() == state.keys()
    synced.load_state_dict(state)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    wanted = network(synced=False)
    for mode in (True, False):  # without a process group it is the plain layer
        assert torch.equal(synced.train(mode)(x), wanted.train(mode)(x))
    assert sum(isinstance(m, SyncBatchNorm) for m in synced.modules()) == 19 + 2  # a layer each, and two shortcuts


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
    x, y = torch.randn(1, 3, 4, 4), torch.tensor([dist.get_rank()])  # maps of one pixel at the end
    backbone = lg.sync_batch_norm(lg.build("resnet20", classes=10))
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


def test_the_door_stands_on_every_rank(tmp_path: Path) -> None:
    one, other = on_ranks(at_the_door, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
