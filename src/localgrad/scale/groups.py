"""The processes that train together, and the groups in which they share blocks or batches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_meshes: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class Ranks:
    """Processes that train together, numbered from 0 in their group. With only one of them nothing here communicates.

    Attributes:
        rank: The number of this process. Default: 0.
        count: The number of processes. Default: 1.
        timeout: The longest time that they wait for each other. Default: PyTorch's.
        group: Their process group. Default: that of all processes.
        mesh: The mesh that they form, where there is one. Default: None.
    """

    rank: int = 0
    count: int = 1
    timeout: timedelta | None = None
    group: Any = None
    mesh: Any = None

    @classmethod
    def everyone(cls) -> Ranks:
        """All processes, or this one alone if there is no process group."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @classmethod
    def of(cls, model: LocalModel) -> Ranks:
        """The ranks that train the same blocks of a model: those that a `Stage` has found, or all."""
        return model.peers or cls.everyone()

    def part(self, sets: Sequence[Sequence[int]], mesh: Any = None) -> Ranks:
        """Those of one of these sets of ranks, in a new process group: of the set that has this rank. All call it."""
        if len(sets[0]) == 1:
            return Ranks(timeout=self.timeout)
        group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sets], timeout=self.timeout)
        return Ranks(dist.get_rank(group), dist.get_world_size(group), self.timeout, group, mesh)  # pyright: ignore[reportArgumentType]

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A process group cannot be pickled. Who reads the pickle is alone."""
        return Ranks, () if self.group is not None else (self.rank, self.count, self.timeout)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def broadcast_object(self, value: Any) -> Any:
        """Returns the value of the first rank. Those of other ranks are ignored."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns the values of all ranks in order."""
        if self.count == 1:
            return [value]
        box = [None] * self.count
        dist.all_gather_object(box, value, group=self.group)
        return box

    def gather_object(self, value: Any) -> list[Any]:
        """Returns the values of all ranks in order on the first rank, and an empty list on the others."""
        if self.count == 1:
            return [value]
        box = [None] * self.count if self.first else []
        dist.gather_object(value, box if self.first else None, group=self.group, group_dst=0)
        return box

    def all_reduce_sum(self, numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
        """Sums each number over the ranks, in float64. The process group's backend must be able to read `device`."""
        return self._reduced(numbers, device, dist.ReduceOp.SUM)

    def all_reduce_max(self, numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
        """Takes the largest value of each number over the ranks."""
        return self._reduced(numbers, device, dist.ReduceOp.MAX)

    def broadcast(self, tensors: Sequence[Tensor], rank: int = 0) -> None:
        """Copies the values of one rank into the tensors of all ranks, in place."""
        if self.count > 1:
            for tensor in tensors:
                # Collectives need contiguous memory, and weights in channels_last are not contiguous in that sense.
                contiguous = tensor.detach().contiguous()
                dist.broadcast(contiguous, group=self.group, group_src=rank)
                tensor.detach().copy_(contiguous)

    def add(self, tensor: Tensor) -> None:
        """Sums a contiguous tensor over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self.group)

    def start_adding(self, tensor: Tensor) -> Any:
        """Begins to do what `add` does, and returns what to wait for, or None."""
        return dist.all_reduce(tensor, group=self.group, async_op=True) if self.count > 1 else None

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The contiguous tensors of all ranks, which have one shape, in order."""
        parts = [torch.empty_like(tensor) for _ in range(self.count)] if self.count > 1 else [tensor]
        if self.count > 1:
            dist.all_gather(parts, tensor, group=self.group)
        return parts

    def _reduced(self, numbers: Sequence[float], device: torch.device | str, operation: Any) -> list[float]:
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total, operation, group=self.group)
        return total.tolist()


@dataclass(frozen=True)
class Grid:
    """The ranks of a pipeline as rows and columns.

    Attributes:
        column: The ranks with one part of each batch, in the order of their blocks.
        back: The same in another process group, for messages against the direction of the outputs.
        row: The ranks that train the same blocks.
    """

    column: Ranks
    back: Ranks
    row: Ranks

    @classmethod
    def of(cls, mesh: DeviceMesh | None, timeout: timedelta | None) -> Grid:
        """The grid of a mesh whose first dimension is the pipeline. All ranks call it.

        Args:
            mesh: Such a mesh, along whose dimensions the numbers of ranks grow. Default: all ranks are the pipeline.
            timeout: The longest time to wait for a message in a new process group. Default: PyTorch's.

        Raises:
            UserError: The mesh does not take all ranks, or has them in another order, or too many dimensions, or no
                names.
        """
        everyone = Ranks.everyone()
        patient = Ranks(everyone.rank, everyone.count, timeout)
        if mesh is None:  # The group of all ranks is the user's, whose messages must not meet those of the pipeline.
            every = [range(everyone.count)]
            return cls(patient.part(every), patient.part(every), Ranks())
        names = mesh.mesh_dim_names
        if mesh.size() != everyone.count or mesh.ndim > 3 or names is None:
            raise UserError(
                f"mesh takes all {everyone.count} ranks in one to three dimensions that have names, the first of which "
                f"is the pipeline, and not a shape of {tuple(mesh.shape)}"
            )
        rows = mesh.mesh.reshape(mesh.shape[0], -1)
        if any(line != sorted(line) for line in (*rows.tolist(), *rows.T.tolist())):
            raise UserError(
                "the ranks of mesh must ascend along each dimension, as those of init_device_mesh do, not "
                f"{rows.tolist()}"
            )
        keep_until_left(mesh)
        columns, own = rows.T.tolist(), mesh[names[1:]] if mesh.ndim > 1 else None
        return cls(patient.part(columns), patient.part(columns), patient.part(rows.tolist(), own))

    def end(self) -> None:
        """Ends the process groups. Their threads end when nothing refers to them any more."""
        for ranks in (self.column, self.back, self.row):
            if ranks.group is not None:
                dist.destroy_process_group(ranks.group)


def keep_until_left(mesh: DeviceMesh) -> None:
    """Notes a mesh for `leave_meshes`."""
    _meshes.add(mesh)


def leave_meshes() -> None:
    """Lets all meshes go of their process groups. Caches of PyTorch keep the meshes themselves."""
    for mesh in _meshes:
        getattr(mesh, "_pg_registry", {}).clear()
