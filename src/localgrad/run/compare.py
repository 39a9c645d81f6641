"""A grid of runs, one process each, and its table: mean, standard deviation and n over the seeds."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from localgrad.core.blocks import split, trace_units
from localgrad.core.errors import RunError, UserError
from localgrad.run import data as data_room
from localgrad.run.arguments import Compare, parse_changes
from localgrad.run.build import backbone_of, machine_for
from localgrad.run.recipe import Recipe, as_dict, override, settle
from localgrad.run.recipes import named_recipe
from localgrad.run.runlog import claim, mib, read_environment, summary_rows


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    blocks: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.method}_k{self.blocks}_s{self.recipe.seed}"


def compare(args: Compare) -> int:
    cells = grid(args)
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    for cell in cells:  # every folder, data set and cut is checked before the first run starts
        claim(args.out / cell.name, cell.recipe)
    check(cells)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}; choose another --out") from error
    failed = run_all(cells, args.out, args.jobs)
    runs = finished_runs(cells, args.out)
    if runs:
        rows = summarize(runs)
        write_csv(args.out / "runs.csv", runs)
        write_csv(args.out / "compare.csv", rows)
        show(rows)
        _plot(args.out / "compare.png", rows)
    if failed:
        raise RunError(f"{len(failed)} of {len(cells)} runs failed: {', '.join(failed)} (see {args.out}/NAME.log)")
    return 0


def check(cells: Sequence[Cell]) -> None:
    """Raises what a run of the grid would raise before it begins to train."""
    for recipe in {replace(cell.recipe, seed=0): None for cell in cells}:
        machine_for(recipe)
        info = data_room.find(recipe.data, recipe.data_dir, download=recipe.download)
        if not info.classes:
            info = replace(info, classes=2)  # an image folder's are counted when it is read; no cut depends on them
        backbone = backbone_of(recipe, info)
        size = recipe.image_size or info.size
        split(trace_units(backbone, torch.zeros(1, info.channels, size, size)), recipe.cut)


def grid(args: Compare) -> list[Cell]:
    """Every run of the grid. `bp` knows no number of blocks, so it runs once a seed."""
    shared = parse_changes(args.set)
    for name, flag in (("method", "methods"), ("coupling", "methods"), ("blocks", "blocks"), ("seed", "seeds")):
        if name in shared:
            raise UserError(f"--set {name} would hold for all runs: the grid takes it from --{flag}")
    shared |= {"data": args.data} if args.data else {}
    base = replace(named_recipe(args.recipe), **shared)
    cells: dict[str, Cell] = {}
    for word in _words(args.methods, "--methods"):
        method, _, coupling = word.partition("+")
        for blocks in _numbers(args.blocks, "--blocks"):
            for seed in _numbers(args.seeds, "--seeds"):
                changes: dict[str, Any] = {"coupling": coupling or "none", "method": method, "seed": seed}
                if method != "bp":
                    changes["blocks"] = str(blocks)
                elif not coupling:
                    del changes["coupling"]
                if "head" in shared:
                    changes["head"] = shared["head"]
                recipe = settle(override(base, changes))
                cell = Cell(word, 1 if method == "bp" else blocks, recipe)
                cells[cell.name] = cell
    return list(cells.values())


def run_all(cells: Sequence[Cell], out: Path, jobs: int) -> list[str]:
    """Runs what is not finished, `jobs` at a time, and returns the names of those that failed."""
    waiting = [c for c in cells if not claim(out / c.name, c.recipe)]
    print(f"{len(cells)} runs, {len(cells) - len(waiting)} of them finished", flush=True)
    running: dict[str, subprocess.Popen] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[cell.name] = _start(cell, out, jobs)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _report(name, process.returncode, out, failed)
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return failed


def finished_runs(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """The last epoch of each finished run, errors in percent, and what it ran on."""
    rows = []
    for cell in cells:
        if (out / cell.name / "model.safetensors").exists():
            last = summary_rows(out / cell.name)[-1]
            row = {"method": cell.method, "blocks": cell.blocks, "seed": cell.recipe.seed}
            row |= {"error": round(100 - last["eval_top1"], 3), "train_loss": last["train_loss"]}
            row |= {"peak_bytes": int(last["peak_bytes"]), "seconds": round(last["seconds"], 1)}
            rows.append(row | read_environment(out / cell.name))
    return rows


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and number of blocks: over its seeds, mean and standard deviation (of the sample) of the
    test error, medians of peak and time, and every machine and version that took part."""
    table = []
    for method, blocks in dict.fromkeys((run["method"], run["blocks"]) for run in runs):
        group = [run for run in runs if (run["method"], run["blocks"]) == (method, blocks)]
        errors = [run["error"] for run in group]
        row = {"method": method, "blocks": blocks, "n": len(group), "error_mean": round(statistics.mean(errors), 3)}
        row |= {"error_std": round(statistics.stdev(errors), 3) if len(errors) > 1 else ""}
        row |= {"peak_bytes": int(statistics.median(run["peak_bytes"] for run in group))}
        row |= {"seconds": round(statistics.median(run["seconds"] for run in group), 1)}
        row |= {"seeds": " ".join(str(run["seed"]) for run in group)}
        told = [name for name in group[0] if name not in (*row, "seed", "error", "train_loss")]
        table.append(row | {name: " / ".join(dict.fromkeys(str(run.get(name, "")) for run in group)) for name in told})
    return table


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("method", "blocks", "test error %", "n", "peak memory", "seconds")
    for row in rows:
        spread = f" ± {row['error_std']:.2f}" if row["error_std"] != "" else ""
        cells = (f"{row['error_mean']:.2f}{spread}", str(row["n"]), mib(row["peak_bytes"]), f"{row['seconds']:.0f}")
        table.add_row(row["method"], str(row["blocks"]), *cells)
    console = Console()
    console.print(table)
    where = f"{rows[0].get('machine')}, torch {rows[0].get('torch')}"
    console.print(f"mean ± standard deviation over seeds; median peak and time; {where}", highlight=False)


