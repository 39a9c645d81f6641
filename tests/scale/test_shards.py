"""Shards on two ranks against one process with both halves of the batch, in float64 and with group norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import CASES as BOTH
from spawned import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.methods import METHODS
from localgrad.core.sharded import clip_gradients, storages, total_norm, whole
from localgrad.scale.shards import gathered

STEPS, HALF = 3, 4
CASES = {**BOTH, "man late": (lg.dgl, lambda: lg.MAN(lag=1, momentum=0.5, buffers=True))}
READERS: dict[str, tuple[Any, Any]] = {
    "reader": (lg.dgl(), lg.MAN(0.5)), "reader, lopt": (lg.lopt(), None), "reader, shared": (lg.dgl(), None),
    "reader, tied": (lg.dgl(), lg.DeepMAN(0.5)),
}  # fmt: skip
HOW: dict[str, tuple[str, dict[str, Any]]] = {  # other ways to train, each with its case
    "accumulated": ("man++", {"accumulate": 2}),
    "clipped": ("man++", {"clip": 0.1}),
    "as you go": ("deep-man", {"as_you_go": True}),
    "recomputed": ("man", {"recompute": True}),
    "frozen": ("man", {"freeze": ("conv1", "bn1", "layer1.0")}),
    "a frozen block": ("man", {"freeze": ("conv1", "bn1", "layer1.0"), "blocks": ["layer1.0", "layer2.0", "layer3.0"]}),
}
NAMES = (*CASES, *HOW, *READERS)


class Reader(nn.Module):
    """Tokens [B, 5] to what `lg.LanguageModel` reads, with parameters that no module of its own holds."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(12, 8), nn.Parameter(torch.randn(5, 8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.strength, self.readout = nn.Parameter(torch.tensor(0.5)), lg.Readout(8, 12)
        if tied:
            self.readout.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Any:
        h = self.token(tokens) + self.position
        for layer in self.layers:
            h = h + self.strength * layer(h)
        return self.readout(h)


