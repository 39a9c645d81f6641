"""Finds copies in the auxiliaries that come from other weights than the backbone has now."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import nn

from localgrad.core.errors import callers_level

if TYPE_CHECKING:
    from localgrad.core.auxiliary import Auxiliary
    from localgrad.core.model import LocalModel


class StaleCopies:
    """Warns of weights that were loaded after `localize`, or changed otherwise than by an optimizer.

    Attributes:
        _sources: For each block, a parameter of each unit that its auxiliary has copied.
        _counts: The versions of these parameters at the last step.
        _usual: For each block that has taken a step, by how much the optimizer's steps have changed such versions.
        _told: Whether it has warned.
    """

    def __init__(self) -> None:
        self._sources: dict[int, list[nn.Parameter]] = {}
        self._counts: dict[int, list[int]] = {}
        self._usual: dict[int, set[int]] = {}
        self._told = False

    def note(self, model: LocalModel) -> None:
        """Notes the present weights as those that the copies in the auxiliaries have started from."""
        for k, auxiliary in enumerate(cast("list[Auxiliary]", list(model.auxiliaries))):
            parts = [next(iter(origin.parameters()), None) for _, origin in auxiliary.copies()]
            self._sources[k] = [p for p in parts if p is not None]
            self._counts[k] = [p._version for p in self._sources[k]]

    def check(self, model: LocalModel, blocks: Sequence[int]) -> None:
        """Warns once if copies in the auxiliaries come from other weights than the backbone has.

        Before the first step, a change of a parameter's version tells of loaded weights or the like. Later, each step
        of an optimizer changes it by the same number, and another number tells of something else. Only then the weights
        are compared.
        """
        if not self._counts:  # This is a copy of a model, which may have been trained before.
            self.note(model)
            self._usual = {k: set() for k in self._counts}
        if self._told:
            return
        for k in (k for k in blocks if k in self._counts):
            now = [p._version for p in self._sources[k]]
            grown = {a - b for a, b in zip(now, self._counts[k], strict=True)} - {0}
            self._counts[k] = now
            if k in self._usual:
                usual = self._usual[k]
                strange = bool(usual) and not grown <= usual
                usual |= grown  # The first change after a step is the optimizer's.
            else:  # No step was taken yet, so no optimizer has changed anything.
                self._usual[k] = set()
                strange = bool(grown)
            if strange and cast("Auxiliary", model.auxiliaries[k]).is_stale():
                self._told = True
                warnings.warn(
                    f"the auxiliary of block {k} has copied other weights than the network has now: load weights "
                    "before localize, or call model.refresh() after loading them",
                    stacklevel=callers_level(),
                )
                return
