"""Shards: each rank holds a part of all parameters, gradients, optimizer states and averages.

PyTorch's `fully_shard` (FSDP2) does the work, unit by unit. What isolated blocks add is that the parameters of one
block and of its auxiliary are whole at a time, from its forward pass to its backward pass, so that they are gathered
once a step, and that the average of a shard is the shard of the average, so that averages move without a message.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad.core.auxiliary import Auxiliary
from localgrad.core.blocks import Block
from localgrad.core.checks import StepChecks
from localgrad.core.couplings import Snapshots
from localgrad.core.errors import UserError, callers_level
from localgrad.core.model import LocalModel, localized
from localgrad.core.rebuild import FrozenReference
from localgrad.core.sharded import is_sharded, whole
from localgrad.scale.groups import Ranks, keep_until_left
from localgrad.scale.replicas import gather_pairs, refuse_unlike, share_values

# A module of the network, the name of a parameter in it, and the same for the block that trains the parameter.
Place = tuple[nn.Module, str, nn.Module, str]


def shard(model: LocalModel, mesh: DeviceMesh | None = None) -> LocalModel:
    """Shards each block and each auxiliary of a model over the ranks, in place.

    All ranks get the first rank's parameters and buffers. Each rank then trains on the same number of images, and
    `fully_shard` averages the gradients, so `Replicas` is not needed beside it:

        lg.shard(model)
        optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.1)
        for x, y in loader:                       # each rank has images of its own
            out = lg.local_backward(model, x, y)  # out.losses are those of this rank
            optimizer.step()
            optimizer.zero_grad()
        with lg.gather(model):                    # all ranks
            model.eval()(x)

    Make optimizers after it, because `fully_shard` makes new parameters, and an optimizer of the old ones trains
    nothing.

    Averages of couplings are sharded alike. Buffers are not, and those of the first rank count. Parameters that a block
    shares with another one, and those of no dimension, stay whole on every rank, with averaged gradients. Objectives
    that compare images with each other (`Term.pairs`) get the images of all ranks.

    Args:
        model: The result of `localize`, the same on all ranks. Load weights before. Or the model of a `Stage`, of which
            the ranks that train the same blocks share those.
        mesh: A mesh of all ranks. If it has two dimensions, which need names, the ranks along the first one are
            replicas, and those along the second one share. Default: all ranks share. Ranks of a stage have their mesh.

    Returns:
        `model` itself.

    Raises:
        UserError: There is no process group, the mesh is no such one, the models of the ranks differ, or parameters
            that are sharded together have several dtypes.
    """
    model = localized(model, "shard")
    if not dist.is_initialized():
        raise UserError("shards need a process group: call torch.distributed.init_process_group first")
    ranks = Ranks.of(model)
    mesh = _mesh(model, ranks, ranks.mesh if mesh is None else mesh)
    keep_until_left(mesh)
    refuse_unlike(model, ranks)
    share_values(model, ranks)
    kept = set(_kept_whole(model))
    _refuse_mixed(model, kept)
    # An optimizer of the whole network has all of these. One of a part of it is not noticed.
    were = [weakref.ref(p) for p in model.backbone.parameters() if p.requires_grad and p not in kept]
    _average_gradients(kept, ranks)
    held = {id(p): (m, n) for k in range(len(model.blocks)) for part in model.parts(k) for m, n, p in _held(part)}
    places = [(m, n, *held[id(p)]) for m, n, p in _held(model.backbone) if id(p) in held]
    for k in range(len(model.blocks)):
        for part in model.parts(k):
            _shard_part(part, mesh, kept)
    for source in _elsewhere(model):
        _contiguous(source)
        fully_shard(source, mesh=mesh, ignored_params=kept)
    _follow(places)
    gather_pairs(model, ranks)
    model.backbone.register_forward_pre_hook(_refuse)
    model.watch.renew()
    model.checks = StepChecks()
    model.checks.copies.note(model)
    model.sharded = places
    now = {id(p) for p in model.parameters()}
    if (old := [ref() for ref in were if id(ref()) not in now]) and all(p is not None for p in old):
        warnings.warn(
            "an optimizer, or a list, has the parameters as they were before lg.shard, which the model no longer has: "
            "make optimizers after lg.shard",
            stacklevel=callers_level(),
        )
    return model


def _mesh(model: LocalModel, ranks: Ranks, mesh: DeviceMesh | None) -> DeviceMesh:
    """The mesh that shares a model. Raises UserError if it cannot."""
    if model.peers is not None and ranks.count == 1:
        raise UserError("a rank of this pipeline shares its blocks with no other: give lg.Stage a mesh with rows")
    if mesh is None:
        return init_device_mesh(next(model.parameters()).device.type, (ranks.count,))
    if mesh.size() != ranks.count or mesh.ndim > 2 or (mesh.ndim == 2 and mesh.mesh_dim_names is None):
        raise UserError(
            f"mesh takes all {ranks.count} ranks in one dimension, or in two that have names, and not a shape of "
            f"{mesh.shape}"
        )
    return mesh


@contextlib.contextmanager
def gather(model: LocalModel) -> Iterator[None]:
    """Gathers the parameters of a sharded network on every rank, to evaluate it without gradients. All ranks call it.

    Within the context, each rank calls `model` or `model.backbone` as often as it likes. A whole state is made outside
    of it, by `get_model_state_dict` of `torch.distributed.checkpoint.state_dict`.

    Args:
        model: The model. If it is not sharded, this only disables gradients.
    """
    places: list[Place] = localized(model, "gather", sharded=True).sharded or []
    if places and model.peers is not None:
        raise UserError("a stage of a pipeline has some of the blocks: stage.forward evaluates through all of them")
    sharded = [module for block in model.blocks for module in _sharded(block)]
    try:
        for module in sharded:
            module.unshard()
        _follow(places)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if places:
                stack.enter_context(model.backbone.register_state_dict_pre_hook(_refuse_state))
            yield
    finally:
        for module in sharded:
            module.reshard()
        _follow(places)


def gathered(tree: Any, *, keep: bool) -> Any:
    """The nested containers `tree` with whole tensors on the CPU in place of sharded ones. All ranks call it.

    Args:
        tree: Such as the state of a module or of an optimizer.
        keep: Whether this rank needs the result. Otherwise it holds one whole tensor at a time, and gets None instead.
    """

    def gather(tensor: DTensor) -> Tensor | None:
        full = whole(tensor)
        return full.cpu() if keep else None

    return tree_map_only(DTensor, gather, tree)


def _shard_part(part: nn.Module, mesh: DeviceMesh, kept: set[nn.Parameter]) -> None:
    """Shards a block or an auxiliary, unless another stage of a pipeline trains it."""
    if all(p in kept for p in part.parameters()) or any(p.is_meta for p in part.parameters()):
        return
    _contiguous(part)
    for module in list(part.modules()):
        if isinstance(module, Snapshots):  # No forward pass runs them, so they are not gathered with the rest.
            for state in module.states:
                fully_shard(state, mesh=mesh, ignored_params=kept)
    for module in _sharded_together(part, kept):
        module.register_forward_hook(_without_views)
        fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=kept)
    part.register_forward_hook(_reshard)
    # It learns now which units it has. Otherwise a unit that the network runs itself, within `gather`, is its own root.
    cast(Any, fully_shard.state(part))._lazy_init()


def _average_gradients(kept: set[nn.Parameter], ranks: Ranks) -> None:
    """Averages the gradients of parameters that stay whole, also of those that are frozen now and trained later."""
    for parameter in kept:
        if parameter.is_floating_point() or parameter.is_complex():
            trained = parameter.requires_grad
            parameter.requires_grad_(True).register_hook(partial(_averaged, ranks))
            parameter.requires_grad_(trained)


def _sharded_together(part: nn.Module, kept: set[nn.Parameter]) -> list[nn.Module]:
    """The modules whose parameters are sharded together, less those of modules before them: units of a block, and last
    the block, with what several of its units use. An auxiliary is one."""
    if not isinstance(part, Block):
        return [part]
    uses = Counter(p for unit in part for p in set(unit.parameters()))
    alone = [unit for unit in part if all(uses[p] == 1 for p in unit.parameters())]
    return [*(unit for unit in alone if not kept.issuperset(unit.parameters())), part]


def _refuse_mixed(model: LocalModel, kept: set[nn.Parameter]) -> None:
    """Raises UserError if trained parameters that are sharded together have several dtypes."""
    for k in range(len(model.blocks)):
        for part in model.parts(k):
            left = set(part.parameters()) - kept
            for module in _sharded_together(part, kept):
                own = left.intersection(module.parameters())
                left -= own
                dtypes = sorted({str(p.dtype) for p in own if p.requires_grad})
                if len(dtypes) > 1:
                    where = f"a unit of block {k}" if isinstance(part, Block) else f"the auxiliary of block {k}"
                    raise UserError(
                        f"{where} has parameters of {' and '.join(dtypes)}, but all parameters of a shard have one "
                        "dtype: convert them before localize, and compute in the other dtype by autocast"
                    )


def _contiguous(module: nn.Module) -> None:
    """`fully_shard` takes parameters in no other memory format."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def _elsewhere(model: LocalModel) -> list[nn.Module]:
    """The sources of this rank's averages that are not sharded yet, as another stage of a pipeline trains them."""
    couplings = [cast(Auxiliary, auxiliary).coupling for auxiliary in model.auxiliaries]
    sources = {id(s.module): s.module for coupling in couplings if coupling for s in coupling.sources}
    return [m for m in sources.values() if not any(p.is_meta or is_sharded(p) for p in m.parameters())]


