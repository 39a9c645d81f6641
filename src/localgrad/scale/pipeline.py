"""Blocks over processes: a rank trains a run of blocks on what the rank before hands on, and waits for no gradient.

That is what backpropagation cannot do: no rank idles between a forward and a backward pass, and no activations of
earlier batches are kept. What an averaged copy follows may lie on a later rank, which is some steps behind: the EMA
then has the lag of `MAN(lag=n)`, and equals it bit for bit.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.core.couplings import Momentum, Past
from localgrad.core.engine import LocalModel, StepResult, local_backward
from localgrad.core.errors import UserError
from localgrad.scale.replicas import Ranks

AHEAD = 2  # batches that a rank may hand on before the next rank has taken the first of them
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REPEATS = 3  # timed passes, after a warm-up


def least_lag(ranks: int) -> int:
    """The least `lag` of a coupling with which no rank of so many waits for one behind it: so many steps the first can
    be ahead of the last."""
    return AHEAD * (ranks - 1)


def shares_of(seconds: Sequence[float], ranks: int) -> tuple[int, ...]:
    """How many blocks each rank trains, so that the slowest rank is as fast as can be. seconds: of each block.

    >>> shares_of([3, 1, 1, 1], 2)
    (1, 3)
    """
    if not 1 <= ranks <= len(seconds):
        raise UserError(f"{len(seconds)} blocks cannot be dealt out to {ranks} ranks: take as many blocks, or more")

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return sum(seconds[first:]), (len(seconds) - first,)
        options = []
        for share in range(1, len(seconds) - first - left + 2):
            slowest, rest = best(first + share, left - 1)
            options.append((max(sum(seconds[first : first + share]), slowest), (share, *rest)))
        return min(options)

    return best(0, ranks)[1]


def block_seconds(model: LocalModel, x: Tensor, y: Tensor, *, autocast: torch.dtype | None = None) -> list[float]:
    """How long each block takes for a batch, median of a few passes, which leave the model and PyTorch's random
    generator as they were."""
    devices = [x.device] if x.device.type == "cuda" else []
    kept = [b.clone() for b in model.buffers()]
    passes: list[list[float]] = []

    def after_block(k: int) -> None:
        for parameter in model.members(k):
            parameter.grad = None
        if devices:
            torch.cuda.synchronize(x.device)
        passes[-1].append(time.perf_counter())

    with torch.random.fork_rng(devices):
        for _ in range(1 + REPEATS):
            passes.append([time.perf_counter()])
            local_backward(model, x, y, autocast=autocast, after_block=after_block, micro_batch=None)
    for buffer, old in zip(model.buffers(), kept, strict=True):
        buffer.copy_(old)
    spent = [[b - a for a, b in pairwise(times)] for times in passes[1:]]
    return [statistics.median(times) for times in zip(*spent, strict=True)]


class Stage:
    """This rank's blocks of a pipeline.

    Every rank makes the same model (the same seed), and one of these; each then steps through the same batches:

        stage = Stage(model, shares=(2, 2))
        optimizers = {k: torch.optim.SGD(model.members(k), lr=0.1) for k in stage.blocks}

        def step(k):
            optimizers[k].step()
            optimizers[k].zero_grad()

        for x, y in loader:
            stage.backward(x, y, after_block=step)
        stage.gather()                                  # the model is whole on each rank
        stage.finish()

    shares: how many blocks each rank trains, in order. timeout: that a rank waits for what another sends, by default
    PyTorch's. Raises UserError for shares that are not the model's, and for a coupling of form="pull" across ranks.

    Without a coupling, and with one of any lag, the result is that of one process that steps as it goes with the same
    model; a lag of less than `least_lag` makes ranks wait. What a network draws while it trains, such as dropout, is
    drawn on each rank.
    """

    def __init__(self, model: LocalModel, shares: Sequence[int], *, timeout: timedelta | None = None) -> None:
        self.ranks = Ranks(dist.get_rank(), dist.get_world_size())
        rank, count = self.ranks.rank, self.ranks.count
        if len(shares) != count or sum(shares) != len(model.blocks) or min(shares) < 1:
            raise UserError(f"shares {list(shares)} do not deal {len(model.blocks)} blocks out to {count} ranks")
        self.model, self.shares = model, tuple(shares)
        first = sum(shares[:rank])
        self.blocks = range(first, first + shares[rank])
        self.reads_images = rank == 0 or model.needs_images(self.blocks)
        self.owners = [rank for rank, share in enumerate(shares) for _ in range(share)]
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._coming: tuple[Any, Tensor] | None = None
        self._layout: tuple[list[int], torch.dtype, bool] | None = None
        self._sources = _Sources(model, self.owners, timeout)

    def backward(
        self,
        x: Tensor | None,
        y: Tensor,
        *,
        images: Tensor | None = None,
        scale: float | Tensor = 1.0,
        autocast: torch.dtype | None = None,
        check: Callable[[int, Tensor], None] | None = None,
        after_block: Callable[[int], None] | None = None,
        micro_batch: tuple[int, int] | None = (0, 1),
    ) -> StepResult:
        """`local_backward` through this rank's blocks. after_block(k) has to step the block, as what the next rank and
        the copies of other ranks get is what it leaves.

        x: only ranks with `reads_images` look at it; if they reconstruct, images is what they reconstruct, by default x
        un-normalised. micro_batch: as there; also what travels for averages travels once per optimizer step.
        """
        if x is not None and images is None and self.model.needs_images(self.blocks):
            images = self.model.method.images(x)
        last = micro_batch is None or micro_batch[0] == micro_batch[1] - 1

        def arrive(k: int, loss: Tensor) -> None:
            if last:
                self._sources.arrive(k)
            if check is not None:
                check(k, loss)

        h = self._receive() if self.ranks.rank else cast(Tensor, x)
        out = local_backward(
            self.model, h, y, images=images, scale=scale, autocast=autocast,
            check=arrive, after_block=after_block, micro_batch=micro_batch, blocks=self.blocks,
        )  # fmt: skip
        if out.handed is not None:
            self._send(out.handed)
        if last:
            self._sources.send()
        return out

    def gather(self) -> None:
        """Makes the model whole on each rank, as one process would have it: weights, statistics, averages, and what
        lagging averages will follow. Every rank calls it, after as many steps; more steps may follow."""
        self._sources.settle()
        for k, owner in enumerate(self.owners):
            self.ranks.spread(self._tensors(k), owner)

    def go_on(self, step: int) -> None:
        """After so many steps of an earlier start, whose whole model was loaded on each rank: before the first step."""
        self._sources.go_on(step)

    def finish(self) -> None:
        """Ends the pipeline: waits until all that this rank has handed on was taken. Every rank calls it, after as many
        steps."""
        self._sources.finish()
        if self._sent:
            self._hand_on(self._sent[-1][1])  # the next rank expects another batch, which is none
        while self._sent:
            self._sent.popleft()[0].wait()
        if self._coming is not None:
            self._coming[0].wait()
            self._coming = None

    def _tensors(self, k: int) -> list[Tensor]:
        modules = [self.model.blocks[k], *self.model.auxiliaries[k : k + 1]]
        return [t for module in modules for t in _tensors(module)]

    def _send(self, h: Tensor) -> None:
        last = h.ndim == 4 and h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()
        if self._layout is None:  # the next rank must know what comes
            self._layout = list(h.shape), h.dtype, last
            head = [h.ndim, DTYPES.index(h.dtype), int(last), *h.shape, *[0] * (8 - h.ndim)]
            dist.send(torch.tensor(head, device=h.device), self.ranks.rank + 1)
        elif self._layout[0] != list(h.shape):
            raise UserError(f"a pipeline's batches are all of one size: {self._layout[0][0]}, then {len(h)}")
        while len(self._sent) >= AHEAD:
            self._sent.popleft()[0].wait()
        self._hand_on(h.permute(0, 2, 3, 1) if last else h.contiguous())

    def _hand_on(self, packed: Tensor) -> None:
        self._sent.append((dist.isend(packed, self.ranks.rank + 1), packed))

    def _receive(self) -> Tensor:
        device = next(self.model.parameters()).device
        if self._layout is None:
            head = torch.empty(11, dtype=torch.int64, device=device)
            dist.recv(head, self.ranks.rank - 1)
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
        return dist.irecv(buffer, self.ranks.rank - 1), buffer


@dataclass
class _Route:
    """A unit whose parameters and buffers travel from the rank that trains it, `owner`, to one with copies of it,
    `user`: after each `every` steps, to be followed `lag` steps later. taken: how many of those states have come to
    where the copies look: in `into`, or without a lag in the user's own module of that unit."""

    owner: int
    user: int
    number: int
    module: nn.Module
    lag: int
    every: int
    into: list[Past] = field(default_factory=list)
    travelling: deque[tuple[Any, Tensor]] = field(default_factory=deque)
    taken: int = 0

    def pack(self) -> Tensor:
        return torch.cat([t.reshape(-1).view(torch.uint8) for t in _tensors(self.module)])

    def take(self, step: int) -> None:
        """The state that is followed in a step, and those before it."""
        while self.taken < max(0, step - self.lag) // self.every:
            work, packed = self.travelling.popleft()
            if work is not None:
                work.wait()
            self.taken += 1
            for module in [past.state(self.taken) for past in self.into] or [self.module]:
                tensors = _tensors(module)
                for tensor, part in zip(tensors, packed.split([t.nbytes for t in tensors]), strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))  # the clone is aligned


