"""Checks of what callers hand to the planner, before anything is traced or run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from localgrad.core.auxiliary import Method
from localgrad.core.checks import OUTSIDE, check_network
from localgrad.core.couplings import MAN
from localgrad.core.errors import UserError
from localgrad.scale.speed import Speed


def check_planned(
    backbone: nn.Module,
    example: Any,
    method: Any,
    coupling: Any,
    optimizer: Any,
    autocast: Any,
    speed: Any,
    accumulate: Any,
) -> None:
    """Raises UserError unless these are arguments that `Planner` takes."""
    check_network(backbone, example)
    if not torch.is_grad_enabled():
        raise UserError(f"gradients are switched off, so no training step can be planned: {OUTSIDE}")
    for name, value, kind in (("method", method, Method), ("coupling", coupling, MAN | None)):
        if not isinstance(value, kind):
            raise UserError(f"{name} takes what its function gives, such as lg.dgl() or lg.MAN(), not {value!r}")
    if method.terms is None and coupling is not None:
        raise UserError("backpropagation has no coupling: give a method of local losses, as lg.dgl(), or leave it out")
    if not (optimizer is None or callable(optimizer)):
        raise UserError(
            "optimizer takes a function that makes one from groups of parameters, as "
            f"functools.partial(torch.optim.SGD, lr=0.1), not {optimizer!r}"
        )
    if not (autocast is None or (isinstance(autocast, torch.dtype) and autocast.is_floating_point)):
        raise UserError(f"autocast takes a dtype, such as torch.bfloat16, or None, not {autocast!r}")
    if not isinstance(speed, Speed | None):
        raise UserError(f"speed takes what lg.calibrate gives, or None, not {speed!r}")
    if accumulate not in ("never", "exact", "any"):
        raise UserError(f"accumulate takes never, exact or any, not '{accumulate}'")
    if not any(p.requires_grad for p in backbone.parameters()):
        raise UserError("nothing can be planned: every parameter of the network is frozen (requires_grad=False)")
