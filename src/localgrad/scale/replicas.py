"""Data parallel by block: the gradients of block k are averaged over the ranks while block k+1 computes.

A process group of `torch.distributed` (gloo on the CPU, NCCL on CUDA) is all that is needed; there is no engine here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localgrad.core.auxiliary import Auxiliary, Term
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel, localized

BUCKET = 25 * 2**20  # bytes that travel together, as many as DistributedDataParallel takes


@dataclass(frozen=True)
class Ranks:
    """The processes that train together. Without others everything here does nothing, at no cost.

    rank, count: which this is, of how many. timeout: that they wait for each other, by default PyTorch's.
    """

    rank: int = 0
    count: int = 1
    timeout: timedelta | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def broadcast_object(self, value: Any) -> Any:
        """What the first rank has. value: plain values and tensors; those of other ranks are not looked at."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """What every rank has, in their order."""
        if self.count == 1:
            return [value]
        box = [None] * self.count
        dist.all_gather_object(box, value)
        return box

    def gather_object(self, value: Any) -> list[Any]:
        """What every rank has, in their order, for the first rank; others get an empty list."""
        if self.count == 1:
            return [value]
        box = [None] * self.count if self.first else []
        dist.gather_object(value, box if self.first else None)
        return box

    def all_reduce_sum(self, numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
        """The sums over the ranks, in float64. device: one that the process group's backend can read."""
        return self._reduced(numbers, device, dist.ReduceOp.SUM)

    def all_reduce_max(self, numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
        """The largest over the ranks of each."""
        return self._reduced(numbers, device, dist.ReduceOp.MAX)

    def broadcast(self, tensors: Sequence[Tensor], rank: int = 0) -> None:
        """One rank's values into every rank's tensors, in place."""
        if self.count > 1:
            for tensor in tensors:
                # Collectives want contiguous memory, which weights in channels_last have in another sense.
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=rank)
                tensor.detach().copy_(whole)

    def _reduced(self, numbers: Sequence[float], device: torch.device | str, how: Any) -> list[float]:
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total, how)
        return total.tolist()


class Replicas:
    """Ranks that hold the same model and train it on different images of each batch.

    As it is made, the first rank's parameters and buffers (averaged copies too) are given to all. In a loop of one's
    own, with as many images on each rank:

        replicas = Replicas(model)
        for done in block_steps(model, x, y):
            replicas.start(done.block, done.loss)    # its gradients travel while the next block computes
        replicas.finish()                            # waits for all
        model.move_averages()
        optimizer.step()

    Averages of the coupling need no exchange: they follow parameters, which are the same everywhere. So do the
    statistics of batch norm not, of which each rank has its own unless the network has `SyncBatchNorm`; the first
    rank's are those that count. Objectives that compare images with each other (`Term.pairs`) see those of all ranks.

    Where a rank's forward pass has left a parameter out (stochastic depth that skips a whole unit), its gradient counts
    as zero there; where all ranks have, it stays None. Sparse gradients, of embeddings, become dense ones.

    bucket: bytes that travel together at most. Raises UserError on all ranks if their models differ.
    """

    def __init__(self, model: LocalModel, *, bucket: int = BUCKET) -> None:
        model = localized(model, "Replicas")
        self.ranks = Ranks(dist.get_rank(), dist.get_world_size())
        self.model = model
        self.bucket = bucket
        refuse_unlike(model, self.ranks)
        self._parameters = [[p for m in model.parts(k) for p in m.parameters()] for k in range(len(model.blocks))]
        self._travelling: dict[int, _Travelling] = {}
        self.ranks.broadcast([*model.parameters(), *model.buffers()])
        for auxiliary in model.auxiliaries:
            _see_all(cast(Auxiliary, auxiliary))

    def start(self, k: int, loss: Tensor, *more: Tensor) -> None:
        """Begins to average the gradients of block k, its loss, and `more` scalars, in place. Call it on all ranks,
        block by block, when the block has its gradients; nothing of this may be read or changed before `finish(k)`."""
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
        # What is sent must be alike on all ranks, so it may not depend on which gradients this rank has.
        groups = _buckets([loss, *more, have, *gradients], self.bucket)
        self._travelling[k] = _Travelling([self._send(group) for group in groups], missing, have, gradients)

    def finish(self, k: int | None = None) -> None:
        """Waits until the averages of block k, or of all blocks that were started, are there."""
        for block in list(self._travelling) if k is None else [k]:
            travelling = self._travelling.pop(block)
            for tensors, flat, work in travelling.buckets:
                work.wait()
                flat /= self.ranks.count
                for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                    tensor.copy_(part.view_as(tensor))
            shares = travelling.have.tolist() if travelling.missing else []
            for i, parameter in travelling.missing:
                if shares[i]:
                    parameter.grad = travelling.gradients[i]

    def _send(self, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor, Any]:
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        return tensors, flat, dist.all_reduce(flat, async_op=True)


