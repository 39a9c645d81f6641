"""Which modules of a network are worth being units, and so which modules are opened: their forward is followed.

In a ResNet, the residual units are worth it. The network itself and its stages are opened, and each residual unit is
one step of the trace.
"""

from __future__ import annotations

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def weighted_layers(module: nn.Module) -> int:
    """The number of weights of two dimensions or more: a residual unit has several, a convolution with a norm one."""
    return sum(p.ndim > 1 for p in module.parameters())


def is_unit(module: nn.Module) -> bool:
    """Whether a module is worth being a unit of its own."""
    return next(module.children(), None) is not None and weighted_layers(module) > 1


def is_stage(module: nn.Module) -> bool:
    """Whether a module holds several units and little else.

    It is a container, such as a ResNet's layer1 or a transformer's blocks, or a module whose parts are of one class and
    are numbered, such as the b1, b2, ... of a stage of timm's RegNets.
    """
    if not isinstance(module, CONTAINERS):
        parts = {(type(m), name.rstrip("0123456789")) for name, m in module.named_children()}
        if len(parts) != 1 or any(not name[-1].isdigit() for name, _ in module.named_children()):
            return False
    return sum(is_unit(m) or is_stage(m) for m in module.children()) > 1


def opened_modules(network: nn.Module) -> set[str]:
    """The names of the modules whose forward is followed: those that are a stage or hold one.

    In a network without stages they are its containers, except a container within another one that holds layers with
    weights, such as a convolution with its norm: it counts as one layer.
    """
    found = {name for name, module in network.named_modules() if any(map(is_stage, module.modules()))} | {""}
    if len(found) > 1 or is_stage(network):
        return found
    modules = dict(network.named_modules())
    for name, module in modules.items():  # A module comes before its children.
        parent = name.rpartition(".")[0]
        weighted = [m for m in module.children() if weighted_layers(m)]
        layer = isinstance(modules[parent], CONTAINERS) and any(next(m.children(), None) is None for m in weighted)
        if isinstance(module, CONTAINERS) and parent in found and not layer:
            found.add(name)
    return found
