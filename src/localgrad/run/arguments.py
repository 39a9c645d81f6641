"""The arguments of each command, as a dataclass whose docstrings are the help texts. PyTorch is not imported here."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from localgrad.core.errors import UserError, unknown
from localgrad.run.fields import DataFields, MachineFields, MemoryFields, MethodFields, ModelFields, OptimizerFields
from localgrad.run.recipe import Recipe, Saving

LISTS = ("model_args", "block_lr", "recompute", "freeze")  # The values of these fields contain commas.
# The flags of a recipe, by the group under which --help lists them.
GROUPS = {
    "model": ModelFields, "data": DataFields, "method": MethodFields, "optimizer": OptimizerFields,
    "memory": MemoryFields, "machine": MachineFields,
}  # fmt: skip
Kind = TypeVar("Kind")
Group = tyro.conf.OmitArgPrefixes[Kind]  # A group's name is no part of its flags.
RunFolder = Annotated[Path, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]


@dataclass(frozen=True)
class Train:
    """Train a network and write the run into a folder. Flags override the fields of the recipe."""

    recipe: Annotated[Recipe, tyro.conf.Fixed, tyro.conf.Suppress]  # `parse` adds its flags, in groups.
    out: Path = Path("runs/train")
    """Run folder. If it holds an unfinished run of the same recipe, that run is resumed."""
    saving: Group[Saving] = field(default_factory=Saving)
    tensorboard: bool = False
    """Also write TensorBoard events (needs localgrad[tensorboard])."""
    budget: str | None = None
    """Memory that a step may take, such as 8GiB or 50%. With --blocks auto, the fastest plan that fits is trained."""
    nproc: int = 1
    """Number of processes on this machine that share each batch. For several machines: torchrun -m localgrad train."""
    pipeline: int = 1
    """Stages of a pipeline, each of N processes with --nproc N. Needs --step-as-you-go; with MAN, --lag 2 is faster."""
    shard: bool = False
    """With --nproc, each process holds a part of the weights, gradients, optimizer states and averages."""
    restarts: int = 0
    """How often to restart all processes after one has died. They resume from the last checkpoint."""
    rank_timeout: float = 600.0
    """Seconds that a process waits for the others before it ends the run."""

    @property
    def share(self) -> Literal["batches", "weights"]:
        """What the processes with the same blocks share. Those that share weights share batches, too."""
        return "weights" if self.shard else "batches"


@dataclass(frozen=True)
class Plan:
    """Find where to cut a network and what to recompute, so that a training step fits into a memory budget.

    Nothing is trained, and the data may be missing. With --image-size, images have 3 channels and 1000 classes.
    """

    recipe: Annotated[Recipe, tyro.conf.Fixed, tyro.conf.Suppress]  # `parse` adds its flags, in groups.
    budget: str = "8GiB"
    """Memory that a training step may take, such as 500MiB, or 50% of what backpropagation takes."""
    out: Path | None = None
    """File to write the plan to. localgrad train --plan FILE follows it."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Eval:
    """Evaluate the trained network of a run on the test images."""

    run: tyro.conf.Positional[RunFolder]
    """Run folder."""
    data_dir: str | None = None
    """Folder of the data, if it has moved since the run."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Compare:
    """Train all combinations of methods, numbers of blocks and seeds, and print a table that compares them.

    A comparison that was stopped is resumed by the same command. Each run is a process of its own.
    """

    methods: str = "bp,dgl,dgl+man,dgl+deep-man"
    """METHOD or METHOD+COUPLING, split by commas. @FIELD=VALUE sets a field of its runs alone: bp@recompute=all."""
    blocks: str = "4"
    """Numbers of blocks, or units after which to cut, joined by slashes: 4,16,layer1.0/layer1.2/layer1.4."""
    seeds: str = "0"
    """Seeds, separated by commas: 0,1,2."""
    recipe: str = "demo"
    """Recipe of all runs: a name or a YAML file."""
    data: str | None = None
    """Data set of all runs. By default that of the recipe."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Recipe field for all runs: --set lr=0.05 --set epochs=3."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Recipe field and values to try: --vary momentum=0,0.9. A list has slashes: --vary recompute=stem/layer1.0,all."""
    out: Path = Path("runs/compare")
    """Folder for the runs, runs.csv, compare.csv and pairs.csv (differences paired by seed)."""
    jobs: int = 1
    """Number of runs at a time."""


@dataclass(frozen=True)
class Probe:
    """Analyse what the units of trained networks have learned: separability, CKA, t-SNE, activation maps.

    The tables are written to RUN/probe, and localgrad report draws them. All analyses use the test images.
    """

    runs: tyro.conf.Positional[RunFolders]
    """Run folders, or folders of run folders such as localgrad compare writes."""
    against: Path | None = None
    """Another run on the same data, such as the one of BP: CKA compares each unit with each unit of that run."""
    images: int = 5000
    """Number of test images. One half fits the linear classifiers, the other half tests them."""
    data_dir: str | None = None
    """Folder of the data, if it has moved since the run."""


@dataclass(frozen=True)
class Report:
    """Write an HTML page about runs: error, memory, time, learning curves, analyses of localgrad probe, recipes.

    It is a single file that opens without a network. To write it, localgrad[plot] must be installed.
    """

    runs: tyro.conf.Positional[RunFolders]
    """Run folders, or folders of run folders such as localgrad compare writes."""
    results: Path | None = None
    """Folder of result tables to show too: accuracy_*_runs.csv and frontier_*.csv."""
    out: Path = Path("report.html")
    """File to write."""


@dataclass(frozen=True)
class Predict:
    """Predict the classes of image files by the trained network of a run."""

    run: tyro.conf.Positional[RunFolder]
    """Run folder."""
    files: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="(required)")]
    ]
    """Image files of any size. They are resized and normalised as the test images of the run."""
    top: int = 5
    """How many classes to show for each image, the most probable first."""
    out: Path | None = None
    """CSV file to write, with a row for each image and class. By default a table is printed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Export:
    """Export the trained network of a run, without auxiliaries."""

    run: tyro.conf.Positional[RunFolder]
    """Run folder."""
    format: Literal["safetensors", "onnx"] = "safetensors"
    """safetensors holds the weights. onnx also holds the network, and needs localgrad[onnx]."""
    out: Path | None = None
    """File to write. By default RUN/export.safetensors or RUN/export.onnx."""


