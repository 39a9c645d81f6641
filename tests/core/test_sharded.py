"""Norms and clipping of tensors that every rank holds whole; `tests/scale/test_shards.py` has those of shards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from localgrad.core.sharded import clip_gradients, is_sharded, local, storages, total_norm, whole


@pytest.mark.parametrize("most", [0.1, 1e6])
def test_whole_gradients_are_clipped_as_pytorch_does_to_the_bit(most: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(2, 2))
    network[:2](torch.randn(4, 5)).square().sum().backward()  # The last layer has no gradient.
    twin = copy.deepcopy(network)
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert torch.equal(total_norm(gradients), nn.utils.get_total_norm(gradients))
    clip_gradients(list(network.parameters()), most)
    nn.utils.clip_grad_norm_(twin.parameters(), most)
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad)


def test_nothing_is_clipped_where_there_is_no_gradient() -> None:
    clip_gradients([nn.Parameter(torch.ones(2))], 1.0)
    assert float(total_norm([])) == 0


def test_a_tensor_that_every_rank_holds_is_its_own_part() -> None:
    tensor = torch.ones(3)
    assert local(tensor) is whole(tensor) is tensor
    assert not is_sharded(tensor)
    assert storages(tensor)[0]._cdata == tensor.untyped_storage()._cdata
    assert len(storages(tensor.to_sparse())) == 2