def grouped(network: nn.Module) -> nn.Module:
    """The network with group norms, which treat each image as if it were alone, in place of its batch norms."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(network, name, nn.GroupNorm(2, child.num_features).to(child.weight.dtype))
        else:
            grouped(child)
    return network


def reader_of(case: str) -> lg.LocalModel:
    method, coupling = READERS[case]
    torch.manual_seed(0)
    network = Reader(tied="tied" in case).double()
    torch.manual_seed(1)
    task = lg.LanguageModel(12, network.readout if "shared" in case else None)
    x = torch.zeros(2, 5, dtype=torch.int64)
    return lg.localize(network, blocks=3, method=method, coupling=coupling, example=x, task=task)


def model_of(case: str, freeze: Sequence[str] = (), blocks: Any = 4) -> lg.LocalModel:
    method, coupling = CASES[case]
    torch.manual_seed(0)
    backbone = grouped(lg.CifarResNet(8).double())
    for name in freeze:
        backbone.get_submodule(name).requires_grad_(False)
    torch.manual_seed(1)  # Fresh copies draw their weights.
    model = lg.localize(
        backbone, blocks=None if case == "bp" else blocks, method=method(), coupling=coupling and coupling(),
        example=torch.zeros(2, 3, 8, 8, dtype=torch.float64),
    )  # fmt: skip
    grouped(model.auxiliaries)
    return model


def batches(model: lg.LocalModel) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    if isinstance(model.backbone, Reader):
        return [(torch.randint(12, (2 * HALF, 5)), torch.randint(12, (2 * HALF, 5))) for _ in range(STEPS)]
    return [(torch.randn(2 * HALF, 3, 8, 8, dtype=torch.float64), torch.randint(10, (2 * HALF,))) for _ in range(STEPS)]


def optimizer_of(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


def trained(
    model: lg.LocalModel,
    rows: slice = slice(None),
    *,
    accumulate: int = 1,
    clip: float | None = None,
    as_you_go: bool = False,
    recompute: bool = False,
) -> dict[str, Any]:
    """What a model has after the steps on some rows of each batch."""
    if recompute:
        lg.recompute(model, couplings=True)
    model.accumulate = accumulate
    groups = lg.param_groups(model, weight_decay=1e-4)
    each = [optimizer_of([g for g in groups if g["block"] == k]) for k in range(len(model.blocks))]
    whole, losses = optimizer_of(groups), []
    for x, y in batches(model):
        if as_you_go:
            done = []
            for step in lg.block_steps(model, x[rows], y[rows]):
                model.move_averages(step.block)
                each[step.block].step()
                each[step.block].zero_grad()
                done.append(step.loss)
            losses.append(torch.stack(done))
            continue
        losses.append(torch.stack(lg.local_backward(model, x[rows], y[rows]).losses))
        for k in range(len(model.blocks)) if clip else ():
            clip_gradients(model.members(k), clip or 0)
        whole.step()
        whole.zero_grad()
    distances = model.ema_distances()
    model.eval()
    with lg.gather(model):
        logits = model(batches(model)[0][0])
    states = [o.state_dict()["state"] for o in (each if as_you_go else [whole])]
    model.train()
    return {
        "state": gathered(model.state_dict(), keep=True), "losses": losses, "logits": logits, "distances": distances,
        "optimizer": gathered(states, keep=True),
    }  # fmt: skip


def case_of(name: str) -> tuple[lg.LocalModel, dict[str, Any]]:
    if name in READERS:
        return reader_of(name), {}
    case, how = HOW.get(name, (name, {}))
    making = {key: how[key] for key in ("freeze", "blocks") if key in how}
    return model_of(case, **making), {key: value for key, value in how.items() if key not in making}


def together() -> dict[str, Any]:
    """What this rank has after the steps on its half of each batch, case by case."""
    rank, found = dist.get_rank(), {}
    for name in NAMES:
        model, how = case_of(name)
        if rank:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)  # the first rank's weights are those that count
        found[name] = trained(lg.shard(model), slice(rank * HALF, (rank + 1) * HALF), **how)
    return found


class Wide(nn.Module):
    """A network whose weights take far more memory than its activations. 256 does not divide by 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)])
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def held_bytes(*, sharded: bool) -> dict[str, int]:
    """The bytes that this rank holds after a backward pass, by kind, and the live bytes between two steps."""
    torch.manual_seed(0)
    coupling = lg.MANPlusPlus(lag=1)
    model = lg.localize(Wide(), blocks=4, method=lg.dgl("0c1f"), coupling=coupling, example=torch.zeros(2, 256))
    if sharded:
        lg.shard(model)
    optimizer = torch.optim.AdamW(lg.param_groups(model))
    x, y = torch.randn(4, 256), torch.randint(10, (4,))

    def step() -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    peak = lg.measure_peak(step, model=model, optimizers=[optimizer])
    lg.local_backward(model, x, y)
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [t for state in optimizer.state.values() for t in state.values()]
    kinds = {
        "parameters": trained, "gradients": [p.grad for p in trained], "optimizer": states,
        "averages": [p for p in model.parameters() if not p.requires_grad],
    }  # fmt: skip
    found = {kind: sum(s.nbytes() for s in {s for t in all_ for s in storages(t)}) for kind, all_ in kinds.items()}
    return {**found, "before": peak.timeline[0][1], "after": peak.timeline[-1][1], "peak": peak.total}


def memory() -> dict[str, int]:
    return held_bytes(sharded=True)


def one_block() -> float:
    """The peak of a step of a block with eight units, divided by the bytes of its parameters."""
    model = lg.localize(Wide(), blocks=1, method=lg.bp(), example=torch.zeros(2, 256))
    whole = sum(p.nbytes for p in model.parameters())
    lg.shard(model)
    x, y = torch.randn(4, 256), torch.randint(10, (4,))
    return lg.measure_peak(lambda: lg.local_backward(model, x, y), model=model).total / whole


