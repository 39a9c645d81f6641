"""Pipelines whose stages are replicas or shards, on 2 x 2 ranks, against one process with whole batches, in float64."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from spawned import on_ranks
from test_shards import grouped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.sharded import storages
from localgrad.scale import deferred

STEPS, STOP, HALF, SHARES = 6, 3, 2, (2, 2)
CASES: dict[str, tuple[Any, Any]] = {
    "infopro": (lg.infopro, None),  # All ranks read images.
    "man": (partial(lg.dgl, "0c1f"), partial(lg.MAN, 0.5, lag=2)),
    "man without lag": (partial(lg.dgl, "0c1f"), partial(lg.MAN, 0.5)),
    "synced": (partial(lg.dgl, "1c1f"), partial(lg.MAN, 0.5, lag=1, buffers=True)),
    "deep-man": (lg.predsim, partial(lg.DeepMAN, 0.5, lag=2, ema_every=2)),  # Its loss compares all images.
}
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "replicas": ((2, 2), ("pipeline", "replicas")),
    "shards": ((2, 2), ("pipeline", "shards")),
    "replicas of shards": ((2, 1, 2), ("pipeline", "replicas", "shards")),
}
NAMES = [
    *(("replicas", case) for case in CASES), *(("shards", case) for case in CASES if case != "synced"),
    ("replicas of shards", "man"),
]  # fmt: skip


def model_of(case: str) -> lg.LocalModel:
    method, coupling = CASES[case]
    torch.manual_seed(0)
    norms = lg.sync_batch_norm if case == "synced" else grouped
    backbone = norms(lg.CifarResNet(8).double()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    model = lg.localize(backbone, blocks=4, method=method(), coupling=coupling and coupling(), example=x)
    norms(model.auxiliaries)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    size = 2 * HALF
    return [(torch.randn(size, 3, 8, 8, dtype=torch.float64), torch.randint(10, (size,))) for _ in range(STEPS)]


def stepped(model: lg.LocalModel, done: Any) -> float:
    model.move_averages(done.block)
    with torch.no_grad():
        for p in model.members(done.block):
            if p.grad is not None:
                p -= 0.05 * p.grad
                p.grad = None
    return float(done.loss)


@cache
def alone(case: str) -> tuple[list[dict[str, Tensor]], list[list[float]], Tensor, list[float | None]]:
    """One process: its state before each step and at the end, its losses, what it evaluates to, and its distances."""
    model, losses = model_of(case), []
    states = [{name: t.clone() for name, t in model.state_dict().items()}]
    for x, y in batches():
        losses.append([stepped(model, done) for done in lg.block_steps(model, x, y)])
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    with torch.no_grad():
        return states, losses, model.eval()(batches()[0][0]), model.ema_distances()


# On the ranks


def stage_of(case: str, how: str) -> tuple[lg.Stage, lg.Replicas | None]:
    shape, names = MESHES[how]
    stage = lg.Stage(lambda: model_of(case), SHARES, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    if how == "replicas":
        return stage, lg.Replicas(stage.model)
    lg.shard(stage.model)
    return stage, None


def run(stage: lg.Stage, averaging: lg.Replicas | None, first: int = 0) -> list[list[float]]:
    losses, rows = [], slice(stage.row.rank * HALF, (stage.row.rank + 1) * HALF)
    for x, y in batches()[first:]:
        own = []
        for done in stage.block_steps(x[rows] if stage.reads_images else None, y[rows]):
            if averaging is not None:
                averaging.start(done.block, done.loss)
                averaging.finish(done.block)
            own.append(stepped(stage.model, done))
        losses.append([sum(stage.row.all_reduce_sum([loss])) / stage.row.count for loss in own])
    return losses


def held(model: lg.LocalModel) -> int:
    """The bytes of all parameters that this rank holds."""
    return sum(s.nbytes() for s in {s for p in model.parameters() if not p.is_meta for s in storages(p)})


def trained(case: str, how: str, before: dict[str, Tensor]) -> dict[str, Any]:
    stage, averaging = stage_of(case, how)
    found: dict[str, Any] = {"held": held(stage.model), "losses": run(stage, averaging), "saved": stage.state_dict()}
    stage.finish()
    rows = slice(stage.row.rank * HALF, (stage.row.rank + 1) * HALF)
    stage.model.eval()
    found |= {"output": stage.forward(batches()[0][0][rows]), "distances": stage.ema_distances()}
    if how == "replicas":
        with stage.gathered():
            found["whole"] = {name: t.clone() for name, t in stage.model.state_dict().items()}
    else:
        with pytest.raises(UserError, match="a stage of shards is never whole on a rank"), stage.gathered():
            pass
        with pytest.raises(UserError, match="a stage of a pipeline has some of the blocks"), lg.gather(stage.model):
            pass
    found["after"] = held(stage.model)
    other, averaging = stage_of(case, how)
    other.load_state_dict(before)
    other.go_on(STOP)
    run(other, averaging, STOP)
    found["resumed"] = other.state_dict()
    other.finish()
    return found


def refused() -> list[str]:
    one_row = init_device_mesh("cpu", (4, 1), mesh_dim_names=("pipeline", "replicas"))
    plain, nameless = lg.Stage(model_of("man"), (1, 1, 1, 1), mesh=one_row), init_device_mesh("cpu", (2, 2))
    crossed = DeviceMesh("cpu", [[0, 3], [1, 2]], mesh_dim_names=("pipeline", "replicas"))
    said = []
    stages = [lambda mesh=mesh: lg.Stage(model_of("man"), SHARES, mesh=mesh) for mesh in (nameless, crossed)]
    for call in (lambda: lg.shard(plain.model), *stages):
        with pytest.raises(UserError) as told:
            call()
        said.append(str(told.value))
    return said


def all_of_it(file: Path) -> dict[str, Any]:
    deferred.SMALL = 1  # All numbers of these small networks come later.
    before = torch.load(file, weights_only=True)
    return {"refused": refused(), **{f"{how} {case}": trained(case, how, before[case]) for how, case in NAMES}}


# Against one process


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("mesh")
    torch.save({case: alone(case)[0][STOP] for case in CASES}, place / "before.pt")
    return on_ranks(all_of_it, place, place / "before.pt", count=4)


def close(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("how", "case"), NAMES)
def test_a_mesh_is_one_process_with_whole_batches(how: str, case: str, ranks: list[dict[str, Any]]) -> None:
    states, losses, output, distances = alone(case)
    found = [rank[f"{how} {case}"] for rank in ranks]
    for rank, own in enumerate(found):
        blocks = slice(0, 2) if rank < 2 else slice(2, 4)
        close(own["losses"], [step[blocks] for step in losses])
        assert own["distances"] == [d and pytest.approx(d, rel=1e-5) for d in distances]  # They are float32.
        if how == "replicas":
            close(own["whole"], states[-1])
    close(found[0]["saved"], states[-1])
    close(found[0]["resumed"], states[-1])
    assert all(own["saved"] == own["resumed"] == {} for own in found[1:])
    assert [own["output"] for own in found[:2]] == [None, None]
    close(torch.cat([own["output"] for own in found[2:]]), output)
    assert any(not torch.equal(states[STOP][name], states[-1][name]) for name in states[-1])


@pytest.mark.parametrize(("how", "case"), NAMES)
def test_a_rank_holds_its_part_of_its_blocks(how: str, case: str, ranks: list[dict[str, Any]]) -> None:
    model = model_of(case)
    for rank, own in enumerate(rank[f"{how} {case}"] for rank in ranks):
        parts = [part for k in ((0, 1) if rank < 2 else (2, 3)) for part in model.parts(k)]
        for k in (0, 1) if rank < 2 else (2,):
            coupling = cast(Any, model.auxiliaries[k]).coupling
            parts += [source.module for source in coupling.sources] if coupling is not None else []
        needed = sum(p.nbytes for p in {p for part in parts for p in part.parameters()})
        assert own["held"] == own["after"]
        assert needed < 0.95 * held(model)
        if how == "replicas":
            assert own["held"] == needed
        else:
            assert 0.45 * needed < own["held"] < 0.55 * needed


def test_what_is_no_such_mesh_is_refused(ranks: list[dict[str, Any]]) -> None:
    said = [
        "a rank of this pipeline shares its blocks with no other: give lg.Stage a mesh with rows",
        "mesh takes all 4 ranks in one to three dimensions that have names, the first of which is the pipeline, and "
        "not a shape of (2, 2)",
        "the ranks of mesh must ascend along each dimension, as those of init_device_mesh do, not [[0, 3], [1, 2]]",
    ]
    assert [rank["refused"] for rank in ranks] == [said] * 4
