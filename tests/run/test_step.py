"""A bad step does no harm: what is not finite stops before its block changes, or is left out; memory that runs out is
said in a sentence."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BP, QUICK, TINY
from torch import Tensor

import localgrad as lg
from localgrad.cli import main
from localgrad.core.errors import RunError, UserError
from localgrad.core.model import LocalModel
from localgrad.core.task import Classification
from localgrad.run import data as datasets
from localgrad.run.build import build_model, machine_for
from localgrad.run.checkpoint import read_checkpoint, saved
from localgrad.run.folder import summary_rows
from localgrad.run.modes import Alone
from localgrad.run.recipe import Recipe
from localgrad.run.step import SKIPS, NotFinite, Stepper, rate, slowed
from localgrad.run.train import to_device, train
from localgrad.scale.groups import Ranks

Undo = Callable[[], None]


class BadCriterion(Classification):
    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().criterion(logits, targets) + float("inf")


def infinite_loss(model: LocalModel, j: int) -> Undo:
    """The loss alone: the gradients stay finite."""
    if j == len(model.blocks) - 1:
        model.task = BadCriterion(10)
        return lambda: setattr(model, "task", Classification(10))
    auxiliary: Any = model.auxiliaries[j]
    total = auxiliary.total
    auxiliary.total = lambda losses: total(losses) + float("inf")
    return lambda: setattr(auxiliary, "total", total)


def nan_gradient(model: LocalModel, j: int) -> Undo:
    """One gradient alone: all losses stay finite."""
    return model.members(j)[0].register_hook(lambda grad: grad * float("nan")).remove


def nan_activations(model: LocalModel, j: int) -> Undo:
    """What a block computes: its running statistics go bad before its loss does, and those of the blocks above."""
    first = next(iter(model.blocks[j].children()))
    return first.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),)).remove


FAULTS = [infinite_loss, nan_gradient, nan_activations]
COUPLINGS = ["none", "man", "deep-man"]
# Each fault with each coupling, in one of the blocks; the other blocks are slow tests.
CASES = [
    pytest.param(fault, j, coupling, marks=() if j == (i + k) % 4 else pytest.mark.slow)
    for (i, fault), (k, coupling) in itertools.product(enumerate(FAULTS), enumerate(COUPLINGS))
    for j in range(4)
]


def stepper_of(recipe: Recipe, steps: int = 100) -> tuple[Stepper, Iterator[Any]]:
    """A stepper two steps into a run (so that the optimizer has a state) and its batches."""
    machine, data = machine_for(recipe), datasets.load("digits", limit_train=640)
    stepper = Stepper(recipe, Alone(build_model(recipe, data, machine), Ranks()), machine, steps)
    epochs = (datasets.train_batches(data, batch_size=recipe.batch_size, seed=0, epoch=e) for e in range(9))
    batches = (to_device(batch, data.info, machine) for epoch in epochs for batch in epoch)
    for _ in range(2):
        stepper(batches)
    return stepper, batches


def everything(stepper: Stepper) -> dict[str, Any]:
    """Parameters, averages, buffers, and the optimizers' tensors."""
    found = {k: v.clone() for k, v in stepper.model.state_dict().items()}
    for i, optimizer in enumerate(stepper.optimizers):
        for j, own in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i} {j} {k}": v.clone() for k, v in own.items() if isinstance(v, Tensor)}
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def of_block(model: LocalModel, k: int) -> list[Tensor]:
    modules = [model.blocks[k], *model.auxiliaries[k : k + 1]]
    return [t.clone() for m in modules for t in m.state_dict().values()]


@pytest.mark.parametrize(("fault", "j", "coupling"), CASES)
def test_what_is_not_finite_changes_nothing_and_is_named(
    fault: Callable[[LocalModel, int], Undo], j: int, coupling: str, figure: Any
) -> None:
    stepper, batches = stepper_of(dataclasses.replace(TINY, coupling=coupling, clip=1.0))
    before = everything(stepper)
    fault(stepper.model, j)
    name = stepper.model.blocks[j].names[-1]
    with pytest.raises(NotFinite, match=rf"in block {j} \({name}\) is (nan|inf) at step 3: ") as caught:
        stepper(batches)
    differing = changed(before, everything(stepper))
    figure(f"{fault.__name__.replace('_', ' ')} in each block", 1, int(not differing))
    assert caught.value.block == j
    assert differing == set()
    assert all(p.grad is None for p in stepper.model.parameters())
    assert stepper.step == 2


