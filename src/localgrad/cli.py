"""Parses the command line and runs a command. PyTorch is imported only then, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

import tyro

from localgrad.core.errors import RunError, UserError, unknown
from localgrad.run.arguments import Compare, Eval, Export, List, Plan, Predict, Probe, Report, Train, parse_grouped
from localgrad.run.recipe import Recipe, override, read_plan
from localgrad.run.recipes import RECIPES, named_recipe
from localgrad.run.signals import Stopped, ignore_signals, rank_here, sigterm_raises

COMMANDS: dict[str, type] = {
    "train": Train, "plan": Plan, "eval": Eval, "compare": Compare, "probe": Probe, "report": Report,
    "export": Export, "predict": Predict, "list": List,
}  # fmt: skip
USAGE = """usage: localgrad COMMAND [flags]    (localgrad COMMAND --help shows the flags)

Train a network in less memory: exactly, or as gradient-isolated blocks with momentum auxiliary networks.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, by default that of the process, and returns the exit code: 0, 2 for an error that the user can
    mend, 3 for a fault of the run, 128 + the number of the signal that stopped it, or 1 if all went well but standard
    output did not take what was printed."""
    args = [_expanded(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    warnings.showwarning = _warnings_shown()
    try:
        with sigterm_raises(last=argv is None), _whole_output():
            return _run(args)
        return 0  # Whoever read the output has gone before its end.
    except (UserError, RunError) as error:
        if not (error.shared and rank_here()):
            print(f"localgrad: {error}", file=sys.stderr)
        return error.exit_code
    except (Stopped, KeyboardInterrupt) as stopped:
        if argv is None:  # A second signal may have interrupted the end of `sigterm_raises`.
            ignore_signals()
        text = str(stopped) if isinstance(stopped, Stopped) else "stopped"
        # The process that started the ranks says why they were stopped. Only the first rank may add where it saved.
        if "RANK" not in os.environ or not (rank_here() or text == "stopped"):
            print(f"localgrad: {text}", file=sys.stderr)
        return stopped.exit_code if isinstance(stopped, Stopped) else 130
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Without this, Python would print an error and exit with 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class OutputLost(RunError):
    """The command has done its work, but standard output did not take all that it printed."""

    exit_code = 1


@contextlib.contextmanager
def _whole_output() -> Iterator[None]:
    """Raises OutputLost if standard output does not take what is printed, as on a full disk. If a reader such as `head`
    has gone, it wants no more, and the context ends in silence."""
    ended = None
    try:
        yield
    except (OSError, SystemExit) as error:  # Printing may have failed, and --help ends in SystemExit.
        ended = error
    try:
        if isinstance(ended, OSError):
            print()  # If the error was that of standard output, it comes again.
        sys.stdout.flush()
    except BrokenPipeError:
        if isinstance(ended, OSError):
            return
    except OSError as error:
        raise OutputLost(f"what was printed is not complete: {error.strerror}") from error
    if ended is not None:
        raise ended


def _run(args: list[str]) -> int:
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
    if isinstance(command, Train) and (command.nproc, command.pipeline) != (1, 1) and "RANK" not in os.environ:
        from localgrad.run.launch import launch

        return launch(args, command)
    from localgrad.run import commands

    functions: dict[type, Callable[[Any], int]] = {
        Train: commands.run_train, Plan: commands.run_plan, Eval: commands.run_eval, Compare: commands.run_compare,
        Probe: commands.run_probe, Report: commands.run_report, Export: commands.run_export,
        Predict: commands.run_predict, List: commands.run_list,
    }  # fmt: skip
    return functions[type(command)](command)


def _expanded(arg: str) -> str:
    """Replaces ~ and ~user in an argument. Most shells do not do it in --flag=~/x."""
    flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return flag + equals + os.path.expanduser(value)


def _parse(name: str, args: list[str]) -> Any:
    """The command with this name and these arguments. It exits after `--help` and wrong arguments."""
    kind, prog = COMMANDS[name], f"localgrad {name}"
    texts = cleandoc(kind.__doc__ or "").split("\n\n")
    if kind not in (Train, Plan):
        return tyro.cli(kind, args=args, prog=prog, description=_wrapped(texts))
    recipe_name, args = _take("--recipe", "a name or a YAML file", args)
    plan_file, args = _take("--plan", "a file that localgrad plan wrote", args) if kind is Train else (None, args)
    recipe = named_recipe(recipe_name) if recipe_name else Recipe()
    if plan_file:
        recipe = override(recipe, read_plan(Path(plan_file)))
    texts.append(f"With --recipe NAME it starts from a recipe, or from a YAML file. The names: {', '.join(RECIPES)}.")
    if kind is Train:
        texts.append("With --plan FILE it follows what localgrad plan has written.")
    command, values = parse_grouped(kind(recipe), args, prog=prog, description=_wrapped(texts))
    # Only the fields on the command line count as changes, because the others may be implied: `--method bp` implies one
    # block, unless `--blocks` is there too.
    changes = {field: values[field] for field in _recipe_fields(args)}
    return dataclasses.replace(command, recipe=override(recipe, changes))


def _wrapped(texts: Sequence[str]) -> str:
    """Paragraphs that fit into the width of the terminal. tyro does not wrap them, and joins lines that do not begin
    with a space."""
    width = shutil.get_terminal_size().columns
    lines = (" ".join(text.split()) for text in texts)
    return "\n\n".join(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _recipe_fields(args: list[str]) -> set[str]:
    """The fields of a recipe that have a flag in these arguments: --lr 0.1, --lr=0.1, --no-download."""
    flags = [arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")]
    fields = {flag.removeprefix("no-").replace("-", "_") for flag in flags}
    return fields & {field.name for field in dataclasses.fields(Recipe)}


def _take(flag: str, what: str, args: list[str]) -> tuple[str | None, list[str]]:
    """Takes a flag out of the arguments. Returns its value, None if it is not there, and the other arguments."""
    for i, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.removeprefix(f"{flag}="), args[:i] + args[i + 1 :]
        if arg == flag:
            if i + 1 == len(args):
                raise UserError(f"{flag} takes {what}")
            return args[i + 1], args[:i] + args[i + 2 :]
    return None, args


def _warnings_shown() -> Callable[..., None]:
    """A function for `warnings.showwarning`, which prints each warning once, on one line without its source line."""
    shown = set()

    def show(message: Warning | str, *_: Any) -> None:
        if not rank_here() and str(message) not in shown:
            shown.add(str(message))
            print(f"localgrad: warning: {message}", file=sys.stderr)

    return show
