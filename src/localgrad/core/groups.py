"""Groups the parameters of a model for an optimizer, by block, by name, and the auxiliaries apart."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from localgrad.core.errors import UserError
from localgrad.core.model import LocalModel, localized

OURS = ("params", "block")  # These entries of a group are not options of an optimizer.


def param_groups(
    model: LocalModel,
    *,
    weight_decay: float | None = None,
    no_decay: bool = False,
    lr: float | Sequence[float] | None = None,
    auxiliary_lr: float | None = None,
    by_name: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters for an optimizer: at least one group a block, each with its number as `block`.

    EMA copies and frozen parameters are left out. A block without trainable parameters has an empty group.

    Learning rates that grow from unit to unit take one line:

        units = lg.units(backbone, x)
        rates = {name: {"lr": 1e-3 * 0.75 ** (len(units) - i)} for i, name in enumerate(units)}
        optimizer = torch.optim.AdamW(lg.param_groups(model, by_name=rates), lr=1e-3)

    Args:
        model: The result of `localize`.
        weight_decay: The weight decay of all groups. Default: the optimizer's own.
        no_decay: Whether parameters of fewer than two dimensions (of norms, biases and scales) get a group without
            weight decay. Default: False.
        lr: One learning rate for all blocks, or a list with one for each block. Default: the optimizer's own.
        auxiliary_lr: The learning rate of all auxiliaries. Default: that of their blocks.
        by_name: Options of the optimizer for a part of the backbone, such as `{"layer1": {"lr": 0.01}}`. A part is a
            module or parameter by its name in the backbone, or a unit by its name in `units`. Where one part lies
            within another, the inner one counts. These options win over the other arguments. Default: none.

    Returns:
        The groups, as optimizers of PyTorch take them.

    Raises:
        UserError: The list of learning rates does not have one for each block, or a name is that of no part.
    """
    model = localized(model, "param_groups", sharded=True)
    count = len(model.blocks)
    if isinstance(lr, Sequence) and len(lr) != count:
        raise UserError(f"lr lists {len(lr)} learning rates for {count} blocks")
    named = _options(model, by_name or {})
    groups: list[dict[str, Any]] = []
    for k in range(count):
        block = {"block": k, "lr": lr[k] if isinstance(lr, Sequence) else lr, "weight_decay": weight_decay}
        own = {id(p) for p in model.blocks[k].parameters()}
        of_block: list[dict[str, Any]] = []
        # Parameters without decay come last.
        for parameter in sorted(model.members(k), key=lambda p: no_decay and p.ndim < 2):
            options = dict(block)
            if no_decay and parameter.ndim < 2:
                options["weight_decay"] = 0.0
            if auxiliary_lr is not None and id(parameter) not in own:
                options["lr"] = auxiliary_lr
            _add(of_block, {**options, **named.get(id(parameter), {})}, [parameter])
        if not of_block:
            _add(of_block, block, [])
        groups += of_block
    return groups


def _add(groups: list[dict[str, Any]], options: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    """Adds parameters to the group that has these options, or to a new group."""
    given = {name: value for name, value in options.items() if value is not None}
    for group in groups:
        if {name: value for name, value in group.items() if name != "params"} == given:
            group["params"] += parameters
            return
    groups.append({"params": parameters, **given})


def _options(model: LocalModel, by_name: Mapping[str, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The options for each parameter that `by_name` names, by the parameter's id."""
    names: dict[int, list[str]] = {}  # All names of a parameter, its own first and that of its unit last.
    for name, parameter in model.backbone.named_parameters(remove_duplicate=False):
        path = name.split(".")
        names.setdefault(id(parameter), []).extend(".".join(path[:i]) for i in range(len(path), 0, -1))
    for block in model.blocks:
        for unit, module in zip(block.names, block, strict=False):
            for parameter in module.parameters():
                names.setdefault(id(parameter), []).append(unit)
    known = sorted({name for of_one in names.values() for name in of_one})
    if not isinstance(by_name, Mapping):
        raise UserError(f"by_name takes a dictionary, such as {{'layer1': {{'lr': 0.01}}}}, not {by_name!r}")
    for name, options in by_name.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "named_modules() and named_parameters() list them"
            raise UserError(f"the network has no part '{name}': {hint}")
        if not isinstance(options, Mapping) or any(ours in options for ours in OURS):
            raise UserError(
                f"by_name takes options of an optimizer for '{name}', such as {{'lr': 0.01}}, not {options}"
            )
    chosen = {key: next((n for n in of_one if n in by_name), None) for key, of_one in names.items()}
    return {key: by_name[name] for key, name in chosen.items() if name is not None}
