"""Probes: estimators against naive formulas, and what is written from a run folder."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localgrad.cli import main
from localgrad.core.errors import UserError
from localgrad.run import probe
from localgrad.run.commands import finished
from localgrad.run.recipe import Recipe
from localgrad.run.train import train

TINY = Recipe(model="resnet20", limit_train=256, batch_size=32, epochs=2, precision="float32", head="1c2f", lr=0.02)
FILES = [f"{name}.{kind}" for name in ("activations", "cka", "separability", "tsne") for kind in ("csv", "png")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, `local` and `bp`."""
    place = tmp_path_factory.mktemp("runs")
    train(TINY, place / "local")
    train(replace(TINY, method="bp", coupling="none", blocks="1", head="auto"), place / "bp")
    return place


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
    biased = [float((probe.gram(torch.randn(6, 5)) * probe.gram(torch.randn(6, 5))).sum()) for _ in range(400)]
    assert np.std(found) < np.std(biased)


def network(units: list[nn.Module], runs: Path) -> probe.Network:
    """The local run's network, cut after as many units, each of which is replaced."""
    loaded = probe.load(runs / "local", finished(runs / "local"))
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
    assert probe.similarity(plain, turned, 300)[0]["cka"] == pytest.approx(1, abs=1e-5)
    assert probe.similarity(plain, crushed, 300)[0]["cka"] < 0.7


def test_cka_is_of_the_mean_over_batches(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(probe, "CKA_BATCH", 8)
    matrix = torch.randn(64, 64)
    a, b = network([Mixed(torch.eye(64))], runs), network([Mixed(matrix)], runs)
    sums = np.zeros(3)
    for (mine, _), (theirs, _) in zip(a.outputs(24, 8), b.outputs(24, 8), strict=True):
        x, y = (h[0].flatten(1).double().numpy() for h in (mine, theirs))
        k, m = x @ x.T, y @ y.T
        sums += [naive_hsic(k, m), naive_hsic(k, k), naive_hsic(m, m)]
    expected = sums[0] / (sums[1] * sums[2]) ** 0.5
    assert probe.similarity(a, b, 24)[0]["cka"] == pytest.approx(expected, abs=2e-6)
    assert probe.similarity(a, b, 29)[0]["cka"] == pytest.approx(expected, abs=2e-6)  # a short batch does not count


def test_a_unit_that_knows_the_class_is_separable_and_a_constant_is_not(runs: Path) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 64, 1, 1)

    loaded = network([Pixels(), Constant()], runs)
    pixels, nothing = probe.separability(loaded, 360)
    assert nothing["top1"] < 20 < 80 < pixels["top1"]
    assert (nothing["fitted"], nothing["measured"]) == (180, 180)
    whole = probe.load(runs / "bp", finished(runs / "bp"))
    assert all(row["top1"] > 40 for row in probe.separability(whole, 360))


def test_units_give_what_the_backbone_gives_there(runs: Path) -> None:
    loaded = probe.load(runs / "local", finished(runs / "local"))
    assert loaded.blocks == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    outputs, labels = next(loaded.outputs(64, 64))
    from localgrad.core.backbones import build
    from localgrad.run.checkpoint import load_backbone

    backbone = build("resnet20", classes=10, in_channels=1)
    load_backbone(backbone, runs / "local" / "model.safetensors")
    seen: dict[str, Tensor] = {}
    for name, module in backbone.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    from localgrad.run.data import normalize

    images = loaded.data.test.images[:64]  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        backbone.eval()(normalize(images, loaded.data.info))
    assert torch.equal(labels, loaded.data.test.labels[:64])
    for unit, out in zip(loaded.units, outputs, strict=True):
        if unit.name in seen:
            torch.testing.assert_close(out, seen[unit.name], rtol=1e-4, atol=1e-5)
    assert sum(unit.name in seen for unit in loaded.units) >= 9


# The command


def test_a_probe_writes_tables_and_pictures_always_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["probe", str(runs / "local"), "--against", str(runs / "bp"), "--images", "200"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "layer3.2" in shown
    assert "CKA with bp" in shown
    place = runs / "local" / "probe"
    assert sorted(p.name for p in place.iterdir()) == sorted(FILES)
    first = {p.name: p.read_bytes() for p in place.iterdir()}
    assert main(command) == 0
    assert {p.name: p.read_bytes() for p in place.iterdir()} == first
    units = [row["unit"] for row in read(place / "separability.csv")]
    cka = read(place / "cka.csv")
    assert [(row["unit"], row["against_unit"]) for row in cka] == [(u, v) for u in units for v in units]
    assert {row["against"] for row in cka} == {"bp"}
    assert len(read(place / "tsne.csv")) == 200
    maps = read(place / "activations.csv")
    assert {row["block"] for row in maps} == {"0", "1", "2", "3"}
    assert len({row["image"] for row in maps}) == len({row["label"] for row in maps}) == 4
    assert sum(row["block"] == "0" for row in maps) == 4 * 8 * 8
    assert max(float(row["value"]) for row in maps) == 1


def test_a_folder_of_runs_is_probed_without_another(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(runs), "--images", "100"]) == 0
    assert "CKA with" not in capsys.readouterr().out
    for name in ("local", "bp"):
        cka = read(runs / name / "probe" / "cka.csv")
        assert {row["against"] for row in cka} == {name}
        assert all(float(row["cka"]) == 1 for row in cka if row["unit"] == row["against_unit"])


def test_a_transformer_is_probed(tmp_path: Path) -> None:
    recipe = replace(TINY, model="timm:vit_tiny_patch16_224", model_args="img_size=8,patch_size=2,depth=4", epochs=1)
    train(recipe, tmp_path / "vit")
    assert main(["probe", str(tmp_path / "vit"), "--images", "64"]) == 0
    maps = read(tmp_path / "vit" / "probe" / "activations.csv")
    assert sum(row["block"] == "1" for row in maps) == 4 * 4 * 4  # the grid, without the class token


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere"], "nowhere holds no finished run"),
        (["{runs}/local", "--against", "nowhere"], "nowhere is no run folder"),
        (["{runs}/local", "--images", "39"], "--images must be at least 40 for as many classes, not 39"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    flags: list[str], says: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", *(flag.format(runs=runs) for flag in flags)]) == 2
    assert says in capsys.readouterr().err


def test_similarity_needs_the_same_data(runs: Path) -> None:
    loaded = probe.load(runs / "bp", finished(runs / "bp"))
    other = replace(loaded, data=replace(loaded.data, info=replace(loaded.data.info, name="others")))
    with pytest.raises(UserError, match="bp saw digits, bp others"):
        probe.similarity(loaded, other, 100)
