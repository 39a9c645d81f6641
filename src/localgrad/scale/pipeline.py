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
2. After the backward pass of its first block `Sources.receive` posts the receive of the units of this step, which a
   later step follows, and waits for those that this step follows. Then averages move and optimizers step.
3. `Stage._send_output` sends the output to the next rank, and `Sources.send` sends this rank's units back.

Sends and receives run in the background. A rank waits only for a message that it needs, or when `AHEAD` of its own have
not been received.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.core.auxiliary import Auxiliary
from localgrad.core.couplings import Snapshots
from localgrad.core.engine import BlockResult, check_step, run_blocks
from localgrad.core.errors import UserError
from localgrad.core.inputs import main_input, targets_of
from localgrad.core.language_model import SharedReadout
from localgrad.core.model import LocalModel
from localgrad.core.rebuild import FrozenReference
from localgrad.scale.groups import Grid, Ranks
from localgrad.scale.held import Held
from localgrad.scale.messages import AHEAD, Layouts, Message
from localgrad.scale.replicas import SyncBatchNorm, refuse_unlike
from localgrad.scale.sources import Sources

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def least_lag(hops: int = 1) -> int:
    """The smallest `lag` of a coupling at which ranks never wait for the units that averages follow.

    It holds for a full pipeline whose messages take less than half a step.

    Args:
        hops: The most ranks between an average and its source, as in `Stage.hops`. Default: 1, which is enough for MAN,
            because it follows the next unit. The path of deep MAN may pass more ranks.
    """
    return AHEAD * hops


