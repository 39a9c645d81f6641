"""Couplings: copies of later units in the auxiliary of a block, because no gradient of those units reaches it.

MAN: "Momentum Auxiliary Network for Supervised Local Learning" (ECCV 2024). MAN++: arXiv 2507.16279. Where the
published code differs from the ECCV text, this module follows the code; `form="pull"` follows the text. Deep MAN is
this library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from localgrad.core.blocks import Call, Unit, plain_call
from localgrad.core.boundary import main_of, with_main
from localgrad.core.errors import UserError
from localgrad.core.paths import as_far_as_fed, select_path
from localgrad.core.sharded import local, total_norm

PLAIN_DEPTH = 3  # Deep MAN copies three units where a network has no stages; one of four stages has three later ones.


@dataclass(frozen=True)
class MAN:
    """Momentum Auxiliary Network: `learnable(h) + ema(h)`, two copies of the next block's first unit.

    Attributes:
        momentum: The momentum of the EMA, from 0 (the EMA equals its source) to 1 (it never moves). Default: 0.995.
        learnable: Whether there is a branch that gradients train. Default: True.
        ema: Whether there is a branch that averages its source. Default: True.
        form: "branches" (default), as in the published code, or "pull", as in the paper's text: one learnable copy,
            which the EMA moves towards its source after each of its gradient steps.
        buffers: Whether the EMA also averages buffers, such as the statistics of batch norm. Default: False, as in the
            published code.
        learnable_units: The number of units that the learnable branch copies, one after the other. Default: 1. Those
            behind the first have no EMA, like the second layer in MAN++'s published code for vision transformers.
        lag: The age, in steps, of the source that the EMA follows. Default: 0, the source as it is now. A pipeline
            needs a lag, because its later blocks are some steps behind.
        ema_every: The EMA follows only the states after every so many steps. Default: 1. In a pipeline a larger number
            saves messages.

    Raises:
        UserError: The options contradict each other, or a number is out of its range.
    """

    momentum: float = 0.995
    learnable: bool = True
    ema: bool = True
    form: str = "branches"
    buffers: bool = False
    learnable_units: int = 1
    lag: int = 0
    ema_every: int = 1
    scaled: ClassVar[bool] = False
    head: ClassVar[str | None] = None  # The classifier if the method names none. None means the method's own.

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise UserError(f"momentum must lie between 0 and 1, not {self.momentum}")
        if not (self.learnable or self.ema):
            raise UserError("a coupling without its learnable and its EMA branch is coupling none")
        if self.form not in LINKS:
            raise UserError(f"form must be {' or '.join(LINKS)}, not '{self.form}'")
        if self.learnable_units < 1 or (self.learnable_units > 1 and not self.learnable):
            raise UserError(
                f"the learnable branch, where there is one, takes 1 unit or more, not {self.learnable_units}"
            )
        if self.lag < 0 or self.ema_every < 1:
            raise UserError(f"lag counts steps from 0 on, and ema_every from 1 on: not {self.lag} and {self.ema_every}")
        one_branch = self.moves_after_step
        if self.delayed and (one_branch or not self.ema):
            raise UserError('only the EMA of form="branches" can be behind its source: leave lag and ema_every out')
        if one_branch and not (self.learnable and self.ema and not self.scaled and self.learnable_units == 1):
            raise UserError(
                'form="pull" has one branch, both learnable and averaged: it takes MAN or deep MAN as they are'
            )

    @property
    def delayed(self) -> bool:
        """Whether the EMA follows earlier states of its source."""
        return self.lag > 0 or self.ema_every > 1

    @property
    def moves_after_step(self) -> bool:
        """Whether averages move after the optimizer's step instead of before it."""
        return LINKS[self.form].moves_after_step

    def select(self, downstream: Sequence[Unit]) -> list[Unit]:
        """Chooses the units to copy, in order, from all units behind the boundary. Each must fit the one before it."""
        return list(downstream[: self.learnable_units])

    def build(self, downstream: Sequence[Unit]) -> Momentum:
        """Makes the trainable module. The copies start from the present weights of the backbone."""
        return Momentum(self, self.select(downstream))


@dataclass(frozen=True)
class MANPlusPlus(MAN):
    """MAN++: `s * learnable(h) + (2 - s) * ema(h)` with a learnable scalar s that starts at 1.

    The attributes are those of `MAN`. It needs both branches.
    """

    scaled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.learnable and self.ema):
            raise UserError("MAN++ weighs its two branches against each other: switch one off with MAN instead")


