"""What the tests of faults compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from starts import Start, tiny


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a tiny run of so many epochs that nothing befell."""

    @functools.cache
    def folder_of(epochs: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        assert Start(folder, *tiny(epochs)).end() == 0
        return folder

    return folder_of
