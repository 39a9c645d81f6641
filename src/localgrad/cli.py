"""argv -> a command. No PyTorch is loaded before a command runs, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from localgrad.core.errors import RunError, UserError, unknown
from localgrad.run.arguments import Compare, Eval, Export, List, Plan, Probe, Report, Train
from localgrad.run.recipe import Recipe, override, read_plan
from localgrad.run.recipes import RECIPES, named_recipe
from localgrad.run.signals import Stopped, rank_here, sigterm_raises

COMMANDS: dict[str, type] = {
    "train": Train, "plan": Plan, "eval": Eval, "compare": Compare, "probe": Probe, "report": Report,
    "export": Export, "list": List,
}  # fmt: skip
USAGE = """usage: localgrad COMMAND [flags]    (localgrad COMMAND --help shows the flags)

Train a network as gradient-isolated blocks with momentum auxiliary networks.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for what the user can change, 3 for a fault of the run, 128 and
    the signal's number for one that a signal stopped."""
    args = [_expanded(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    warnings.showwarning = _warnings_shown()
    try:
        with sigterm_raises():
            return _run(args)
    except (UserError, RunError) as error:
        if not (error.shared and rank_here()):
            print(f"localgrad: {error}", file=sys.stderr)
        return error.exit_code
    except (Stopped, KeyboardInterrupt) as stopped:
        if argv is None:  # the process is about to end: another signal must not change how
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        said = str(stopped) if isinstance(stopped, Stopped) else "stopped"
        # A rank that has nothing to add was ended with the others: whoever started them says why.
        if "RANK" not in os.environ or not (rank_here() or said == "stopped"):
            print(f"localgrad: {said}", file=sys.stderr)
        return stopped.exit_code if isinstance(stopped, Stopped) else 130
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody takes what was said; Python would say so and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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

    return getattr(commands, f"run_{args[0]}")(command)


def _expanded(arg: str) -> str:
    """`arg` with its ~ or ~user replaced as a shell does it, but in --flag=~/x too, where most shells do not."""
    flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return flag + equals + os.path.expanduser(value)


def _parse(name: str, args: list[str]) -> Any:
    kind, prog = COMMANDS[name], f"localgrad {name}"
    if kind not in (Train, Plan):
        return tyro.cli(kind, args=args, prog=prog)
    chosen, rest = _take("--recipe", "a name or a YAML file", args)
    plan, rest = _take("--plan", "a file that localgrad plan wrote", rest) if kind is Train else (None, rest)
    base = named_recipe(chosen) if chosen else Recipe()
    if plan:
        base = override(base, read_plan(Path(plan)))
    description = f"{kind.__doc__}\n\n--recipe NAME starts from one of: {', '.join(RECIPES)}; or from a YAML file."
    if kind is Train:
        description += "\n--plan FILE follows what localgrad plan has written."
    parsed = tyro.cli(kind, args=rest, prog=prog, default=kind(base), description=description)
    # Only what was typed overrides: bp's single block, say, is implied unless --blocks is there too.
    typed = {
        a.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for a in rest if a.startswith("--")
    }
    fields = {f.name for f in dataclasses.fields(Recipe)}
    changes = {name: getattr(parsed.recipe, name) for name in typed & fields}
    return dataclasses.replace(parsed, recipe=override(base, changes))


def _take(flag: str, what: str, args: list[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, and the other arguments."""
    for i, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.removeprefix(f"{flag}="), args[:i] + args[i + 1 :]
        if arg == flag:
            if i + 1 == len(args):
                raise UserError(f"{flag} takes {what}")
            return args[i + 1], args[:i] + args[i + 2 :]
    return None, args


def _warnings_shown() -> Callable[..., None]:
    """What shows a warning of ours: one line for a person, once a command, without its place in the source."""
    said = set()

    def show(message: Warning | str, *_: Any) -> None:
        if not rank_here() and str(message) not in said:
            said.add(str(message))
            print(f"localgrad: warning: {message}", file=sys.stderr)

    return show


if __name__ == "__main__":
    sys.exit(main())
