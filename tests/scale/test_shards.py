"""Shards on two ranks against one process with both halves of the batch, in float64 and with group norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import on_ranks
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.methods import METHODS
from localgrad.core.sharded import clip_gradients
from localgrad.scale.shards import gathered

STEPS, HALF = 3, 4
CASES: dict[str, tuple[Any, Any]] = {
    "bp": (lg.bp, None),
    "dgl": (lambda: lg.dgl("1c2f"), None),
    "predsim": (lg.predsim, None),
    "infopro": (lg.infopro, None),
    "infopro contrast": (lambda: lg.infopro(contrast=True), None),
    "auglocal": (lambda: lg.auglocal(depth=3), None),
    "man": (lg.dgl, lg.MAN),
    "man late": (lg.dgl, lambda: lg.MAN(lag=1, momentum=0.5, buffers=True)),
    "man pull": (lg.dgl, lambda: lg.MAN(form="pull")),
    "man++": (lg.dgl, lg.MANPlusPlus),
    "deep-man": (lg.predsim, lg.DeepMAN),
}
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
    backbone = grouped(lg.CifarResNet(14).double())
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


def all_of_it() -> dict[str, Any]:
    return {call.__name__: call() for call in (together,)}


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
