"""timm's families: the blocks are the network bit for bit, all of it learns, and it stays loadable.

The checks are those of `benchmarks/families.py`, which writes them down for every family.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from families import CHECKS, SMALL, check

QUICK = "mobilenetv3_small_050"  # The others are slow.


@pytest.mark.filterwarnings("ignore")  # The networks' own constructors warn.
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == QUICK else pytest.mark.slow) for n in SMALL])
def test_a_family_is_trained_in_blocks_and_stays_what_it_is(name: str, tmp_path: Path) -> None:
    row = check(name, tmp_path)
    assert [key for key in CHECKS if not row[key]] == []