@dataclass(frozen=True)
class _Travelling:
    """A block's averages on their way. missing: the parameters without a gradient on this rank, with their number.
    have: of each parameter, 1 where there is a gradient, which becomes the share of ranks that have one."""

    buckets: list[tuple[list[Tensor], Tensor, Any]]
    missing: list[tuple[int, nn.Parameter]]
    have: Tensor
    gradients: list[Tensor]


def refuse_unlike(model: LocalModel, ranks: Ranks) -> None:
    """Raises UserError on all ranks if the model of one is not like the first one's: parameters and buffers by name,
    shape and dtype, what is trained, and where the network is cut."""
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

    PyTorch's own does so on CUDA alone. Its parameters and buffers are those of the layer that it replaces, so weights
    go from the one to the other. As the first of two passes gives the mean and the second the variance, the result is
    that of one process with all images, up to rounding.
    """

    alone = False  # where ranks share no batch

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        alone = self.alone or not dist.is_initialized() or dist.get_world_size() == 1
        if alone or not self.training:
            return super().forward(input)
        if input.device.type == "meta":
            return torch.empty_like(input)  # one value a channel here is one of several over the ranks
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        places = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = x.numel() // x.shape[1] * dist.get_world_size()  # as many on each rank
        mean = cast(Tensor, _Total.apply(x.sum(places))) / count
        apart = x - mean.view(shape)
        variance = cast(Tensor, _Total.apply(apart.square().sum(places))) / count
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        out = apart * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for average, new in ((self.running_mean, mean), (self.running_var, variance)):
            cast(Tensor, average).lerp_(new.to(cast(Tensor, average).dtype), share)


def sync_batch_norm(network: nn.Module) -> nn.Module:
    """`network` with a `SyncBatchNorm` in the place of each batch norm, with its parameters and buffers. Before
    `localize`, whose copies are then of the same kind."""
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            twin = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            twin._parameters, twin._buffers, twin.training = child._parameters, child._buffers, child.training
            setattr(network, name, twin)
        else:
            sync_batch_norm(child)
    return network


class _Total(torch.autograd.Function):
    """The sum over the ranks. Each rank's loss depends on it, so the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class _Together(torch.autograd.Function):
    """[B, ...] -> [ranks * B, ...], those of all ranks in their order. The gradient is the sum of what each rank's loss
    asks of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _see_all(auxiliary: Auxiliary) -> None:
    """Lets the objectives that compare images with each other see those of all ranks."""
    for name, term in auxiliary.terms.items():
        if term.pairs:
            auxiliary.terms[name] = replace(term, objective=_OverAll(term))


@dataclass(frozen=True)
class _OverAll:
    """An objective on the outputs and targets of all ranks, in their order: the same value on each.

    A rank's gradient is `count` times its share of the whole, because the backward pass of the gathering sums over
    ranks that have all computed the same; the average over the ranks is then the whole gradient.
    """

    term: Term

    def __call__(self, output: Tensor, against: Tensor) -> Tensor:
        together = cast(Tensor, _Together.apply(output.contiguous()))
        return self.term.objective(together, cast(Tensor, _Together.apply(against)))


def _buckets(tensors: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """The tensors in their order, as many together as `size` bytes hold; of one dtype and device each."""
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
