"""The adapters in examples/ in their trainers: the steps and memory of `local_backward`, less than backpropagation's.

A test whose library is missing is skipped: `pip install 'localgrad[examples]'` installs them.
"""

from __future__ import annotations

import copy
import logging
import re
import runpy
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad as lg

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trainers.md").read_text()
STEPS, BATCH, SIZE = 2, 32, {"accelerate": 16, "lightning": 16, "hf_trainer": 32, "timm": 32}
LIBRARY = {"accelerate": "accelerate", "lightning": "lightning", "hf_trainer": "transformers", "timm": "timm"}
WAYS = {  # in the example of each trainer: by one loss, by a backward pass for each block, by backpropagation
    "accelerate": ("by_loss", "by_blocks", "by_backpropagation"),
    "lightning": ("Automatic", "Manual", "Backpropagation"),
    "hf_trainer": ("ByLoss", "ByBlocks", "Backpropagation"),
    "timm": ("LocalTask", None, "ClassificationTask"),
}
CLIP = {"accelerate": 5.0, "timm": 5.0, "hf_trainer": 1.0}  # the largest norm of the gradients in these examples
Names = dict[str, Any]


def example_of(trainer: str) -> Names:
    needed = (LIBRARY[trainer], "accelerate") if trainer == "hf_trainer" else (LIBRARY[trainer],)
    for library in needed:  # The Trainer of transformers runs on accelerate.
        pytest.importorskip(library, reason=f"{library} is missing: pip install 'localgrad[examples]'")
    names = runpy.run_path(str(ROOT / "examples" / f"with_{trainer}.py"))
    scope = names["main"].__globals__
    if "BATCH" in scope:
        scope["BATCH"] = BATCH
    return names


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Libraries warn of each other, and log; the tests count in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "accelerate", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def run(trainer: str, names: Names, model: nn.Module, way: str, steps: int = STEPS, accumulate: int = 1) -> None:
    """Trains for some steps of the optimizer, as the example does."""
    if trainer == "accelerate":
        names["train"](model, names[way], steps * accumulate, accumulate)
    elif trainer == "lightning":
        names["train"](names[way](model), steps, accumulate_grad_batches=accumulate)
    elif trainer == "timm":
        own = (nn.CrossEntropyLoss(),) if way == "ClassificationTask" else ()
        names["train"](names[way](model, *own), steps)
    else:
        how = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
        how |= {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": accumulate}
        names["train"](names[way], model, steps, **how)


def make(trainer: str, blocks: int, coupling: lg.MAN | None) -> tuple[lg.LocalModel, nn.Module]:
    torch.manual_seed(0)
    network = lg.build("resnet32" if SIZE[trainer] == 16 else "resnet20", classes=10, in_channels=1)
    x = torch.zeros(2, 1, SIZE[trainer], SIZE[trainer])
    plain = copy.deepcopy(network)
    return lg.localize(network, blocks=blocks, method=lg.dgl("0c1f"), coupling=coupling, example=x), plain


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The batches that `as_loss` gets."""
    batches, original = [], lg.as_loss

    def as_loss(model: lg.LocalModel, x: Tensor, y: Tensor, **how: Any) -> lg.LossResult:
        batches.append((x.clone(), y.clone()))
        return original(model, x, y, **how)

    monkeypatch.setattr(lg, "as_loss", as_loss, raising=False)
    return batches


def replay(trainer: str, model: lg.LocalModel, batches: Iterable[tuple[Tensor, Tensor]], accumulate: int = 1) -> None:
    """The same steps in a loop of one's own."""
    momentum = 0.0 if trainer == "hf_trainer" else 0.9
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.05, momentum=momentum)
    for number, (x, y) in enumerate(batches, 1):
        lg.local_backward(model, x, y, scale=1 / accumulate, move_averages=False)
        if number % accumulate == 0:
            if trainer in CLIP:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP[trainer])
            model.move_averages()
            optimizer.step()
            optimizer.zero_grad()


def assert_close(model: nn.Module, wanted: nn.Module) -> None:
    expected = wanted.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


QUICK = ("accelerate", "timm")  # Importing the other two takes seconds; some tests below do.
CASES = [
    pytest.param(t, blocks, c, id=f"{t}-{blocks}-{c and 'man'}", marks=() if quick else pytest.mark.slow)
    for t in WAYS
    for blocks in (2, 4)
    for c in (None, lg.MAN(0.9))
    for quick in [t in QUICK and blocks == 4 and c is not None]
]