@dataclass(frozen=True)
class List:
    """List methods, couplings, heads, recipes, networks and data sets, and where data sets were found."""

    data_dir: str | None = None
    """Folder to search for data sets."""


def parse_grouped(command: Any, args: Sequence[str], *, prog: str, description: str) -> tuple[Any, dict[str, Any]]:
    """Parses the arguments of a command that has a recipe. It exits after `--help` and wrong arguments.

    Args:
        command: The command with the values that hold without flags.
        args: The arguments behind the name of the command.
        prog: The command as the usage line shows it.
        description: The text above the flags.

    Returns:
        The command with the values of its own flags, and the values of all fields of the recipe.
    """
    values = vars(command.recipe)
    parts = {name: kind(**{f.name: values[f.name] for f in fields(kind)}) for name, kind in GROUPS.items()}
    groups = [(name, Group[type(part)], field(default=part)) for name, part in parts.items()]
    own = ("command", Annotated[type(command), tyro.conf.arg(name="")], field(default=command))
    flags = dataclasses.make_dataclass("Flags", [own, *groups])
    config = [tyro.conf.HelptextFromCommentsOff]  # Without it, tyro reads the sources again for fields without a text.
    parsed: Any = tyro.cli(flags, args=args, prog=prog, description=description, config=config)
    return parsed.command, {name: value for group in GROUPS for name, value in vars(getattr(parsed, group)).items()}


def parse_lists(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """Reads KEY=VALUE,VALUE pairs: a recipe field with several values. Raises UserError for a pair that is none."""
    lists: dict[str, list[Any]] = {}
    for pair in pairs:
        key, _, values = pair.partition("=")
        if not values:
            raise UserError(f"--vary takes KEY=VALUE,VALUE, not '{pair}'")
        is_list = key.replace("-", "_") in LISTS
        for value in values.split(","):
            value = value.replace("/", ",") if is_list else value
            for name, parsed in parse_changes([f"{key}={value}"], "--vary").items():
                lists.setdefault(name, []).append(parsed)
    return lists


def parse_changes(pairs: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """Reads KEY=VALUE pairs into recipe fields of the right types. Raises UserError for a pair that is none."""
    changes = {}
    names = {f.name for f in fields(Recipe)}
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
