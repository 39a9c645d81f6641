"""Blocks over processes: a rank trains a run of blocks on what the rank before hands on, and waits for no gradient.

That is what backpropagation cannot do: no rank idles between a forward and a backward pass, and no activations of
earlier batches are kept. What an averaged copy follows may lie on a later rank, which is some steps behind: the EMA
then has the lag of `MAN(lag=n)`, and equals it bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.core.couplings import Momentum
from localgrad.core.engine import LocalModel, block_backward
from localgrad.core.errors import UserError

AHEAD = 2  # batches that a rank may hand on before the next rank has taken the first of them
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def least_lag(ranks: int) -> int:
    """Steps by which an EMA in a pipeline of so many ranks is behind: the first rank can be so far ahead of the last
    without waiting for it."""
    return AHEAD * (ranks - 1)


@dataclass
class Handed:
    """One step of one rank: the losses of its blocks by number, and the network's logits on the last rank."""

    losses: dict[int, Tensor]
    logits: Tensor | None


class Stage:
    """This rank's blocks of a pipeline.

    Every rank makes the same model (the same seed), and one of these; each then steps through the same batches:

        stage = Stage(model, shares=(2, 2), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
        for x, y in loader:
            out = stage.step(x, y)

    shares: how many blocks each rank trains, in order. optimizer: makes that of one block, from its parameters; it
    steps when the block has its gradients. The first rank reads x, the last one the logits; a rank in between reads y
    alone (and the images that its objectives reconstruct). Raises UserError for shares that are not the model's, and
    for a coupling whose lag is not `least_lag` where a pipeline has one.
    """

    def __init__(
        self,
        model: LocalModel,
        shares: Sequence[int],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        if len(shares) != self.count or sum(shares) != len(model.blocks) or min(shares) < 1:
            raise UserError(f"shares {list(shares)} do not deal {len(model.blocks)} blocks out to {self.count} ranks")
        self.model, self.autocast = model, autocast
        first = sum(shares[: self.rank])
        self.blocks = range(first, first + shares[self.rank])
        self.optimizers = {k: optimizer(model.members(k)) for k in self.blocks}
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._coming: tuple[Any, Tensor] | None = None
        self._layout: tuple[list[int], torch.dtype, bool] | None = None
        self._sources = _Sources(model, shares)

    def step(self, x: Tensor, y: Tensor, images: Tensor | None = None) -> Handed:
        """One batch through this rank's blocks, each of which steps."""
        h = x if self.rank == 0 else self._receive()
        handed = Handed({}, None)
        for k in self.blocks:
            h, handed.losses[k], _, handed.logits = block_backward(
                self.model, k, h, y, images=images, autocast=self.autocast
            )
            self._sources.arrive(k)
            self.model.move_averages(k)
            self.optimizers[k].step()
            self.optimizers[k].zero_grad()
        if self.rank < self.count - 1:
            self._send(h)
        self._sources.send()
        return handed

    def finish(self) -> None:
        """Ends the pipeline: waits until all that this rank has handed on was taken. Every rank calls it, after as many
        steps; the next step may follow it."""
        self._sources.finish()
        if self._sent:
            self._hand_on(self._sent[-1][1])  # the next rank expects another batch, which is none
        while self._sent:
            self._sent.popleft()[0].wait()
        if self._coming is not None:
            self._coming[0].wait()
            self._coming = None

    def _send(self, h: Tensor) -> None:
        last = h.ndim == 4 and h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()
        if self._layout is None:  # the next rank must know what comes
            self._layout = list(h.shape), h.dtype, last
            head = [h.ndim, DTYPES.index(h.dtype), int(last), *h.shape, *[0] * (8 - h.ndim)]
            dist.send(torch.tensor(head, device=h.device), self.rank + 1)
        while len(self._sent) >= AHEAD:
            self._sent.popleft()[0].wait()
        self._hand_on(h.permute(0, 2, 3, 1) if last else h.contiguous())

    def _hand_on(self, packed: Tensor) -> None:
        self._sent.append((dist.isend(packed, self.rank + 1), packed))

    def _receive(self) -> Tensor:
        device = next(self.model.parameters()).device
        if self._layout is None:
            head = torch.empty(11, dtype=torch.int64, device=device)
            dist.recv(head, self.rank - 1)
            ndim, dtype, last, *shape = head.tolist()
            self._layout = shape[:ndim], DTYPES[dtype], bool(last)
        work, buffer = self._coming or self._expect(device)
        work.wait()
        self._coming = self._expect(device)
        return buffer.permute(0, 3, 1, 2) if self._layout[2] else buffer

    def _expect(self, device: torch.device) -> tuple[Any, Tensor]:
        """The next batch travels here while this one is trained on."""
        assert self._layout is not None
        shape, dtype, last = self._layout
        b, *rest = shape
        buffer = torch.empty([b, *rest[1:], rest[0]] if last else shape, dtype=dtype, device=device)
        return dist.irecv(buffer, self.rank - 1), buffer


@dataclass
class _Route:
    """A unit whose parameters travel, after each step of `owner`, to a rank with copies of it. For `user` its own
    module of that unit, which it does not train, holds what has come."""

    owner: int
    user: int
    module: nn.Module
    lag: int
    number: int
    travelling: deque[tuple[Any, Tensor]]

    @property
    def tensors(self) -> list[Tensor]:
        return [t.detach() for t in (*self.module.parameters(), *self.module.buffers()) if t.is_floating_point()]


class _Sources:
    """What averaged copies follow on other ranks."""

    def __init__(self, model: LocalModel, shares: Sequence[int]) -> None:
        self.rank = dist.get_rank()
        self.group: Any = dist.new_group(list(range(len(shares))))  # apart from the batches, which go the other way
        rank_of = [rank for rank, share in enumerate(shares) for _ in range(share)]
        block_of = {name: k for k, block in enumerate(model.blocks) for name in block.names}
        self.routes: dict[tuple[int, str], _Route] = {}
        self._needs: dict[int, list[_Route]] = {k: [] for k in range(len(model.blocks))}
        for k, auxiliary in enumerate(model.auxiliaries):
            coupling = cast(Momentum | None, auxiliary.coupling)
            if coupling is None or not coupling.spec.ema:
                continue
            for i, unit in enumerate(coupling.sources):
                user, owner = rank_of[k], rank_of[block_of[unit.name]]
                if user == owner or cast(Any, coupling.links[i]).ema is None:
                    continue
                number = len(self.routes)
                fresh = _Route(owner, user, unit.module, coupling.spec.lag, number, deque())
                self._needs[k].append(self.routes.setdefault((user, unit.name), fresh))
                if coupling.spec.lag and user == self.rank:
                    coupling.past[i] = _Arrived()
        self.steps = 0  # of this rank
        self._awaited = 0  # messages that this rank has made room for, of each route

    def arrive(self, k: int) -> None:
        """Before the averages of block k move: its sources are as they were `lag` steps ago."""
        if self._awaited == self.steps:  # the first block of this step
            self._awaited += 1
            for route in self.routes.values():
                if route.user == self.rank:
                    flat = torch.cat([t.reshape(-1) for t in route.tensors])
                    work = dist.irecv(flat, route.owner, group=self.group, tag=route.number)
                    route.travelling.append((work, flat))
                    self._take(route)

    def send(self) -> None:
        """After a step: this rank's units are on their way to whom copies them."""
        self.steps += 1
        for route in self.routes.values():
            if route.owner == self.rank:
                while len(route.travelling) > AHEAD:
                    route.travelling.popleft()[0].wait()
                flat = torch.cat([t.reshape(-1) for t in route.tensors])
                work = dist.isend(flat, route.user, group=self.group, tag=route.number)
                route.travelling.append((work, flat))

    def finish(self) -> None:
        for route in self.routes.values():
            while route.travelling:
                route.travelling.popleft()[0].wait()

    def _take(self, route: _Route) -> None:
        """The state of `lag` steps ago, where there has been one; before, the first state is there already."""
        if self.steps - route.lag < 1:
            return
        work, flat = route.travelling.popleft()
        work.wait()
        tensors = route.tensors
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _Arrived(nn.Module):
    """In the place of a source's past: the source's own module holds the state that has arrived."""

    def forward(self, source: nn.Module) -> nn.Module:
        return source
