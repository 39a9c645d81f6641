"""What a rank of a pipeline says to who takes its part of the model for the whole one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from spawned import on_ranks
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.errors import UserError


class Recurrent(nn.Module):
    """Has layers that keep weak references to their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(12, 12, batch_first=True) for _ in range(4))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x.mean(1))


def misused() -> list[str]:
    """What a user is told who takes the model of a stage for a whole one."""
    x, y, told = torch.ones(2, 5, 12), torch.tensor([0, 1]), list[str]()
    torch.manual_seed(0)
    stage = lg.Stage(lambda: lg.localize(Recurrent(), blocks=2, method=lg.dgl(), example=x), (1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for done in stage.block_steps(x, y):
            assert done.loss.isfinite()
        stage.finish()
        stage.state_dict()
    for wrong in (lg.local_backward, lg.as_loss, lambda *given: list(lg.block_steps(*given))):
        with pytest.raises(UserError, match="trains all blocks, and the model of a stage has the weights of its own"):
            wrong(stage.model, x, y)
    for module in (stage.model, stage.model.backbone):
        with pytest.raises(UserError, match="this rank holds the weights of its own blocks alone") as error:
            module(x)
        told.append(str(error.value))
        with pytest.warns(UserWarning, match="this state lacks the weights that other ranks train"):
            module.state_dict()
    with stage.gathered(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(t.is_meta for t in stage.model.backbone.state_dict().values())
    kept = []
    with pytest.raises(UserError, match=r"compute it within torch.no_grad\(\)"), stage.gathered():
        kept.append(stage.model(x))
    kept.clear()
    with torch.no_grad(), stage.gathered():
        stage.model(x)
    return told


def test_the_model_of_a_stage_says_what_it_lacks(tmp_path: Path) -> None:
    assert [len(told) for told in on_ranks(misused, tmp_path)] == [2, 2]
