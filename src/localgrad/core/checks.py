"""Checks of what callers hand to this library, before anything changes.

A mistake becomes a `UserError` of one sentence. A step that looks right costs a few comparisons. Only an input that
looks odd is tried on a copy of a unit, once.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad.core.boundary import main_of, with_main
from localgrad.core.copies import duplicate, undisturbed, without_values
from localgrad.core.errors import UserError, callers_level
from localgrad.core.hooks import without_hooks
from localgrad.core.inputs import arguments, check_batched, check_inputs, main_input, rows, tensors_of
from localgrad.core.stale import StaleCopies
from localgrad.core.task import Classification
from localgrad.core.trace import input_dtype
from localgrad.core.trial import Trial

if TYPE_CHECKING:
    from localgrad.core.auxiliary import Auxiliary
    from localgrad.core.model import LocalModel

SURE = 3  # After so many steps in a row that leave an auxiliary as it was, no optimizer seems to train it.
ODD = (RuntimeError, TypeError, ValueError)  # Layers raise these for inputs of another dtype or device.
OUTSIDE = "call it outside torch.no_grad() and torch.inference_mode()"


def check_network(backbone: object, example: object) -> None:
    """Raises UserError unless `backbone` is a network and `example` a batch that it can be cut by."""
    if not isinstance(backbone, nn.Module):
        raise UserError(f"the network to cut is an nn.Module, not {_kind(backbone)}")
    if hasattr(backbone, "_orig_mod"):
        raise UserError(
            "a network that torch.compile has wrapped cannot be cut: give the network itself, and compile the blocks "
            "afterwards, as in model.blocks[0].compile()"
        )
    if isinstance(backbone, DistributedDataParallel):
        raise UserError(
            "DistributedDataParallel averages nothing of K separate backward passes: give the network itself, and "
            "average the gradients with lg.Replicas(model)"
        )
    check_inputs("example", example)
    args, kwargs = arguments(example)
    try:
        inspect.signature(backbone.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(
            f"example is not what the forward of {type(backbone).__name__} takes ({error}): give all "
            "inputs and no labels, as x of a batch (x, y): a tensor, a tuple of them, or a dictionary by their names"
        ) from error
    except ValueError:  # Some callables tell no signature.
        pass
    shape = tuple(main_input(example).shape)
    if len(shape) < 2 or 0 in shape:
        raise UserError(f"example takes a batch of one sample or more, such as [B, C, H, W], not shape {shape}")


def check_making(backbone: nn.Module, example: object, task: object, criterion: object) -> None:
    """Raises UserError if no trainable model can be made of these arguments of `localize`."""
    check_network(backbone, example)
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in backbone.parameters()):
        raise UserError(
            "what is made under torch.inference_mode() cannot be trained: make the network and localize it outside"
        )
    missing = [name for name in ("criterion", "check_targets", "output") if not callable(getattr(task, name, None))]
    if task is not None and (missing or isinstance(task, type)):
        raise UserError(
            f"task takes an object with the methods of lg.Classification(classes), not {_kind(task)}: give a loss of "
            "your own as criterion"
        )
    if task is not None and criterion is not None:
        raise UserError("a task has a criterion of its own: give task or criterion, not both")
    if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
        raise UserError(f"criterion takes a function of (output, targets), as nn.MSELoss(), not {_kind(criterion)}")


def check_example_targets(model: LocalModel, targets: object, count: int, device: torch.device) -> None:
    """Raises UserError unless a model can be trained on targets like these.

    Args:
        model: The model.
        targets: The targets of an example.
        count: The number of samples in the example.
        device: Where the network is. The targets may be elsewhere.
    """
    if device.type != "meta":
        targets = tree_map_only(Tensor, lambda t: t.to(device), targets)
    check_batched(targets, count)
    model.task.check_targets(targets)
    tensors = [leaf for leaf in tree_leaves(targets) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if tensor.ndim and len(tensor) != count:
            raise UserError(f"targets of {len(tensor)} samples do not belong to an example of {count}")
    model.checks.trial.check(model, targets, next((t.device for t in tensors), device))


def check_tensor(name: str, value: object) -> None:
    """Raises UserError unless `value`, the argument of this name, is a tensor."""
    if isinstance(value, np.ndarray):
        raise UserError(f"{name} takes a tensor, not an array of numpy: torch.from_numpy(...) makes one")
    if not isinstance(value, Tensor):
        raise UserError(f"{name} takes a tensor, not {_kind(value)}")


def check_call(x: Any, y: object, scale: object, autocast: object, backward: object = None) -> None:
    """Raises UserError for arguments of a step of the wrong kind, or without gradients. See `block_steps`."""
    if not torch.is_grad_enabled():
        raise UserError(f"gradients are switched off, so nothing can be trained: {OUTSIDE}")
    check_inputs("x", x)
    check_batched(y, main_input(x).shape[:1].numel())
    for name, value in [*(("x", t) for t in tensors_of(x).values()), *(("y", leaf) for leaf in tree_leaves(y))]:
        if isinstance(value, Tensor) and value.is_inference():
            raise UserError(f"{name} was made under torch.inference_mode(): train on {name}.clone()")
        if name == "y" and isinstance(value, Tensor) and value.requires_grad:
            raise UserError("y requires a gradient, but no loss of a block hands one on to targets: y.detach()")
    if not (autocast is None or (isinstance(autocast, torch.dtype) and autocast.is_floating_point)):
        raise UserError(f"autocast takes a dtype, such as torch.bfloat16, or None, not {autocast!r}")
    if not (backward is None or callable(backward)):
        raise UserError(f"backward takes a function of a loss, as accelerator.backward, or None, not {backward!r}")
    number = isinstance(scale, Real) and not isinstance(scale, bool)
    if number and scale == scale:
        return
    if not (isinstance(scale, Tensor) and scale.numel() == 1 and scale.is_floating_point()):
        given = scale if number else _kind(scale)
        raise UserError(f"scale takes a number or a tensor of one, such as scaler.scale(torch.ones(())), not {given}")


def no_local_model(model: object, what: str, kind: type[nn.Module]) -> UserError:
    """The error for another object in the place of a model.

    Args:
        model: The object.
        what: The function that was called with it.
        kind: The class `LocalModel`, which cannot be imported here.
    """
    text = f"{what} takes the LocalModel that lg.localize gives, not {_kind(model)}"
    if isinstance(model, DistributedDataParallel | DataParallel):
        return UserError(
            f"{text}, which averages nothing of K separate backward passes, nor does what it wraps: leave it out, run "
            "one process for each device, and average with lg.Replicas(model)"
        )
    if isinstance(model, nn.Module) and any(isinstance(m, kind) for m in model.modules()):
        return UserError(f"{text}: give it the one within")
    if isinstance(model, nn.Module):
        return UserError(f"{text}: lg.localize(network, method=..., example=x) makes one of a network")
    return UserError(text)


class StepChecks:
    """Checks the steps of one model, and remembers what it has found. A copy of the model begins without memory.

    Attributes:
        trial: Tries the losses on the targets.
        _tried: The kinds of odd inputs that the network takes.
        _modules: All modules of the model.
        _alone: The part that refuses a batch of one sample, or None, by the training modes of all modules.
        _probes: A parameter of each block and one of its auxiliary, whose changes are watched.
        _versions: The versions of these two parameters at the last step.
        _left: How many steps in a row have changed the block but not its auxiliary.
        _warned: Whether the warning about that was given.
        _told: Whether the warning about a block that was frozen after the cut was given.
        _seen: Whether inputs were looked at as images.
        copies: Watches whether the copies in auxiliaries are those of the present weights.
    """

    def __init__(self) -> None:
        self.trial = Trial()
        self._tried: set[tuple[Any, ...]] = set()
        self._modules: list[nn.Module] = []
        self._alone: dict[tuple[bool, ...], str | None] = {}
        self._probes: dict[int, tuple[nn.Parameter, nn.Parameter] | None] = {}
        self._versions: dict[int, tuple[int, int]] = {}
        self._left: dict[int, int] = {}
        self._warned = self._told = self._seen = False
        self.copies = StaleCopies()

    def __deepcopy__(self, memo: dict) -> StepChecks:
        return StepChecks()

    def __reduce__(self) -> tuple[Any, ...]:
        return StepChecks, ()

    def check_step(
        self,
        model: LocalModel,
        blocks: Sequence[int],
        h: Any,
        y: Any,
        images: Any,
        autocast: torch.dtype | None,
    ) -> None:
        """Checks one step.

        Args:
            model: The model.
            blocks: The numbers of neighbouring blocks, through which the step goes.
            h: What the first of them reads. Its shape is right.
            y: The targets.
            images: What decoders reconstruct, or None.
            autocast: The dtype of the forward pass, or None.

        Raises:
            UserError: The step cannot be taken.
        """
        x = main_of(h)
        if not len(x):
            raise UserError("an empty batch has no loss: give one sample or more")
        if isinstance(y, Tensor) and y.device != x.device and isinstance(model.task, Classification):
            raise UserError(f"x is on {x.device} and y on {y.device}: y.to(x.device)")
        if images is not None and model.needs_images(blocks):
            check_tensor("images", images)
            if images.shape != (len(x), *model.image):
                raise UserError(f"images of shape {tuple(images.shape)} are not those of {(len(x), *model.image)}")
            if images.requires_grad:
                raise UserError("images require a gradient, but they are only compared with: images.detach()")
        first = next(model.blocks[blocks[0]].parameters(), None)
        if first is not None and not blocks[0]:
            self._check_kind(model, h, first, autocast)
        _check_frozen(model, blocks, x)
        self.check_size(model, len(x))
        self.trial.check(model, y, x.device)
        self._warn_of_frozen(model, blocks, x)
        self._watch(model, blocks)
        self.copies.check(model, blocks)

    def images(self, model: LocalModel, x: Tensor) -> Tensor:
        """The images that decoders reconstruct of inputs x. The first ones are looked at."""
        images = model.method.images(x)
        if not self._seen:
            self._seen = True
            model.method.warn_of_values(x)
        return images

    def check_size(self, model: LocalModel, batch_size: int) -> None:
        """Raises UserError for a batch of one sample if a batch norm would see one value a channel."""
        if batch_size < 1:
            raise UserError(f"a batch has one sample or more, not {batch_size}")
        if batch_size > 1:
            return
        self._modules = self._modules or list(model.modules())
        modes = tuple([module.training for module in self._modules])
        if modes not in self._alone:
            self._alone[modes] = _refuses_one(model)
        if (what := self._alone[modes]) is not None:
            raise UserError(
                f"a batch of one sample cannot train {what}, where a batch norm would see one value a channel: give "
                "two samples or more (drop_last=True leaves a smaller last batch out)"
                + (', or take a head without batch norm, as lg.dgl("0c1f")' if what.startswith("the head") else "")
            )

    def _check_kind(self, model: LocalModel, h: Any, first: Tensor, autocast: torch.dtype | None) -> None:
        """Raises UserError for an input of another dtype or device than the network takes.

        It is tried on a copy of the first unit, because the network may convert its input.
        """
        x, given = main_of(h), model.blocks[0].entering.dtype
        dtype = first.dtype if given.is_floating_point and first.is_floating_point() else given
        key = (x.dtype, x.device, dtype, first.device, autocast)
        if (x.dtype, x.device) == (dtype, first.device) or key in self._tried:
            return
        with undisturbed(first.device):
            right = model.blocks[0].entering.random(2, first.device, dtype)
        if _fails(model.blocks[0][0], rows(h, slice(2)), with_main(right, torch.zeros_like), autocast):
            if x.device != first.device:
                raise UserError(f"x is on {x.device} and the model on {first.device}: x.to('{first.device}')")
            also = "; of bytes, x.float() / 255, normalised" if x.dtype == torch.uint8 else ""
            raise UserError(f"x is {x.dtype}, and this network takes {dtype}: x.to({dtype}){also}")
        self._tried.add(key)

    def _warn_of_frozen(self, model: LocalModel, blocks: Sequence[int], x: Tensor) -> None:
        """Warns once of a block that was frozen after the cut, so that its auxiliary is trained alone."""
        for k in () if self._told else [k for k in blocks if k < len(model.auxiliaries)]:
            asked = k == blocks[0] and x.requires_grad  # Through this block, the auxiliary gives x its gradient.
            if not (asked or _is_trained(model.blocks[k])) and _is_trained(model.auxiliaries[k]):
                self._told = True
                warnings.warn(
                    f"block {k} is frozen, and training its auxiliary changes nothing in the network: freeze before "
                    f"localize, which then makes none, or call model.auxiliaries[{k}].requires_grad_(False)",
                    stacklevel=callers_level(),
                )
                return

    def _watch(self, model: LocalModel, blocks: Sequence[int]) -> None:
        """Warns once if an optimizer steps a block and not its auxiliary.

        Optimizers change parameters in place, and PyTorch counts these changes in each parameter's `_version`.
        """
        if self._warned:
            return
        for k in blocks:
            if k not in self._probes:
                self._probes[k] = _probes(model, k)
            probes = self._probes[k]
            if probes is None:
                continue
            own, head = probes
            now = own._version, head._version
            before = self._versions.get(k, now)
            self._versions[k] = now
            if now[1] != before[1]:
                self._left[k] = 0
            elif now[0] != before[0] and own.requires_grad and head.requires_grad:
                self._left[k] = self._left.get(k, 0) + 1
                if self._left[k] >= SURE or (own.grad is None and head.grad is not None):
                    self._warned = True
                    warnings.warn(
                        f"the optimizer steps block {k} but not its auxiliary, which then learns nothing while its "
                        "gradients may grow: make the optimizer after localize, of lg.param_groups(model) "
                        "(model.auxiliaries.requires_grad_(False) says that they shall stay as they are)",
                        stacklevel=callers_level(),
                    )
                    return


def _check_frozen(model: LocalModel, blocks: Sequence[int], x: Tensor) -> None:
    """Raises UserError if nothing can be trained, or what can be trained would get no gradient."""
    if not x.requires_grad and not _is_trained(model):
        raise UserError("every parameter is frozen, so nothing can be trained: requires_grad_() on some of them")
    for k in blocks:
        if k == len(model.auxiliaries) or not cast("Auxiliary", model.auxiliaries[k]).empty:
            continue
        if _is_trained(model.blocks[k]):
            raise UserError(
                f"block {k} was frozen when the network was cut, so it has no loss, but parameters of it are trainable "
                "now: call localize again"
            )
        if k == blocks[0] and x.requires_grad:
            raise UserError(
                f"x requires a gradient, but block {k} is frozen and has no loss to give it one: x.detach()"
            )


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _probes(model: LocalModel, k: int) -> tuple[nn.Parameter, nn.Parameter] | None:
    """A trainable parameter of block k, and the last one of its auxiliary's heads, which a loss always reaches."""
    if k >= len(model.auxiliaries):
        return None
    own = next((p for p in model.blocks[k].parameters() if p.requires_grad), None)
    heads = [p for p in cast("Auxiliary", model.auxiliaries[k]).heads.parameters() if p.requires_grad]
    return None if own is None or not heads else (own, heads[-1])


