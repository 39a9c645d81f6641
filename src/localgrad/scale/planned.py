"""A plan: how to train a network, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from localgrad.core.methods import bp
from localgrad.core.model import LocalModel, localize
from localgrad.core.sizes import mib
from localgrad.scale.recompute import recompute


@dataclass(frozen=True, repr=False)
class Plan:
    """How to train a network. `print(plan)` says in one sentence what it is and what memory it takes.

    Attributes:
        blocks: The last unit of each block, as `localize` takes them. One block is backpropagation, which is exact.
        units: What `recompute` takes: units and ranges of units that are recomputed.
        couplings: The blocks whose coupling is recomputed.
        step_as_you_go: Whether each block steps right after its backward pass.
        accumulate: Into how many micro-batches the batch is split, whose gradients are added up.
        peak: Bytes of a step, with everything counted.
        lasting: Those of them that parameters, averages and the optimizer's state hold.
        seconds: The predicted time of a step.
        flops: Its floating-point operations.
        exact: Whether `peak` was predicted on the whole step, and not put together from its pieces.
        recomputed: How many units are recomputed.
        count: How many units the network has.
        how: The method, coupling, criterion and task that were planned, as arguments of `localize`.
    """

    blocks: tuple[str, ...]
    units: tuple[str, ...]
    couplings: tuple[int, ...]
    step_as_you_go: bool
    accumulate: int
    peak: int
    lasting: int
    seconds: float
    flops: float
    exact: bool = False
    recomputed: int = 0
    count: int = 0
    how: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def localize(self, backbone: nn.Module, example: Any) -> LocalModel:
        """Makes the model that was planned, with what it recomputes and how `local_backward` splits a batch.

        Args:
            backbone: The network.
            example: A batch [B, ...].
        """
        how = dict(self.how)
        if len(self.blocks) == 1:
            how |= {"method": bp(), "coupling": None}
        blocks = list(self.blocks) if len(self.blocks) > 1 else 1
        return self.apply(localize(backbone, blocks=blocks, example=example, **how))

    def apply(self, model: LocalModel) -> LocalModel:
        """Sets what `model`, which was localized with `blocks`, recomputes, and how `local_backward` splits a batch."""
        model.accumulate = self.accumulate
        return recompute(model, units=self.units, couplings=self.couplings)

    @property
    def measures(self) -> list[str]:
        """What it does beside plain training, for a person."""
        said = []
        if self.recomputed:
            said.append(f"{self.recomputed} of {self.count} units recomputed")
        if self.couplings:
            said.append(f"couplings of {len(self.couplings)} blocks recomputed")
        if self.accumulate > 1:
            said.append(f"each batch in {self.accumulate} parts")
        if self.step_as_you_go:
            said.append("each block steps right after its backward pass")
        return said

    def __repr__(self) -> str:
        name = "backpropagation" if len(self.blocks) == 1 else f"local training in {len(self.blocks)} blocks"
        return f"{', '.join([name, *self.measures])}: {mib(self.peak)} predicted, {mib(self.lasting)} of them lasting"
