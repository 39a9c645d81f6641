"""The commands. Each function takes the arguments that `cli.py` has parsed, and returns the exit code."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from localgrad.core.backbones import CIFAR_RESNETS
from localgrad.core.errors import RunError, UserError
from localgrad.core.sizes import bytes_of, mib
from localgrad.run import data as data_room
from localgrad.run.arguments import Compare, Eval, Export, List, Plan, Predict, Probe, Report, Train
from localgrad.run.build import backbone_of, data_of, info_of, machine_for, planner_for
from localgrad.run.checkpoint import load_backbone, read_weights, save_weights
from localgrad.run.files import MODEL, check_folder, check_system, replacing, write_text
from localgrad.run.folder import claim, evaluated, finished_runs, open_run, read_classes, summary_rows
from localgrad.run.modes import check_shards
from localgrad.run.ranks import joined
from localgrad.run.recipe import COUPLINGS, HEADS, METHODS, PLANNED, Recipe, read_recipe, settle
from localgrad.run.recipes import RECIPES
from localgrad.run.runlog import scores
from localgrad.run.tables import write_csv
from localgrad.run.train import evaluate, train
from localgrad.scale import plan as plans

MOST_PARTS = 8  # The most parts of a batch that the table of plans shows.
SHOWN = 6  # The table of plans shows about this many of each kind.


def run_train(args: Train) -> int:
    check_system()
    with joined(args.recipe.device, args.rank_timeout) as ranks:
        replicas = ranks.count // args.pipeline  # torchrun may have started them without --nproc.
        if replicas * args.pipeline != ranks.count or args.nproc not in (1, replicas):
            given = " ".join(f"{n} {v}" for n, v in (("--nproc", args.nproc), ("--pipeline", args.pipeline)) if v > 1)
            raise UserError(f"torchrun has started {ranks.count} processes, which {given} cannot share")
        if args.shard:
            check_shards(args.recipe, replicas)
        # The first rank plans for all, because each would measure other times and might choose other cuts.
        recipe = settle(ranks.broadcast_object(_fitted(args) if ranks.first else None))
        # All ranks learn what the folder holds before the first rank writes to it.
        finished = ranks.broadcast_object(ranks.first and claim(args.out, recipe, may_grow=True))
        if finished and args.saving.resume == "auto":
            if ranks.first:
                print(f"{args.out} holds this run, finished: {scores(summary_rows(args.out)[-1])}")
            return 0
        how = {"ranks": ranks, "share": args.share, "stages": args.pipeline}
        train(recipe, args.out, saving=args.saving, tensorboard=args.tensorboard, **how)
        if ranks.first:
            print(f"wrote {args.out / 'model.safetensors'}")
    return 0


def run_plan(args: Plan) -> int:
    recipe = settle(args.recipe)
    bytes_of(args.budget, what="--budget")
    if args.out is not None:
        check_folder(args.out)
    planner = planner_for(recipe, machine_for(recipe))
    budget = planner.bytes_of(args.budget, "--budget")
    rows, chosen = planned_rows(planner, recipe, budget, args.budget)
    if args.json:
        print(json.dumps([{"name": name, **asdict(replace(plan, how={}))} for name, plan in rows]))
    else:
        show_plans(rows, planner.bp.seconds)
    if chosen is None:
        chosen = planner.fastest(budget, as_you_go=may_step_as_it_goes(recipe))  # It says what would do.
    if args.out is not None:
        fields = planned_fields(recipe, chosen)
        predicted = {"model": recipe.model, "batch_size": recipe.batch_size, "peak_bytes": chosen.peak}
        write_text(args.out, yaml.safe_dump({"plan": fields, "predicted": predicted}, sort_keys=False, width=1000))
        print(f"wrote {args.out}", file=sys.stderr)
    return 0


def planned_rows(
    planner: plans.Planner, recipe: Recipe, budget: int, text: str
) -> tuple[list[tuple[str, plans.Plan]], plans.Plan | None]:
    """The rows of the table of plans, exact ones beside local ones, and the fastest plan within the budget, if any."""
    go = may_step_as_it_goes(recipe)
    rows = [("BP", planner.bp)]
    parts = (n for n in plans.SPLITS if recipe.batch_size % n == 0 and recipe.batch_size // n > 1)
    rows += [(f"BP in {n} parts", planner.accumulation(n)) for n in parts if n <= MOST_PARTS]
    rows.append(("checkpointing", planner.checkpointing))
    fitting: list[plans.Plan] = []
    kinds: list[tuple[str, dict[str, Any]]] = [("exact", {"blocks": 1})]
    kinds += [(recipe.label, {"several": True})] if recipe.method != "bp" else []
    for kind, how in kinds:
        frontier = planner.frontier(**how, as_you_go=go)
        rows += [(kind, plan) for plan in frontier[:: max(1, len(frontier) // SHOWN)]]
        plan = planner.within(budget, how.get("blocks"), several="several" in how, as_you_go=go)
        if plan is not None:
            rows.append((f"{kind}, fits {text}", plan))
            fitting.append(plan)
    return rows, min(fitting, key=lambda plan: (plan.seconds, plan.peak), default=None)


def planned_fields(recipe: Recipe, chosen: plans.Plan) -> dict[str, Any]:
    """Returns the values of the fields in `PLANNED` that make a recipe follow a plan."""
    single = {"method": "bp", "coupling": "none", "head": "auto", "blocks": "1"}
    several = {"method": recipe.method, "coupling": recipe.coupling, "head": recipe.head}
    return {
        **(single if len(chosen.blocks) == 1 else {**several, "blocks": ",".join(chosen.blocks)}),
        "recompute": ",".join([*chosen.units, *(f"coupling.{k}" for k in chosen.couplings)]) or None,
        "step_as_you_go": chosen.step_as_you_go,
        "batch_size": recipe.batch_size // chosen.accumulate,
        "accumulate": recipe.accumulate * chosen.accumulate,
    }


def may_step_as_it_goes(recipe: Recipe) -> bool:
    """Whether a plan of the recipe may step each block right after its backward pass."""
    return recipe.accumulate == 1 and not recipe.skip_nonfinite


def _fitted(args: Train) -> Recipe:
    """The recipe, with `blocks="auto"` replaced by the plan of the run to resume, or by the fastest in the budget."""
    recipe = args.recipe
    if (recipe.blocks == "auto") != (args.budget is not None):
        raise UserError("--blocks auto and --budget belong together: give both, as --blocks auto --budget 8GiB")
    if args.budget is None:
        return recipe
    bytes_of(args.budget, what="--budget")
    if args.saving.resume == "auto" and (args.out / "config.yaml").is_file():
        earlier = read_recipe(args.out / "config.yaml")
        print(f"going on with the plan of {args.out}: blocks {earlier.blocks}")
        return replace(recipe, **{name: getattr(earlier, name) for name in PLANNED})
    folder = recipe.data == "image-folder"  # Only its folders tell the number of its classes.
    info = data_room.load(recipe.data, data_dir=recipe.data_dir, image_size=recipe.image_size).info if folder else None
    planner = planner_for(recipe, machine_for(recipe), classes=info.classes if info else None)
    budget = planner.bytes_of(args.budget, "--budget")
    chosen = planner.fastest(budget, as_you_go=may_step_as_it_goes(recipe))
    times = chosen.seconds / planner.bp.seconds
    kind = "exact training" if len(chosen.blocks) == 1 else f"{len(chosen.blocks)} blocks"
    print(f"fits {args.budget}: {kind}, {mib(chosen.peak)} and {times:.2f} x BP's time predicted")
    fields = planned_fields(recipe, chosen)
    return replace(recipe, **fields | {"step_as_you_go": fields["step_as_you_go"] or args.pipeline > 1})


def show_plans(rows: list[tuple[str, plans.Plan]], bp: float) -> None:
    table = Table("", "blocks", "peak memory", "time", "recomputed", "cut after")
    for name, plan in rows:
        recomputed = [f"{len(plan.units)} ranges"] if plan.units else []
        recomputed += [f"{len(plan.couplings)} couplings"] if plan.couplings else []
        cuts = " ".join(plan.blocks[:-1])
        as_you_go = " (step as you go)" if plan.step_as_you_go else ""
        count, times = f"{len(plan.blocks)}{as_you_go}", f"{plan.seconds / bp:.2f} x BP"
        table.add_row(name, count, mib(plan.peak), times, ", ".join(recomputed), cuts)
    console = Console()
    console.print(table)
    console.print("Peaks and times are predicted, nothing was trained.", highlight=False)
    if any(plan.accumulate > 1 for _, plan in rows):
        console.print("A batch in parts trains as the whole batch does, but for batch norm.", highlight=False)


def run_eval(args: Eval) -> int:
    recipe = evaluated(args.run, args.device)
    if args.data_dir is not None:
        recipe = replace(recipe, data_dir=args.data_dir)
    data = data_of(args.run, recipe)
    machine = machine_for(recipe)
    backbone = backbone_of(recipe, data.info)
    load_backbone(backbone, args.run / MODEL)
    machine.place(backbone)
    bad: dict[str, str] = {}
    row = evaluate(backbone, data, recipe, machine, on_bad=bad.__setitem__ if recipe.on_bad_image == "skip" else None)
    print(f"{len(data.test) - len(bad):,} images of {recipe.data}, {machine.precision}: {scores(row)}")
    if bad:
        print(f"{len(bad)} that cannot be read were left out, {min(bad)} among them")
    return 0


def run_export(args: Export) -> int:
    recipe = open_run(args.run)
    path = args.out or args.run / f"export.{args.format}"
    weights = args.run / MODEL
    check_folder(path)
    if args.format == "safetensors":
        save_weights(path, read_weights(weights), _about(args.run, recipe))
    else:
        _export_onnx(args.run, recipe, path)
    print(f"wrote {path}")
    return 0


def _about(run: Path, recipe: Recipe) -> dict[str, str]:
    """What an exported file says about the data: the names of the classes, and how to make an input of an image."""
    return data_room.described(info_of(run, recipe), read_classes(run))


def run_predict(args: Predict) -> int:
    from localgrad.run.predict import predict

    return predict(args)


def run_compare(args: Compare) -> int:
    from localgrad.run.compare import compare

    return compare(args)


def run_probe(args: Probe) -> int:
    from localgrad.run import probe

    def load(run: Path) -> probe.Network:
        recipe = replace(open_run(run), device="auto", precision="float32")
        return probe.load(run, replace(recipe, data_dir=args.data_dir or recipe.data_dir), args.images)

    runs = finished_runs(args.runs)
    against = load(args.against) if args.against else None
    for run in runs:  # All runs are checked before work on the first one begins.
        probe.check_alike(load(run), against)
        check_folder(run / "probe" / "cka.csv", make=True)
    for run in runs:
        itself = args.against is not None and run.resolve() == args.against.resolve()
        other = None if itself else against
        tables = probe.probe(load(run), other, lambda what: print(f"{what} ...", file=sys.stderr))
        for name, rows in tables.items():
            write_csv(run / "probe" / f"{name}.csv", rows)
        print(f"wrote {run / 'probe'}")
        if len(runs) == 1:
            _show_probe(run, tables["separability"], probe.agreement(tables["cka"]), other and other.name)
    if len(runs) > 1:
        print("localgrad report draws what the probes found")
    return 0


def _show_probe(run: Path, separable: list[dict[str, Any]], cka: dict[str, float], other: str | None) -> None:
    columns = ["unit", "block", "linear classifier, %", *([f"CKA with {other}"] if other else [])]
    table = Table(*map(escape, columns), title=escape(run.resolve().name))
    for row in separable:
        similar = [f"{cka[row['unit']]:.3f}"] if other and row["unit"] in cka else []
        table.add_row(row["unit"], str(row["block"]), f"{row['top1']:.2f}", *similar)
    Console().print(table)


def run_report(args: Report) -> int:
    from localgrad.run.report import report

    check_folder(args.out)
    write_text(args.out, report(args.runs, args.results))
    print(f"wrote {args.out}: open it in a browser")
    return 0


def run_list(args: List) -> int:
    console = Console()
    for title, names in (("methods", METHODS), ("couplings", COUPLINGS), ("heads", HEADS), ("recipes", RECIPES)):
        console.print(f"[bold]{title}[/]  {', '.join(names)}", highlight=False)
    models = f"{', '.join(CIFAR_RESNETS)}, torchvision:NAME, timm:NAME, PACKAGE.MODULE:FUNCTION"
    console.print(f"[bold]backbones[/]  {models} (networks for classes of images or pixels)", highlight=False)
    table = Table("data set", "images", "classes", "present", title="data sets", title_justify="left")
    for name, info in data_room.DATASETS.items():
        path = data_room.present(name, args.data_dir)
        size = f"{info.channels}x{info.size}x{info.size}" if info.classes else "any"
        classes = str(info.classes) if info.classes else "its classes.txt" if info.masks else "its folders"
        table.add_row(name, size, classes, path or "no")
    console.print(table)
    return 0


def _export_onnx(run: Path, recipe: Recipe, path: Path) -> None:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport, reportMissingImports]
    except ImportError:
        raise UserError("onnx is not installed: pip install 'localgrad[onnx]'") from None
    info = info_of(run, recipe)
    backbone = backbone_of(recipe, info)
    load_backbone(backbone, run / MODEL)
    example = torch.zeros(2, info.channels, info.size, info.size)
    batch = torch.export.Dim("batch")
    try:
        program: Any = torch.onnx.export(
            backbone.eval(), (example,), dynamo=True, dynamic_shapes=({0: batch},),
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip
        program.model.metadata_props.update(_about(run, recipe))
        with replacing(path) as part:
            program.save(str(part), external_data=False)
    except Exception as error:  # The exporter raises many kinds of errors.
        raise RunError(f"exporting {recipe.model} to ONNX failed: {str(error).splitlines()[0]}") from error