def evaluated() -> dict[str, Any]:
    """What the network gives, before the first step and after it. Rank 0 calls it once, rank 1 twice."""
    model = lg.shard(model_of("man"))
    found = {}
    for x, y in batches(model)[:2]:
        with lg.gather(model):
            for _ in range(1 + dist.get_rank()):
                found["output"] = model.backbone.eval()(x)
        found["losses"] = lg.local_backward(model.train(), x, y).losses
    return found


def norms() -> list[float]:
    """Of PyTorch's and of ours, the norm of all gradients and what clipping to it leaves."""
    model = lg.shard(model_of("dgl"))
    lg.local_backward(model, *batches(model)[0])
    parameters = model.members(1)
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = [float(total_norm(gradients)), float(whole(nn.utils.get_total_norm(gradients)))]
    clip_gradients(parameters, 0.25 * found[0])
    return [*found, float(total_norm(gradients)) / (0.25 * found[0])]


def with_pytorch() -> dict[str, Any]:
    """What `torch.distributed.checkpoint` makes of the network, and reads into another one."""
    options = StateDictOptions(full_state_dict=True)
    model, other = lg.shard(model_of("man")), lg.shard(model_of("man", freeze=["conv1"]))
    lg.local_backward(model, *batches(model)[0])
    optimizer_of(lg.param_groups(model)).step()
    state = get_model_state_dict(model.backbone, options=options)
    set_model_state_dict(other.backbone, dict(state), options=options)
    with lg.gather(other):  # It has never run.
        logits = other.eval()(batches(model)[0][0])
    return {"state": state, "read": gathered(other.backbone.state_dict(), keep=True), "logits": logits}


def thawed(*, sharded: bool) -> dict[str, Any]:
    """What a model has that was frozen in part when it was sharded, and trains all of it from the second step on."""
    model = reader_of("reader")
    frozen = [*model.blocks[0].parameters(), *(p for p in model.backbone.parameters() if not p.ndim)]
    for p in frozen:
        p.requires_grad_(False)
    model.auxiliaries[0].requires_grad_(False)
    if sharded:
        lg.shard(model)
    for step, (x, y) in enumerate(batches(model)):
        rows = slice(dist.get_rank() * HALF, (dist.get_rank() + 1) * HALF) if sharded else slice(None)
        lg.local_backward(model, x[rows], y[rows])
        for p in model.parameters():
            if p.grad is not None:
                p.data.sub_(0.1 * p.grad)
                p.grad = None
        later = (*model.blocks[0].parameters(), *(p for p in model.backbone.parameters() if not p.ndim))
        for p in (*later, *model.auxiliaries[0].get_submodule("heads").parameters()) if not step else ():
            p.requires_grad_(True)
    return gathered(model.backbone.state_dict(), keep=True)


def thawed_on_ranks() -> dict[str, Any]:
    return thawed(sharded=True)


class Mixed(nn.Sequential):
    """Units of two dtypes."""

    def __init__(self) -> None:
        units = (nn.Sequential(nn.LayerNorm(8), InHalf(8, 8, dtype=torch.bfloat16)) for _ in range(3))
        super().__init__(nn.Linear(8, 8), *units, nn.Linear(8, 3))


class InHalf(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.bfloat16()).float()


def slips() -> list[str]:
    """What is said of an optimizer from before, of a state within `gather`, and of two dtypes in a unit."""
    model = model_of("man++")
    optimizer = optimizer_of(lg.param_groups(model))
    with pytest.warns(UserWarning, match="before lg.shard, which the model no longer has: make optimizers after"):
        lg.shard(model)
    assert optimizer.param_groups
    said = []
    for module in (model, model.backbone):
        with lg.gather(model), pytest.raises(UserError) as error:
            module.state_dict()
        said.append(str(error.value))
    assert model.state_dict()
    mixed = lg.localize(Mixed(), blocks=2, method=lg.dgl(), example=torch.zeros(2, 8))
    with pytest.raises(UserError) as error:
        lg.shard(mixed)
    return [*said, str(error.value)]