@dataclass(frozen=True)
class DeepMAN(MAN):
    """MAN along a path of downstream units: `z_0 = h; z_i = learnable_i(z_{i-1}) + ema_i(z_{i-1})`.

    Attributes:
        depth: The number of units in the path, among which those that change the shape come first. Default: the next
            unit, then the first unit of each later stage. In a network without stages, such as a plain transformer,
            3 units that are spread evenly over the rest.
    """

    depth: int | None = None
    head: ClassVar[str | None] = "0c1f"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None and self.depth < 1:
            raise UserError(f"the depth of deep MAN counts units, so it is at least 1, not {self.depth}")
        if self.learnable_units != 1:
            raise UserError("deep MAN has both branches at each of its units: give depth instead of learnable_units")

    def select(self, downstream: Sequence[Unit]) -> list[Unit]:
        later = [u for u in downstream[1:] if u.changes_shape]
        if self.depth is None and (later or downstream[0].output.stage):
            return as_far_as_fed([downstream[0], *later], downstream[0].input)
        return select_path(downstream, self.depth or PLAIN_DEPTH)


class Link(nn.Module):
    """Both branches of one source unit: `learnable(h) + ema(h)`, as in the published code.

    A wholly frozen source has one branch, because there is nothing to learn, and both would be the source.

    Attributes:
        learnable: The branch that gradients train, or None if it is switched off or the source is frozen.
        ema: The branch that averages the source, or None if it is switched off.
        scale: The learnable scalar s of MAN++, or None if there is one branch.
        call: The function that runs a branch. `recompute` changes it.
    """

    fresh: ClassVar[bool] = True  # The learnable branch starts from newly drawn parameters.
    moves_after_step: ClassVar[bool] = False  # The average moves before the optimizer's step.
    call: Call

    def __init__(self, spec: MAN, source: Unit, *, alone: bool) -> None:
        super().__init__()  # With `alone` the link has no EMA branch, even if `spec` asks for one.
        averages = spec.ema and not alone
        learns = any(p.requires_grad for p in source.module.parameters())
        self.learnable = source.copy(fresh=self.fresh) if spec.learnable and (learns or not averages) else None
        self.ema = source.copy(fresh=False).requires_grad_(False) if averages else None
        parameter = next(source.module.parameters(), None)
        device = None if parameter is None else parameter.device
        scale = torch.ones((), dtype=source.output.dtype, device=device)
        self.scale = nn.Parameter(scale) if spec.scaled and averages and learns else None
        self.call = plain_call

    @property
    def averaged(self) -> nn.Module | None:
        """The branch that follows the source."""
        return self.ema

    def forward(self, h: Any) -> Any:
        if self.learnable is None or self.ema is None:
            branch = self.ema if self.learnable is None else self.learnable
            assert branch is not None
            return self.call(branch, h)
        learnable, averaged = self.call(self.learnable, h), self.call(self.ema, h)
        ema, s = main_of(averaged), self.scale  # Passengers are those of the learnable branch.
        return with_main(learnable, lambda main: main + ema if s is None else s * main + (2 - s) * ema)


class PullLink(Link):
    """One branch, as in the paper's text: gradients train it, and after each step the EMA draws it to its source."""

    fresh = False
    moves_after_step = True

    def __init__(self, spec: MAN, source: Unit, *, alone: bool) -> None:
        super().__init__(spec, source, alone=True)

    @property
    def averaged(self) -> nn.Module | None:
        return self.learnable


LINKS = {"branches": Link, "pull": PullLink}  # The values of `MAN.form`.