def _start(cell: Cell, out: Path, jobs: int) -> subprocess.Popen:
    print(f"{cell.name} ...", flush=True)
    recipe = out / f"{cell.name}.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(cell.recipe), sort_keys=False))
    command = [sys.executable, "-m", "localgrad", "train", "--recipe", str(recipe), "--out", str(out / cell.name)]
    # Runs beside each other share the cores, or each would start a thread a core.
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with (out / f"{cell.name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**threads, **os.environ})


def _report(name: str, code: int, out: Path, failed: list[str]) -> None:
    if code == 0:
        row = summary_rows(out / name)[-1]
        print(
            f"{name}: test error {100 - row['eval_top1']:.2f}%, peak {mib(row['peak_bytes'])}, {row['seconds']:.0f} s",
            flush=True,
        )
    else:
        failed.append(name)
        lines = (out / f"{name}.log").read_text().strip().splitlines()
        print(f"{name} failed ({code}): {lines[-1] if lines else 'no output'}", flush=True)


def _plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return  # [plot] is an extra; the table and the CSV hold the same
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        label, spread = f"{row['method']} K={row['blocks']}", row["error_std"] or None
        axes.errorbar(row["peak_bytes"] / 2**20, row["error_mean"], yerr=spread, fmt="o", capsize=3, label=label)
    axes.set(xlabel="peak training memory (MiB)", ylabel="test error (%), mean and deviation over seeds")
    axes.set(xlim=(0, 1.1 * max(row["peak_bytes"] for row in rows) / 2**20))
    axes.set(ylim=(0, 1.1 * max(row["error_mean"] + (row["error_std"] or 0) for row in rows)))
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _words(text: str, flag: str) -> list[str]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not words:
        raise UserError(f"{flag} takes names split by commas, not '{text}'")
    return words


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(w) for w in _words(text, flag)]
    except ValueError:
        raise UserError(f"{flag} takes whole numbers split by commas, not '{text}'") from None
