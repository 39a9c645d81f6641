"""What sits on a block's output during training: an optional coupling, then heads, each with its objective."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from localgrad.core.blocks import Origin, Unit
from localgrad.core.boundary import MAIN, Boundary, full_precision, main_of
from localgrad.core.couplings import Momentum
from localgrad.core.errors import UserError, callers_level
from localgrad.core.language_model import SharedReadout
from localgrad.core.sharded import local
from localgrad.core.task import Task

BEYOND = 0.02  # By so much an image may go beyond [0, 1]: it may be rounded.
FAR = 0.5  # The relative distance of averages from their sources that only other weights explain.


@dataclass(frozen=True)
class Site:
    """The position in the network for which an auxiliary is built.

    Attributes:
        boundary: The input of the heads. With a coupling it is the coupling's output.
        downstream: The units of the backbone behind that boundary.
        index: The number of the auxiliary, from 0.
        count: The number of auxiliaries in the network.
        image: The shape of one input of the network, [C, H, W].
        width: The channels of the backbone's last unit.
        task: The task of the network.
        entering: The features that enter the block: the boundary before it, or that behind the network's first unit.
        head: The name of the classifier, as `heads.classifier` takes it. Default: the method's own classifier.
    """

    boundary: Boundary
    downstream: tuple[Unit, ...]
    index: int
    count: int
    image: tuple[int, int, int]
    width: int
    task: Task
    entering: Boundary
    head: str | None = None


@dataclass(frozen=True)
class Term:
    """One head of an auxiliary with the objective on its output.

    Attributes:
        head: The layers of the head, [B, *boundary.shape] -> the first argument of the objective.
        objective: Called with the output of the head and what `against` names. It returns a scalar.
        weight: The factor of the objective in the block's loss. Default: 1.
        against: The second argument of the objective: "targets" (default), "images", which lie in [0, 1], or
            "features", the features that enter the block, without a graph.
        pairs: Whether the objective compares images of a batch with each other, so that its value is not the mean of
            its values on parts of the batch. Default: False.
        reads: The name of the passenger that the head reads. Default: the main tensor. None: all that crosses, as a
            dictionary where there are passengers.
    """

    head: nn.Module
    objective: Callable[[Any, Any], Tensor]
    weight: float = 1.0
    against: str = "targets"
    pairs: bool = False
    reads: str | None = MAIN


@dataclass(frozen=True, repr=False)
class Method:
    """A paper's choice of heads, objectives and their weights over depth.

    Attributes:
        name: The name of the method, for messages.
        terms: A function that builds the terms of a site, by name. With None the network is trained end to end.
        head: The name of a classifier that replaces the method's or coupling's own. Default: none.
        mean: The mean of the input's normalisation, one value a channel, to recover images. Default: the input is the
            image.
        std: The standard deviation of that normalisation. It is given together with `mean`.

    Raises:
        UserError: Only one of `mean` and `std` was given.
    """

    name: str
    terms: Callable[[Site], dict[str, Term]] | None
    head: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        """The call that makes it, such as `dgl(channels=128, hidden=512)`."""
        options = {**getattr(self.terms, "keywords", {}), "head": self.head, "mean": self.mean, "std": self.std}
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in options.items() if value is not None)})"

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UserError(f"{self.name} recovers images from mean and std: give both or neither")

    def images(self, x: Tensor) -> Tensor:
        """Recovers images in [0, 1] from normalised inputs, both [B, C, H, W] or [B, C, L]. No gradient goes back."""
        if not x.is_floating_point():
            raise UserError(
                f"{self.name} rebuilds images, and the inputs are {x.dtype}, as tokens are: lg.lopt() rebuilds features"
            )
        x = x.detach()
        if self.mean is None or self.std is None:
            return x.clamp(0, 1)
        like = [-1, *[1] * (x.ndim - 2)]
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(like) for v in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1)

    def warn_of_values(self, x: Tensor) -> None:
        """Warns if inputs without `mean` and `std` are no images in [0, 1].

        Values are compared on the CPU only, because reading them from another device would make it wait.
        """
        if self.mean is not None or type(x) is not Tensor or x.device.type != "cpu" or not x.numel():
            return
        low, high = (float(value) for value in x.detach().aminmax())
        if low < -BEYOND or high > 1 + BEYOND:
            warnings.warn(
                f"{self.name} rebuilds images in [0, 1] and cuts off what lies outside, and x runs from {low:.3g} to "
                f"{high:.3g}: give {self.name} the mean=... and std=... of its normalisation, or the step images=...",
                stacklevel=callers_level(),
            )


class Auxiliary(nn.Module):
    """A coupling and the heads of one boundary: [B, *boundary.shape] -> the output of each head by name.

    That of a wholly frozen block has neither. Such a block has no loss, because it has nothing to learn.

    Attributes:
        coupling: The coupling, or None.
        heads: The heads by name.
        terms: The terms of the method by name, each with its head and objective.
    """

    def __init__(self, coupling: Momentum | None, terms: dict[str, Term]) -> None:
        super().__init__()
        self.coupling = coupling
        self.heads = nn.ModuleDict({name: term.head for name, term in terms.items()})
        self.terms = terms

    @property
    def empty(self) -> bool:
        """Whether it gives its block no loss."""
        return not self.terms

    @property
    def needs_images(self) -> bool:
        return self.needs("images")

    def needs(self, reference: str) -> bool:
        """Whether an objective has this second argument, as `Term.against` names it."""
        return any(term.against == reference for term in self.terms.values())

    def read(self, h: Any) -> dict[str, Any]:
        """What each head reads, by the head's name."""
        crossing = h if self.coupling is None else self.coupling(h)
        read = {MAIN: main_of(crossing), None: crossing}
        return {name: read[r] if (r := self.terms[name].reads) in read else h[r] for name in self.heads}

    def forward(self, h: Any) -> dict[str, Any]:
        tensors = self.read(h)
        return {name: head(tensors[name]) for name, head in self.heads.items()}

    def losses(
        self, outputs: dict[str, Any], targets: Any, images: Tensor | None, features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The value of each objective by name, unweighted, in float32 or wider."""
        features = None if features is None else full_precision(features)
        references = {"targets": targets, "images": images, "features": features}
        values = {}
        for name, output in outputs.items():
            term = self.terms[name]
            values[name] = term.objective(tree_map_only(Tensor, full_precision, output), references[term.against])
        return values

    def move(self, *, stepped: bool) -> None:
        """Moves the coupling's averages once, and lets heads follow the backbone that have a copy of a part of it.

        Args:
            stepped: Whether the optimizer has stepped already. Averages that move at the other time are left alone.
        """
        if self.coupling is not None and self.coupling.spec.moves_after_step == stepped:
            self.coupling.update()
        for module in () if stepped else self.heads.modules():
            if isinstance(module, SharedReadout):
                module.follow()

    def copies(self) -> Iterator[tuple[nn.Module, Origin]]:
        """Each copy of a unit in the coupling and the heads, with where it comes from."""
        yield from ((m, vars(m)["origin"]) for m in self.modules() if "origin" in vars(m))

    def refresh(self) -> None:
        """Starts all copies anew from the present weights of the backbone."""
        for module, origin in self.copies():
            origin.start(module)
        if self.coupling is not None:
            self.coupling.restart()
        for module in self.heads.modules():
            if isinstance(module, SharedReadout):
                module.restart()

    def is_stale(self) -> bool:
        """Whether its averages are far from their sources, or a copy of a frozen parameter has another value."""
        pairs = ((p, s) for m, o in self.copies() for p, s in zip(m.parameters(), o.parameters(), strict=True))
        frozen = [(local(p), local(s)) for p, s in pairs if not s.requires_grad]
        distance = self.coupling and self.coupling.distance()
        return (distance or 0.0) > FAR or not all(torch.equal(p, s) for p, s in frozen)

    def __repr__(self) -> str:
        if self.empty:
            return "none: frozen"
        terms = " + ".join(name if t.weight == 1 else f"{t.weight:.3g} {name}" for name, t in self.terms.items())
        if self.coupling is None:
            return terms
        copied = ", ".join(unit.name for unit in self.coupling.sources)
        return f"{type(self.coupling.spec).__name__}({copied}) -> {terms}"

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The block's loss: the weighted sum of its objectives."""
        return torch.stack([self.terms[name].weight * loss for name, loss in losses.items()]).sum()


def cast_head(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Casts a head to the dtype of its input, and returns the dtype of its output.

    Copies of units in it keep the dtypes of their sources.
    """
    copied = [m for m in module.modules() if "origin" in vars(m)]
    if not copied:
        module.to(dtype)
    elif copied[0] is module:
        return vars(module)["origin"].unit.output.dtype
    else:
        for child in module.children():
            dtype = cast_head(child, dtype)
    return dtype