class Momentum(nn.Module):
    """A built coupling: [B, *boundary.shape] -> [B, *sources[-1].output.shape].

    Attributes:
        spec: The coupling as it was asked for.
        sources: The units of the backbone that the links copy, in order.
        links: One link for each source.
        snapshots: With `spec.delayed`, the earlier states of each source that has an EMA.
    """

    def __init__(self, spec: MAN, sources: Sequence[Unit]) -> None:
        super().__init__()
        self.spec = spec
        self.sources = tuple(sources)  # In a tuple, because the backbone has registered their modules already.
        self.links = nn.ModuleList(
            LINKS[spec.form](spec, unit, alone=0 < i < spec.learnable_units) for i, unit in enumerate(sources)
        )
        if spec.delayed:
            followed = [unit for unit, link in zip(sources, self.links, strict=True) if link.ema is not None]
            self.snapshots = nn.ModuleList(Snapshots(unit, spec.lag, spec.ema_every) for unit in followed)

    def forward(self, h: Any) -> Any:
        for link in self.links:
            h = link(h)
        return h

    def distance(self) -> float | None:
        """`|averages - sources| / |sources|` over all parameters, or None without an averaged branch."""
        zipped = [zip(a.parameters(), s.parameters(), strict=True) for a, s in self._followed()]
        pairs = [(_real(a), _real(s)) for pair in zipped for a, s in pair]
        if not pairs:
            return None
        return float(total_norm([a - s for a, s in pairs]) / total_norm([s for _, s in pairs]))

    def update(self) -> None:
        """Moves the averaged branches once: `averaged <- momentum * averaged + (1 - momentum) * source`."""
        for i, (averaged, source) in enumerate(self._followed()):
            if self.spec.delayed:
                source = self.snapshots[i](source)
            update_ema(averaged, source, self.spec.momentum, buffers=self.spec.buffers)

    @torch.no_grad()
    def restart(self) -> None:
        """Sets what is no copy, the scales and the numbers of steps, to its first value."""
        for module in self.modules():
            if isinstance(module, Link) and module.scale is not None:
                module.scale.fill_(1.0)
            elif isinstance(module, Snapshots):
                module.turn.zero_()

    def _followed(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each averaged branch with its source."""
        links = cast(list[Link], list(self.links))
        pairs = zip((link.averaged for link in links), self.sources, strict=True)
        return [(module, source.module) for module, source in pairs if module is not None]


class Snapshots(nn.Module):
    """A ring buffer with the states of a source after steps 0, `every`, 2 `every`, ....

    Calling it with the source as it is in this step returns the newest state that is at least `lag` steps old, or the
    first state while none is that old.

    Attributes:
        lag: The least age of the state to follow, in steps.
        every: The number of steps between two states.
        remote: Whether another process trains the source. Then the pipeline fills `states` as messages arrive.
        states: The buffer. `state(index)` is its entry for state number `index`.
        turn: The number of steps so far.
    """

    turn: Tensor

    def __init__(self, source: Unit, lag: int, every: int = 1) -> None:
        super().__init__()
        self.lag, self.every, self.remote = lag, every, False
        count = -(-lag // every) + 1
        self.states = nn.ModuleList(source.copy(fresh=False).requires_grad_(False) for _ in range(count))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))

    def forward(self, source: nn.Module) -> nn.Module:
        turn = int(self.turn)
        if turn % self.every == 0 and not self.remote:
            update_ema(self.state(turn // self.every), source, 0.0, buffers=True)  # A momentum of 0 copies.
        self.turn += 1
        return self.state(self.index(turn))

    def index(self, step: int) -> int:
        """The number of the state that the EMA follows in a step. State i is the source after `i * every` steps."""
        return max(0, step - self.lag) // self.every

    def state(self, index: int) -> nn.Module:
        """The module that holds a state. An older state, which is no longer needed, was in it before."""
        return self.states[index % len(self.states)]


@torch.no_grad()
def update_ema(average: nn.Module, source: nn.Module, momentum: float, *, buffers: bool = False) -> None:
    """Moves an average in place: `average <- momentum * average + (1 - momentum) * source` for each parameter.

    Args:
        average: The module to change. It has the same parameters and buffers as `source`.
        source: The module that it follows.
        momentum: From 0 (a copy of the source) to 1 (no change).
        buffers: Whether buffers are averaged too. Those of integers, which are counters, are copied. Default: False.
    """
    averaged, sources = ([local(p) for p in m.parameters()] for m in (average, source))
    if buffers:
        for a, s in zip(average.buffers(), source.buffers(), strict=True):
            if a.is_floating_point() or a.is_complex():
                averaged.append(a)
                sources.append(s)
            else:
                a.copy_(s)
    if averaged:
        torch._foreach_lerp_(averaged, sources, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def _real(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return (torch.view_as_real(value) if value.is_complex() else value).float()


COUPLINGS = {"none": None, "man": MAN, "man++": MANPlusPlus, "deep-man": DeepMAN}
