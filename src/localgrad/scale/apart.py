"""Whether a batch may be taken in parts: whether a network treats each sample as if it were alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.core.blocks import trace_units
from localgrad.core.boundary import main_of, with_main
from localgrad.core.copies import duplicate, undisturbed
from localgrad.core.engine import autocasting
from localgrad.core.inputs import main_input
from localgrad.core.model import to_training
from localgrad.core.trace import Trace


def treats_samples_apart(
    backbone: nn.Module, example: Any, autocast: torch.dtype | None = None, trace: Trace | None = None
) -> bool:
    """Whether a training step gives the same gradients and the same state if its batch is taken in parts.

    Each unit of a copy runs on two random samples. It treats them apart if the gradient of what it makes of the first
    one is zero for the second one, and if it changes no buffer: a buffer that moves once a forward pass, such as a
    running average, would move once a part. Random draws do not matter: two parts draw as a whole batch might have.

    Args:
        backbone: The network. Without values (on the meta device), only its buffers are watched.
        example: A batch [B, ...].
        autocast: The dtype in which forward passes are computed.
        trace: The trace of the network, if it is there.
    """
    copied = duplicate(backbone)
    to_training(copied)
    for parameter in copied.parameters():
        if not parameter.is_meta and not parameter.any():  # A branch that is scaled by zero would show nothing.
            nn.init.constant_(parameter, 0.5)
    traced = trace_units(copied, example, trace=trace)
    parts = [(unit.module, unit.input) for unit in traced.units]
    if traced.head is not None:
        parts.append((traced.head, traced.units[-1].output))
    before = _versions(copied)
    with undisturbed(main_input(example).device):
        for module, enters in parts:
            h = enters.random(2, main_input(example).device)
            if _mixes(module, h, autocast):
                return False
    after = _versions(copied)
    return [(id(buffer), version) for buffer, version in before] == [(id(buffer), version) for buffer, version in after]


def _versions(module: nn.Module) -> list[tuple[Tensor, int]]:
    """The buffers, each with how often it was changed in place."""
    return [(buffer, buffer._version) for buffer in module.buffers()]


def _mixes(module: nn.Module, crossing: Any, autocast: torch.dtype | None) -> bool:
    """Whether what a module makes of the first sample of its main input depends on the second one."""
    h = main_of(crossing)
    h.requires_grad_(h.is_floating_point())
    with torch.enable_grad(), autocasting(h, autocast):
        made = tree_leaves(module(with_main(crossing, Tensor.clone)))
        leaves = [leaf for leaf in made if isinstance(leaf, Tensor) and leaf.requires_grad]
        firsts = [leaf[0] if leaf.ndim else leaf for leaf in leaves]
    if not (firsts and h.requires_grad):
        return False
    weights = [torch.rand_like(first) for first in firsts]  # A plain sum may have no gradient, as behind a softmax.
    (gradient,) = torch.autograd.grad(firsts, h, weights, allow_unused=True)
    return gradient is not None and not gradient.is_meta and bool(gradient[1].any())