@pytest.mark.parametrize(("fault", "j", "coupling"), CASES)
def test_step_as_you_go_stops_before_that_block(
    fault: Callable[[LocalModel, int], Undo], j: int, coupling: str
) -> None:
    stepper, batches = stepper_of(dataclasses.replace(TINY, coupling=coupling, step_as_you_go=True))
    before = [of_block(stepper.model, k) for k in range(4)]
    optimizers = [copy.deepcopy(o.state_dict()["state"]) for o in stepper.optimizers]
    fault(stepper.model, j)
    with pytest.raises(NotFinite) as caught:
        stepper(batches)
    assert caught.value.block == j
    for k in range(4):
        same = all(torch.equal(a, b) for a, b in zip(before[k], of_block(stepper.model, k), strict=True))
        assert same == (k >= j)
        own = stepper.optimizers[k].state_dict()["state"]
        assert all(torch.equal(own[i]["momentum_buffer"], s["momentum_buffer"]) for i, s in optimizers[k].items()) == (
            k >= j
        )


@pytest.mark.parametrize("changes", [{}, {"form": "pull"}, {"coupling": "man++"}, {"optimizer": "adamw"}], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_step_is_as_if_it_had_not_been(
    fault: Callable[[LocalModel, int], Undo], changes: dict[str, Any]
) -> None:
    recipe = dataclasses.replace(TINY, skip_nonfinite=True, **changes)
    stepper, batches = stepper_of(recipe)
    undisturbed, others = stepper_of(recipe)
    undo = fault(stepper.model, 2)
    before = everything(stepper)
    done = stepper(batches)
    undo()
    assert "in block 2 (layer2.0) is" in done.skipped
    assert changed(before, everything(stepper)) == set()
    assert (stepper.step, stepper.skipped) == (3, 1)
    next(others)  # the skipped step's images are not seen again
    undisturbed.step += 1
    for _ in range(2):
        assert stepper(batches).skipped == ""
        undisturbed(others)
    assert changed(everything(stepper), everything(undisturbed)) == set()


@pytest.mark.parametrize("as_you_go", [False, True])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_the_backbone_learns_at_a_rate_of_its_own(as_you_go: bool, decay_norms: bool) -> None:
    """The head and the auxiliaries keep lr, and the factors of --block-lr multiply both."""
    rates = {"lr": 0.02, "backbone_lr": 0.1, "block_lr": "1,2,1,0.5"}
    stepper, batches = stepper_of(dataclasses.replace(TINY, step_as_you_go=as_you_go, decay_norms=decay_norms, **rates))
    model = stepper.model
    found = {id(p): group["peak_lr"] for o in stepper.optimizers for group in o.param_groups for p in group["params"]}
    assert len(found) == sum(len(model.members(k)) for k in range(4))
    head = {"fc.weight", "fc.bias"}
    slow = {id(p) for name, p in model.backbone.named_parameters() if name not in head}
    for k, factor in enumerate((1, 2, 1, 0.5)):
        for p in model.members(k):
            assert found[id(p)] == pytest.approx(0.02 * factor * (0.1 if id(p) in slow else 1))
    own = {id(p) for p in model.auxiliaries[0].parameters()}
    now = {g["lr"] for o in stepper.optimizers for g in o.param_groups if own & {id(p) for p in g["params"]}}
    assert now == {stepper.lr}
    assert stepper.lr == pytest.approx(0.02 * rate(stepper.step - 1, stepper.total, TINY.warmup))
    stepper(batches)


def test_one_block_has_the_rate_of_its_head() -> None:
    stepper, batches = stepper_of(dataclasses.replace(TINY, **BP, backbone_lr=0.0))
    before = {name: p.clone() for name, p in stepper.model.backbone.named_parameters()}
    stepper(batches)
    moved = {name for name, p in stepper.model.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    assert stepper.lr > 0


def test_a_network_of_one_unit_has_no_backbone() -> None:
    model = lg.localize(torch.nn.Sequential(torch.nn.Linear(4, 2)), method=lg.bp(), example=torch.zeros(2, 4))
    with pytest.raises(UserError, match="backbone-lr has no effect on this network, whose head cannot be told"):
        slowed(model, [1.0], 0.5)


def test_one_bad_batch_of_several_drops_the_whole_step() -> None:
    stepper, batches = stepper_of(dataclasses.replace(TINY, accumulate=3, batch_size=8, skip_nonfinite=True))
    before = everything(stepper)
    x, y = next(batches)
    bad = iter([next(batches), (x * float("nan"), y), next(batches)])
    assert "is nan at step 3" in stepper(bad).skipped
    assert changed(before, everything(stepper)) == set()


def test_a_run_that_only_skips_is_given_up() -> None:
    stepper, batches = stepper_of(dataclasses.replace(TINY, skip_nonfinite=True))
    undo = nan_gradient(stepper.model, 1)
    for _ in range(SKIPS - 1):
        stepper(batches)
    undo()
    stepper(batches)  # one good step, and the count begins again
    nan_gradient(stepper.model, 1)
    for _ in range(SKIPS - 1):
        stepper(batches)
    with pytest.raises(NotFinite, match="block 1"):
        stepper(batches)
    assert stepper.skipped == 2 * (SKIPS - 1)


def test_skipping_and_stepping_as_you_go_exclude_each_other() -> None:
    with pytest.raises(UserError, match="drop skip-nonfinite"):
        dataclasses.replace(TINY, step_as_you_go=True, skip_nonfinite=True)


def test_a_run_that_stopped_for_a_nan_goes_on_without_that_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    criterion = BadCriterion.__base__.criterion  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    seen: list[int] = []

    def poisoned(self: Classification, logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(int(targets.sum()))
        loss = criterion(self, logits, targets)
        return loss * float("nan") if seen[-1] == sums[5] and len(seen) % 4 == 3 else loss

    batches = datasets.train_batches(datasets.load("digits", limit_train=64), batch_size=16, seed=0, epoch=1)
    sums = {4 + i: int(y.sum()) for i, (_, y) in enumerate(batches)}  # step 6 is the second epoch's second
    assert len(set(sums.values())) == 4
    monkeypatch.setattr(Classification, "criterion", poisoned)
    command = ["train", *QUICK, "--head", "1c2f", "--epochs", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "the loss in block 2 (layer2.0) is nan at step 6: --skip-nonfinite leaves such steps out" in said
    kept = read_checkpoint(saved(tmp_path / "run" / "checkpoints")[-1])
    assert kept.path.name == "step-4"
    assert all(t.isfinite().all() for t in (*kept.model.values(), *kept.auxiliaries.values()))
    seen.clear()
    assert main([*command, "--skip-nonfinite"]) == 0
    assert summary_rows(tmp_path / "run")[-1]["skipped_steps"] == 1
    assert "is nan at step 6: left out" in capsys.readouterr().out


# fp16: gradients too large for the scale are the scaler's to answer


def test_the_gradient_scaler_skips_the_averages_too() -> None:
    stepper, batches = stepper_of(TINY)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)  # pyright: ignore[reportPrivateImportUsage]
    undo = nan_gradient(stepper.model, 1)
    before = everything(stepper)
    assert stepper(batches).skipped == ""
    assert stepper.scaler.get_scale() == 1.0
    assert {
        name for name in changed(before, everything(stepper)) if "running" not in name and "num_" not in name
    } == set()
    undo()
    stepper(batches)
    assert any(".ema." in name for name in changed(before, everything(stepper)))


# Memory


@pytest.mark.parametrize(("kind", "j"), [(torch.OutOfMemoryError, 0), (RuntimeError, 2), (MemoryError, 3)])
def test_memory_that_runs_out_names_the_block(kind: type[Exception], j: int) -> None:
    stepper, batches = stepper_of(TINY)

    def refuse(*_: Any) -> None:
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes.")

    next(iter(stepper.model.blocks[j].children())).register_forward_pre_hook(refuse)
    name = stepper.model.blocks[j].names[-1]
    says = rf"out of memory in block {j} \({name}\) at step 3: [\d.]+ MiB were held, 256.0 MiB more were asked for; "
    with pytest.raises(
        RunError, match=says + "more --blocks, --recompute all, or a smaller --batch-size with --accumulate"
    ):
        stepper(batches)


def test_other_errors_stay_what_they_are() -> None:
    stepper, batches = stepper_of(TINY)

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    stepper.model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes cannot") as caught:
        stepper(batches)
    assert not isinstance(caught.value, RunError)


@pytest.mark.slow
def test_memory_that_really_runs_out_ends_with_one_sentence(tmp_path: Path) -> None:
    program = """
import resource, sys
from localgrad.run import step
from localgrad.cli import main
call = step.Stepper.__call__
def limited(self, batches):
    if self.step == 1:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, -1))
    return call(self, batches)
step.Stepper.__call__ = limited
sys.exit(main(sys.argv[1:]))
"""
    flags = ["--model", "resnet20", "--batch-size", "1400", "--precision", "float32", "--method", "bp", "--epochs", "3"]
    command = [sys.executable, "-c", program, "train", *flags, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("localgrad: out of memory in block 0 (layer3.2) at step 2: ")
    assert "--method dgl with --blocks 4 or more" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_summary_counts_no_skips_where_there_are_none(tmp_path: Path) -> None:
    assert train(TINY, tmp_path / "run")["skipped_steps"] == 0
