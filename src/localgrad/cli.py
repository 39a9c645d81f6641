"""argv -> a command. No PyTorch is loaded before a command runs, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from localgrad.core.errors import RunError, UserError, unknown
from localgrad.run.recipe import Recipe, override
from localgrad.run.recipes import RECIPES


@dataclass(frozen=True)
class Train:
    """Train one network into a run folder. Flags override the recipe's fields."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path = Path("runs/train")
    """The run folder."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs localgrad[tensorboard])."""


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
    """Numbers of blocks."""
    seeds: str = "0"
    """Seeds: 0,1,2."""
    recipe: str = "demo"
    """Recipe that all runs share: a name or a YAML file."""
    data: str | None = None
    """Data set, if not the recipe's."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Recipe fields that all runs share: --set lr=0.05 --set epochs=3."""
    out: Path = Path("runs/compare")
    """Folder of the grid: a folder for each run, runs.csv, compare.csv, and compare.png with localgrad[plot]."""
    jobs: int = 1
    """Runs at a time."""


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


COMMANDS: dict[str, type] = {"train": Train, "eval": Eval, "compare": Compare, "export": Export, "list": List}
USAGE = """usage: localgrad COMMAND [flags]    (localgrad COMMAND --help shows the flags)

Train a network as gradient-isolated blocks with momentum auxiliary networks.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for what the user can change, 3 for a fault of the run."""
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    try:
        if not args or args[0] in ("-h", "--help"):
            width = max(map(len, COMMANDS))
            lines = [f"  {name:{width}}  {(kind.__doc__ or '').splitlines()[0]}" for name, kind in COMMANDS.items()]
            print(USAGE + "\n".join(lines))
            return 0 if args else 2
        if args[0] == "--version":
            import localgrad

            print(localgrad.__version__)
            return 0
        if args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        command = _parse(args[0], args[1:])
        from localgrad.run import commands

        return getattr(commands, f"run_{args[0]}")(command)
    except (UserError, RunError) as error:
        print(f"localgrad: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("localgrad: stopped", file=sys.stderr)
        return 130


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Recipe fields from KEY=VALUE pairs, of the types that the fields have. Raises UserError."""
    changes = {}
    names = {f.name for f in dataclasses.fields(Recipe)}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        name = key.replace("-", "_")
        if not equals or not value:
            raise UserError(f"--set takes KEY=VALUE, not '{pair}'")
        if name not in names:
            raise unknown("field", name, names)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                parsed = tyro.cli(_FlatRecipe, args=[f"--{name.replace('_', '-')}", value])
        except SystemExit:
            raise UserError(f"--set {pair}: {name} cannot be '{value}'") from None
        changes[name] = getattr(parsed, name)
    return changes


_FlatRecipe = tyro.conf.FlagConversionOff[Recipe]


def _parse(name: str, args: list[str]) -> Any:
    kind, prog = COMMANDS[name], f"localgrad {name}"
    if kind is not Train:
        return tyro.cli(kind, args=args, prog=prog)
    chosen, rest = _take_recipe(args)
    base = named_recipe(chosen) if chosen else Recipe()
    description = f"{Train.__doc__}\n\n--recipe NAME starts from one of: {', '.join(RECIPES)}; or from a YAML file."
    parsed = tyro.cli(Train, args=rest, prog=prog, default=Train(base), description=description)
    # Only what was typed overrides: bp's single block, say, is implied unless --blocks is there too.
    typed = {
        a.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for a in rest if a.startswith("--")
    }
    fields = {f.name for f in dataclasses.fields(Recipe)}
    changes = {name: getattr(parsed.recipe, name) for name in typed & fields}
    return dataclasses.replace(parsed, recipe=override(base, changes))


def named_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a YAML file (a run's config.yaml). Raises UserError."""
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith((".yaml", ".yml")):
        from localgrad.run.runlog import read_recipe

        return read_recipe(Path(name))
    raise unknown("recipe", name, RECIPES)


def _take_recipe(args: list[str]) -> tuple[str | None, list[str]]:
    for i, arg in enumerate(args):
        if arg.startswith("--recipe="):
            return arg.removeprefix("--recipe="), args[:i] + args[i + 1 :]
        if arg == "--recipe":
            if i + 1 == len(args):
                raise UserError("--recipe takes a name or a YAML file")
            return args[i + 1], args[:i] + args[i + 2 :]
    return None, args


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning of ours is one line for a person; its place in the source is not."""
    print(f"localgrad: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
