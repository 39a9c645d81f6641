"""A grid of runs, each in a process of its own, and its tables: means over seeds, and differences paired by seed."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from localgrad.core.blocks import split, trace_units
from localgrad.core.errors import RunError, UserError
from localgrad.core.sizes import mib
from localgrad.run import data as data_room
from localgrad.run.arguments import Compare, parse_changes, parse_lists
from localgrad.run.build import backbone_of, freeze, machine_for, task_of
from localgrad.run.files import MODEL, check_system
from localgrad.run.folder import claim, summary_rows
from localgrad.run.recipe import Recipe, as_dict, idle, override, settle
from localgrad.run.recipes import named_recipe
from localgrad.run.runlog import scores
from localgrad.run.tables import paired, row_of, show, summarize, write_csv


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `method` includes the coupling. `varied` has the fields of --vary that have an effect."""

    method: str
    blocks: int
    recipe: Recipe
    varied: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        values = "".join(f"_{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', str(value))}" for name, value in self.varied.items())
        return f"{self.method}_k{self.blocks}_s{self.recipe.seed}{values}"

    @property
    def setting(self) -> str:
        """`varied` as text, such as momentum=0.9."""
        return " ".join(f"{name}={value}" for name, value in self.varied.items())


def compare(args: Compare) -> int:
    """Runs `localgrad compare` and returns its exit code."""
    check_system()
    cells = grid(args)
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    for cell in cells:  # All folders, data sets and cuts are checked before the first run starts.
        claim(args.out / cell.name, cell.recipe)
    check(cells)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}; choose another --out") from error
    failed = run_all(cells, args.out, args.jobs)
    runs = [
        row_of(args.out / cell.name, cell.method, cell.blocks, cell.setting, cell.recipe.seed)
        for cell in cells
        if (args.out / cell.name / MODEL).exists()
    ]
    if runs:
        rows, pairs = summarize(runs), paired(runs)
        write_csv(args.out / "runs.csv", runs)
        write_csv(args.out / "compare.csv", rows)
        if pairs:
            write_csv(args.out / "pairs.csv", pairs)
        show(rows, pairs)
    if failed:
        raise RunError(f"{len(failed)} of {len(cells)} runs failed: {', '.join(failed)} (see {args.out}/NAME.log)")
    return 0


def check(cells: Sequence[Cell]) -> None:
    """Raises the errors that a run of the grid would raise before it begins to train."""
    for recipe in {replace(cell.recipe, seed=0): None for cell in cells}:
        machine_for(recipe)
        info = data_room.find(recipe.data, recipe.data_dir, download=recipe.download)
        if not info.classes:
            info = replace(info, classes=2)  # An image folder has not been read yet. Cuts do not depend on the number.
        backbone = backbone_of(recipe, info)
        size = recipe.image_size or info.size
        example = torch.zeros(1, info.channels, size, size)
        traced = trace_units(backbone, example, recipe.cut)
        split(traced, recipe.cut)
        task_of(info).check_output(traced.cut.gives)
        if recipe.freeze is not None:
            freeze(backbone, recipe.freeze, example)