def _fails(unit: nn.Module, h: Any, right: Any, autocast: torch.dtype | None) -> bool:
    """Whether a unit can take `right` but cannot take `h`."""
    device = main_of(right).device
    cast_to = contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    with undisturbed(device), contextlib.suppress(*ODD), cast_to:
        copied = without_hooks(duplicate(unit)).eval()
        wanted = copied(right)
        try:
            return main_of(copied(h)).device != main_of(wanted).device
        except ODD:
            return True
    return False


def _refuses_one(model: LocalModel) -> str | None:
    """The part of a model that cannot be trained on one sample. A copy of the model runs on tensors without values."""
    what = ""
    with undisturbed(torch.device("cpu")), torch.device("meta"):
        try:
            copied = without_values(model, "meta")
            dtype = input_dtype(copied.backbone, copied.blocks[0].entering.dtype)
            h = copied.blocks[0].entering.random(1, torch.device("meta"), dtype)
            for k, block in enumerate(copied.blocks):
                what = f"block {k} (up to '{block.names[-1]}')"
                h = block(h)
                for auxiliary in cast("list[Auxiliary]", copied.auxiliaries[k : k + 1]):
                    what = f"the coupling of the auxiliary of block {k} (behind '{block.names[-1]}')"
                    tensors = auxiliary.read(h)
                    for name, head in auxiliary.heads.items():
                        what = f"the head '{name}' of the auxiliary of block {k} (behind '{block.names[-1]}')"
                        head(tensors[name])
        except Exception as error:  # A network may fail without values in many ways.
            return what if "more than 1 value per channel" in str(error) else None
    return None


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
