"""The steps of a recorded forward pass, and what they carry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DRAWS = re.compile("rand|dropout|bernoulli|normal_|uniform_|multinomial")  # Functions with such names draw numbers.
CONSTANT = "_tensor_constant"  # The target of a step that reads a tensor which the forward holds outside the network.

# These are the keys of a step's `meta`, with what the step carries there.
VALUE = "value"  # What it returned, once for each of BATCHES.
BORN = "born"  # The version of the tensor that it returned, when it was made.
EVALUATION = "evaluation"  # Its arguments in evaluation mode.
NO_GRAD = "no_grad"  # Whether it ran without gradients.
WRITES = "writes"  # The tensors that it has changed in place.
CHECKPOINT = "checkpoint"  # The number of the network's own activation checkpoint that it runs in, or None.
REENTRANT = "reentrant"  # Whether its module enters reentrant checkpoints.
PACKED = "packed"  # Whether other hooks of the network would keep what it saves for its backward pass.


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor that a step has returned.

    Attributes:
        step: The number of the step.
        leaf: The number of the tensor among the parts of what the step returned, or None if it returned the tensor
            itself.
    """

    step: int
    leaf: int | None = None


@dataclass
class Step:
    """A step of a forward pass.

    Attributes:
        op: One of fx's: "placeholder", "get_attr", "call_function", "call_method" or "call_module".
        target: What it calls or reads.
        args: Its arguments in order, with a `Ref` in the place of each tensor.
        kwargs: Its arguments by name, likewise.
        inside: The name of the module whose forward was running.
        value: What it returned.
        meta: What the step carries in its graph.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inside: str
    value: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """A forward pass.

    Attributes:
        steps: Its steps in order.
        output: What the network returned, with a `Ref` in the place of each tensor.
        written: Attributes that the forward has changed, as (name of the module, name of the attribute).
    """

    steps: list[Step]
    output: Any
    written: set[tuple[str, str]]


def put(tensor: Tensor, key: Any, value: Any) -> Tensor:
    """`tensor[key] = value` as a step that returns a tensor."""
    tensor[key] = value
    return tensor


def part(value: Any, leaf: int) -> Any:
    """One of the tensors in a structure that a step has returned, such as an object of a class of transformers."""
    return tree_leaves(value)[leaf]


def draws(target: Any) -> bool:
    """Whether a function, by its name, draws random numbers."""
    return bool(DRAWS.search(getattr(target, "__name__", str(target))))


def has_tensor(value: Any) -> bool:
    """Whether there is a tensor in a structure."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


class ShapesOfNorms(TorchDispatchMode):
    """Gives what a batch norm returns for tensors without values, for which PyTorch runs dozens of functions in Python.
    They were more than half of the time of a recording. What the network gives to the norm is checked before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default and args[0].is_meta:
            h = args[0]
            return torch.empty_like(h), h.new_empty(h.shape[1]), h.new_empty(h.shape[1])
        return func(*args, **(kwargs or {}))
