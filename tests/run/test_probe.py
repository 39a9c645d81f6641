"""Probes: estimators against naive formulas, and what is written from a run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import BP, rows_of, tiny
from torch import Tensor, nn

from localgrad.cli import main
from localgrad.core.backbones import build
from localgrad.core.errors import UserError
from localgrad.run import commands, probe
from localgrad.run import data as datasets
from localgrad.run.checkpoint import load_backbone
from localgrad.run.data import normalize
from localgrad.run.folder import open_run
from localgrad.run.recipe import Recipe
from localgrad.run.train import train

IMAGES = 360  # all of the digits' test images
RECIPE = tiny(limit_train=256, batch_size=32, epochs=2)
FILES = [f"{name}.csv" for name in ("activations", "cka", "separability", "tsne")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, `local` and `bp`."""
    place = tmp_path_factory.mktemp("runs")
    train(RECIPE, place / "local")
    train(replace(RECIPE, **BP), place / "bp")
    return place


# The estimators


def naive_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. (JMLR 2012), eq. 5, sum by sum over indices that differ: the mean over all ordered pairs, quadruples
    and triples of distinct samples."""
    n = len(k)
    pairs = quads = triples = 0.0
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            pairs += k[i, j] * m[i, j]
            for q in range(n):
                if q in (i, j):
                    continue
                triples += k[i, j] * m[i, q]
                for r in range(n):
                    if r not in (i, j, q):
                        quads += k[i, j] * m[q, r]
    count2, count3 = n * (n - 1), n * (n - 1) * (n - 2)
    return pairs / count2 + quads / (count3 * (n - 3)) - 2 * triples / count3


def test_hsic_is_the_mean_over_distinct_samples() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randn(7, 2, 2)
    k, m = probe.gram(x), probe.gram(y)
    full = (x.double() @ x.double().T).numpy()
    assert float(probe.hsic(k, m)) == pytest.approx(naive_hsic(full, m.numpy()), rel=1e-12)


def test_hsic_of_independent_features_is_zero_on_average() -> None:
    torch.manual_seed(0)
    found = [float(probe.hsic(probe.gram(torch.randn(6, 5)), probe.gram(torch.randn(6, 5)))) for _ in range(4000)]
    assert abs(np.mean(found)) < 4 * np.std(found) / len(found) ** 0.5


def network(units: list[nn.Module], runs: Path) -> probe.Network:
    """The local run's network, cut after as many units, each of which is replaced."""
    loaded = probe.load(runs / "local", open_run(runs / "local"), IMAGES)
    found = [replace(unit, module=module) for unit, module in zip(loaded.units, units, strict=False)]
    return replace(loaded, units=found, blocks=loaded.blocks[: len(found)])


