"""Evaluates a network on the test images of a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from localgrad.core.engine import autocasting
from localgrad.core.errors import RunError
from localgrad.core.model import LocalModel
from localgrad.core.task import Classification
from localgrad.run import data as datasets
from localgrad.run.build import Machine
from localgrad.run.recipe import Recipe
from localgrad.scale.replicas import Ranks


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: datasets.Data,
    recipe: Recipe,
    machine: Machine,
    *,
    on_bad: datasets.OnBad | None = None,
    between: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Evaluates a backbone or a local model on the test images.

    Args:
        on_bad: Called with the path of an image that cannot be read, and the reason. The image is left out. By default
            such an image raises RunError.
        between: Called after each batch.
        ranks: The processes that share the test images. Each of them gets the scores of all images.

    Returns:
        The loss, and the top-1 and top-5 accuracy in percent.
    """
    ranks = ranks or Ranks()
    modes = [(module, module.training) for module in _modules(model)]
    was_training = model.training
    model.eval()
    task = Classification(data.info.classes)
    sums: dict[str, float] = dict.fromkeys(("loss", "top1", "top5"), 0.0)
    count = 0
    size, shard = max(recipe.batch_size, 256), (ranks.rank, ranks.count)
    batches = datasets.eval_batches(data, batch_size=size, shard=shard, workers=recipe.workers, on_bad=on_bad)
    with contextlib.closing(batches):
        for batch in batches:
            x, y = to_device(batch, data.info, machine)
            with autocasting(x, machine.autocast):
                logits = model(x)
            for name, value in task.metrics(logits, y).items():
                sums[name] += float(value)
            count += len(y)
            between()
    model.train(was_training)
    for module, mode in modes:  # Frozen parts stay in evaluation mode.
        module.training = mode
    loss, top1, top5, images = ranks.all_reduce_sum([*sums.values(), count], machine.device)
    if not images:
        raise RunError("no image of the test set can be read")
    return {"eval_loss": loss / images, "eval_top1": 100 * top1 / images, "eval_top5": 100 * top5 / images}


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a network, and those that only the blocks of a local model have."""
    blocks = model.blocks if isinstance(model, LocalModel) else ()
    return [module for part in (model, *blocks) for module in part.modules()]


def to_device(batch: tuple[Tensor, Tensor], info: datasets.DataInfo, machine: Machine) -> tuple[Tensor, Tensor]:
    """Moves a batch of uint8 images and targets to the device, and normalises the images there."""
    images, targets = (t.to(machine.device, non_blocking=True) for t in batch)
    x = datasets.normalize(images, info)
    return x.contiguous(memory_format=machine.memory_format), targets
