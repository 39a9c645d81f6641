"""Ideas to narrow the gap to backpropagation that are not in the package, tried on the recipe `fashion_small`.

    python benchmarks/ideas.py

Each idea is another training step. Writes results/ideas_fashion_small.csv, one row for each run as soon as it is
finished. A run that has a row is not trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from loop import run_missing, train
from torch import Tensor
from torch.nn import functional as F

from localgrad.core.boundary import full_precision
from localgrad.core.engine import autocasting
from localgrad.core.model import LocalModel
from localgrad.run import data as data_room
from localgrad.run.arguments import Compare
from localgrad.run.compare import grid
from localgrad.run.recipe import Recipe

KEY = ("idea", "weight", "method", "blocks", "setting", "seed")


def _block(model: LocalModel, k: int, z: Tensor, autocast: torch.dtype | None) -> Tensor:
    with autocasting(z, autocast):
        return model.blocks[k](z)


def _loss(model: LocalModel, k: int, h: Tensor, y: Tensor, autocast: torch.dtype | None) -> Tensor:
    """The loss of block k, of its output h."""
    if k == len(model.blocks) - 1:
        return model.task.criterion(full_precision(h), y)
    auxiliary: Any = model.auxiliaries[k]
    with autocasting(h, autocast):
        outputs = auxiliary(h)
    return auxiliary.total(auxiliary.losses(outputs, y, None))


def window(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None, weight: float) -> None:
    """A block also gets the gradient of the next block's loss, times `weight`.

    It is the cascade of HPFF (ECCV 2024) with one forward pass of a block and two backward passes, of which the first
    gives the gradient of its input alone. The graphs of two neighbours live at a time.
    """
    before: tuple[Tensor, Tensor] | None = None
    h = x
    for k in range(len(model.blocks)):
        z = h.detach().requires_grad_(k > 0)
        h = _block(model, k, z, autocast)
        leaf = h.detach().requires_grad_()
        _loss(model, k, leaf, y, autocast).backward()
        assert leaf.grad is not None
        if before is not None:
            (gradient,) = torch.autograd.grad(h, z, leaf.grad, retain_graph=True)
            output, own = before
            output.backward(own + weight * gradient)
        before = h, leaf.grad
    output, own = before  # pyright: ignore[reportGeneralTypeIssues]
    output.backward(own)


def feedback(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None, weight: float) -> None:
    """An auxiliary also learns to give the gradient that the next block sends back.

    After block k + 1 has its gradients, auxiliary k runs again on the detached boundary. One minus the cosine between
    its gradient there and the gradient of block k + 1's input, times `weight`, goes back into the auxiliary alone.
    """
    h = x
    for k in range(len(model.blocks)):
        z = h.detach().requires_grad_(k > 0)
        h = _block(model, k, z, autocast)
        _loss(model, k, h, y, autocast).backward()
        if k > 0:
            assert z.grad is not None
            again = z.detach().requires_grad_()
            (own,) = torch.autograd.grad(_loss(model, k - 1, again, y, autocast), again, create_graph=True)
            (
                weight
                * (1 - F.cosine_similarity(full_precision(own).flatten(), full_precision(z.grad).flatten(), dim=0))
            ).backward()


def leap(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None, weight: float) -> None:
    """A window whose auxiliaries have deep MAN's path, in which the first unit alone has an average: MLAAN's leap
    auxiliaries (arXiv 2406.16633). In its code the average moves in the last auxiliary alone; here it moves in all."""
    for auxiliary in model.auxiliaries:
        for link in cast(Any, auxiliary).coupling.links[1:]:
            link.ema = None
    model.move_averages()
    window(model, x, y, autocast, weight)


def sgr(model: LocalModel, x: Tensor, y: Tensor, autocast: torch.dtype | None, weight: float) -> None:
    """Successive Gradient Reconciliation (Yang et al., ICML 2024): a block's input gradient follows the gradient that
    the block before got from its own loss.

    The squared distance of both, over the square of the latter, times `weight`, is added to the loss of the block. So
    a block is differentiated twice, which keeps more of it in memory.
    """
    h, before = x, None
    for k in range(len(model.blocks)):
        z = h.detach().requires_grad_(k > 0)
        h = _block(model, k, z, autocast)
        loss = _loss(model, k, h, y, autocast)
        following = None
        if k < len(model.blocks) - 1:
            (following,) = map(full_precision, torch.autograd.grad(loss, h, retain_graph=True))
        if before is not None:
            (own,) = torch.autograd.grad(loss, z, create_graph=True)
            loss = loss + weight * F.mse_loss(full_precision(own), before) / before.square().mean()
        loss.backward()
        before = following


IDEAS: dict[str, Callable[..., None]] = {"window": window, "leap": leap, "feedback": feedback, "sgr": sgr}


@dataclass(frozen=True)
class Settings:
    """Train the runs that the table lacks. Ctrl-C stops the trials, and the same command continues them."""

    out: Path = Path("results/ideas_fashion_small.csv")
    jobs: int = 2


def _runs(idea: str, weight: float, blocks: str, head: str, method: str = "dgl") -> Iterator[tuple[Any, Any]]:
    """The name of each run with this idea, and the function that trains it."""
    compare = Compare(methods=method, blocks=blocks, seeds="0", recipe="fashion_small", vary=(f"head={head}",))
    for cell in grid(compare):
        name = (idea, weight, cell.method, cell.blocks, cell.setting, cell.recipe.seed)
        yield name, partial(trained, idea, weight, cell.recipe)


def trained(idea: str, weight: float, recipe: Recipe) -> dict[str, Any]:
    data = data_room.load(recipe.data, limit_train=recipe.limit_train, seed=recipe.seed)
    return train(recipe, data, partial(IDEAS[idea], weight=weight))


def main(settings: Settings) -> None:
    runs = [
        *_runs("window", 1, "4,16", "1c2f"),
        *_runs("window", 1, "4,16", "1c1f@4"),
        *_runs("feedback", 1, "4,16", "1c1f@4"),
        *_runs("sgr", 1, "4", "1c1f@4"),
        *_runs("leap", 1, "4", "1c1f@4", "dgl+deep-man"),
    ]
    run_missing(settings.out, KEY, dict(runs), settings.jobs)


if __name__ == "__main__":
    main(tyro.cli(Settings))