class Mixed(nn.Module):
    """Every pixel of the image through a matrix."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix).view_as(x)


def test_cka_knows_no_rotation_and_no_scale(runs: Path) -> None:
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(64, 64)).Q
    plain = network([Mixed(torch.eye(64))], runs)
    turned, crushed = (
        network([Mixed(5 * rotation)], runs),
        network([Mixed(torch.diag((torch.arange(64) > 60).float()))], runs),
    )
    assert probe.similarity(plain, turned)[0]["cka"] == pytest.approx(1, abs=1e-5)
    assert probe.similarity(plain, crushed)[0]["cka"] < 0.7


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_a_unit_that_says_nothing_has_no_cka(runs: Path) -> None:
    rows = probe.similarity(network([nn.Identity(), Constant()], runs))
    assert [row["cka"] for row in rows] == [1, "", "", ""]


def test_cka_is_of_the_mean_over_batches_and_each_way_round(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "BATCH", 8)
    torch.manual_seed(0)
    few = probe.load(runs / "local", open_run(runs / "local"), 43)  # the last batch has 3 images: too few
    units = [replace(u, module=Mixed(torch.randn(64, 64))) for u in few.units]
    a, b = replace(few, units=units[:2]), replace(few, units=units[2:])
    sums = np.zeros((2, 2, 3))
    for images, _ in list(a.batches())[:-1]:
        mine, theirs = ([h.flatten(1).double().numpy() for h in n.outputs(images)] for n in (a, b))
        for i, j in np.ndindex(2, 2):
            k, m = mine[i] @ mine[i].T, theirs[j] @ theirs[j].T
            sums[i, j] += [naive_hsic(k, m), naive_hsic(k, k), naive_hsic(m, m)]
    rows = probe.similarity(a, b)
    expected = (sums[..., 0] / (sums[..., 1] * sums[..., 2]) ** 0.5).flatten()
    assert [row["cka"] for row in rows] == pytest.approx(expected.tolist(), abs=2e-6)
    names = [unit.name for unit in units]
    assert [(row["unit"], row["against_unit"]) for row in rows] == [(u, v) for u in names[:2] for v in names[2:]]


def test_what_separates_is_measured_on_other_images() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    knows = np.eye(4)[labels] + 0.3 * rng.standard_normal((400, 4))
    noise = rng.standard_normal((400, 150))  # enough to learn the fitted half by heart
    units: Any = [SimpleNamespace(name=name) for name in ("knows", "noise")]
    found = probe.separability(SimpleNamespace(units=units, blocks=[0, 1]), [knows, noise], labels)  # pyright: ignore[reportArgumentType]
    assert [(row["index"], row["unit"], row["block"], row["fitted"], row["measured"]) for row in found] == [
        (0, "knows", 0, 200, 200),
        (1, "noise", 1, 200, 200),
    ]
    assert found[0]["top1"] > 85
    assert found[1]["top1"] < 45
    with pytest.raises(UserError, match="no two classes"):
        probe.separability(SimpleNamespace(units=units, blocks=[0, 1]), [knows, noise], labels * 0)  # pyright: ignore[reportArgumentType]


def test_the_embedding_keeps_images_and_labels_together() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    rows = probe.embedding(np.eye(3)[labels] * 20 + rng.standard_normal((90, 3)), labels)
    assert [row["label"] for row in rows] == labels.tolist()
    points = np.array([(row["x"], row["y"]) for row in rows])
    middles = np.array([points[labels == c].mean(0) for c in range(3)])
    nearest = ((points[:, None] - middles[None]) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() > 0.95


def test_activations_are_means_of_absolute_values(runs: Path) -> None:
    class Signed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x], 1)

    loaded = replace(network([Signed()], runs), blocks=[0])
    rows = probe.activations(loaded)
    maps = {name: [r["value"] for r in rows if r["unit"] == name and r["image"] == 0] for name in ("image", "stem")}
    assert len(maps["image"]) == len(maps["stem"]) == 64
    (first,) = [x for x, y in zip(*next(loaded.batches()), strict=True) if int(y) == 0][:1]
    assert maps["image"] == pytest.approx((first[0] / first.max()).flatten().tolist(), abs=1e-4)
    normal = normalize(first[None], loaded.data.info).abs().flatten()
    assert maps["stem"] == pytest.approx((normal / normal.max()).tolist(), abs=1e-4)


def test_units_give_what_the_backbone_gives_there(runs: Path) -> None:
    loaded = probe.load(runs / "local", open_run(runs / "local"), 64)
    assert loaded.blocks == [0, 1, 2, 3]
    images, labels = next(loaded.batches())
    outputs = list(loaded.outputs(images))
    backbone = build("resnet8", classes=10, in_channels=1)
    load_backbone(backbone, runs / "local" / "model.safetensors")
    seen: dict[str, Tensor] = {}
    for name, module in backbone.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        backbone.eval()(normalize(images, loaded.data.info))
    whole = datasets.load("digits").test
    assert len(labels) == 64
    assert len(set(labels.tolist())) == 10
    assert not torch.equal(labels, whole.labels[:64])  # they are drawn from all, since some sets lie class by class
    for unit, out in zip(loaded.units, outputs, strict=True):
        if unit.name in seen:
            torch.testing.assert_close(out, seen[unit.name], rtol=1e-4, atol=1e-5)
    assert sum(unit.name in seen for unit in loaded.units) >= 3


# The command


def test_a_probe_writes_tables_that_are_always_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["probe", str(runs / "local"), "--against", str(runs / "bp"), "--images", "200"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "layer3.0" in shown
    assert "CKA with bp" in shown
    place = runs / "local" / "probe"
    assert sorted(p.name for p in place.iterdir()) == sorted(FILES)
    first = {p.name: p.read_bytes() for p in place.iterdir()}
    assert main(command) == 0
    assert {p.name: p.read_bytes() for p in place.iterdir()} == first
    units = [row["unit"] for row in rows_of(place / "separability.csv")]
    cka = rows_of(place / "cka.csv")
    assert [(row["unit"], row["against_unit"]) for row in cka] == [(u, v) for u in units for v in units]
    assert {row["against"] for row in cka} == {"bp"}
    assert len(rows_of(place / "tsne.csv")) == 200
    maps = rows_of(place / "activations.csv")
    assert {row["block"] for row in maps} == {"", "0", "1", "2", "3"}
    assert {row["unit"] for row in maps} == {"image", "stem", "layer1.0", "layer2.0", "layer3.0"}
    assert len({row["image"] for row in maps}) == len({row["label"] for row in maps}) == 4
    assert sum(row["block"] == "0" for row in maps) == 4 * 8 * 8
    assert max(float(row["value"]) for row in maps) == 1


def test_a_folder_of_runs_is_probed_without_another(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(runs), "--images", "100"]) == 0
    assert "CKA with" not in capsys.readouterr().out
    for name in ("local", "bp"):
        cka = rows_of(runs / name / "probe" / "cka.csv")
        assert {row["against"] for row in cka} == {"itself"}
        assert all(float(row["cka"]) == 1 for row in cka if row["unit"] == row["against_unit"])


def test_a_transformer_is_probed(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, model="timm:vit_tiny_patch16_224", model_args="img_size=8,patch_size=2,depth=2", epochs=1, blocks="2"
    )
    train(recipe, tmp_path / "vit")
    assert main(["probe", str(tmp_path / "vit"), "--images", "64"]) == 0
    maps = rows_of(tmp_path / "vit" / "probe" / "activations.csv")
    assert sum(row["block"] == "0" for row in maps) == 4 * 4 * 4  # the grid, without the class token


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere"], "nowhere holds no finished run"),
        ([], "there is no run to look at"),
        (["{runs}/local", "--against", "{runs}/rgb"], "local saw digits (1x8x8), rgb digits (3x8x8)"),
        (["{runs}/local", "--against", "nowhere"], "nowhere is no run folder"),
        (["{runs}/local", "--images", "39"], "--images is 39, but a probe of 10 classes takes at least 40"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    flags: list[str], says: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "{runs}/rgb" in flags:
        real = probe.load

        def load(run: Path, recipe: Recipe, images: int) -> probe.Network:
            loaded = real(runs / "local", recipe, images)
            info = replace(loaded.data.info, channels=3 if run.name == "rgb" else 1)
            return replace(loaded, name=run.name, data=replace(loaded.data, info=info))

        monkeypatch.setattr(probe, "load", load)
        monkeypatch.setattr(commands, "open_run", lambda run: open_run(runs / "local"))
    assert main(["probe", *(flag.format(runs=runs) for flag in flags)]) == 2
    assert says in capsys.readouterr().err


def test_an_image_folder_is_probed_though_it_lies_class_by_class(tmp_path: Path) -> None:
    """Bright and dark images, all bright ones first; one of them cannot be read."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 20)):
        for k, name in enumerate(("bright", "dark")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(130 - 120 * k, 250 - 120 * k, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "data/val/bright/7.png").write_bytes(b"nothing")
    folder = {"data": "image-folder", "data_dir": str(tmp_path / "data"), "on_bad_image": "skip"}
    recipe = tiny(**folder, image_size=32, batch_size=8, limit_train=None)
    train(recipe, tmp_path / "run")
    assert main(["probe", str(tmp_path / "run"), "--images", "30"]) == 0
    rows = rows_of(tmp_path / "run" / "probe" / "separability.csv")
    assert float(rows[0]["top1"]) > 80
    assert int(rows[0]["fitted"]) + int(rows[0]["measured"]) in (29, 30)
