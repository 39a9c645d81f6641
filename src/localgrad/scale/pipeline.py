"""A pipeline: each rank trains some of the blocks on the output of the rank before it, and waits for no gradient.

Backpropagation cannot do this. Here no rank idles between a forward and a backward pass, and no activations of earlier
batches are kept. Two kinds of messages travel. Outputs of blocks go to the next rank. Units go the other way: an EMA
may follow a unit that a later rank trains, which is some steps behind. With `MAN(lag=2)` on two ranks:

    rank 0, the first blocks                               rank 1, the last blocks
    step 0: trains, its EMA follows unit(0)  -- output --> waits for the first output
    step 1: trains, its EMA follows unit(0)  -- output --> step 0: trains on the output of step 0
                                             <- unit(1) --
    step 2: trains, its EMA follows unit(0)  -- output --> step 1: trains on the output of step 1
                                             <- unit(2) --
    step 3: trains, its EMA follows unit(1)  -- output --> step 2: trains on the output of step 2

unit(n) is the unit after n steps; both ranks have unit(0) from the start. In step t the EMA follows unit(t - lag), as
it does in one process, so the results are equal bit for bit. Each rank does the following in each step:

1. `Stage._receive_input` takes the output of the rank before it, and posts the receive of the next output.
2. After the backward pass of its first block `_Sources.receive` posts the receive of the units of this step, which a
   later step follows, and waits for those that this step follows. Then averages move and optimizers step.
3. `Stage._send_output` sends the output to the next rank, and `_Sources.send` sends this rank's units back.

Sends and receives run in the background. A rank waits only for a message that it needs, or when `AHEAD` of its own have
not been received.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.core.couplings import Momentum, Snapshots, update_ema
from localgrad.core.engine import BlockResult, check_step, run_blocks
from localgrad.core.errors import UserError
from localgrad.core.inputs import main_input, targets_of
from localgrad.core.language_model import SharedReadout
from localgrad.core.model import LocalModel, localized
from localgrad.core.rebuild import FrozenReference
from localgrad.scale.messages import Layouts, Message
from localgrad.scale.replicas import Ranks, SyncBatchNorm, refuse_unlike

AHEAD = 2  # The number of outputs that a rank may send before the next rank has received the first of them.


def least_lag(hops: int = 1) -> int:
    """The smallest `lag` of a coupling at which ranks never wait for the units that averages follow.

    It holds for a full pipeline whose messages take less than half a step.

    Args:
        hops: The most ranks between an average and its source, as in `Stage.hops`. Default: 1, which is enough for MAN,
            because it follows the next unit. The path of deep MAN may pass more ranks.
    """
    return AHEAD * hops


class Stage:
    """The blocks of this rank in a pipeline.

    Every rank makes the same model from the same seed, makes a stage, and steps through the same batches:

        stage = Stage(model, shares=(2, 2))
        optimizers = {k: torch.optim.SGD([{"params": model.members(k)}], lr=0.1) for k in stage.blocks}

        for x, y in loader:
            for done in stage.block_steps(x, y):
                model.move_averages(done.block)
                optimizers[done.block].step()
                optimizers[done.block].zero_grad()
        stage.gather()                                  # Now each rank has the whole model.
        stage.finish()

    The result is that of one process in which each block's optimizer steps before the next block runs. If the lag of a
    coupling is below `least_lag(stage.hops)`, ranks wait for each other. Random numbers that a network draws while it
    trains, as for dropout, are drawn on each rank.

    Args:
        model: The result of `localize`, the same on all ranks.
        shares: The number of blocks that each rank trains, in order.
        timeout: The longest time to wait for a unit from another rank. Default: PyTorch's.

    Attributes:
        blocks: The numbers of this rank's blocks.
        reads_images: Whether this rank needs the inputs x.

    Raises:
        UserError: The shares do not fit the model, the models differ, a coupling of form="pull" has its source on
            another rank, or blocks of two ranks use the same parameters.
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
                module.alone = True  # Each rank has the whole batch.
        self._sent: deque[Message] = deque()  # Sends in the background.
        self._next_input: Message | None = None  # The receive that is posted already.
        self._input_layout: Layouts | None = None
        self._output_layout: Layouts | None = None
        self._sources = _Sources(model, self.owners, timeout)

    def block_steps(
        self,
        x: Any,
        y: Any = None,
        *,
        images: Tensor | None = None,
        scale: float | Tensor = 1.0,
        autocast: torch.dtype | None = None,
    ) -> Iterator[BlockResult]:
        """Does what `localgrad.block_steps` does, for the blocks of this rank. Gradients cannot be accumulated.

        The caller moves the averages of a block and steps its optimizer before asking for the next block, because other
        ranks get the result.

        Args:
            x: Normalised inputs, [B, C, H, W], or a tuple or dictionary of several, as in `localgrad.block_steps`.
                Ranks without `reads_images` may give None.
            y: Targets, [B], or what the criterion takes. Default: the `labels` of the dictionary x.
            images: The images that decoders of this rank reconstruct. Default: x, un-normalised.
            scale: A factor for every loss before its backward pass. Default: 1.
            autocast: The dtype of each block's forward pass. Default: the model's own.

        Returns:
            An iterator over a `BlockResult` for each block of this rank, in order.

        Raises:
            UserError: The batch has another size than the first one, or an argument is wrong.
        """
        if x is not None and images is None and self.model.needs_images(self.blocks):
            images = self.model.method.images(main_input(x))
        y = targets_of(x, y)
        h = self._receive_input() if self.ranks.rank else self.model.inputs.crossing(x)
        check_step(self.model, self.blocks, h, y, images=images, scale=scale, autocast=autocast)
        done = None
        for done in run_blocks(self.model, self.blocks, h, y, images=images, scale=scale, autocast=autocast):
            self._sources.receive()
            yield done
        if done is not None and done.block + 1 < len(self.model.blocks):
            self._send_output(done.output)
        self._sources.send()

    @property
    def hops(self) -> int:
        """The most ranks between an average and its source, or 0 if all sources are on the rank of their averages."""
        return max((route.owner - route.user for route in self._sources.routes.values()), default=0)

    def gather(self) -> None:
        """Gives each rank the whole model as one process would have it: weights, statistics, averages and snapshots.

        All ranks call it after the same number of steps. They may take more steps afterwards.
        """
        self._sources.receive_all()
        for k, owner in enumerate(self.owners):
            parameters = [p for module in self.model.parts(k) for p in module.parameters()]
            self.ranks.broadcast([*parameters, *self.model.statistics(k)], owner)

    def go_on(self, step: int) -> None:
        """Resumes after `step` steps of an earlier run. Call it on all ranks after the whole model has been loaded."""
        self._sources.resume(step)

    def finish(self) -> None:
        """Waits until all messages have arrived. All ranks call it after the same number of steps.

        They may take more steps afterwards.
        """
        self._sources.wait()
        if self._sent:  # The next rank has posted a receive, which is answered here with no new output.
            self._send(self._sent[-1].tensors)
        while self._sent:
            self._sent.popleft().wait()
        if self._next_input is not None:
            self._next_input.wait()
            self._next_input = None

    def _refuse_shared(self) -> None:
        """Raises UserError if a block reads parameters of another rank, because they would be out of date."""
        if any(isinstance(module, SharedReadout) for module in self.model.auxiliaries.modules()):
            raise UserError("ranks of a pipeline send each other no readout: let heads have their own, without shared")
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
                        "them on one rank, with fewer blocks or ranks, or give each block its own"
                    )

    def _send_output(self, crossing: Any) -> None:
        layouts = Layouts.of(crossing)
        if self._output_layout is None:  # The next rank needs the layout once, before the first batch.
            self._output_layout = layouts
            dist.send_object_list([layouts], self.ranks.rank + 1)
        elif self._output_layout != layouts:
            raise UserError(f"a pipeline's batches are all alike: {self._output_layout} was handed on, then {layouts}")
        while len(self._sent) >= AHEAD:
            self._sent.popleft().wait()
        self._send(layouts.pack(crossing))

    def _send(self, packed: list[Tensor]) -> None:
        self._sent.append(Message([dist.isend(tensor, self.ranks.rank + 1) for tensor in packed], packed))

    def _receive_input(self) -> Any:
        if self._input_layout is None:
            box: list[Any] = [None]
            dist.recv_object_list(box, self.ranks.rank - 1)
            self._input_layout = cast(Layouts, box[0])
        message = self._next_input or self._post_receive(self._input_layout)
        message.wait()
        self._next_input = self._post_receive(self._input_layout)  # It travels while this one is trained on.
        return self._input_layout.unpack(message.tensors)

    def _post_receive(self, layouts: Layouts) -> Message:
        packed = layouts.empty(next(self.model.parameters()).device)
        return Message([dist.irecv(tensor, self.ranks.rank - 1) for tensor in packed], packed)


