"""Blocks over processes: a rank trains a run of blocks on what the rank before hands on, and waits for no gradient.

That is what backpropagation cannot do: no rank idles between a forward and a backward pass, and no activations of
earlier batches are kept. What an averaged copy follows may lie on a later rank, which is some steps behind: the EMA
then has the lag of `MAN(lag=n)`, and equals it bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.core.couplings import Momentum, Snapshots, update_ema
from localgrad.core.engine import BlockResult, check_step, run_blocks
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel, localized
from localgrad.core.rebuild import FrozenReference
from localgrad.scale.replicas import Ranks, SyncBatchNorm, refuse_unlike

AHEAD = 2  # How many batches a rank may send before the next rank has taken the first of them.


def least_lag(hops: int = 1) -> int:
    """The least `lag` of a coupling with which ranks do not wait for what averages follow, in a full pipeline whose
    messages take less than half a step. hops: over how many ranks they follow it: 1 for MAN, whose source is the next
    unit, and for deep MAN as many as its path passes."""
    return AHEAD * hops


class Stage:
    """This rank's blocks of a pipeline.

    Every rank makes the same model (the same seed), and one of these; each then steps through the same batches:

        stage = Stage(model, shares=(2, 2))
        optimizers = {k: torch.optim.SGD(model.members(k), lr=0.1) for k in stage.blocks}

        for x, y in loader:
            for done in stage.block_steps(x, y):
                model.move_averages(done.block)
                optimizers[done.block].step()
                optimizers[done.block].zero_grad()
        stage.gather()                                  # the model is whole on each rank
        stage.finish()

    shares: how many blocks each rank trains, in order. timeout: that a rank waits for what another sends, by default
    PyTorch's. Raises UserError for shares that are not the model's, for models that differ, for a coupling of
    form="pull" across ranks, and for parameters that blocks of two ranks read.

    Without a coupling, and with one of any lag, the result is that of one process that steps as it goes with the same
    model; a lag of less than `least_lag(stage.hops)` makes ranks wait. What a network draws while it trains, such as
    dropout, is drawn on each rank.
    """

    def __init__(self, model: LocalModel, shares: Sequence[int], *, timeout: timedelta | None = None) -> None:
        model = localized(model, "Stage")
        self.ranks = Ranks(dist.get_rank(), dist.get_world_size())
        rank, count = self.ranks.rank, self.ranks.count
        if len(shares) != count or sum(shares) != len(model.blocks) or min(shares) < 1:
            raise UserError(f"shares {list(shares)} do not deal {len(model.blocks)} blocks out to {count} ranks")
        refuse_unlike(model, self.ranks)
        self.model, self.shares = model, tuple(shares)
        first = sum(shares[:rank])
        self.blocks = range(first, first + shares[rank])
        self.reads_images = rank == 0 or model.needs_images(self.blocks)
        self.owners = [rank for rank, share in enumerate(shares) for _ in range(share)]
        self._refuse_shared()
        for module in model.modules():
            if isinstance(module, SyncBatchNorm):
                module.alone = True  # each rank has the whole batch
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._coming: tuple[Any, Tensor] | None = None
        self._comes: _Layout | None = None
        self._goes: _Layout | None = None
        self._sources = _Sources(model, self.owners, timeout)

    def block_steps(
        self,
        x: Tensor | None,
        y: Tensor,
        *,
        images: Tensor | None = None,
        scale: float | Tensor = 1.0,
        autocast: torch.dtype | None = None,
    ) -> Iterator[BlockResult]:
        """`localgrad.block_steps` through this rank's blocks. Each batch is a step: gradients are not accumulated.

        The caller moves the averages of a block and steps it before it asks for the next one, because the next rank,
        and the copies on other ranks, get what it leaves.

        Args:
            x: normalised inputs [B, C, H, W], which only ranks with `reads_images` look at.
            y: targets [B].
            images: what decoders of this rank's blocks reconstruct. By default x, un-normalised.
            scale: every loss is multiplied by it before its backward pass.
            autocast: the dtype in which each block's forward pass is computed. By default the model's own.

        Raises:
            UserError: the batch has another size than the first one.
        """
        if x is not None and images is None and self.model.needs_images(self.blocks):
            images = self.model.method.images(x)
        h = self._receive() if self.ranks.rank else cast(Tensor, x)
        check_step(self.model, self.blocks, h, y, images=images, scale=scale, autocast=autocast)
        done = None
        for done in run_blocks(self.model, self.blocks, h, y, images=images, scale=scale, autocast=autocast):
            self._sources.arrive()
            yield done
        if done is not None and done.block + 1 < len(self.model.blocks):
            self._send(done.output)
        self._sources.send()

    @property
    def hops(self) -> int:
        """Over how many ranks averages follow their sources; 0 if none follows one of another rank."""
        return max((route.owner - route.user for route in self._sources.routes.values()), default=0)

    def gather(self) -> None:
        """Makes the model whole on each rank, as one process would have it: weights, statistics, averages, and what
        lagging averages will follow. Every rank calls it, after as many steps; more steps may follow."""
        self._sources.settle()
        for k, owner in enumerate(self.owners):
            parameters = [p for module in self.model.parts(k) for p in module.parameters()]
            self.ranks.broadcast([*parameters, *self.model.statistics(k)], owner)

    def go_on(self, step: int) -> None:
        """After so many steps of an earlier start, whose whole model was loaded on each rank: before the first step."""
        self._sources.go_on(step)

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

    def _refuse_shared(self) -> None:
        """Parameters that a block only reads, as it reads those of another rank, would be out of date."""
        trained = {id(p): k for k, block in enumerate(self.model.blocks) for p in block.parameters()}
        for k, owner in enumerate(self.owners):
            held = (
                m.reference[0] for part in self.model.parts(k) for m in part.modules() if isinstance(m, FrozenReference)
            )
            for parameter in (p for module in held for p in module.parameters()):
                other = trained.get(id(parameter), k)
                if self.owners[other] != owner:
                    raise UserError(
                        f"blocks {other} and {k} read the same parameters, which ranks of a pipeline cannot share: put "
                        "them on one rank, with fewer blocks or ranks"
                    )

    def _send(self, h: Tensor) -> None:
        layout = _Layout.of(h)
        if self._goes is None:  # The next rank needs the layout once, before the first batch.
            self._goes = layout
            dist.send_object_list([layout], self.ranks.rank + 1)
        elif self._goes != layout:
            raise UserError(
                f"a pipeline's batches are all alike: {self._goes.shape} was handed on, then {layout.shape}"
            )
        while len(self._sent) >= AHEAD:
            self._sent.popleft()[0].wait()
        self._hand_on(h.permute(layout.order).contiguous())

    def _hand_on(self, packed: Tensor) -> None:
        self._sent.append((dist.isend(packed, self.ranks.rank + 1), packed))

    def _receive(self) -> Tensor:
        if self._comes is None:
            box: list[Any] = [None]
            dist.recv_object_list(box, self.ranks.rank - 1)
            self._comes = cast(_Layout, box[0])
        work, packed = self._coming or self._expect(self._comes)
        work.wait()
        self._coming = self._expect(self._comes)
        return packed.permute(np.argsort(self._comes.order).tolist())

    def _expect(self, layout: _Layout) -> tuple[Any, Tensor]:
        """The next batch travels here while this one is trained on."""
        device = next(self.model.parameters()).device
        packed = torch.empty([layout.shape[d] for d in layout.order], dtype=layout.dtype, device=device)
        return dist.irecv(packed, self.ranks.rank - 1), packed


@dataclass(frozen=True)
class _Layout:
    """How the tensors that one rank sends to the next lie in memory. They must lie so there too, because kernels round
    differently for another memory format.

    Attributes:
        order: the dimensions, the one with the largest stride first.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, h: Tensor) -> _Layout:
        return cls(tuple(h.shape), tuple(sorted(range(h.ndim), key=lambda d: -h.stride(d))), h.dtype)


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
    into: list[Snapshots] = field(default_factory=list)
    travelling: deque[tuple[Any, Tensor]] = field(default_factory=deque)
    taken: int = 0

    def pack(self) -> Tensor:
        return torch.cat([t.reshape(-1).view(torch.uint8) for t in _tensors(self.module)])

    def begin(self) -> None:
        """Before the first step: what the source is now, as one process would find it then."""
        for snapshots in self.into:
            update_ema(snapshots.state(0), self.module, 0.0, buffers=True)

    def take(self, step: int) -> None:
        """The state that is followed in a step, and those before it."""
        while self.taken < max(0, step - self.lag) // self.every:
            work, packed = self.travelling.popleft()
            if work is not None:
                work.wait()
            self.taken += 1
            for module in [snapshots.state(self.taken) for snapshots in self.into] or [self.module]:
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
                if spec.moves_after_step:
                    raise UserError('form="pull" follows its sources at once, which lie on another rank: take branches')
                if cast(Any, coupling.links[i]).ema is None:
                    continue
                fresh = _Route(owner, user, len(self.routes), unit.module, spec.lag, spec.ema_every)
                route = self.routes.setdefault((user, unit.name), fresh)
                if spec.delayed and user == self.rank:
                    snapshots = cast(Snapshots, coupling.snapshots[i])
                    snapshots.remote = True
                    route.into.append(snapshots)

    @property
    def mine(self) -> list[_Route]:
        """Those that end here."""
        return [route for route in self.routes.values() if route.user == self.rank]

    def arrive(self) -> None:
        """Before the averages of a block move: what they follow in this step is there."""
        if self._awaited > self.steps:
            return  # for an earlier block of this step
        self._awaited += 1
        for route in self.mine:
            if not self.steps:
                route.begin()
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
        """Waits for what is on its way; what has come, and is followed later, stays."""
        for route in self.routes.values():
            for work, _ in route.travelling:
                if work is not None:
                    work.wait()
            came = deque((None, packed) for _, packed in route.travelling)
            route.travelling = came if route.user == self.rank else deque()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*module.parameters(), *module.buffers())]