def refusals() -> list[str]:
    """What is said of sharded models, and of meshes."""
    model = lg.shard(model_of("man"))
    x, y = batches(model)[0]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("many", "one"))
    optimizers: Any = lambda m: [optimizer_of(lg.param_groups(m))]  # noqa: E731
    calls: list[Callable[[], object]] = [
        lambda: lg.shard(model), lambda: lg.as_loss(model, x, y), lambda: lg.Replicas(model),
        lambda: lg.Stage(model, (2, 2)), lambda: lg.predict_peak(model, 4, optimizers), lambda: copy.deepcopy(model),
        model.refresh, lambda: model.eval()(x), lambda: lg.shard(model_of("man"), mesh["one"]),
    ]  # fmt: skip
    said = []
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        said.append(str(error.value))
    return said


def as_replicas_and_shards() -> dict[str, Any]:
    """A mesh of two dimensions: two replicas, each of one shard."""
    model = lg.shard(model_of("man++"), init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))
    return trained(model, slice(dist.get_rank() * HALF, (dist.get_rank() + 1) * HALF), clip=0.1)


def all_of_it() -> dict[str, Any]:
    return {
        call.__name__: call()
        for call in (
            together,
            memory,
            one_block,
            evaluated,
            norms,
            with_pytorch,
            refusals,
            as_replicas_and_shards,
            thawed_on_ranks,
            slips,
        )
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(all_of_it, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_process_with_both_halves(name: str, ranks: list[dict[str, Any]]) -> None:
    model, how = case_of(name)
    expected = trained(model, **how)
    first, second = (rank["together"][name] for rank in ranks)
    losses = [(a + b) / 2 for a, b in zip(first.pop("losses"), second.pop("losses"), strict=True)]
    torch.testing.assert_close(losses, expected.pop("losses"), rtol=1e-9, atol=1e-9)
    assert first["state"].keys() == expected["state"].keys()
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert set(METHODS) <= {case.split()[0] for case in CASES}


def test_what_was_frozen_as_it_was_sharded_can_be_trained_later(ranks: list[dict[str, Any]]) -> None:
    expected, first = thawed(sharded=False), reader_of("reader").backbone.state_dict()
    for rank in ranks:
        torch.testing.assert_close(rank["thawed_on_ranks"], expected, rtol=1e-9, atol=1e-9)
    assert not any(torch.equal(first[name], expected[name]) for name in expected)


def test_a_mesh_of_two_dimensions_has_replicas_and_shards(ranks: list[dict[str, Any]]) -> None:
    expected = trained(model_of("man++"), clip=0.1)
    for rank in ranks:
        found = rank["as_replicas_and_shards"]
        torch.testing.assert_close(found["state"], expected["state"], rtol=1e-6, atol=1e-6)


def test_each_of_two_ranks_holds_half_of_everything(ranks: list[dict[str, Any]]) -> None:
    one = held_bytes(sharded=False)
    for rank in ranks:
        found = rank["memory"]
        assert all(found[kind] <= 0.55 * one[kind] for kind in ("parameters", "gradients", "optimizer", "averages"))
        # What the meter counts between two steps is that, and a batch.
        held = sum(found[kind] for kind in ("parameters", "optimizer", "averages"))
        assert held <= found["before"] <= held + 2**14
        assert abs(found["after"] - found["before"]) < 2**12
        assert found["peak"] < one["peak"]


def test_each_rank_calls_a_gathered_network_as_often_as_it_likes(ranks: list[dict[str, Any]]) -> None:
    model = model_of("man")
    (x, y), (other, _) = batches(model)[:2]
    lg.local_backward(model, x, y)
    with torch.no_grad():
        expected = model.backbone.eval()(other)
    for rank in ranks:
        torch.testing.assert_close(rank["evaluated"]["output"], expected, rtol=1e-9, atol=1e-9)
        assert len(rank["evaluated"]["losses"]) == 4


def test_the_gradients_of_a_block_are_whole_unit_by_unit(ranks: list[dict[str, Any]]) -> None:
    # Half of the parameters, all parameters of the block, and what a unit or two need.
    for rank in ranks:
        assert 1.5 < rank["one_block"] < 2


def test_norms_are_those_of_pytorch_with_one_message(ranks: list[dict[str, Any]]) -> None:
    model = model_of("dgl")
    lg.local_backward(model, *batches(model)[0])
    expected = nn.utils.get_total_norm([p.grad for p in model.members(1) if p.grad is not None])
    for rank in ranks:
        ours, theirs, clipped = rank["norms"]
        assert ours == pytest.approx(theirs, rel=1e-12)
        assert ours == pytest.approx(float(expected), rel=1e-9)
        assert clipped == pytest.approx(1, rel=1e-5)


def test_pytorchs_checkpoints_read_a_sharded_network(ranks: list[dict[str, Any]]) -> None:
    model = model_of("man")
    lg.local_backward(model, *batches(model)[0])
    optimizer_of(lg.param_groups(model)).step()
    with lg.gather(model):
        logits = model.eval()(batches(model)[0][0])
    for rank in ranks:
        torch.testing.assert_close(rank["with_pytorch"]["logits"], logits)
        torch.testing.assert_close(rank["with_pytorch"]["state"], dict(model.backbone.state_dict()))
        torch.testing.assert_close(rank["with_pytorch"]["read"], dict(model.backbone.state_dict()))


def test_what_sharded_models_cannot_do_is_said(ranks: list[dict[str, Any]]) -> None:
    only_a_part = "takes no sharded model, of which each rank has only a part: leave lg.shard out"
    said = [f"{name} {only_a_part}" for name in ("shard", "as_loss", "Replicas", "Stage", "predict_peak")]
    said += [
        "a sharded model, of which each rank has a part, cannot be copied: do so before lg.shard",
        f"refresh {only_a_part}",
        "the network is sharded: call it within `with lg.gather(model):`",
        "mesh takes all 2 ranks in one dimension, or in two that have names, and not a shape of (1,)",
    ]
    assert [rank["refusals"] for rank in ranks] == [said, said]


def test_slips_are_named(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["slips"][0] == rank["slips"][1]
        assert "a state made within lg.gather has shards" in rank["slips"][0]
        assert "a unit of block 0 has parameters of torch.bfloat16 and torch.float32" in rank["slips"][2]


def test_shards_need_a_process_group() -> None:
    with pytest.raises(UserError, match="shards need a process group: call torch"):
        lg.shard(model_of("dgl"))


def test_gathering_a_model_that_is_whole_only_disables_gradients() -> None:
    model = model_of("dgl")
    with lg.gather(model):
        assert not model(batches(model)[0][0]).requires_grad


def trained_on(device: str, *, sharded: bool) -> dict[str, Tensor]:
    model = model_of("man++").to(device)
    if sharded:
        lg.shard(model)
    optimizer = optimizer_of(lg.param_groups(model))
    for x, y in batches(model):
        lg.local_backward(model, x.to(device), y.to(device))
        clip_gradients(model.members(0), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return {name: t.cpu() for name, t in gathered(model.state_dict(), keep=True).items()}


@pytest.mark.gpu
def test_a_group_of_nccl_trains_the_same(tmp_path: Path) -> None:
    """One rank, because a machine may have one device."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        expected, found = (trained_on("cuda", sharded=sharded) for sharded in (False, True))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
