"""Recordings of a forward pass for two batch sizes -> one graph of its steps.

Both passes must have the same steps. A number that differs between them follows the size of the batch, and a dtype that
differs follows that of the input. Such a value becomes a step of its own, which carries both.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from localgrad.core.recorder import Stopped
from localgrad.core.steps import EVALUATION, VALUE, WRITES, Recording, Ref, Step, part

BATCHES = (5, 7)  # These two sizes have no common factor.
ON_THE_BATCH = "it depends on the size of the batch"


def paired(first: Recording, other: Recording, evaluation: Recording | None, wide: Recording | None) -> fx.Graph:
    """Makes the graph of a forward pass.

    Args:
        first: The pass for the first of BATCHES, in training mode.
        other: The pass for the second of BATCHES.
        evaluation: The pass in evaluation mode. It is not used if its steps are others, like the following one.
        wide: The pass in another dtype.

    Raises:
        Stopped: The passes for the two batch sizes have different steps.
    """
    return _Pairing(first, other, evaluation, wide).graph()


class _Pairing:
    def __init__(
        self, first: Recording, other: Recording, evaluation: Recording | None, wide: Recording | None
    ) -> None:
        self.first, self.other = first, other
        self.evaluation, self.wide = (_if_alike(first, recording) for recording in (evaluation, wide))
        self.made = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.parts: dict[Ref, fx.Node] = {}

    def graph(self) -> fx.Graph:
        for number, step in enumerate(self.first.steps):
            twin = self.other.steps[number] if number < len(self.other.steps) else None
            if twin is None or _kind(step) != _kind(twin):  # The inner one of their modules has done something else.
                raise Stopped(max(step.inside, twin.inside if twin else "", key=len), ON_THE_BATCH)
            try:
                self._add(step, twin, number)
            except ValueError as error:
                raise Stopped(step.inside, str(error)) from error
        if len(self.other.steps) != len(self.first.steps):
            raise Stopped(self.other.steps[len(self.first.steps)].inside, ON_THE_BATCH)
        try:
            self.made.output(self._output())
        except ValueError as error:
            raise Stopped("", str(error)) from error
        return self.made

    def _add(self, step: Step, twin: Step, number: int) -> None:
        given, its = (step.args, step.kwargs), (twin.args, twin.kwargs)
        if self.wide is not None:  # A dtype that differs there follows that of the input.
            its = _with_dtypes(its, (self.wide[number].args, self.wide[number].kwargs))
        args, kwargs = self._merged(given, its)
        node = self.made.create_node(step.op, step.target, args, kwargs)
        node.meta.update(step.meta, **{VALUE: (step.value, twin.value)})
        if self.evaluation is not None:
            at = self.evaluation[number]
            node.meta[EVALUATION] = self._in_evaluation((args, kwargs), given, (at.args, at.kwargs))
        self.nodes.append(node)
        if not isinstance(step.value, Tensor):
            self._add_parts(node, step, twin, number)

    def _add_parts(self, node: fx.Node, step: Step, twin: Step, number: int) -> None:
        """Adds a step for each tensor among what a step returns."""
        one, two = tree_leaves(step.value), tree_leaves(twin.value)
        if len(one) != len(two):
            raise ValueError(ON_THE_BATCH)
        leaves = list(zip(one, two, strict=True))
        own = list(step.value) if isinstance(step.value, tuple | list) else []
        plain = len(own) == len(leaves) and all(a is b for a, (b, _) in zip(own, leaves, strict=True))
        for leaf, (value, other) in enumerate(leaves):
            if not isinstance(value, Tensor):
                continue
            # Each is written as Python would, so that a person who reads the steps knows them.
            taken = self.made.create_node("call_function", operator.getitem if plain else part, (node, leaf))
            taken.meta.update(step.meta, **{VALUE: (value, other), WRITES: []})
            self.parts[Ref(number, leaf)] = taken

    def _node(self, ref: Ref) -> fx.Node:
        return self.nodes[ref.step] if ref.leaf is None else self.parts[ref]

    def _merged(self, first: Any, other: Any) -> Any:
        """The arguments of a step, from those of two passes."""
        if isinstance(first, slice) and isinstance(other, slice):
            ends = [(getattr(first, end), getattr(other, end)) for end in ("start", "stop", "step")]
            return slice(*(self._merged(a, b) for a, b in ends))
        leaves, structure = tree_flatten(first)
        others, its = tree_flatten(other)
        if structure != its:
            raise ValueError(ON_THE_BATCH)
        if len(leaves) == 1 and leaves[0] is first:
            return self._leaf(first, other)
        return tree_unflatten([self._merged(a, b) for a, b in zip(leaves, others, strict=True)], structure)

    def _leaf(self, first: Any, other: Any) -> Any:
        if isinstance(first, Ref) or isinstance(other, Ref):
            if first != other:
                raise ValueError(ON_THE_BATCH)
            return self._node(first)
        if _same(first, other) and not isinstance(first, torch.device):
            return first
        if type(first) is not type(other) or not isinstance(first, int | float | tuple | torch.dtype | torch.device):
            raise ValueError(f"it passes on a {type(first).__name__}, which is another one for each batch")
        node = self.made.call_function(type(first), (first,))
        node.meta.update({VALUE: (first, other), WRITES: []})
        return node

    def _in_evaluation(self, merged: Any, training: Any, evaluation: Any) -> Any:
        """The arguments of a step in evaluation mode: those of training where they are tensors or the same value."""
        leaves, structure = tree_flatten(training)
        others, its = tree_flatten(evaluation)
        if structure != its:
            return merged
        values = tree_leaves(merged, is_leaf=lambda value: isinstance(value, fx.Node | slice))
        chosen = [
            value if isinstance(a, Ref) or isinstance(b, Ref | slice) or _same(a, b) else b
            for value, a, b in zip(values, leaves, others, strict=True)
        ]
        return map_aggregate(tree_unflatten(chosen, structure), lambda value: value)  # With fx's own lists.

    def _output(self) -> Any:
        return self._merged(self.first.output, self.other.output)


def _if_alike(first: Recording, other: Recording | None) -> list[Step] | None:
    """The steps of another recording, if they are those of the first."""
    alike = other is not None and list(map(_kind, other.steps)) == list(map(_kind, first.steps))
    return other.steps if alike and other is not None else None


def _with_dtypes(arguments: Any, wide: Any) -> Any:
    """Arguments with the dtypes of those in another pass."""
    leaves, structure = tree_flatten(arguments)
    others, its = tree_flatten(wide)
    if structure != its:
        return arguments
    pairs = zip(leaves, others, strict=True)
    return tree_unflatten([b if isinstance(a, torch.dtype) else a for a, b in pairs], structure)


def _kind(step: Step) -> tuple[str, Any]:
    """What a step does, so that those of two passes can be compared. A function made in the pass has its name alone."""
    own = step.op == "call_function" and "<locals>" in getattr(step.target, "__qualname__", "")
    return step.op, step.target.__qualname__ if own else step.target


def _same(first: Any, other: Any) -> bool:
    try:
        return first is other or (type(first) is type(other) and bool(first == other))
    except Exception:  # Objects may refuse to be compared in their own way.
        return False
