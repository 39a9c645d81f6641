"""Where PyTorch's fake tensors are smaller than real ones: what recurrent layers keep, and sparse gradients."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

LSTM = 2  # oneDNN's number for it; PyTorch computes no other recurrent layer with oneDNN
PAGE = 4096
CLONE = torch.ops.aten.clone.default
ONEDNN = torch.ops.aten.mkldnn_rnn_layer.default
BACKWARD = torch.ops.aten.mkldnn_rnn_layer_backward.default
UNKNOWN = (torch.ops.aten._cudnn_rnn.default, torch.ops.aten.miopen_rnn.default)


class RealSizes(TorchDispatchMode):
    """Gives fake tensors the sizes of real ones, where the fake kernel of an operation gives others.

    Warns where the size is not known in advance: what recurrent layers keep on CUDA, or in another version of oneDNN.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is CLONE and out.is_sparse:  # the fake copy has no values
            places, values = args[0]._indices().clone(), args[0]._values().clone()
            return torch.sparse_coo_tensor(places, values, out.shape, check_invariants=False)
        if func is BACKWARD:  # the real one gives both biases a gradient of their own
            return *out[:4], torch.empty_like(out[4]), *out[5:]
        if (func is ONEDNN or func in UNKNOWN) and torch.is_grad_enabled():
            return _with_workspace(func, args, out)
        return out


def _with_workspace(func: Any, args: tuple, out: tuple) -> tuple:
    """What the layer `func` gives, with what it keeps for its backward pass: the last of oneDNN's four outputs."""
    if func is ONEDNN and args[9] == LSTM and _is_as_computed(args[1].dtype):
        x, hidden, dtype = args[0], args[10], args[1].dtype
        steps, rows, inputs = x.shape
        kept = lstm_workspace(steps, rows, inputs, hidden, dtype)
        return *out[:3], torch.empty(kept, dtype=torch.uint8, device=x.device)
    warnings.warn(
        "what this network's recurrent layers (nn.LSTM and the like) keep on this device is not known in advance: a "
        "step needs more memory than predicted",
        stacklevel=2,
    )
    return out


def lstm_workspace(steps: int, rows: int, inputs: int, hidden: int, dtype: torch.dtype) -> int:
    """The bytes that oneDNN's LSTM layer of one direction keeps of `rows` sequences, for its backward pass.

    It keeps gates and outputs of each step, inputs, outputs and cells before and after each, and has room for the
    gradients of these in float32. Each of them begins a page of its own.
    """
    size, wide = dtype.itemsize, max(inputs, hidden)
    states = 2 * (steps + 1)
    parts = [
        size * steps * _padded(4 * hidden, size),
        size * steps * _padded(hidden, size),
        size * states * _padded(wide, size),
        size * states * hidden,
        4 * states * _padded(wide, 4),
        4 * states * _padded(wide, 4),
        4 * states * hidden,
    ]
    return sum(-(-rows * part // PAGE) * PAGE for part in parts)


def _padded(width: int, size: int) -> int:
    """`width` numbers of `size` bytes as whole cache lines, of which rows a multiple of 256 numbers apart get one more,
    as they would share places in the cache."""
    line = 64 // size
    whole = -(-width // line) * line
    return whole + line if whole % 256 == 0 else whole


@functools.cache
def _is_as_computed(dtype: torch.dtype) -> bool:
    """Whether two small layers on this machine keep as much as `lstm_workspace` says."""
    with unset_fake_temporarily(), torch.enable_grad():
        for steps, rows, inputs, hidden in ((2, 3, 5, 7), (5, 40, 70, 64)):
            x, state = torch.zeros(steps, rows, inputs, dtype=dtype), torch.zeros(rows, hidden, dtype=dtype)
            biases = torch.zeros(4 * hidden, dtype=dtype)
            weights = torch.zeros(4 * hidden, inputs, dtype=dtype), torch.zeros(4 * hidden, hidden, dtype=dtype)
            how = False, [], LSTM, hidden, 1, True, False, False, True
            try:
                *_, kept = torch.ops.aten.mkldnn_rnn_layer(x, *weights, biases, biases, state, state.clone(), *how)
            except RuntimeError:  # not every processor computes every dtype
                return False
            if kept.numel() != lstm_workspace(steps, rows, inputs, hidden, dtype):
                return False
    return True
