"""The recipe: all fields of a run as one frozen value.

The command line fills it, the run folder keeps it, and the training loop reads it. Each field changes the run, or
`settle` warns that it does not. This module imports no PyTorch, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import typing
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from localgrad.core.errors import UserError, unknown
from localgrad.run.fields import DataFields, MachineFields, MemoryFields, MethodFields, ModelFields, OptimizerFields

SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max
METHODS = ("bp", "dgl", "predsim", "infopro", "auglocal")
COUPLINGS = ("none", "man", "man++", "deep-man")
MASKS = ("fashion-scenes", "mask-folder")  # The data sets that have a class for each pixel.
HEADS = ("auto", "dgl", "0c1f", "1c1f", "1c2f", "1c3f", "2c2f")


@dataclass(frozen=True, kw_only=True)
class Recipe(MachineFields, MemoryFields, OptimizerFields, MethodFields, DataFields, ModelFields):
    """Everything that determines a run's result, and where its data lies. The fields of the last base come first."""

    def __post_init__(self) -> None:
        for kind, options in (("method", METHODS), ("coupling", COUPLINGS), ("head", HEADS)):
            name = getattr(self, kind).partition("@")[0] if kind == "head" else getattr(self, kind)
            if name not in options:
                raise unknown(kind, name, options)
        if not re.fullmatch(r"auto|\w+(@[1-9]\d*)?", self.head):
            raise UserError(f"head takes the side of a pooled map behind @, as in 1c2f@4, not '{self.head}'")
        integers = (("epochs", 1), ("batch_size", 2), ("accumulate", 1), ("workers", 0), ("depth", 1), ("seed", 0),
                    ("learnable_units", 1), ("lag", 0), ("ema_every", 1), ("image_size", 1))  # fmt: skip
        ranges = [(name, low, 2**63 - 1, f"at least {low}") for name, low in integers]
        ranges += [(name, 0, 1, "between 0 and 1") for name in ("momentum", "warmup", "label_smoothing")]
        ranges += [(name, SMALLEST, LARGEST, "above 0 and finite") for name in ("lr", "clip")]
        rest = ("weight_decay", "backbone_lr", "mixup", "cutmix")
        ranges += [(name, 0, LARGEST, "at least 0 and finite") for name in rest]
        for name, low, high, allowed in ranges:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name} must be {allowed}, not {value}")
        if any(not 0 <= factor <= LARGEST for factor in self.block_factors or ()):
            raise UserError(f"block-lr takes factors of at least 0, not '{self.block_lr}'")
        _ = self.recomputed, self.arguments  # These properties check their fields.
        if self.init is not None:  # The same file has the same name, whether a shell or a YAML file names it.
            object.__setattr__(self, "init", os.path.expanduser(self.init))
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Raises UserError for two fields that cannot go together."""
        if self.step_as_you_go and self.accumulate > 1:
            raise UserError("step-as-you-go frees gradients after each batch, but accumulate keeps them: drop one")
        if self.step_as_you_go and self.skip_nonfinite:
            raise UserError("step-as-you-go has stepped the first blocks when a later one fails: drop skip-nonfinite")
        if self.mixes and (self.method == "predsim" or (self.method == "infopro" and self.contrast)):
            compares = "predsim" if self.method == "predsim" else "infopro's contrastive loss"
            raise UserError(
                f"{compares} compares the classes of two images, and mixup and cutmix give an image several: "
                "drop them, or take another method"
            )

    @property
    def cut(self) -> int | list[str]:
        """The field `blocks` in the form that `localize` takes."""
        if self.blocks.lstrip("-").isdigit():
            return int(self.blocks)
        return [name.strip() for name in self.blocks.split(",")]

    @property
    def arguments(self) -> dict[str, Any]:
        """The field `model_args` as keyword arguments. Values are read as YAML. Raises UserError."""
        try:
            mapping = re.sub(r"(\w+)\s*=", r"\1: ", self.model_args or "")
            found = yaml.safe_load(f"{{{mapping}}}")
        except (yaml.YAMLError, ValueError):
            found = {"": None}
        if not all(isinstance(name, str) and name.isidentifier() for name in found) or None in found.values():
            raise UserError(f"model-args takes NAME=VALUE split by commas, not '{self.model_args}'")
        for name in found.keys() & {"name", "classes", "in_channels", "num_classes", "in_chans"}:
            raise UserError(f"model-args cannot set {name}: the model and the data tell it")
        number = re.compile(r"[-+]?\d+e[-+]?\d+")  # YAML reads 1e-3 as text.
        return {name: float(v) if isinstance(v, str) and number.fullmatch(v) else v for name, v in found.items()}

    @property
    def recomputed(self) -> dict[str, Any]:
        """The field `recompute` as arguments of the function of that name. Raises UserError for a coupling without a
        number."""
        words = [word.strip() for word in (self.recompute or "").split(",") if word.strip()]
        numbers = [word.removeprefix("coupling.") for word in words if word.startswith("coupling.")]
        if not all(number.isdecimal() for number in numbers):
            raise UserError(f"recompute takes names of units, all, and coupling.K, not '{self.recompute}'")
        units = [word for word in words if not word.startswith("coupling.")]
        return {"units": True if units == ["all"] else units, "couplings": [int(number) for number in numbers]}

    @property
    def block_factors(self) -> list[float] | None:
        """The field `block_lr` as numbers. Raises UserError for anything else."""
        if self.block_lr is None:
            return None
        try:
            return [float(f) for f in self.block_lr.split(",")]
        except ValueError:
            raise UserError(f"block-lr takes numbers split by commas, not '{self.block_lr}'") from None

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with each other, so that targets are shares of the classes."""
        return bool(self.mixup or self.cutmix)

    @property
    def label(self) -> str:
        """Method and coupling in one word: dgl, dgl+man."""
        return self.method if self.coupling == "none" else f"{self.method}+{self.coupling}"


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When a run is saved besides after each epoch, which checkpoints stay, and whether a stopped run goes on."""

    save_every: str = "600s"
    """Steps, or seconds as 600s, from one save to the next, apart from the end of each epoch."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep besides the best one; at least 2."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest sound checkpoint in --out; never removes what is there and begins anew."""

    def __post_init__(self) -> None:
        number = self.save_every.removesuffix("s")
        if not number.isdecimal() or int(number) < 1:
            raise UserError(f"save-every takes a number of steps, or of seconds as 600s, not '{self.save_every}'")
        if self.keep_last < 2:
            raise UserError(f"keep-last must be at least 2, in case that one is damaged, not {self.keep_last}")

    def steps_left(self, steps: int, each: float) -> int:
        """About how many steps of `each` seconds are left until a save is due, when `steps` are done since the last."""
        number = int(self.save_every.removesuffix("s"))
        every = max(1, int(number / each)) if self.save_every.endswith("s") else number
        return every - steps % every

    def due(self, steps: int, seconds: float) -> bool:
        """Whether a save is due, by the steps and the seconds since the last one."""
        number = int(self.save_every.removesuffix("s"))
        return (seconds if self.save_every.endswith("s") else steps) >= number


# A plan chooses these fields.
PLANNED = ("method", "coupling", "head", "blocks", "recompute", "step_as_you_go", "batch_size", "accumulate")

# These fields belong to a method or coupling. The others are conditions under which methods can be compared.
OF_METHODS = frozenset({
    "method", "coupling", "blocks", "head", "momentum", "branches", "form", "depth", "learnable_units", "lag",
    "ema_every", "contrast",
})  # fmt: skip

# These fields do not change the result of a run that reaches its end.
PLACES = frozenset({"data_dir", "download", "workers", "device", "recompute", "on_bad_image", "skip_nonfinite"})


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with some fields changed, and with what these imply unless `changes` has it too: `bp` has one block,
    one block has neither coupling nor head, and deep MAN has its own head."""
    implied: dict[str, Any] = {}
    if changes.get("method") == "bp":
        implied = {"blocks": "1", "coupling": "none", "head": "auto"}
    elif changes.get("blocks") == "1":
        implied = {"coupling": "none", "head": "auto"}
    elif changes.get("coupling") == "deep-man":
        implied = {"head": "auto"}
    return dataclasses.replace(recipe, **{**implied, **changes})


