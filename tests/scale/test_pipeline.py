"""A pipeline of two ranks against one process that steps as it goes, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import on_ranks
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.pipeline import Stage, least_lag

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
    "deep-man 8": (8, lg.dgl, partial(lg.DeepMAN, 0.9, lag=3)),
}
SHARES = {4: (1, 3), 8: (5, 3)}


def model_of(case: str) -> lg.LocalModel:
    blocks, method, coupling = CASES[case]
    torch.manual_seed(0)
    backbone = lg.build("resnet20", classes=10).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.zeros(2, 3, 8, 8)
    model = lg.localize(backbone, blocks=blocks, method=method(), coupling=coupling and coupling(), example=x)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def batches(case: str) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    steps = LONG if case in ("dgl 4", "dgl 8", "man 4", "man 8") else SHORT
    return [
        (torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.randint(10, (4,)))
        for _ in range(steps)
    ]


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)


def state_of(model: lg.LocalModel, k: int) -> dict[str, Tensor]:
    """All that block k's training changes, without the past states that a pipeline does not keep."""
    state = model.blocks[k].state_dict()
    if k < len(model.auxiliaries):
        own = model.auxiliaries[k].state_dict()
        state |= {f"auxiliary.{name}": t for name, t in own.items() if ".past." not in name}
    return {name: t.clone() for name, t in state.items()}


def sequential(case: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    model, losses = model_of(case), []
    optimizers = [optimizer(model.members(k)) for k in range(len(model.blocks))]

    def after_block(k: int) -> None:
        optimizers[k].step()
        optimizers[k].zero_grad()

    for x, y in batches(case):
        losses.append(torch.stack(lg.local_backward(model, x, y, after_block=after_block).losses))
    return [state_of(model, k) for k in range(len(model.blocks))], losses


def piped() -> dict[str, Any]:
    found = {}
    for case, (blocks, _, _) in CASES.items():
        model = model_of(case)
        stage = Stage(model, SHARES[blocks], optimizer)
        losses = []
        for x, y in batches(case):
            images = x.clamp(0, 1) if "infopro" in case else None
            handed = stage.step(x, y, images)
            losses.append([float(loss) for loss in handed.losses.values()])
            assert (handed.logits is not None) == (dist.get_rank() == 1)
        stage.finish()
        found[case] = {"blocks": [state_of(model, k) for k in stage.blocks], "losses": torch.tensor(losses)}
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(piped, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_is_one_process_that_steps_as_it_goes(case: str, trained: list[dict[str, Any]]) -> None:
    states, losses = sequential(case)
    found = [state for rank in trained for state in rank[case]["blocks"]]
    assert len(found) == len(states)
    for mine, theirs in zip(found, states, strict=True):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert torch.equal(torch.cat([rank[case]["losses"] for rank in trained], 1), torch.stack(losses))
    if "man" in case:
        assert any("ema" in name for name in states[0])


def test_the_lag_shows() -> None:
    """Else the cases with and without one would test the same."""
    with_lag, without = (sequential(case)[0] for case in ("man++ 4", "man++ 4 without lag"))
    assert any(not torch.equal(with_lag[0][name], without[0][name]) for name in without[0])


def wrong_shares() -> str:
    try:
        Stage(model_of("dgl 4"), (2, 1), optimizer)
    except UserError as error:
        return str(error)
    return ""


def test_shares_that_are_not_the_models_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    said = on_ranks(wrong_shares, tmp_path_factory.mktemp("ranks"))
    assert said == ["shares [2, 1] do not deal 4 blocks out to 2 ranks"] * 2
    assert (least_lag(1), least_lag(2), least_lag(4)) == (0, 2, 6)
