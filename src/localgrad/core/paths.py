"""Which of the later units a deep coupling or a head copies."""

from __future__ import annotations

from collections.abc import Sequence

from localgrad.core.blocks import Unit
from localgrad.core.boundary import Boundary


def select_path(downstream: Sequence[Unit], depth: int) -> list[Unit]:
    """Chooses `depth` of the units, in order, or all if there are fewer.

    Units that change the shape come first, because the others would not fit together without them. The rest is spread
    evenly over the others.
    """
    changing = [i for i, u in enumerate(downstream) if u.changes_shape][:depth]
    others = [i for i, u in enumerate(downstream) if not u.changes_shape]
    extra = max(0, min(depth - len(changing), len(others)))
    spread = [others[i * len(others) // extra] for i in range(extra)]
    path = [downstream[i] for i in sorted(changing + spread)]
    return as_far_as_fed(path, downstream[0].input) if path else []


def as_far_as_fed(path: list[Unit], entering: Boundary) -> list[Unit]:
    """The units of a path up to the first one that reads a passenger that is not there.

    Args:
        path: Units in order. In the network, others may lie between them.
        entering: The boundary before the first one.
    """
    there = {p.name for p in entering.passengers}
    for i, unit in enumerate(path):
        if not unit.needs <= there:
            return path[:i]
        there |= {p.name for p in unit.output.passengers}
    return path