class Same(torch.autograd.Function):
    """The same tensor, which to autograd is no view of another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _without_views(part: nn.Module, entered: Any, output: Any) -> Any:
    """`fully_shard` has a hook on each output, which views would lose if they were changed in place."""
    return tree_map_only(Tensor, lambda t: Same.apply(t) if t.requires_grad and t._base is not None else t, output)


def _reshard(part: nn.Module, entered: Any, output: Any) -> Any:
    """Frees the whole parameters of a part if no backward pass will do so, as when all of them are frozen. A readout
    hands its own on to the loss, which gets copies."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(output)):
        return output
    output = tree_map_only(nn.Parameter, lambda p: p.detach().clone(), output)
    for module in _sharded(part):
        module.reshard()
    return output


def _sharded(part: nn.Module) -> list[FSDPModule]:
    """The modules of a part whose parameters are sharded."""
    return [module for module in part.modules() if isinstance(module, FSDPModule)]


def _kept_whole(model: LocalModel) -> Iterator[nn.Parameter]:
    """The parameters that every rank keeps whole: `fully_shard` takes none without a dimension, and none that two parts
    hold. Copies of them stay whole too, as the sources of averages do."""
    parts = [part for k in range(len(model.blocks)) for part in model.parts(k)]
    of_parts = [set(part.parameters()) for part in parts]
    kept = {p for own in of_parts for p in own if p.ndim == 0 or sum(p in other for other in of_parts) > 1}
    for module in (m for part in parts for m in part.modules()):
        if isinstance(module, FrozenReference):
            kept.update(module.reference[0].parameters())
    yield from kept
    for auxiliary in model.auxiliaries:
        for copied, origin in cast(Auxiliary, auxiliary).copies():
            yield from (p for p, s in zip(copied.parameters(), origin.parameters(), strict=True) if s in kept)


def _held(part: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters of a module and of its submodules, each with the module that holds it and its name there."""
    for module in part.modules():
        yield from ((module, name, p) for name, p in module._parameters.items() if p is not None)


def _averaged(ranks: Ranks, gradient: Tensor) -> Tensor:
    """The mean of a gradient over the ranks."""
    mean = gradient.contiguous() / ranks.count
    ranks.add(mean)
    return mean


def _follow(places: Iterable[Place]) -> None:
    """Gives the network the parameters that its blocks have now."""
    for module, name, own, key in places:
        module._parameters[name] = own._parameters[key]


def _refuse_state(*_: Any) -> None:
    """Refuses a state of a network within `gather`. PyTorch would shard the network again for it."""
    raise UserError(
        "a state made within lg.gather has shards: outside of it, get_model_state_dict(model.backbone, "
        "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict makes a whole one"
    )


def _refuse(network: nn.Module, *_: Any) -> None:
    """Refuses a forward pass of a network whose parameters are sharded. Within a block, they are whole."""
    if any(is_sharded(p) for p in network.parameters()):
        raise UserError("the network is sharded: call it within `with lg.gather(model):`")