class Stage:
    """The blocks of this rank in a pipeline. This rank holds what they need, and nothing else of the model.

    Every rank calls the same function that makes the model, from the same seed, and steps through the same batches:

        def make():
            return lg.localize(Network(), blocks=4, method=lg.dgl(), example=x)

        torch.manual_seed(0)
        stage = lg.Stage(make, shares=(2, 2))
        model = stage.model
        optimizers = {k: torch.optim.SGD([{"params": model.members(k)}], lr=0.1) for k in stage.blocks}

        for x, y in loader:
            for done in stage.block_steps(x, y):
                model.move_averages(done.block)
                optimizers[done.block].step()
                optimizers[done.block].zero_grad()
        stage.finish()
        weights = stage.state_dict(model.backbone)      # whole, on the first rank

    The result is that of one process in which each block's optimizer steps before the next block runs. If the lag of a
    coupling is below `least_lag(stage.hops)`, ranks wait for each other. Random numbers that a network draws while it
    trains, as for dropout, are drawn on each rank for its own blocks. So give a `DataLoader` that shuffles
    `generator=torch.Generator().manual_seed(seed)`. Otherwise it draws from the global generator, and once a block has
    drawn on one rank and not on another, these read different batches.

    With a mesh, the ranks of a row train the same blocks, each on its part of every batch, as replicas or shards:

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "replicas"))
        stage = lg.Stage(make, shares=(2, 2), mesh=mesh)
        replicas = lg.Replicas(stage.model)             # or lg.shard(stage.model), and nothing below

        for done in stage.block_steps(x, y):            # part stage.row.rank of each batch
            replicas.start(done.block, done.loss)
            replicas.finish(done.block)
            ...

    Outputs and units travel between the ranks of a column. So units that are sharded travel shard by shard.

    Args:
        model: A function that makes the model, as `localize` returns it, the same on all ranks. The weights of other
            ranks' blocks never take memory. It may be such a model, too, which then loses those weights.
        shares: The number of blocks that each rank trains, in order.
        mesh: A mesh of all ranks with named dimensions. The first one is the pipeline, and ranks along the others, of
            which there are one or two, train the same blocks. Default: all ranks are the pipeline.
        timeout: The longest time to wait for a message. Default: PyTorch's, and not that of `init_process_group`.

    Attributes:
        model: The model. Tensors that this rank does not need are on the "meta" device.
        ranks: The ranks of this rank's column, in the order of their blocks. Without a mesh they are all.
        row: The ranks that train the same blocks. Without a mesh it is this one.
        blocks: The numbers of this rank's blocks.
        reads_images: Whether this rank needs the inputs x.

    Raises:
        UserError: The shares do not fit the model, or the mesh the ranks, the models or the shares differ, a coupling
            of form="pull" has its source on another rank, or blocks of two ranks use the same parameters.
    """

    def __init__(
        self,
        model: LocalModel | Callable[[], LocalModel] | Held,
        shares: Sequence[int],
        *,
        mesh: DeviceMesh | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self._held = model if isinstance(model, Held) else Held(model)
        self.model = model = self._held.model
        self._grid = grid = Grid.of(mesh, timeout)
        self.ranks, self.row = grid.column, grid.row
        rank, count = self.ranks.rank, self.ranks.count
        everyone = Ranks.everyone()
        refuse_unlike(model, everyone)
        drawn, asked = zip(*everyone.all_gather_object((self._held.drawn, list(shares))), strict=True)
        if len(given := dict.fromkeys(map(str, asked))) > 1:
            raise UserError(f"all ranks take the same shares, not {' and '.join(given)}")
        if len(shares) != count or sum(shares) != len(model.blocks) or min(shares) < 1:
            raise UserError(f"shares {list(shares)} do not deal {len(model.blocks)} blocks out to {count} ranks")
        if len(set(drawn)) > 1:
            raise UserError(
                "ranks must make the same model, but have drawn other random numbers: call torch.manual_seed with the "
                "same seed on each rank before"
            )
        self.shares = tuple(shares)
        first = sum(shares[:rank])
        self.blocks = range(first, first + shares[rank])
        self.reads_images = rank == 0 or model.needs_images(self.blocks)
        self.owners = [rank for rank, share in enumerate(shares) for _ in range(share)]
        self._refuse_shared()
        for module in model.modules():
            if isinstance(module, SyncBatchNorm):
                module.ranks = self.row
        model.peers = self.row
        self._sent: deque[Message] = deque()  # Sends in the background.
        self._next_input: Message | None = None  # The receive that is posted already.
        self._input_layout: Layouts | None = None
        self._output_layout: Layouts | None = None
        self._sources = Sources(model, self.owners, grid)
        self._held.keep(grid, self.owners)
        self._device = self._held.device
        self._loaded: int | None = None  # The steps of a state that was loaded, until the next step or `go_on`.

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
            UserError: The batch has another size than the first one, an argument is wrong, or `go_on` was forgotten.
        """
        loaded, taken = self._loaded, self._sources.steps
        if loaded not in (None, taken):  # All ranks see the same numbers, so none waits for another.
            raise UserError(
                f"the state that was loaded is that after {loaded} steps, and this stage has taken {taken}: call "
                f"stage.go_on({loaded}) before the next step"
            )
        self._loaded = None
        if x is not None and images is None and self.model.needs_images(self.blocks):
            images = self.model.checks.images(self.model, main_input(x))
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

    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        """Runs a batch through the blocks of all ranks, as for an evaluation. All ranks call it.

        Args:
            x: Inputs, as for `block_steps`. Only the first rank needs them.

        Returns:
            The output of the network on the last rank, and None on the others.

        Raises:
            UserError: In evaluation mode, the network takes other steps than its blocks.
        """
        if not (self.model.training or self.model.evaluates):
            raise UserError(
                f"{type(self.model.backbone).__name__} takes other steps in evaluation mode than in training, and its "
                "blocks take those of training: evaluate it within `with stage.gathered():`"
            )
        rank, group = self.ranks.rank, self._sources.group  # The group of training may have a receive on its way.
        if rank:
            box: list[Any] = [None]
            dist.recv_object_list(box, group_src=rank - 1, group=group)
            packed = box[0].empty(self._device)
            for tensor in packed:
                dist.recv(tensor, group_src=rank - 1, group=group)
            h = box[0].unpack(packed)
        else:
            h = self.model.inputs.crossing(x)
        for k in self.blocks:
            h = self.model.blocks[k](h)
        if rank == self.ranks.count - 1:
            return h
        layouts = Layouts.of(h)
        dist.send_object_list([layouts], group_dst=rank + 1, group=group)
        for tensor in layouts.pack(h):
            dist.send(tensor, group_dst=rank + 1, group=group)
        return None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which each rank has the whole model as one process would have it: weights, statistics, averages
        and snapshots. All ranks enter it after the same number of steps. They may take more steps afterwards."""
        if self.model.sharded is not None:
            raise UserError("a stage of shards is never whole on a rank: take stage.forward or stage.state_dict")
        self._sources.receive_all()
        with self._held.gathered():
            yield

    def ema_distances(self) -> list[float | None]:
        """`LocalModel.ema_distances` of all blocks. All ranks call it after the same number of steps."""
        self._sources.bring()
        mine = self.model.auxiliaries[self.blocks.start : self.blocks.stop]
        own = [a.coupling and a.coupling.distance() for a in cast(list[Auxiliary], list(mine))]
        return [distance for part in self.ranks.all_gather_object(own) for distance in part]

    def state_dict(self, module: nn.Module | None = None) -> dict[str, Any]:
        """The whole state of the model on the first rank, in host memory, and nothing on the others. All ranks call it
        after the same number of steps.

        Args:
            module: A module of the model, whose state is wanted. Default: the model.
        """
        self._sources.receive_all()
        return self._held.state_dict(self.model if module is None else module)

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module | None = None) -> None:
        """Loads this rank's part of what `state_dict` gave, which is there on each rank. Call `go_on` afterwards."""
        module = self.model if module is None else module
        turns = [f"{name}.turn" for name, m in module.named_modules() if isinstance(m, Snapshots)]
        self._loaded = max((int(state[turn]) for turn in turns if turn in state), default=self._loaded)
        self._held.load_state_dict(module, state)

    def go_on(self, step: int) -> None:
        """Resumes after `step` steps of an earlier run. Call it on all ranks, after the same number of steps, once they
        have loaded its state."""
        self._sources.resume(step)
        self._loaded = None

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

    def close(self) -> None:
        """Ends the process groups of this stage, for a process that makes another one. All ranks call it after
        `finish`. Neither the stage nor its model can be used with other ranks afterwards."""
        self._grid.end()

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
            dist.send_object_list([layouts], group_dst=self.ranks.rank + 1, group=self.ranks.group)
        elif self._output_layout != layouts:
            raise UserError(f"a pipeline's batches are all alike: {self._output_layout} was handed on, then {layouts}")
        while len(self._sent) >= AHEAD:
            self._sent.popleft().wait()
        self._send(layouts.pack(crossing))

    def _send(self, packed: list[Tensor]) -> None:
        to: Any = {"group_dst": self.ranks.rank + 1, "group": self.ranks.group}
        self._sent.append(Message([dist.isend(tensor, **to) for tensor in packed], packed))

    def _receive_input(self) -> Any:
        if self._input_layout is None:
            box: list[Any] = [None]
            dist.recv_object_list(box, group_src=self.ranks.rank - 1, group=self.ranks.group)
            self._input_layout = cast(Layouts, box[0])
        message = self._next_input or self._post_receive(self._input_layout)
        message.wait()
        self._next_input = self._post_receive(self._input_layout)  # It travels while this one is trained on.
        return self._input_layout.unpack(message.tensors)

    def _post_receive(self, layouts: Layouts) -> Message:
        packed = layouts.empty(self._device)
        source: Any = {"group_src": self.ranks.rank - 1, "group": self.ranks.group}
        return Message([dist.irecv(tensor, **source) for tensor in packed], packed)
