"""Units that travel from the rank of a pipeline that trains them to ranks with averages that follow them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.core.couplings import Momentum, Snapshots, update_ema
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel
from localgrad.core.sharded import local
from localgrad.scale.groups import Grid
from localgrad.scale.messages import AHEAD


@dataclass
class Route:
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
                self.unpack(packed, module)

    @staticmethod
    def unpack(packed: Tensor, module: nn.Module) -> None:
        """Gives a copy of the unit the values of a message."""
        tensors = _tensors(module)
        for tensor, part in zip(tensors, packed.split([t.nbytes for t in tensors]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))  # The clone is aligned in memory.


class Sources:
    """Sends and receives the units that averages follow on other ranks.

    Attributes:
        routes: A route for each unit that a rank copies from another, by that rank and the name of the unit.
        steps: The number of steps that this rank has finished.
    """

    def __init__(self, model: LocalModel, owners: Sequence[int], grid: Grid) -> None:
        # These messages have a process group of their own, because they go against the direction of the outputs.
        self.rank, self.group, self._presently = grid.back.rank, grid.back.group, grid.column.group
        self.routes: dict[tuple[int, str], Route] = {}
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
        fresh = Route(owner, user, len(self.routes), unit.module, spec.lag, spec.ema_every)
        route = self.routes.setdefault((user, unit.name), fresh)
        if spec.delayed and user == self.rank:
            snapshots = cast(Snapshots, coupling.snapshots[i])
            snapshots.remote = True
            route.snapshots.append(snapshots)

    @property
    def incoming(self) -> list[Route]:
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
                work = dist.irecv(packed, group_src=route.owner, group=self.group, tag=route.number)
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
                work = dist.isend(packed, group_dst=route.user, group=self.group, tag=route.number)
                route.messages.append((work, packed))

    def receive_all(self) -> None:
        """Waits for all states that one process would have stored by now."""
        for route in self.incoming:
            route.store_states(self.steps - 1 + route.lag)

    def bring(self) -> None:
        """Gives each unit that averages on this rank follow the present values of the rank that trains it."""
        self.receive_all()
        for route in self.routes.values():
            if route.owner == self.rank:
                dist.send(route.pack(), group_dst=route.user, group=self._presently)
            elif route.user == self.rank:
                packed = route.pack()
                dist.recv(packed, group_src=route.owner, group=self._presently)
                route.unpack(packed, route.module)

    def resume(self, step: int) -> None:
        """Sets the state that this rank would have after `step` steps, from the loaded model."""
        self.wait()
        self.steps = self._posted = step
        for route in self.routes.values():
            route.messages.clear()  # Those of steps that are taken back.
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
    """What this rank holds of a unit. If it is sharded, its copies on other ranks are sharded alike."""
    return [local(t).detach() for t in (*module.parameters(), *module.buffers())]