def grid(args: Compare) -> list[Cell]:
    """Returns all runs of the grid. BP has one block whatever --blocks says, so it runs once for each seed."""
    shared = parse_changes(args.set)
    for name, flag in (("method", "methods"), ("coupling", "methods"), ("blocks", "blocks"), ("seed", "seeds")):
        if name in shared:
            raise UserError(f"--set {name} would hold for all runs: the grid takes it from --{flag}")
    varied = [[(name, value) for value in values] for name, values in parse_lists(args.vary).items()]
    shared |= {"data": args.data} if args.data else {}
    for axis in varied:
        if axis[0][0] in ("method", "coupling", "blocks", "seed", *shared):
            raise UserError(f"--vary {axis[0][0]} is given otherwise too: by another flag of the grid, or --set")
    base = replace(named_recipe(args.recipe), **shared)
    cells: dict[str, Cell] = {}
    methods, cuts, seeds = (
        _words(args.methods, "--methods"), _cuts(args.blocks), _numbers(args.seeds, "--seeds")
    )  # fmt: skip
    for label, (blocks, names), seed, values in itertools.product(methods, cuts, seeds, itertools.product(*varied)):
        label, _, own = label.partition("@")
        method, _, coupling = label.partition("+")
        own = parse_changes([own] if own else [], "--methods")
        for name in ("method", "coupling", "blocks", "seed", *shared, *dict(values)):
            if name in own:
                raise UserError(
                    f"--methods {label}@{name} is given otherwise too: by another flag of the grid, or --set"
                )
        values = (*values, *own.items())
        changes: dict[str, Any] = {"coupling": coupling or "none", "method": method, "seed": seed, **dict(values)}
        if method != "bp":
            changes["blocks"] = names or str(blocks)
        elif not coupling:
            del changes["coupling"]
        if "head" in shared:
            changes["head"] = shared["head"]
        recipe = settle(override(base, changes))
        effective = {name: value for name, value in values if name not in idle(recipe)}
        if names and method != "bp":
            effective["blocks"] = names
        cell = Cell(label, 1 if method == "bp" else blocks, recipe, effective)
        if cells.setdefault(cell.name, cell).recipe != recipe:
            raise UserError(f"two runs of the grid would both be called {cell.name}: run them as grids of their own")
    return list(cells.values())


def run_all(
    cells: Sequence[Cell], out: Path, jobs: int, *, done: Callable[[Cell], None] = lambda cell: None
) -> list[str]:
    """Trains the runs that are not finished, `jobs` at a time, and returns the names of those that failed.

    `done` is called with each finished run.
    """
    waiting = [c for c in cells if not claim(out / c.name, c.recipe)]
    print(f"{len(cells)} runs, {len(cells) - len(waiting)} of them finished", flush=True)
    for cell in cells:
        if cell not in waiting:
            done(cell)
    running: list[tuple[Cell, subprocess.Popen]] = []
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running.append((cell, _start(cell, out, jobs)))
            for cell, process in list(running):
                if process.poll() is not None:
                    running.remove((cell, process))
                    _report(cell.name, process.returncode, out, failed)
                    if process.returncode == 0:
                        done(cell)
            time.sleep(0.05)
    finally:
        for _, process in running:
            process.terminate()
            process.wait()
    return failed


def _start(cell: Cell, out: Path, jobs: int) -> subprocess.Popen:
    print(f"{cell.name} ...", flush=True)
    recipe = out / f"{cell.name}.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(cell.recipe), sort_keys=False))
    # The command would expand a path that begins with ~, so such a path gets a ./ before it.
    recipe_path, run_path = (os.path.join(".", path) for path in (recipe, out / cell.name))
    command = [sys.executable, "-m", "localgrad", "train", "--recipe", recipe_path, "--out", run_path]
    # Runs at the same time share the cores. Without a limit each of them would start one thread for each core.
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with (out / f"{cell.name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**threads, **os.environ})


def _report(name: str, code: int, out: Path, failed: list[str]) -> None:
    if code == 0:
        row = summary_rows(out / name)[-1]
        print(
            f"{name}: {scores(row)}, peak {mib(row['peak_bytes'])}, {row['seconds']:.0f} s",
            flush=True,
        )
    else:
        failed.append(name)
        lines = (out / f"{name}.log").read_text().strip().splitlines()
        print(f"{name} failed ({code}): {lines[-1] if lines else 'no output'}", flush=True)


def _words(text: str, flag: str) -> list[str]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not words:
        raise UserError(f"{flag} takes names split by commas, not '{text}'")
    return words


def _cuts(text: str) -> list[tuple[int, str]]:
    """For each word of --blocks the number of blocks, and the last units of all blocks but the last if it has names."""
    cuts = []
    for word in _words(text, "--blocks"):
        names = ",".join(name for name in word.split("/") if name)
        cuts.append((int(word), "") if word.lstrip("-").isdigit() else (names.count(",") + 2, names))
    return cuts


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(w) for w in _words(text, flag)]
    except ValueError:
        raise UserError(f"{flag} takes whole numbers split by commas, not '{text}'") from None
