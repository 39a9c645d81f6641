"""A run as a value: the frozen recipe that the command line fills, the run folder keeps and the loop reads.

No PyTorch here, so that `--help` is quick. Each field changes the run, or `settle` warns that it does not.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from localgrad.core.errors import UserError, unknown

METHODS = ("bp", "dgl", "predsim", "infopro", "auglocal")
COUPLINGS = ("none", "man", "man++", "deep-man")
HEADS = ("auto", "dgl", "0c1f", "1c1f", "1c2f", "1c3f", "2c2f")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a run's result, and where its data lies."""

    model: str = "resnet32"
    """resnet20/32/44/56/110/1202, torchvision:NAME or timm:NAME."""
    data: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, svhn, stl10 or image-folder."""
    data_dir: str | None = None
    """Where the data lies; each set has a default."""
    download: bool = False
    """Fetch a missing data set."""
    image_size: int | None = None
    """Side of the images in pixels (image-folder only)."""
    limit_train: int | None = None
    """Train on so many images, balanced over the classes."""

    method: str = "dgl"
    """bp, dgl, predsim, infopro or auglocal."""
    coupling: str = "man"
    """none, man, man++ or deep-man."""
    blocks: str = "4"
    """How many blocks, or the last unit of each: layer1.4,layer2.4."""
    head: str = "auto"
    """Local classifier: dgl, 0c1f, 1c1f, 1c2f, 1c3f, 2c2f; auto is the method's own (deep MAN: pool + linear)."""
    momentum: float = 0.995
    """Of the coupling's EMA: 0 copies the source, 1 never moves."""
    branches: Literal["both", "learnable", "ema"] = "both"
    """Which branches of the coupling exist."""
    form: Literal["branches", "pull"] = "branches"
    """The coupling as published in code, or after the ECCV text."""
    depth: int | None = None
    """Units that deep MAN or auglocal takes; each has a default."""
    contrast: bool = False
    """InfoPro: supervised contrastive instead of cross-entropy."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images of one forward pass."""
    accumulate: int = 1
    """Gradients of so many batches are summed before a step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is with Nesterov momentum 0.9."""
    lr: float = 0.1
    """The peak of the cosine schedule."""
    block_lr: str | None = None
    """Factors on lr, one for each block: 1,1,0.5,0.5."""
    warmup: float = 0.05
    """Share of the steps in which lr rises linearly."""
    weight_decay: float = 1e-4
    """Of blocks and auxiliaries."""
    decay_norms: bool = True
    """Weight decay on norms, biases and scales too."""
    label_smoothing: float = 0.0
    """Of the cross-entropies, the auxiliaries' too."""
    clip: float | None = None
    """Largest gradient norm of a block with its auxiliary."""
    step_as_you_go: bool = False
    """Step each block right after its backward pass, so that gradients are freed too."""

    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    """auto is bf16 where the processor is fast at it."""
    channels_last: bool = True
    """Memory format of images and weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Of the weights, the order, the augmentation and the subset."""
    deterministic: bool = False
    """Only deterministic kernels."""
    workers: int = 0
    """Processes that decode images (image-folder only)."""
    init: str | None = None
    """Checkpoint of the backbone to start from."""

    def __post_init__(self) -> None:
        for kind, name, options in (
            ("method", self.method, METHODS),
            ("coupling", self.coupling, COUPLINGS),
            ("head", self.head, HEADS),
        ):
            if name not in options:
                raise unknown(kind, name, options)
        for name, low in (
            ("epochs", 1),
            ("batch_size", 2),
            ("accumulate", 1),
            ("workers", 0),
            ("depth", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} must be at least {low}, not {value}")
        for name, low, high in (("momentum", 0, 1), ("warmup", 0, 1), ("label_smoothing", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must lie between {low} and {high}, not {getattr(self, name)}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be above 0, not {value}")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay must not be negative, not {self.weight_decay}")
        if self.step_as_you_go and self.accumulate > 1:
            raise UserError("step-as-you-go frees each block's gradients at once, so it cannot accumulate: drop one")

    @property
    def cut(self) -> int | list[str]:
        """`blocks` as `localize` takes it."""
        if self.blocks.lstrip("-").isdigit():
            return int(self.blocks)
        return [name.strip() for name in self.blocks.split(",")]

    @property
    def block_factors(self) -> list[float] | None:
        """`block_lr` as numbers."""
        if self.block_lr is None:
            return None
        try:
            return [float(f) for f in self.block_lr.split(",")]
        except ValueError:
            raise UserError(f"block-lr takes numbers split by commas, not '{self.block_lr}'") from None

    @property
    def label(self) -> str:
        """Method and coupling in one word: dgl, dgl+man."""
        return self.method if self.coupling == "none" else f"{self.method}+{self.coupling}"


# Fields that say where things lie or how fast, not what comes out.
PLACES = frozenset({"data_dir", "download", "workers", "device"})


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """`recipe` with other fields. What the changes imply, unless they say otherwise themselves: `bp` has one block and
    neither coupling nor head, and deep MAN its own head."""
    implied: dict[str, Any] = {}
    if changes.get("method") == "bp":
        implied = {"blocks": "1", "coupling": "none", "head": "auto"}
    elif changes.get("coupling") == "deep-man":
        implied = {"head": "auto"}
    return dataclasses.replace(recipe, **{**implied, **changes})


def settle(recipe: Recipe) -> Recipe:
    """`recipe` without its options that have no effect; each gets a warning."""
    single = recipe.method == "bp" or recipe.cut == 1
    uncoupled = single or recipe.coupling == "none"
    deep = recipe.coupling == "deep-man" and not single
    alone = "one block has no boundary"
    idle = [
        ("blocks", recipe.method == "bp", "1", "bp trains end to end, in 1 block"),
        ("coupling", single, "none", alone),
        ("head", single, "auto", alone),
        ("momentum", uncoupled or recipe.branches == "learnable", Recipe.momentum, "there is no EMA"),
        ("branches", uncoupled, Recipe.branches, "there is no coupling"),
        ("form", uncoupled, Recipe.form, "there is no coupling"),
        ("depth", not deep and recipe.method != "auglocal", None, "only deep-man and auglocal count units"),
        ("contrast", recipe.method != "infopro", False, "only infopro has a contrastive objective"),
        ("workers", recipe.data != "image-folder", 0, "this data set lies in memory"),
        ("download", recipe.data == "digits", False, "digits comes with scikit-learn"),
        ("data_dir", recipe.data == "digits", None, "digits comes with scikit-learn"),
    ]
    changes: dict[str, Any] = {}
    for name, without_effect, unset, why in idle:
        if without_effect and getattr(recipe, name) != unset:
            changes[name] = unset
            warnings.warn(f"{name.replace('_', '-')} has no effect: {why}", stacklevel=2)
    return dataclasses.replace(recipe, **changes)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Fields in which two recipes would give another result, as "lr 0.1 against 0.05"."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(Recipe) if f.name not in PLACES)
    return [f"{name} {x} against {y}" for name, x, y in pairs if x != y]


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file: a run's config.yaml, or fields alone. Raises UserError."""
    try:
        content = yaml.safe_load(path.read_text())
        return Recipe(**(content.get("recipe", content)))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}") from None
    except (yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} holds no recipe: {str(error).splitlines()[0]}") from error
