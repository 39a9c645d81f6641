"""Tensors of which each rank holds a part, as the parameters of a sharded model are.

They are recognised by their methods, because importing `torch.distributed.tensor` takes half a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """The part that this rank holds, without a copy, or a tensor that every rank holds as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """The parts of all ranks together. All of them call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_of(tensor: Tensor, like: Any) -> Tensor:
    """This rank's shard of a whole tensor that all ranks have, sharded like `like`. No message is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor on this rank: one, or those of the indices and values of a sparse tensor."""
    parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (local(tensor),)
    return [part.untyped_storage() for part in parts]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, with one message for those that are sharded."""
    sharded: list[Any] = [t for t in tensors if is_sharded(t)]
    if not sharded:
        return nn.utils.get_total_norm(tensors)
    squared = nn.utils.get_total_norm([local(t) for t in sharded]).square()
    for dimension, placement in enumerate(sharded[0].placements):
        if placement.is_shard():
            dist.all_reduce(squared, group=sharded[0].device_mesh.get_group(dimension))
    return (squared + nn.utils.get_total_norm([t for t in tensors if not is_sharded(t)]).square()).sqrt()


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Does what `nn.utils.clip_grad_norm_` does, for sharded gradients with one message instead of one for each."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        factor = (most / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(g) for g in gradients], factor)  # pyright: ignore[reportPrivateImportUsage]