@dataclass
class _Route:
    """A unit that travels from the rank that trains it to a rank with copies of it.

    State number i of the unit is the unit after `i * every` steps.

    Attributes:
        owner: The rank that trains the unit.
        user: The rank with the copies.
        number: The tag of the messages.
        module: The unit.
        lag: The age of the state that copies follow, in steps.
        every: The number of steps between two states.
        snapshots: On the user, where states are stored. Without a lag there are none, and states go into `module`.
        messages: Sends or receives in the background, in order. A receive without work has arrived.
        received: The number of the last state that was stored.
    """

    owner: int
    user: int
    number: int
    module: nn.Module
    lag: int
    every: int
    snapshots: list[Snapshots] = field(default_factory=list)
    messages: deque[tuple[Any, Tensor]] = field(default_factory=deque)
    received: int = 0

    def pack(self) -> Tensor:
        return torch.cat([t.reshape(-1).view(torch.uint8) for t in _tensors(self.module)])

    def store_first_state(self) -> None:
        """Stores state 0, which the user has itself before the first step."""
        for snapshots in self.snapshots:
            update_ema(snapshots.state(0), self.module, 0.0, buffers=True)

    def store_states(self, step: int) -> None:
        """Waits for the states up to the one that is followed in a step, and stores them."""
        while self.received < max(0, step - self.lag) // self.every:
            work, packed = self.messages.popleft()
            if work is not None:
                work.wait()
            self.received += 1
            for module in [snapshots.state(self.received) for snapshots in self.snapshots] or [self.module]:
                tensors = _tensors(module)
                for tensor, part in zip(tensors, packed.split([t.nbytes for t in tensors]), strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))  # The clone is aligned in memory.


