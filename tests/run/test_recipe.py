"""Recipes: checks, what changes imply, and that every field changes the run or warns that it does not."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy_tables import RECIPES as STUDIED
from tiny import TINY

from localgrad.core.errors import RunError, UserError
from localgrad.run.build import machine_for
from localgrad.run.recipe import PLACES, Recipe, differences, override, read_recipe, settle
from localgrad.run.recipes import RECIPES
from localgrad.run.train import train

# A changed value for every field. A field that is missing here fails `test_every_field_has_a_changed_value`.
CHANGED = {
    "model": "resnet14", "model_args": "stem_width=8",
    "data": "fashion-mnist", "data_dir": "elsewhere", "download": True, "image_size": 8,
    "limit_train": 80, "method": "predsim", "coupling": "man++", "blocks": "3", "head": "1c1f", "momentum": 0.5,
    "branches": "ema", "form": "pull", "depth": 2, "learnable_units": 2, "lag": 2, "ema_every": 3,
    "contrast": True, "epochs": 2, "batch_size": 32, "accumulate": 2,
    "optimizer": "adamw", "lr": 0.04, "block_lr": "1,1,0.5,0.5", "warmup": 0.5, "weight_decay": 0.1,
    "decay_norms": False,
    "label_smoothing": 0.1, "clip": 0.1, "step_as_you_go": True, "precision": "bf16", "channels_last": False,
    "device": "cpu:0", "seed": 1, "deterministic": True, "workers": 1,
    "freeze": "stem", "backbone_lr": 0.1, "mixup": 0.2, "cutmix": 1.0,
    "recompute": "all", "on_bad_image": "skip", "skip_nonfinite": True,
}  # fmt: skip
NEEDS = {  # the setting in which a field has an effect
    "model_args": {"model": "timm:test_resnet", "blocks": "2"},
    "depth": {"coupling": "deep-man"},
    "contrast": {"method": "infopro"},
    "momentum": {"epochs": 2},
    "form": {"epochs": 2},
    "decay_norms": {"weight_decay": 0.5},
    "step_as_you_go": {"model": "resnet14"},
    "recompute": {"batch_size": 64, "limit_train": 128},
}


def outcome(recipe: Recipe, folder: Path) -> tuple[str, float, bool]:
    """The trained weights, the peak of a step, and whether kernels are deterministic."""
    row = train(recipe, folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    flag = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    return digest.hexdigest(), row["peak_bytes"], flag


def small_fashion(folder: Path) -> Path:
    """Fashion-MNIST's files with a few noisy images, so that the test needs no data set."""
    for part, count in (("train", 80), ("t10k", 20)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float, bool]:
    return outcome(TINY, tmp_path_factory.mktemp("base") / "run")


def test_every_field_has_a_changed_value() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields == {*CHANGED, "init", "sync_batch_norm"}  # the last changes nothing alone


def test_the_same_recipe_gives_the_same_bytes(baseline: tuple[str, float, bool], tmp_path: Path) -> None:
    assert outcome(TINY, tmp_path / "run") == baseline


@pytest.mark.parametrize("field", sorted(CHANGED))
def test_a_field_changes_the_run_or_warns(field: str, baseline: tuple[str, float, bool], tmp_path: Path) -> None:
    setting = dataclasses.replace(TINY, **NEEDS.get(field, {}))
    changed = dataclasses.replace(setting, **{field: CHANGED[field]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settled = settle(changed)
    if caught:
        assert field.replace("_", "-") in str(caught[0].message)
        assert settled == setting
        return
    if field in ("image_size", "device"):  # these place the run; both are refused where they cannot be
        with pytest.raises(UserError):
            train(dataclasses.replace(changed, **{field: {"image_size": 9, "device": "tpu"}[field]}), tmp_path / "run")
        return
    if field == "channels_last":  # a format of tensors: the same bits are no fault
        formats = [machine_for(recipe).memory_format for recipe in (settled, TINY)]
        assert formats == [torch.contiguous_format, torch.channels_last]
        return
    if field == "skip_nonfinite":  # without a fault it changes nothing
        wild = {"lr": 1e30, "warmup": 0.0}
        with pytest.raises(RunError, match=r"is (nan|inf) at step 2"):
            train(dataclasses.replace(setting, **wild), tmp_path / "before")
        assert train(dataclasses.replace(settled, **wild), tmp_path / "run")["skipped_steps"] == 3
        return
    if field == "data":
        settled = dataclasses.replace(settled, data_dir=str(small_fashion(tmp_path)))
    before = outcome(setting, tmp_path / "before") if field in NEEDS else baseline
    assert outcome(settled, tmp_path / "run") != before


def test_model_args_are_read_as_yaml() -> None:
    recipe = dataclasses.replace(TINY, model_args="img_size=28, layers=[1,2], act_layer=gelu, bias=false, rate=1e-1")
    expected = {"img_size": 28, "layers": [1, 2], "act_layer": "gelu", "bias": False, "rate": 0.1}
    assert recipe.arguments == expected
    assert TINY.arguments == {}


def test_init_starts_from_a_checkpoint(tmp_path: Path) -> None:
    train(TINY, tmp_path / "first")
    started = dataclasses.replace(TINY, init=str(tmp_path / "first" / "model.safetensors"))
    first, again = outcome(TINY, tmp_path / "a"), outcome(started, tmp_path / "b")
    assert first[0] != again[0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "dgll"}, "did you mean 'dgl'"),
        ({"coupling": "mann"}, "did you mean 'man'"),
        ({"head": "1c2"}, "did you mean '1c2f'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"momentum": 1.5}, "between 0 and 1"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"weight_decay": -1.0}, "at least 0"),
        ({"weight_decay": float("nan")}, "at least 0"),
        ({"lr": float("inf")}, "above 0 and finite"),
        ({"seed": 2**64}, "seed must be"),
        ({"block_lr": "-1,1"}, "factors of at least 0"),
        ({"step_as_you_go": True, "accumulate": 2}, "drop one"),
    ],
)
def test_wrong_values_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Recipe(**fields)


