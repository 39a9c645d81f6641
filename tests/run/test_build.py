"""Recipes become models: the papers' rows cut where they say, options reach the parts that they name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny

from localgrad.core.couplings import DeepMAN
from localgrad.core.engine import local_backward
from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel
from localgrad.run.build import build_model, check_single, coupling_of, freeze, machine_for, method_of, planner_for
from localgrad.run.data import DATASETS, Data, Images, load
from localgrad.run.recipe import Recipe
from localgrad.run.recipes import RECIPES
from localgrad.run.signals import Stopped
from localgrad.run.train import train
from localgrad.run.weights import read_weights


def model_of(recipe: Recipe, size: int | None = None) -> LocalModel:
    """The recipe's model on the CPU, without its data."""
    info = DATASETS[recipe.data]
    info = dataclasses.replace(info, classes=info.classes or 10, size=size or info.size)
    nothing = Images(torch.zeros(0, info.channels, info.size, info.size, dtype=torch.uint8), torch.zeros(0).long())
    recipe = dataclasses.replace(recipe, device="cpu", precision="float32")
    return build_model(recipe, Data(info, nothing, nothing), machine_for(recipe))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "the set is 1 image, too few for an auxiliary, where a batch norm gets 1 value a channel: .*--head 0c1f"),
        ({"coupling": "none", "blocks": "2"}, "too few for an auxiliary"),
        ({"model": "torchvision:mobilenet_v2", "head": "0c1f"}, "for the network, where .*: take 2 images or more$"),
        ({"model": "resnet14", "method": "bp", "blocks": "1", "coupling": "none", "size": 4}, "few for the network"),
        ({"head": "0c1f"}, None),
        ({"head": "0c1f", "coupling": "none", "blocks": "7"}, None),
        ({"method": "infopro"}, None),
        ({"method": "bp", "blocks": "1", "coupling": "none"}, None),
    ],
)  # fmt: skip
def test_one_image_at_a_time_is_refused_where_a_batch_norm_cannot_take_it(fields: dict, says: str | None) -> None:
    size = fields.pop("size", None)
    model = model_of(dataclasses.replace(Recipe(model="resnet14"), **fields), size)
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        check_single(model, torch.zeros(1, dtype=torch.int64), "the set is")
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    x, y = torch.randn(1, *model.image), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError) if says else contextlib.nullcontext():  # and so it is
        local_backward(model, x, y)


# One recipe for each network and cut, on whatever data.
SMALL = {(RECIPES[n]().model, RECIPES[n]().blocks): n for n in RECIPES if not n.startswith("imagenet")}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "110" in model else ()) for (model, _), n in SMALL.items()]
)
def test_small_recipes_have_the_blocks_that_they_say(name: str) -> None:
    recipe = RECIPES[name]()
    wanted = recipe.cut if isinstance(recipe.cut, int) else len(recipe.cut) + 1
    assert len(model_of(recipe).blocks) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet_resnet101_k4", "imagenet_resnet152_k2", "imagenet_resnext101_k4"])
def test_imagenet_recipes_cut_where_the_paper_does(name: str) -> None:
    recipe = RECIPES[name]()
    model = model_of(recipe, size=224)
    cuts = recipe.cut
    assert isinstance(cuts, list)
    assert [block.names[-1] for block in model.blocks] == [*cuts, "layer4.2"]
    weights = [[term.weight for term in auxiliary.terms.values()] for _, auxiliary in model.isolated]
    assert weights == [[0.75, 5.0]] * len(cuts)


def test_options_reach_the_coupling() -> None:
    recipe = Recipe(coupling="deep-man", momentum=0.9, branches="ema", depth=3)
    assert coupling_of(recipe) == DeepMAN(momentum=0.9, learnable=False, depth=3)
    assert coupling_of(Recipe(coupling="none")) is None
    pull = coupling_of(Recipe(form="pull"))
    assert pull is not None
    assert pull.form == "pull"


def test_options_reach_the_method() -> None:
    info = DATASETS["digits"]
    method = method_of(Recipe(method="infopro", head="1c1f"), info)
    assert (method.head, method.mean, method.std) == ("1c1f", info.mean, info.std)
    assert method_of(Recipe(method="bp", coupling="none"), info).terms is None


def test_the_memory_format_reaches_the_weights() -> None:
    for asked in (True, False):
        model = model_of(Recipe(model="resnet8", channels_last=asked))
        weight = model.backbone.get_parameter("layer1.0.conv1.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) == asked


def frozen(name: str) -> bool:
    """Whether an entry of a resnet8's state belongs to the units stem and layer1.0."""
    return name.startswith(("conv1", "bn1", "layer1"))


@pytest.mark.parametrize("changes", [{}, {"method": "bp", "blocks": "1", "coupling": "none"}, {"coupling": "none"}])
def test_frozen_units_stay_as_they_are(changes: dict, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    """Weights, running statistics and counters, over evaluations and a stop; all else learns."""
    recipe = tiny(freeze="stem:layer1.0", epochs=3, **changes)
    data, machine = load("digits", limit_train=64), machine_for(recipe)
    model = build_model(recipe, data, machine)
    assert {n for n, p in model.backbone.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.backbone.named_parameters() if frozen(n)
    }
    norms = {n: m for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert all(norm.training != frozen(name) for name, norm in norms.items())
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    stop_after(6)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run")
    stop_after(0)
    train(recipe, tmp_path / "run")
    after = read_weights(tmp_path / "run" / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if frozen(name)}


def test_frozen_units_are_planned() -> None:
    """Nothing of what the frozen units compute is kept for a backward pass."""
    all_trained, few = (planner_for(tiny(freeze=units), machine_for(TINY)) for units in (None, "stem:layer2.0"))
    assert few.bp.peak < 0.7 * all_trained.bp.peak


def test_what_cannot_be_frozen() -> None:
    network, example = torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.zeros(2, 4)  # one unit without a head
    with pytest.raises(UserError, match=r"unknown unit '2': choose one of \(0\)"):
        freeze(network, "0,2", example)
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(UserError, match="freeze leaves nothing of the network to train: leave out one of 0"):
        freeze(network, "0", example)


def test_the_seed_fixes_the_weights() -> None:
    a, b, c = (model_of(Recipe(model="resnet8", seed=s)).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["backbone.conv1.weight"], c["backbone.conv1.weight"])
