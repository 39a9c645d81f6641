"""Weights on disk: equal weights give equal bytes, wrong files get a sentence, old checkpoints go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from localgrad.core.backbones import build
from localgrad.core.errors import RunError, UserError
from localgrad.run.checkpoint import load_backbone, prune, read_weights, save_weights


def test_equal_weights_give_equal_bytes_in_any_memory_format(tmp_path: Path) -> None:
    backbone = build("resnet20", classes=10)
    save_weights(tmp_path / "a.safetensors", backbone.state_dict())
    backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_weights(tmp_path / "b.safetensors", backbone.state_dict())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_reads_torch_files_bare_or_wrapped(key: str | None, tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    state = source.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pt")
    load_backbone(target, tmp_path / "w.pt")
    assert torch.equal(source.weight, target.weight)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        read_weights(tmp_path / "none.pt")
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(RunError, match="is damaged"):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state_dict"):
        read_weights(tmp_path / "list.pt")


def test_a_checkpoint_of_another_network_changes_nothing(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", nn.Linear(3, 4).state_dict())
    target = nn.Linear(3, 2)
    before = target.weight.detach().clone()
    with pytest.raises(UserError, match="2 tensors differ, 'weight' first"):
        load_backbone(target, tmp_path / "w.safetensors")
    assert torch.equal(before, target.weight)


def test_keeps_the_newest_by_number_and_the_best(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        (tmp_path / f"step-{step}").mkdir()
    prune(tmp_path, 2, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-100", "step-20", "step-9"]
    assert (tmp_path / "best").resolve() == tmp_path / "step-9"
    prune(tmp_path, 2, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-100", "step-20"]
    assert (tmp_path / "best").resolve() == tmp_path / "step-20"
