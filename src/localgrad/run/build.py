"""From a recipe to the machine that it runs on and the model that it trains."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.core.auxiliary import Method
from localgrad.core.backbones import build
from localgrad.core.blocks import trace_units
from localgrad.core.couplings import COUPLINGS, MAN
from localgrad.core.engine import local_backward
from localgrad.core.errors import UserError
from localgrad.core.methods import METHODS
from localgrad.core.model import LocalModel, localize
from localgrad.core.task import Classification, Segmentation
from localgrad.run.checkpoint import load_backbone, read_weights
from localgrad.run.data import DATASETS, Data, DataInfo, check_classes, find, load
from localgrad.run.files import MODEL
from localgrad.run.folder import read_classes, read_input
from localgrad.run.own import build_own, is_own
from localgrad.run.recipe import MASKS, Recipe
from localgrad.scale.memory import MakeOptimizer, on_fake_tensors
from localgrad.scale.plan import Planner
from localgrad.scale.recompute import recompute, unit_range
from localgrad.scale.replicas import sync_batch_norm
from localgrad.scale.speed import calibrate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes.

    Attributes:
        precision: "bf16", "fp16" or "float32".
        memory_format: The memory format of images and weights.
        why: The reason for the precision, for the first lines of a run.
    """

    device: torch.device
    precision: str
    memory_format: torch.memory_format
    why: str

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of a forward pass under autocast; None for float32."""
        return DTYPES[self.precision]

    def place(self, module: nn.Module) -> None:
        """Moves `module` to this device, into this memory format."""
        module.to(self.device, memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]


def machine_for(recipe: Recipe) -> Machine:
    """Chooses device, precision and memory format. Raises UserError for a device or precision that is not there."""
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if cuda else "cpu") if recipe.device == "auto" else recipe.device)
    except RuntimeError:
        raise UserError(f"unknown device '{recipe.device}': take auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{recipe.device}' is not supported: take auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{recipe.device}' is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    fast, why = _fast_bf16(device)
    precision = ("bf16" if fast else "float32") if recipe.precision == "auto" else recipe.precision
    if precision == "fp16" and device.type != "cuda":
        raise UserError("fp16 needs a CUDA device (its gradient scaler does): take bf16 or float32")
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return Machine(device, precision, layout, why if recipe.precision == "auto" else "as asked")


def backbone_of(recipe: Recipe, info: DataInfo) -> nn.Module:
    """The recipe's network with fresh weights, for a data set. Raises UserError if its arguments ask for others."""
    for asked in ("pretrained", "weights"):
        if not is_own(recipe.model) and recipe.arguments.get(asked):
            raise UserError(f"--model-args cannot set {asked}: weights come from --init FILE")
    make = build_own if is_own(recipe.model) else build
    return make(recipe.model, classes=info.classes, in_channels=info.channels, **recipe.arguments)


def freeze(backbone: nn.Module, units: str, example: Tensor) -> None:
    """Freezes units of a network: their parameters need no gradient, and their modules are in evaluation mode, in which
    `localize` and a run leave them.

    Args:
        units: Names of units and ranges FIRST:LAST of them, split by commas.
        example: An input batch, of which only the shape counts.

    Raises:
        UserError: A name is that of no unit, or nothing is left to train.
    """
    found = trace_units(backbone, example).units
    names = [unit.name for unit in found]
    backbone.train()
    for first, last in [unit_range(word.strip(), names) for word in units.split(",")]:
        for unit in found[first : last + 1]:
            unit.module.eval().requires_grad_(False)
    if not any(p.requires_grad for p in backbone.parameters()):
        raise UserError(f"freeze leaves nothing of the network to train: leave out one of {', '.join(names)}")


def data_of(run: Path, recipe: Recipe) -> Data:
    """Reads the test images for a finished run; the training split stays empty. Raises UserError if the classes are not
    those that the run was trained on, and warns if the run has not recorded them."""
    data = load(recipe.data, data_dir=recipe.data_dir, image_size=recipe.image_size, only_test=True)
    if unknown := check_classes(data, read_classes(run), run):
        warnings.warn(unknown, stacklevel=2)
    return data


def check_of_images(recipe: Recipe, what: str) -> None:
    """Raises UserError for a run on masks. `what` is a command that needs a class for each image."""
    if recipe.data in MASKS:
        raise UserError(f"{what} needs one class for each image, and a run on {recipe.data} gives each pixel one")


def info_of(run: Path, recipe: Recipe) -> DataInfo:
    """What is known of a finished run's data, which need not be there any more. If the run has not recorded its
    classes, their number follows from the weights: the network is built for another number, and shapes are compared."""
    info = DATASETS[recipe.data]
    info = replace(info, classes=info.classes or len(read_classes(run)), size=recipe.image_size or info.size)
    if recorded := read_input(run):
        info = replace(info, **{name: tuple(recorded[name]) for name in ("mean", "std")})
    if info.classes:
        return info
    trial, saved = 1009, read_weights(run / MODEL)
    built = backbone_of(recipe, replace(info, classes=trial)).state_dict()
    different = [saved[n].shape[:1] for n in built.keys() & saved.keys() if built[n].shape != saved[n].shape]
    return replace(info, classes=max((size for (size,) in filter(None, different)), default=trial))