def idle(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """The fields that have no effect in this recipe, each with the value that counts as not set, and the reason."""
    single = recipe.method == "bp" or recipe.cut == 1
    uncoupled = single or recipe.coupling == "none"
    deep = recipe.coupling == "deep-man" and not single
    alone = "one block has no boundary"
    rules = [  # A rule has a field, whether it has no effect, its value when it is not set, and the reason.
        ("blocks", recipe.method == "bp", "1", "bp trains end to end, in 1 block"),
        ("coupling", single, "none", alone),
        ("head", single, "auto", alone),
        ("head", not single and recipe.data in MASKS, "auto", "on masks each head is a 1x1 convolution"),
        ("momentum", uncoupled or recipe.branches == "learnable", Recipe.momentum, "there is no EMA"),
        ("branches", uncoupled, Recipe.branches, "there is no coupling"),
        ("form", uncoupled, Recipe.form, "there is no coupling"),
        ("depth", not deep and recipe.method != "auglocal", None, "only deep-man and auglocal count units"),
        ("learnable_units", uncoupled or deep or recipe.branches == "ema", 1, "only man and man++ have such a branch"),
        ("decay_norms", recipe.weight_decay == 0, True, "there is no weight decay"),
        ("lag", uncoupled or recipe.branches == "learnable", 0, "there is no EMA"),
        ("ema_every", uncoupled or recipe.branches == "learnable", 1, "there is no EMA"),
        ("contrast", recipe.method != "infopro", False, "only infopro has a contrastive objective"),
        ("workers", recipe.data != "image-folder", 0, "this data set lies in memory"),
        ("on_bad_image", recipe.data != "image-folder", "error", "this data set is checked as it is read"),
        ("download", recipe.data == "digits", False, "digits comes with scikit-learn"),
        ("data_dir", recipe.data == "digits", None, "digits comes with scikit-learn"),
    ]
    return {name: (unset, why) for name, without_effect, unset, why in rules if without_effect}


def settle(recipe: Recipe) -> Recipe:
    """The recipe without the options that have no effect. It warns of each of them that was set."""
    changes = {}
    for name, (unset, why) in idle(recipe).items():
        if getattr(recipe, name) != unset:
            changes[name] = unset
            warnings.warn(f"{name.replace('_', '-')} has no effect: {why}", stacklevel=2)
    return dataclasses.replace(recipe, **changes)


def shown(recipe: Recipe) -> str:
    """The fields of a recipe that are set, on one line."""
    return " ".join(f"{name}={value}" for name, value in as_dict(recipe).items() if value not in (None, False))


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """All fields of a recipe, by name."""
    return dataclasses.asdict(recipe)


def differences(a: Recipe, b: Recipe) -> list[str]:
    """The fields that make the results of two recipes differ, each as "lr 0.1 against 0.05"."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(Recipe) if f.name not in PLACES)
    return [f"{name} {x} against {y}" for name, x, y in pairs if x != y]


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe from a YAML file, which is a run's config.yaml or has fields alone. Raises UserError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Recipe(**_typed(content.get("recipe", content)))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}") from None
    except KeyError as error:
        raise UserError(f"{path} holds no recipe: there is no field {error}") from error
    except (OSError, yaml.YAMLError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} holds no recipe: {str(error).splitlines()[0]}") from error


def read_plan(path: Path) -> dict[str, Any]:
    """Reads the fields of a recipe that `localgrad plan` has chosen. Raises UserError."""
    try:
        chosen = yaml.safe_load(path.read_text(encoding="utf-8"))["plan"]
        return _typed({name: chosen[name] for name in PLANNED})
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no plan: let localgrad plan --out write one") from error


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a recipe from YAML values, with the types that the fields have."""
    kinds = typing.get_type_hints(Recipe)
    return {name: _as_kind(value, kinds[name]) for name, value in values.items()}


def _as_kind(value: Any, kind: Any) -> Any:
    """Converts a YAML value to a field's type, because YAML reads `blocks: 4` as a number and `lr: 1e-1` as text."""
    options = typing.get_args(kind)
    if value is None:
        if type(None) in options:
            return None
        raise TypeError("null is no value here")
    kind = str if typing.get_origin(kind) is Literal else (options or (kind,))[0]
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise TypeError(f"{value!r} is not {kind.__name__}")
        return value
    number = kind(value)
    if kind is int and number != float(value):
        raise TypeError(f"{value!r} is not a whole number")
    return number
