"""timm's families: the blocks are the network bit for bit, all of it learns, and it stays loadable.

The checks are those of `benchmarks/families.py`, which writes them down for every family.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from families import CHECKS, SMALL, check

QUICK = {  # one of each kind; the others are marked slow
    "convnext_zepto_rms", "convit_tiny", "cs3darknet_focus_s", "dla46x_c", "mobilenetv3_small_050", "pit_ti_224",
    "regnetx_002", "resnet10t", "swin_tiny_patch4_window7_224", "swiftformer_xs",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # those of the networks' own constructors
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SMALL])
def test_a_family_is_trained_in_blocks_and_stays_what_it_is(name: str, tmp_path: Path) -> None:
    row = check(name, tmp_path)
    assert [key for key in CHECKS if not row[key]] == []
