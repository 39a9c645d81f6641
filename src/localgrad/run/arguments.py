"""What each command takes: one dataclass a command, whose docstrings are the help texts. No PyTorch here."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from localgrad.core.errors import UserError, unknown
from localgrad.run.recipe import Recipe, Saving

LISTS = ("model_args", "block_lr", "recompute")  # fields whose values have commas


@dataclass(frozen=True)
class Train:
    """Train one network into a run folder. Flags override the recipe's fields."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path = Path("runs/train")
    """The run folder. A run that stopped there goes on."""
    saving: Annotated[Saving, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Saving)
    tensorboard: bool = False
    """Also write TensorBoard events (needs localgrad[tensorboard])."""
    budget: str | None = None
    """With --blocks auto: bytes that a step may take (8GiB, 500MiB); the fastest plan that fits is trained."""
    nproc: int = 1
    """Processes on this machine that share each batch; torchrun -m localgrad train does so on several machines."""
    pipeline: int = 1
    """Processes on this machine that share the blocks: each trains its own on what the one before hands on."""
    restarts: int = 0
    """How often to start all these processes again when one has died; they go on from the last save."""
    rank_timeout: float = 600.0
    """Seconds that a process waits for the others before it ends the run."""


@dataclass(frozen=True)
class Plan:
    """Fit a recipe's training step into a budget of memory: where to cut, what to compute again. Trains nothing.

    The data need not be there; --image-size alone means 3 channels and 1000 classes.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    budget: str = "8GiB"
    """Bytes that a step may take: 8GiB, 500MiB."""
    out: Path | None = None
    """File for the plan, which localgrad train --plan FILE follows."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a run's trained backbone on its test images."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    data_dir: str | None = None
    """Where the data lies, if not where the run had it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Compare:
    """Train a grid of methods, numbers of blocks and seeds, one process a run, and print the table.

    A grid that was stopped goes on where it stopped.
    """

    methods: str = "bp,dgl,dgl+man,dgl+deep-man"
    """Methods with their couplings: METHOD or METHOD+COUPLING."""
    blocks: str = "4"
    """Numbers of blocks, or the units behind which to cut, joined by a slash: 4,16,layer1.0/layer1.2/layer1.4."""
    seeds: str = "0"
    """Seeds: 0,1,2."""
    recipe: str = "demo"
    """Recipe that all runs share: a name or a YAML file."""
    data: str | None = None
    """Data set, if not the recipe's."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Recipe fields that all runs share: --set lr=0.05 --set epochs=3."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Recipe fields of which each value is run: --vary momentum=0,0.9,0.99. What is itself a list is joined by slashes:
    --vary recompute=layer1.0/layer1.1,all."""
    out: Path = Path("runs/compare")
    """Folder of the grid: a folder for each run, runs.csv, compare.csv and pairs.csv (differences paired by seed)."""
    jobs: int = 1
    """Runs at a time."""


@dataclass(frozen=True)
class Probe:
    """Show what the units of a trained network have learned: separability, CKA, t-SNE, activation maps.

    Tables go to RUN/probe, and localgrad report draws them. Everything is computed on the test images.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of such, as localgrad compare leaves them."""
    against: Path | None = None
    """Another run on the same data, BP's say: CKA of each unit of the one with each of the other."""
    images: int = 5000
    """Test images to look at; half of them fit the linear classifiers, the other half is their test."""
    data_dir: str | None = None
    """Where the data lies, if not where the run had it."""


@dataclass(frozen=True)
class Report:
    """Write one HTML file about runs: errors, memory, time, learning curves, what probes found, and each run's recipe.

    The file needs no network (and localgrad[plot] to be made).
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of such, as localgrad compare leaves them."""
    results: Path | None = None
    """A folder of result tables to show too: accuracy_*_runs.csv and frontier_*.csv."""
    out: Path = Path("report.html")
    """The file."""


@dataclass(frozen=True)
class Export:
    """Export a run's trained backbone, without auxiliaries."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    format: Literal["safetensors", "onnx"] = "safetensors"
    out: Path | None = None
    """The file; by default RUN/export.safetensors or RUN/export.onnx."""


@dataclass(frozen=True)
class List:
    """Show methods, couplings, heads, backbones, recipes, and the data sets with where each is present."""

    data_dir: str | None = None
    """Where to look for data."""


def parse_lists(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """Recipe fields with several values from KEY=VALUE,VALUE pairs, where a value is a list joined by slashes. Raises
    UserError."""
    lists: dict[str, list[Any]] = {}
    for pair in pairs:
        key, _, values = pair.partition("=")
        if not values:
            raise UserError(f"--vary takes KEY=VALUE,VALUE, not '{pair}'")
        listed = key.replace("-", "_") in LISTS
        for value in values.split(","):
            value = value.replace("/", ",") if listed else value
            for name, parsed in parse_changes([f"{key}={value}"], "--vary").items():
                lists.setdefault(name, []).append(parsed)
    return lists


def parse_changes(pairs: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """Recipe fields from KEY=VALUE pairs, of the types that the fields have. Raises UserError."""
    changes = {}
    names = {f.name for f in dataclasses.fields(Recipe)}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        name = key.replace("-", "_")
        if not equals or not value:
            raise UserError(f"{flag} takes KEY=VALUE, not '{pair}'")
        if name not in names:
            raise unknown("field", name, names)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                parsed = tyro.cli(tyro.conf.FlagConversionOff[Recipe], args=[f"--{name.replace('_', '-')}", value])
        except SystemExit:
            raise UserError(f"{flag} {pair}: {name} cannot be '{value}'") from None
        changes[name] = getattr(parsed, name)
    return changes