@pytest.mark.parametrize(("trainer", "blocks", "coupling"), CASES)
def test_steps_and_peak(trainer: str, blocks: int, coupling: lg.MAN | None, seen: list[tuple[Tensor, Tensor]]) -> None:
    names = example_of(trainer)
    by_loss, by_blocks, by_backpropagation = WAYS[trainer]
    assert by_loss is not None
    (model, plain), (other, _) = make(trainer, blocks, coupling), make(trainer, blocks, coupling)
    wanted = copy.deepcopy(model)
    ours = lg.measure_peak(lambda: run(trainer, names, model, by_loss)).total
    batches = list(seen)
    assert len(batches) == STEPS
    engines = lg.measure_peak(
        lambda: run(trainer, names, other, by_blocks) if by_blocks else replay(trainer, other, names["batches"](STEPS))
    ).total
    exact = lg.measure_peak(lambda: run(trainer, names, plain, by_backpropagation)).total
    replay(trainer, wanted, batches)
    assert_close(model, wanted)
    if by_blocks:
        assert_close(other, wanted)
    assert abs(ours - engines) <= 0.02 * engines
    assert ours < exact


@pytest.mark.parametrize("trainer", ["accelerate", "lightning", pytest.param("hf_trainer", marks=pytest.mark.slow)])
def test_accumulation_moves_averages_once_a_step(trainer: str, seen: list[tuple[Tensor, Tensor]]) -> None:
    names = example_of(trainer)
    model, _ = make(trainer, 4, lg.MAN(0.5))
    wanted = copy.deepcopy(model)
    run(trainer, names, model, WAYS[trainer][0], accumulate=2)
    assert len(seen) == 2 * STEPS
    replay(trainer, wanted, seen, accumulate=2)
    assert_close(model, wanted)


@pytest.mark.parametrize("way", ["ByLoss", "ByBlocks"])
def test_the_trainer_of_hugging_face_averages_what_it_accumulates(way: str) -> None:
    names, found = example_of("hf_trainer"), []
    how = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    for parts in (1, 2):
        torch.manual_seed(0)  # No batch norm, which would see the parts.
        network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(6272, 10))
        model = lg.localize(network, blocks=2, method=lg.dgl("0c1f"), example=torch.zeros(2, 1, 32, 32))
        size = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        names["train"](names[way], model, 1, **how, **size)
        found.append(dict(model.named_parameters()))
    torch.testing.assert_close(*found)


def test_the_obvious_override_of_training_step_is_warned_of() -> None:
    """The Trainer clears and steps what its own model holds. Auxiliaries beside it keep their gradients and weights.

    PyTorch does not count the changes by a fused optimizer, the default there, so these are not warned of.
    """
    names = example_of("hf_trainer")
    model, _ = make("hf_trainer", 4, None)

    class Obvious(names["Backpropagation"]):
        def training_step(self, network: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
            return lg.local_backward(model, inputs["x"], inputs["labels"]).losses[-1]

    auxiliaries = copy.deepcopy(model.auxiliaries.state_dict())
    with pytest.warns(UserWarning, match=r"steps block \d but not its auxiliary"):
        names["train"](Obvious, model.backbone, 6, per_device_train_batch_size=4, optim="adamw_torch")
    heads = [n for n, _ in model.auxiliaries.named_parameters()]
    assert all(torch.equal(auxiliaries[name], model.auxiliaries.state_dict()[name]) for name in heads)


def test_the_trainer_of_hugging_face_evaluates_the_network() -> None:
    names = example_of("hf_trainer")
    model, _ = make("hf_trainer", 4, None)
    arguments = names["TrainingArguments"](
        "unused", use_cpu=True, report_to="none", remove_unused_columns=False, label_names=["labels"], disable_tqdm=True
    )
    found = names["ByLoss"](model, arguments, eval_dataset=names["digits"]()[:8]).evaluate()
    model.eval()
    x, y = (torch.stack([row[key] for row in names["digits"]()[:8]]) for key in ("x", "labels"))
    assert found["eval_loss"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", WAYS)
def test_the_example_runs(trainer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example_of(trainer)
    torch.set_default_dtype(torch.float32)
    file = ROOT / "examples" / f"with_{trainer}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--steps", "3"])
    runpy.run_path(str(file), run_name="__main__")
    *ours, exact = map(float, re.findall(r"peak ([\d.]+) MiB", capsys.readouterr().out))
    assert len(ours) == sum(way is not None for way in WAYS[trainer]) - 1
    assert all(peak < exact for peak in ours)


# The page


def blocks_of_the_page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_shows_each_trainer_in_at_most_15_lines_of_its_example() -> None:
    """Each line of code on the page stands in one example, which other tests run."""
    scripts = [path.read_text() for path in (ROOT / "examples").glob("with_*.py")]
    known = [{line.strip() for line in text.splitlines()} for text in scripts]
    for code in blocks_of_the_page():
        lines = [line.strip() for line in code.splitlines() if line.strip()]
        assert len(lines) <= 15, code
        assert any(set(lines) <= own for own in known), code
    assert len(blocks_of_the_page()) >= len(WAYS) + 1