def build_model(
    recipe: Recipe, data: Data, machine: Machine, say: Callable[[str], object] = warnings.warn
) -> LocalModel:
    """Builds the recipe's model for a data set on the machine's device. All global random generators are seeded before,
    because a network's modules may use any of them.

    Args:
        say: Called with a sentence about each part of the weights in `init` that was not used.
    """
    info = data.info
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)  # noqa: NPY002
    if recipe.deterministic:  # PyTorch refuses to be deterministic without this, which cuBLAS reads when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.deterministic)
    torch.backends.cudnn.benchmark = not recipe.deterministic
    backbone = backbone_of(recipe, info)
    if recipe.init is not None:
        other = replace(info, classes=info.classes + 1)
        for sentence in load_backbone(backbone, Path(recipe.init), resized=lambda: backbone_of(recipe, other)):
            say(sentence)
    example = torch.zeros(2, info.channels, info.size, info.size)
    if recipe.sync_batch_norm:
        sync_batch_norm(backbone)
    if recipe.freeze is not None:
        freeze(backbone, recipe.freeze, example)
    machine.place(backbone)
    model = localize(
        backbone,
        blocks=recipe.cut, method=method_of(recipe, info), coupling=coupling_of(recipe),
        example=example,
        targets=info.targets(2), task=task_of(info, recipe),
    )  # fmt: skip
    if recipe.sync_batch_norm:
        sync_batch_norm(model.auxiliaries)
    if recipe.recompute is not None:
        recompute(model, **recipe.recomputed)
    machine.place(model)
    return model


def task_of(info: DataInfo, recipe: Recipe | None = None) -> Classification | Segmentation:
    """What a network is trained for on a data set.

    Args:
        info: What is known about the set.
        recipe: Its label smoothing counts. Default: none, as in an evaluation.

    Raises:
        UserError: Its images cannot be mixed as the recipe says.
    """
    if recipe and recipe.mixes and info.masks:
        raise UserError(
            f"mixup and cutmix give an image shares of classes, and the masks of {info.name} give each pixel one: drop "
            "them"
        )
    kind = Segmentation if info.masks else Classification
    return kind(info.classes, label_smoothing=recipe.label_smoothing if recipe else 0.0)


def check_single(model: LocalModel, targets: Tensor, share: str) -> None:
    """Raises UserError if a batch norm has only one value per channel when the model is trained on one image.

    A copy of the model without values is tried.

    Args:
        targets: An example of the targets.
        share: The subject of the sentence, such as "the training set is".
    """
    whose, remedy = "the network", ""
    try:
        with on_fake_tensors(model, 1, targets) as (copied, x, y):
            copied.backbone(x)
            whose, remedy = "an auxiliary", ", or a head that has no such norm, as --head 0c1f"
            local_backward(copied, x, y)
    except ValueError as error:  # PyTorch's batch norm raises it.
        text = f"{share} 1 image, too few for {whose}, where a batch norm gets 1 value a channel: take 2 images or more"
        raise UserError(text + remedy) from error


def planner_for(recipe: Recipe, machine: Machine, classes: int | None = None) -> Planner:
    """The planner for the recipe's network and batch on this device.

    If the recipe has an `image_size`, the images have three channels, as those of ImageNet. A folder of masks must be
    there, because it tells the number of classes.

    Args:
        classes: The number of classes of an image folder, 1000 by default.
    """
    info = DATASETS["image-folder" if recipe.image_size and DATASETS[recipe.data].classes else recipe.data]
    info = find(info.name, recipe.data_dir) if info.name == "mask-folder" else info
    size = recipe.image_size or info.size
    info = replace(info, classes=info.classes or classes or 1000, size=size)
    backbone = backbone_of(recipe, info)
    machine.place(backbone)
    example = torch.zeros(recipe.batch_size, info.channels, size, size, device=machine.device)
    example = example.contiguous(memory_format=machine.memory_format)
    if recipe.freeze is not None:
        freeze(backbone, recipe.freeze, example)
    return Planner(
        backbone, example, method=method_of(recipe, info), coupling=coupling_of(recipe),
        task=task_of(info, recipe), targets=info.targets(recipe.batch_size), optimizer=optimizer_of(recipe),
        autocast=machine.autocast, speed=calibrate(backbone, example, autocast=machine.autocast),
    )  # fmt: skip


def optimizer_of(recipe: Recipe) -> MakeOptimizer:
    """The function that makes the recipe's optimizer from groups of parameters."""
    if recipe.optimizer == "adamw":
        return partial(torch.optim.AdamW, lr=recipe.lr)
    return partial(torch.optim.SGD, lr=recipe.lr, momentum=0.9, nesterov=True)


def method_of(recipe: Recipe, info: DataInfo) -> Method:
    """The recipe's method with its options."""
    options: dict = {} if recipe.method == "bp" else {"head": None if recipe.head == "auto" else recipe.head}
    if recipe.method == "infopro":
        options |= {"mean": info.mean, "std": info.std, "contrast": recipe.contrast}
    if recipe.method == "auglocal" and recipe.depth is not None:
        options["depth"] = recipe.depth
    return METHODS[recipe.method](**options)


def coupling_of(recipe: Recipe) -> MAN | None:
    """The recipe's coupling with its options."""
    kind = COUPLINGS[recipe.coupling]
    if kind is None:
        return None
    deep = recipe.coupling == "deep-man"
    units: dict[str, Any] = {"depth": recipe.depth} if deep else {"learnable_units": recipe.learnable_units}
    learnable, ema = recipe.branches != "ema", recipe.branches != "learnable"
    timing = {"lag": recipe.lag, "ema_every": recipe.ema_every}
    return kind(momentum=recipe.momentum, learnable=learnable, ema=ema, form=recipe.form, **timing, **units)


def _fast_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether bf16 is fast on the device, and the reason."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return fast, "this GPU has bf16 tensor cores" if fast else "this GPU has no bf16 tensor cores"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")):
        if capabilities.get(flag):
            return True, f"this processor has {name}"
    return False, "this processor has no bf16 arithmetic"
