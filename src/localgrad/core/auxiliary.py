"""What sits on a block's output during training only: an optional coupling, then heads, each with its objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localgrad.core.blocks import Unit
from localgrad.core.boundary import Boundary
from localgrad.core.couplings import Momentum
from localgrad.core.errors import UserError
from localgrad.core.task import Task


@dataclass(frozen=True)
class Site:
    """Where an auxiliary is built.

    boundary: what its heads read (beyond the coupling). downstream: the backbone's units beyond that. index, count:
    which of the network's auxiliaries it is. image: [C, H, W] of the network's input. width: channels of the
    backbone's last unit. head: the name of the classifier, or None for the method's own.
    """

    boundary: Boundary
    downstream: tuple[Unit, ...]
    index: int
    count: int
    image: tuple[int, int, int]
    width: int
    task: Task
    head: str | None = None


@dataclass(frozen=True)
class Term:
    """One head of an auxiliary with the objective on its output. against: what the objective compares with,
    "targets" or "images" (in [0, 1]). pairs: whether it compares images of the batch with each other, so that its value
    is not the mean of its values on parts of the batch."""

    head: nn.Module
    objective: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0
    against: str = "targets"
    pairs: bool = False


@dataclass(frozen=True)
class Method:
    """A paper's choice of heads, objectives and depth weights.

    terms: builds those of one site, by name; None trains end to end. head: the classifier to use whatever the
    coupling prefers. mean, std: of the input's normalisation, by which images are recovered from it.
    """

    name: str
    terms: Callable[[Site], dict[str, Term]] | None
    head: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UserError(f"{self.name} recovers images from mean and std: give both or neither")

    def images(self, x: Tensor) -> Tensor:
        """The image in [0, 1] of a normalised input, both [B, C, H, W] or [B, C, L]; without mean and std the input is
        taken for the image itself."""
        if self.mean is None or self.std is None:
            return x.clamp(0, 1)
        like = [-1, *[1] * (x.ndim - 2)]
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(like) for v in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1)


class Auxiliary(nn.Module):
    """A coupling and the heads of one boundary."""

    def __init__(self, coupling: Momentum | None, terms: dict[str, Term]) -> None:
        super().__init__()
        self.coupling = coupling
        self.heads = nn.ModuleDict({name: term.head for name, term in terms.items()})
        self.terms = terms

    @property
    def needs_images(self) -> bool:
        return any(term.against == "images" for term in self.terms.values())

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        """h [B, *boundary.shape] -> each head's output by name."""
        if self.coupling is not None:
            h = self.coupling(h)
        return {name: head(h) for name, head in self.heads.items()}

    def losses(self, outputs: dict[str, Tensor], targets: Tensor, images: Tensor | None) -> dict[str, Tensor]:
        """Each objective's value, unweighted, in float32 or wider."""
        with_what = {"targets": targets, "images": images}
        return {
            name: self.terms[name].objective(full_precision(output), with_what[self.terms[name].against])  # pyright: ignore[reportArgumentType]
            for name, output in outputs.items()
        }

    def move(self, *, stepped: bool) -> None:
        """Moves the coupling's averages once, if this is when they move: before or after the optimizer has stepped."""
        if self.coupling is not None and self.coupling.spec.moves_after_step == stepped:
            self.coupling.update()

    def __repr__(self) -> str:
        terms = " + ".join(name if t.weight == 1 else f"{t.weight:.3g} {name}" for name, t in self.terms.items())
        if self.coupling is None:
            return terms
        copied = ", ".join(unit.name for unit in self.coupling.sources)
        return f"{type(self.coupling.spec).__name__}({copied}) -> {terms}"

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The block's loss: the objectives' weighted sum."""
        return torch.stack([self.terms[name].weight * loss for name, loss in losses.items()]).sum()


def full_precision(x: Tensor) -> Tensor:
    """x, in float32 if autocast has left it in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cast_head(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Casts what a method has made to the dtype that reaches it, and returns that which it hands on. Copies of units
    keep the dtypes of their sources."""
    copied = [m for m in module.modules() if hasattr(m, "gives")]
    if not copied:
        module.to(dtype)
    elif copied[0] is module:
        return module.gives  # pyright: ignore[reportReturnType]
    else:
        for child in module.children():
            dtype = cast_head(child, dtype)
    return dtype
