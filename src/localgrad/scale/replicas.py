"""Data parallel by block: the gradients of block k are averaged over the ranks while block k+1 computes.

It only needs a process group of `torch.distributed`: gloo on the CPU, or NCCL on CUDA.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localgrad.core.auxiliary import Auxiliary
from localgrad.core.errors import UserError, callers_level
from localgrad.core.language_model import SharedReadout
from localgrad.core.model import LocalModel, localized
from localgrad.scale.groups import Ranks

BUCKET = 25 * 2**20  # The bytes of a message, as in DistributedDataParallel.


class Replicas:
    """Averages gradients over ranks that train the same model on different images of each batch.

    When it is made, all ranks get the first rank's parameters and buffers, the averages of couplings among them. Each
    rank then trains on the same number of images:

        replicas = Replicas(model)
        for done in block_steps(model, x, y):
            replicas.start(done.block, done.loss)    # These gradients travel while the next block computes.
        replicas.finish()
        model.move_averages()
        optimizer.step()

    Averages of couplings are not exchanged, because they follow parameters, which are the same on all ranks. Nor are
    statistics of batch norm, which differ unless the network has `SyncBatchNorm`; then those of the first rank count.
    Objectives that compare images with each other (`Term.pairs`) get the images of all ranks.

    A parameter that a rank's forward pass did not use, as with stochastic depth, has a gradient of zero there. If no
    rank used it, its gradient stays None. Sparse gradients, as of embeddings, become dense.

    Args:
        model: The result of `localize`, the same on all ranks.
        bucket: The most bytes of a message. Default: 25 MiB, as in DistributedDataParallel.

    Raises:
        UserError: The models of the ranks differ. It is raised on all ranks.
    """

    def __init__(self, model: LocalModel, *, bucket: int = BUCKET) -> None:
        model = localized(model, "Replicas")
        if not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") != "1":
            warnings.warn(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but there is no process group, so Replicas averages "
                "nothing: call torch.distributed.init_process_group before",
                stacklevel=callers_level(),
            )
        self.ranks = Ranks.of(model)
        self.model = model
        self.bucket = bucket
        refuse_unlike(model, self.ranks)
        self._parameters = [[p for m in model.parts(k) for p in m.parameters()] for k in range(len(model.blocks))]
        self._pending: dict[int, _Pending] = {}
        share_values(model, self.ranks)
        gather_pairs(model, self.ranks)

    def start(self, k: int, loss: Tensor, *more: Tensor) -> None:
        """Begins to average the gradients of a block in place, on all ranks in the same order.

        Nothing of what it averages may be read or changed before `finish(k)`.

        Args:
            k: The number of the block. It must have its gradients.
            loss: The loss of the block, which is averaged too.
            *more: Other scalars to average, of a dtype with fractions.

        Raises:
            UserError: Something to average is no such tensor.
        """
        for value in (loss, *more):
            if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise UserError(
                    f"Replicas.start averages tensors of floating-point numbers, as done.loss, not {given}: .float() "
                    "makes one of a tensor, and torch.tensor(...) of a number"
                )
        trained = [p for p in self._parameters[k] if p.requires_grad]
        missing, gradients = [], []
        have = torch.ones(len(trained), dtype=loss.dtype, device=loss.device)
        for i, parameter in enumerate(trained):
            if parameter.grad is None:
                missing.append((i, parameter))
                have[i] = 0
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        # All ranks must send the same number of values, whichever gradients a rank has.
        groups = _buckets([loss, *more, have, *gradients], self.bucket)
        self._pending[k] = _Pending([self._send(group) for group in groups], missing, have, gradients)

    def finish(self, k: int | None = None) -> None:
        """Waits for the averages of block k. Default: those of all blocks that were started.

        Raises:
            UserError: Block k was not started since the last time.
        """
        if k is not None and k not in self._pending:
            raise UserError(f"nothing of block {k} is being averaged: call replicas.start({k}, loss) before")
        for block in list(self._pending) if k is None else [k]:
            pending = self._pending.pop(block)
            for tensors, flat, work in pending.buckets:
                if work is not None:
                    work.wait()
                flat /= self.ranks.count
                for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                    tensor.copy_(part.view_as(tensor))
            shares = pending.have.tolist() if pending.missing else []
            for i, parameter in pending.missing:
                if shares[i]:
                    parameter.grad = pending.gradients[i]

    def _send(self, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor, Any]:
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        return tensors, flat, self.ranks.start_adding(flat)


@dataclass(frozen=True)
class _Pending:
    """The averages of a block while they are computed.

    Attributes:
        buckets: For each message its tensors, their values in one flat tensor, and the work in the background.
        missing: The parameters without a gradient on this rank, each with its number.
        have: For each parameter, 1 if this rank has a gradient, else 0. Averaging makes it the share of such ranks.
        gradients: The gradients, with zeros for those that are missing.
    """

    buckets: list[tuple[list[Tensor], Tensor, Any]]
    missing: list[tuple[int, nn.Parameter]]
    have: Tensor
    gradients: list[Tensor]


def refuse_unlike(model: LocalModel, ranks: Ranks) -> None:
    """Raises UserError on all ranks if the model of one differs from the first rank's.

    It compares names, shapes and dtypes of parameters and buffers, which parameters are trained, and the cuts.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mine = [f"block {k} of {', '.join(block.names)}" for k, block in enumerate(model.blocks)]
    mine += [f"{name} {tuple(t.shape)} {t.dtype}{' trained' * t.requires_grad}" for name, t in state.items()]
    first, *others = ranks.all_gather_object(mine)
    for rank, other in enumerate(others, 1):
        for one, two in zip_longest(first, other, fillvalue="nothing more"):
            if one != two:
                raise UserError(
                    f"ranks must make the same model, but where rank 0 has {one}, rank {rank} has {two}: give each "
                    "rank the same arguments, and freeze the same parameters"
                )


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the images of all ranks, for maps, tokens and vectors, on every device.

    PyTorch's own works on CUDA only. Parameters and buffers have the names that they have in PyTorch's layers, so
    weights can be exchanged. Mean and variance are computed in two passes, so the result is that of one process with
    all images, up to rounding.

    Attributes:
        ranks: The ranks that share a batch, as a `Stage` sets them. Default: None, which is all ranks.

    Modules within it, such as an activation, run after the norm.
    """

    ranks: Ranks | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        out = self._normed(input)
        for after in self.children():
            out = after(out)
        return out

    def _normed(self, input: Tensor) -> Tensor:
        ranks = self.ranks or Ranks.everyone()
        if ranks.count == 1 or not self.training:
            return super().forward(input)
        if input.device.type == "meta":
            return torch.empty_like(input)  # Elsewhere a single image is an error, but here other ranks have more.
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        dimensions = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = x.numel() // x.shape[1] * ranks.count  # Each rank has the same number of images.
        mean = cast(Tensor, _AllReduceSum.apply(x.sum(dimensions), ranks)) / count
        centred = x - mean.view(shape)
        variance = cast(Tensor, _AllReduceSum.apply(centred.square().sum(dimensions), ranks)) / count
        if self.track_running_stats:
            self._update_statistics(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for average, new in ((self.running_mean, mean), (self.running_var, variance)):
            cast(Tensor, average).lerp_(new.to(cast(Tensor, average).dtype), share)


def sync_batch_norm(network: nn.Module) -> nn.Module:
    """Replaces each batch norm in a network by a `SyncBatchNorm` with the same parameters and buffers, in place.

    Call it before `localize`, so that copies in couplings have the new layers too. It returns the network.

    Raises:
        UserError: A layer does something else after its norm than PyTorch's layers (nothing) and timm's (a dropout and
            an activation).
    """
    for path, layer in network.named_modules():
        if isinstance(layer, _BatchNorm) and not (isinstance(layer, SyncBatchNorm) or _is_replaceable(layer)):
            raise UserError(
                f"'{path}' is a {type(layer).__name__}, which does more than a batch norm, so no SyncBatchNorm "
                "replaces it: take a layer of PyTorch or timm, or group norm"
            )
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            twin = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            twin._parameters, twin._buffers, twin.training = child._parameters, child._buffers, child.training
            twin._modules = child._modules
            setattr(network, name, twin)
        else:
            sync_batch_norm(child)
    return network


def _is_replaceable(layer: nn.Module) -> bool:
    """Whether a batch norm is what it is in PyTorch, or followed by the modules `drop` and `act`, as in timm."""
    forward = type(layer).forward
    if forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return not layer._modules
    return forward.__module__.startswith("timm.layers.") and list(layer._modules) == ["drop", "act"]


class _AllReduceSum(torch.autograd.Function):
    """The sum over the ranks. The losses of all ranks depend on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, total = ranks, x.clone()
        ranks.add(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        ctx.ranks.add(total)
        return total, None


class _AllGather(torch.autograd.Function):
    """[B, ...] -> [ranks * B, ...], in the order of the ranks. The gradient sums those of all ranks for this part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return torch.cat(ranks.gathered(x.contiguous()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        ctx.ranks.add(total)
        return total.chunk(ctx.ranks.count)[ctx.ranks.rank], None


def share_values(model: LocalModel, ranks: Ranks) -> None:
    """Gives all ranks what the first one has of a model: parameters, buffers, and the turns of shared readouts. All of
    them hold the same tensors."""
    ranks.broadcast([t for t in (*model.parameters(), *model.buffers()) if not t.is_meta])
    shared = [module for module in model.modules() if isinstance(module, SharedReadout)]
    turns = ranks.broadcast_object([module.turn for module in shared]) if shared else []
    for module, turn in zip(shared, turns, strict=True):
        module.turn = turn


def gather_pairs(model: LocalModel, ranks: Ranks) -> None:
    """Gives the images of all ranks to objectives that compare images with each other. It may be called again."""
    for auxiliary in model.auxiliaries:
        terms = cast(Auxiliary, auxiliary).terms
        for name, term in terms.items():
            if term.pairs:
                gathered = isinstance(term.objective, _GatheredObjective)
                own = cast(Any, term.objective).objective if gathered else term.objective
                terms[name] = replace(term, objective=_GatheredObjective(own, ranks))


@dataclass(frozen=True)
class _GatheredObjective:
    """An objective on the outputs and targets of all ranks, with the same value on each rank.

    A rank's gradient is `count` times its part of the full gradient, because the backward pass of `_AllGather` sums
    over ranks that have all computed the same. The average over the ranks is then the full gradient.
    """

    objective: Callable[[Any, Any], Tensor]
    ranks: Ranks

    def __call__(self, output: Tensor, against: Tensor) -> Tensor:
        gathered = cast(Tensor, _AllGather.apply(output.contiguous(), self.ranks))
        return self.objective(gathered, cast(Tensor, _AllGather.apply(against, self.ranks)))


def _buckets(tensors: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """Groups tensors in order, up to `size` bytes in a group and with one dtype and device in each."""
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        alike = groups and (groups[-1][-1].dtype, groups[-1][-1].device) == (tensor.dtype, tensor.device)
        if not alike or tensor.nbytes > room:
            groups.append([])
            room = size
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return groups
