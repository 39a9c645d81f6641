"""The fixtures that tests of this folder share. Their data and helper functions are in tiny.py."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from localgrad.cli import main
from localgrad.core import backbones
from localgrad.run.step import Stepper


@pytest.fixture(scope="module", autouse=True)
def _small_networks() -> Iterator[None]:
    """Lets a recipe name the two smallest networks that CifarResNet can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "CIFAR_RESNETS", ("resnet8", "resnet14", *backbones.CIFAR_RESNETS))
        yield


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`stop_after(n)`: SIGTERM comes during step n of the runs that follow; 0 lets them run."""
    wanted, call = [0], Stepper.__call__

    def stepping(self: Stepper, batches: Any) -> Any:
        if self.step + 1 == wanted[0]:
            signal.raise_signal(signal.SIGTERM)
        return call(self, batches)

    monkeypatch.setattr(Stepper, "__call__", stepping)
    return lambda step: wanted.__setitem__(0, step)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(words..., code=2)`: the one sentence that a command says which must end with this exit code."""

    def run(*words: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("localgrad: ")
        return line

    return run