class _Sources:
    """What averaged copies follow on other ranks."""

    def __init__(self, model: LocalModel, owners: Sequence[int], timeout: timedelta | None) -> None:
        self.rank = dist.get_rank()
        # Apart from the batches, which go the other way.
        self.group: Any = dist.new_group(list(range(max(owners) + 1)), timeout=timeout)
        block_of = {name: k for k, block in enumerate(model.blocks) for name in block.names}
        self.routes: dict[tuple[int, str], _Route] = {}
        self.steps = 0  # of this rank
        self._awaited = 0  # steps whose messages this rank has made room for
        for k, auxiliary in enumerate(model.auxiliaries):
            coupling = cast(Momentum | None, auxiliary.coupling)
            if coupling is None or not coupling.spec.ema:
                continue
            for i, unit in enumerate(coupling.sources):
                user, owner, spec = owners[k], owners[block_of[unit.name]], coupling.spec
                if user == owner:
                    continue
                if spec.form == "pull":
                    raise UserError('form="pull" follows its sources at once, which lie on another rank: take branches')
                if cast(Any, coupling.links[i]).ema is None:
                    continue
                fresh = _Route(owner, user, len(self.routes), unit.module, spec.lag, spec.ema_every)
                route = self.routes.setdefault((user, unit.name), fresh)
                if spec.delayed and user == self.rank:
                    past = cast(Past, coupling.past[i])
                    past.elsewhere = True
                    route.into.append(past)

    @property
    def mine(self) -> list[_Route]:
        """Those that end here."""
        return [route for route in self.routes.values() if route.user == self.rank]

    def arrive(self, k: int) -> None:
        """Before the averages of block k move: what they follow in this step is there."""
        if self._awaited > self.steps:
            return  # for an earlier block of this step
        self._awaited += 1
        for route in self.mine:
            if self._awaited % route.every == 0:  # this step's state, which is needed later
                tensors = _tensors(route.module)
                size = sum(t.nbytes for t in tensors)
                packed = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
                work = dist.irecv(packed, route.owner, group=self.group, tag=route.number)
                route.travelling.append((work, packed))
            route.take(self.steps)

    def send(self) -> None:
        """After a step: this rank's units are on their way to whom copies them."""
        self.steps += 1
        for route in self.routes.values():
            if route.owner == self.rank and self.steps % route.every == 0:
                while len(route.travelling) > AHEAD:
                    route.travelling.popleft()[0].wait()
                packed = route.pack()
                work = dist.isend(packed, route.user, group=self.group, tag=route.number)
                route.travelling.append((work, packed))

    def settle(self) -> None:
        """Waits for all that one process would have kept by now."""
        for route in self.mine:
            route.take(self.steps - 1 + route.lag)

    def go_on(self, step: int) -> None:
        self.steps = self._awaited = step
        for route in self.routes.values():
            route.taken = max(0, step - 1) // route.every
            if route.user == self.rank and step and step % route.every == 0:
                route.travelling.append((None, route.pack()))  # which the owner has sent before

    def finish(self) -> None:
        for route in self.routes.values():
            for work, _ in route.travelling:
                if work is not None:
                    work.wait()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*module.parameters(), *module.buffers())]
