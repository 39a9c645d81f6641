"""Which parameters of a block reach no loss through its main tensor, or through what the task reads of its output.

An example is the convolution of a feature pyramid: what it makes of an early map is read only by a later block. Such a
passenger gets a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localgrad.core.blocks import Block, Unit
from localgrad.core.boundary import MAIN, Boundary, Passenger
from localgrad.core.copies import undisturbed, without_values
from localgrad.core.errors import UserError, callers_level
from localgrad.core.trace import as_compiled, input_dtype

BATCH = 2  # A batch norm takes at least two samples.
LAYOUTS = {1: "NC", 2: "NLC", 3: "NCHW", 4: "NCDHW"}


def passengers_with_heads(group: Sequence[Unit]) -> list[Boundary]:
    """The passengers that need a head, the last one first. Each is a boundary, with itself as its only passenger.

    A copy of the block runs on tensors without values. A passenger is taken if trainable parameters follow to it that
    follow neither to the main tensor nor to a passenger that was taken before.

    Args:
        group: The units of a block.

    Raises:
        UserError: Parameters follow only to a passenger that no head can read.
    """
    entered = {p.name for p in group[0].input.passengers}
    end = group[-1].output
    made = [p for p in reversed(end.passengers) if p.name not in entered]
    if not made:
        return []
    run = without_values(nn.ModuleList(unit.module for unit in group), "meta")
    meta = torch.device("meta")
    # A forward may make tensors on no named device, hence `meta`.
    with undisturbed(torch.device("cpu")), torch.enable_grad(), as_compiled(), meta:
        h = group[0].input.random(BATCH, meta)
        for module in run:
            h = module(h)
        parameters = [p for p in run.parameters() if p.requires_grad]
        reached = _reached(h[MAIN], parameters)
        found = []
        for passenger in sorted(made, key=_is_readable, reverse=True):
            more = _reached(h[passenger.name], parameters) - reached
            if more and not _is_readable(passenger):
                raise UserError(
                    f"no cut behind '{group[-1].name}': parameters before it reach only the tensor of "
                    f"'{passenger.made_by}', which no head can read; cut elsewhere, by names of units"
                )
            if more:
                found.append(_boundary(passenger, end.stage))
                reached |= more
    return found


def warn_of_unread(block: Block, read: str) -> None:
    """Warns of trainable parameters that follow only to outputs which the task does not read.

    Args:
        block: The last block, whose output is that of the network.
        read: The name of the output that the task reads, if the network returns a dictionary.
    """
    run, meta = without_values(block, "meta"), torch.device("meta")
    parameters = [p for p in run.parameters() if p.requires_grad]
    lost: list[str] = []
    try:
        with undisturbed(torch.device("cpu")), torch.enable_grad(), as_compiled(), meta:
            outputs = run(block.entering.random(BATCH, meta, input_dtype(run, block.entering.dtype)))
            if isinstance(outputs, dict) and len(outputs) > 1:
                reached = _reached(outputs.pop(read), parameters)
                lost = [name for name, output in outputs.items() if _reached(output, parameters) - reached]
    except Exception:  # A network may fail without values in many ways, and return something else than tensors.
        return
    if lost:
        warnings.warn(
            f"segmentation reads '{read}' of what the network returns, so what only {' and '.join(map(repr, lost))} "
            "needs is not trained: leave it out (network.aux_classifier = None, for torchvision's networks) or freeze "
            "it, before localize",
            stacklevel=callers_level(),
        )


def _is_readable(passenger: Passenger) -> bool:
    real = passenger.dtype.is_floating_point and all(size >= 0 for size in passenger.shape[1:])
    return real and passenger.shape[0] == -1 and len(passenger.shape) - 1 in LAYOUTS


def _reached(tensor: Tensor, parameters: Sequence[nn.Parameter]) -> set[int]:
    """The numbers of the parameters that a tensor depends on."""
    if not tensor.requires_grad:
        return set()
    gradients = torch.autograd.grad(tensor.sum(), parameters, allow_unused=True, retain_graph=True)
    return {i for i, gradient in enumerate(gradients) if gradient is not None}


def _boundary(passenger: Passenger, stage: int) -> Boundary:
    shape = passenger.shape[1:]
    return Boundary(shape, LAYOUTS[len(shape)], stage, dtype=passenger.dtype, passengers=(passenger,))
