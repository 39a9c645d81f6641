"""Evaluates a network on the test images of a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.engine import autocasting
from localgrad.core.errors import RunError
from localgrad.core.model import LocalModel
from localgrad.core.task import Classification, Segmentation
from localgrad.run import data as datasets
from localgrad.run.build import Machine, task_of
from localgrad.run.folder import EVAL
from localgrad.run.recipe import Recipe
from localgrad.scale.groups import Ranks


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
    network: Callable[[Any], Any] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Evaluates a backbone or a local model on the test images.

    Args:
        on_bad: Called with the path of an image that cannot be read, and the reason. The image is left out. By default
            such an image raises RunError.
        between: Called after each batch.
        ranks: The processes that share the test images. Each of them gets the scores of all images.
        network: What gives the output for a batch. Where it gives None, another process has the output. Default: the
            model.
        shard: (i, n) for a process that reads part i of n of each batch.

    Returns:
        The loss and the scores of the task in percent, such as eval_loss, eval_top1 and eval_top5.
    """
    ranks = ranks or Ranks()
    modes = [(module, module.training) for module in _modules(model)]
    was_training = model.training
    model.eval()
    tally = Tally(task_of(data.info))
    size, network = max(recipe.batch_size, 256), network or model
    batches = datasets.eval_batches(data, batch_size=size, shard=shard, workers=recipe.workers, on_bad=on_bad)
    with contextlib.closing(batches):
        for batch in batches:
            x, y = to_device(batch, data.info, machine)
            with autocasting(x, machine.autocast):
                output = network(x)
            if output is not None:
                tally.add(output, y)
            between()
    model.train(was_training)
    for module, mode in modes:  # Frozen parts stay in evaluation mode.
        module.training = mode
    whole = Tally(tally.task)
    for sums in ranks.all_gather_object(tally.sums):
        whole.merge(sums)
    if not whole.sums:
        raise RunError("no image of the test set can be read")
    return {EVAL + name: value for name, value in whole.scores().items()}


class Tally:
    """The sums of a task's metrics over batches, and the scores that follow from them.

    Attributes:
        sums: The sums by name, in float64 on the CPU. Empty before the first batch.
    """

    def __init__(self, task: Classification | Segmentation) -> None:
        self.task = task
        self.sums: dict[str, Tensor] = {}

    def add(self, output: Any, targets: Tensor) -> None:
        """Adds a batch."""
        self.merge({name: value.double().cpu() for name, value in self.task.metrics(output, targets).items()})

    def merge(self, sums: dict[str, Tensor]) -> None:
        """Adds other sums."""
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()} if sums else self.sums

    def scores(self) -> dict[str, float]:
        """The loss, and the scores in percent, of which the first one decides."""
        return self.task.scores(self.sums)


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a network, and those that only the blocks of a local model have."""
    blocks = model.blocks if isinstance(model, LocalModel) else ()
    return [module for part in (model, *blocks) for module in part.modules()]


def to_device(batch: tuple[Tensor, Tensor], info: datasets.DataInfo, machine: Machine) -> tuple[Tensor, Tensor]:
    """Moves a batch of uint8 images and targets to the device, and normalises the images there."""
    images, targets = (t.to(machine.device, non_blocking=True) for t in batch)
    x = datasets.normalize(images, info)
    return x.contiguous(memory_format=machine.memory_format), targets
