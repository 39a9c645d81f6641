"""Mixup and CutMix: what they compute, that draws follow from seed, epoch and batch, and runs that use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import QUICK, tiny

from localgrad.cli import main
from localgrad.core.errors import UserError
from localgrad.core.task import Classification
from localgrad.run.mixing import Mixing
from localgrad.run.recipe import Recipe
from localgrad.run.signals import Stopped
from localgrad.run.train import train

X, Y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])


def mixing(mixup: float = 0.0, cutmix: float = 0.0, seed: int = 0) -> Mixing:
    return Mixing(mixup, cutmix, classes=4, size=8, seed=seed)


def test_mixup_is_the_papers_formula() -> None:
    x, y = mixing(mixup=0.4)(X, Y, epoch=2, batch=5)
    assert x is not None
    onehot = torch.nn.functional.one_hot(Y, 4).float()
    lam = float(y[1, 1])  # Image 1 is of class 1, and the one before it of class 0.
    assert 0 < lam < 1
    torch.testing.assert_close(y, lam * onehot + (1 - lam) * onehot.roll(1, 0))
    torch.testing.assert_close(x, lam * X + (1 - lam) * X.roll(1, 0))


def test_cutmix_gives_each_class_the_area_of_its_pixels() -> None:
    for batch in range(8):
        x, y = mixing(cutmix=1.0)(X, Y, epoch=0, batch=batch)
        assert x is not None
        other = (x == X.roll(1, 0)).all(1)
        assert torch.equal(x, torch.where(other[:, None], X.roll(1, 0), X))
        assert float(y[1, 0]) == pytest.approx(float(other[1].float().mean()), abs=1e-6)


def test_draws_follow_from_seed_epoch_and_batch_alone() -> None:
    """Other random numbers between do not count, and the global generators stay as they are."""
    mix = mixing(mixup=1.0, cutmix=1.0)
    places = [(epoch, batch) for epoch in range(3) for batch in range(4)]
    first = {place: mix(X, Y, *place) for place in places}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for place in reversed(places):
        assert all(torch.equal(a, b) for a, b in zip(mix(X, Y, *place), first[place], strict=True))  # pyright: ignore[reportArgumentType]
    assert torch.equal(state, torch.get_rng_state())
    assert len({float(y[1, 1]) for _, y in first.values()}) > 6
    assert not torch.equal(mixing(mixup=1.0, seed=1)(X, Y, 0, 0)[1], mixing(mixup=1.0)(X, Y, 0, 0)[1])


def test_a_rank_without_images_gets_the_same_targets() -> None:
    mix = mixing(mixup=0.3, cutmix=0.7)
    for batch in range(8):
        nothing, y = mix(None, Y, 1, batch)
        assert nothing is None
        assert torch.equal(y, mix(X, Y, 1, batch)[1])


def test_the_memory_format_stays() -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        for mix in (mixing(mixup=1.0), mixing(cutmix=1.0)):
            x, _ = mix(X.contiguous(memory_format=layout), Y, 0, 0)
            assert x is not None
            assert x.is_contiguous(memory_format=layout)


def test_shares_of_classes_are_targets() -> None:
    task = Classification(3, label_smoothing=0.1)
    logits, shares = torch.randn(4, 3).double(), torch.rand(4, 3).double().softmax(1)
    task.check_targets(shares)
    naive = -((0.9 * shares + 0.1 / 3) * logits.log_softmax(1)).sum(1).mean()
    assert float(task.criterion(logits, shares)) == pytest.approx(float(naive), abs=1e-12)
    for wrong in (torch.rand(4, 2), torch.rand(4), torch.zeros(4, 3).long()):
        with pytest.raises(UserError):
            task.check_targets(wrong)


@pytest.mark.parametrize("method", ["dgl", "infopro", "auglocal"])
def test_a_run_that_mixes_goes_on_to_the_same_bits(
    method: str, tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    recipe = tiny(method=method, mixup=0.4, cutmix=1.0, label_smoothing=0.1, epochs=2, blocks="2")
    train(recipe, tmp_path / "straight")
    stop_after(6)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "stopped")
    stop_after(0)
    train(recipe, tmp_path / "stopped")
    straight, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "stopped"))
    assert straight == stopped


def test_methods_that_compare_classes_refuse(fails: Callable[..., str]) -> None:
    text = "compares the classes of two images, and mixup and cutmix give an image several: drop them, or take another"
    for flags in (["--method", "predsim"], ["--method", "infopro", "--contrast"]):
        for mix in ("--mixup", "--cutmix"):
            assert text in fails("train", *QUICK, *flags, mix, "0.2")
    dataclasses.replace(Recipe(method="infopro"), mixup=0.2)
    with pytest.raises(UserError, match="mixup must be at least 0"):
        Recipe(mixup=-1.0)


@pytest.mark.slow
def test_ranks_that_mix(tmp_path: Path) -> None:
    """In a pipeline, the ranks behind the first one read targets alone, and the bits are those of one process."""
    flags = [*QUICK, "--model", "resnet20", "--mixup", "0.4", "--cutmix", "1", "--blocks", "2", "--coupling", "none"]
    flags += ["--step-as-you-go"]
    outs = {"one": [], "two": ["--pipeline", "2"], "replicas": ["--nproc", "2"]}
    for out, more in outs.items():
        assert main(["train", *flags, *more, "--out", str(tmp_path / out)]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