def test_block_lr_is_a_number_a_block(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="numbers split by commas"):
        Recipe(block_lr="1,x")
    with pytest.raises(UserError, match="3 learning rates for 4 blocks"):
        train(dataclasses.replace(TINY, block_lr="1,1,1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changes_imply_what_goes_with_them() -> None:
    small = RECIPES["fashion_small"]()
    bp = override(small, {"method": "bp"})
    assert (bp.blocks, bp.coupling, bp.head) == ("1", "none", "auto")
    assert override(small, {"method": "bp", "blocks": "4"}).blocks == "4"
    assert override(small, {"coupling": "deep-man"}).head == "auto"
    assert override(small, {"coupling": "deep-man", "head": "1c1f"}).head == "1c1f"
    assert override(small, {"coupling": "man++"}).head == "1c2f"
    assert settle(override(small, {"blocks": "1"})).coupling == "none"  # without a warning, which would be an error


def test_settled_recipes_do_not_warn_again() -> None:
    with pytest.warns(UserWarning, match="blocks has no effect"):
        settled = settle(Recipe(method="bp", coupling="none", blocks="4"))
    assert settle(settled) == settled


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_sound_and_documented(name: str) -> None:
    recipe = RECIPES[name]()
    assert settle(recipe) == recipe
    assert f"--recipe {name}" in (RECIPES[name].__doc__ or "")


def test_the_papers_rows() -> None:
    row = RECIPES["cifar10_resnet32_k16"]()
    assert (row.blocks, row.epochs, row.batch_size, row.lr, row.weight_decay) == ("16", 400, 1024, 0.8, 1e-4)
    assert RECIPES["imagenet_resnet152_k4"]().cut == ["layer2.6", "layer3.13", "layer3.25"]


def test_our_own_recipes_are_rows_of_the_study() -> None:
    for (blocks, setting), name in STUDIED.items():
        cuts = re.search(r"blocks=(\S+)", setting)
        changes = {"coupling": "none", "head": "1c1f@4", "blocks": cuts[1] if cuts else blocks}
        assert RECIPES[name]() == override(RECIPES["fashion_small"](), changes)


def test_differences_leave_places_out() -> None:
    assert differences(Recipe(), Recipe(data_dir="x", workers=3)) == []
    assert differences(Recipe(), Recipe(lr=0.2)) == ["lr 0.1 against 0.2"]
    assert {f.name for f in dataclasses.fields(Recipe)} >= PLACES


def test_a_recipe_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("blocks: 4\nlr: 1e-1\nepochs: 3.0\nclip: null\nchannels_last: false\nform: pull\nblock_lr: 1\n")
    assert read_recipe(path) == Recipe(blocks="4", lr=0.1, epochs=3, channels_last=False, form="pull", block_lr="1")


@pytest.mark.parametrize(
    "text", ["epochs: 2.5", "epochs: true", "channels_last: 1", "lr: null", "lr: x", "nope: 1", "- a", "{", "recipe: 3"]
)
def test_a_file_that_holds_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no recipe"):
        read_recipe(path)
