"""What ranks share: each batch, and the test images. Runs of several ranks: tests/faults/test_ranks.py."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from localgrad.core.errors import UserError
from localgrad.run import data as D


@pytest.mark.parametrize("name", ["digits", "image-folder"])
def test_shards_are_the_parts_of_each_batch_and_every_test_image_once(tmp_path: Path, name: str) -> None:
    for split, label in itertools.product(("train", "val"), ("a", "b")):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(7):
            Image.new("RGB", (32, 32), (i, 10 * i, 0)).save(tmp_path / split / label / f"{i}.png")
    data = D.load(name, data_dir=str(tmp_path))
    batches = partial(D.train_batches, data, batch_size=4, seed=1, epoch=2)
    for whole, *halves in zip(batches(), batches(shard=(0, 2)), batches(shard=(1, 2)), strict=True):
        for k in range(2):
            assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
    tests = [[y for _, y in D.eval_batches(data, batch_size=4, shard=(i, 3))] for i in range(3)]
    whole = [y for _, y in D.eval_batches(data, batch_size=4)]
    assert sum(map(len, tests)) == len(whole)
    assert all(torch.equal(labels, tests[i % 3][i // 3]) for i, labels in enumerate(whole))
    with pytest.raises(UserError, match="3 ranks cannot share a batch of 4 images"):
        next(iter(batches(shard=(0, 3))))