class _Sources:
    """Sends and receives the units that averages follow on other ranks.

    Attributes:
        routes: A route for each unit that a rank copies from another, by that rank and the name of the unit.
        steps: The number of steps that this rank has finished.
    """

    def __init__(self, model: LocalModel, owners: Sequence[int], timeout: timedelta | None) -> None:
        self.rank = dist.get_rank()
        # These messages have a process group of their own, because they go against the direction of the outputs.
        self.group: Any = dist.new_group(list(range(max(owners) + 1)), timeout=timeout)
        self.routes: dict[tuple[int, str], _Route] = {}
        self.steps = 0
        self._posted = 0  # The number of steps whose receives this rank has posted.
        block_of = {name: k for k, block in enumerate(model.blocks) for name in block.names}
        for k, auxiliary in enumerate(model.auxiliaries):
            coupling = cast(Momentum | None, auxiliary.coupling)
            if coupling is None or not coupling.spec.ema:
                continue
            for i, unit in enumerate(coupling.sources):
                user, owner = owners[k], owners[block_of[unit.name]]
                if user != owner:
                    self._add_route(coupling, i, user, owner)

    def _add_route(self, coupling: Momentum, i: int, user: int, owner: int) -> None:
        """Adds the route of source i of a coupling, unless its link has no EMA."""
        spec, unit = coupling.spec, coupling.sources[i]
        if spec.moves_after_step:
            raise UserError('form="pull" follows its sources at once, which lie on another rank: take branches')
        if cast(Any, coupling.links[i]).ema is None:
            return
        fresh = _Route(owner, user, len(self.routes), unit.module, spec.lag, spec.ema_every)
        route = self.routes.setdefault((user, unit.name), fresh)
        if spec.delayed and user == self.rank:
            snapshots = cast(Snapshots, coupling.snapshots[i])
            snapshots.remote = True
            route.snapshots.append(snapshots)

    @property
    def incoming(self) -> list[_Route]:
        """The routes that end on this rank."""
        return [route for route in self.routes.values() if route.user == self.rank]

    def receive(self) -> None:
        """Makes sure that the states that this step follows are there. Only the first call in a step does something."""
        if self._posted > self.steps:
            return
        self._posted += 1
        for route in self.incoming:
            if not self.steps:
                route.store_first_state()
            if self._posted % route.every == 0:
                tensors = _tensors(route.module)
                size = sum(t.nbytes for t in tensors)
                packed = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
                work = dist.irecv(packed, route.owner, group=self.group, tag=route.number)
                route.messages.append((work, packed))
            route.store_states(self.steps)

    def send(self) -> None:
        """Ends a step: sends this rank's units to the ranks with copies of them."""
        self.steps += 1
        for route in self.routes.values():
            if route.owner == self.rank and self.steps % route.every == 0:
                while len(route.messages) > AHEAD:
                    route.messages.popleft()[0].wait()
                packed = route.pack()
                work = dist.isend(packed, route.user, group=self.group, tag=route.number)
                route.messages.append((work, packed))

    def receive_all(self) -> None:
        """Waits for all states that one process would have stored by now."""
        for route in self.incoming:
            route.store_states(self.steps - 1 + route.lag)

    def resume(self, step: int) -> None:
        """Sets the state that this rank would have after `step` steps, from the loaded model."""
        self.steps = self._posted = step
        for route in self.routes.values():
            route.received = max(0, step - 1) // route.every
            if route.user == self.rank and step and step % route.every == 0:
                route.messages.append((None, route.pack()))  # The owner had sent this state before the run stopped.

    def wait(self) -> None:
        """Waits for all messages. Those that have arrived and that later steps follow are kept."""
        for route in self.routes.values():
            for work, _ in route.messages:
                if work is not None:
                    work.wait()
            arrived = deque((None, packed) for _, packed in route.messages)
            route.messages = arrived if route.user == self.rank else deque()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*module.parameters(), *module.buffers())]
