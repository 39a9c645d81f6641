"""Corrects the sizes of PyTorch's fake tensors in recurrent layers, in some losses and in sparse gradients."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

LSTM = 2  # oneDNN's number for an LSTM. PyTorch computes no other recurrent layer with oneDNN.
PAGE = 4096
CLONE = torch.ops.aten.clone.default
ONEDNN = torch.ops.aten.mkldnn_rnn_layer.default
BACKWARD = torch.ops.aten.mkldnn_rnn_layer_backward.default
ATEN = torch.ops.aten
LOSSES = (ATEN.mse_loss.default, ATEN.smooth_l1_loss.default, ATEN.soft_margin_loss.default)
UNKNOWN = (torch.ops.aten._cudnn_rnn.default, torch.ops.aten.miopen_rnn.default)


class RealSizes(TorchDispatchMode):
    """Gives fake tensors the sizes of real ones where an operation's fake kernel makes them smaller.

    It warns if a size is not known in advance: for recurrent layers on CUDA or in another version of oneDNN.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is CLONE and out.is_sparse:  # The fake copy has no values.
            indices, values = args[0]._indices().clone(), args[0]._values().clone()
            return torch.sparse_coo_tensor(indices, values, out.shape, check_invariants=False)
        if func in LOSSES and out.ndim == 0 and out.device.type == "cpu":
            # The real kernel makes the mean in the storage of all the losses, which stays as large as they were.
            losses = torch.broadcast_tensors(args[0], args[1])[0]
            out.untyped_storage().resize_(max(1, losses.numel()) * out.element_size())
        if func is BACKWARD:  # The real kernel makes two gradients for the two biases, and the fake one makes one.
            return *out[:4], torch.empty_like(out[4]), *out[5:]
        if (func is ONEDNN or func in UNKNOWN) and torch.is_grad_enabled():
            return _with_workspace(func, args, out)
        return out


def _with_workspace(func: Any, args: tuple, out: tuple) -> tuple:
    """The outputs of a recurrent layer. The last of oneDNN's four is what it keeps for its backward pass."""
    if func is ONEDNN and args[9] == LSTM and _is_as_computed(args[1].dtype):
        x, hidden, dtype = args[0], args[10], args[1].dtype
        steps, rows, inputs = x.shape
        size = lstm_workspace(steps, rows, inputs, hidden, dtype)
        return *out[:3], torch.empty(size, dtype=torch.uint8, device=x.device)
    warnings.warn(
        "what this network's recurrent layers (nn.LSTM and the like) keep on this device is not known in advance: a "
        "step needs more memory than predicted",
        stacklevel=2,
    )
    return out


def lstm_workspace(steps: int, rows: int, inputs: int, hidden: int, dtype: torch.dtype) -> int:
    """The bytes that oneDNN's LSTM layer of one direction keeps for its backward pass.

    It keeps the gates and outputs of each step, and the inputs, outputs and cells before and after each step. It also
    allocates the gradients of the latter in float32. Each of these arrays begins at a page of its own.

    Args:
        steps: The length of the sequences.
        rows: The number of sequences.
        inputs: The features of the input.
        hidden: The features of the hidden state.
        dtype: The dtype of the layer.
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
    """Rounds a row of `width` numbers of `size` bytes up to cache lines.

    A row of a multiple of 256 numbers gets one more line, because such rows would compete for the same lines.
    """
    line = 64 // size
    rounded = -(-width // line) * line
    return rounded + line if rounded % 256 == 0 else rounded


@functools.cache
def _is_as_computed(dtype: torch.dtype) -> bool:
    """Whether two small layers on this computer keep as many bytes as `lstm_workspace` says."""
    with unset_fake_temporarily(), torch.enable_grad():
        for steps, rows, inputs, hidden in ((2, 3, 5, 7), (5, 40, 70, 64)):
            x, state = torch.zeros(steps, rows, inputs, dtype=dtype), torch.zeros(rows, hidden, dtype=dtype)
            biases = torch.zeros(4 * hidden, dtype=dtype)
            weights = torch.zeros(4 * hidden, inputs, dtype=dtype), torch.zeros(4 * hidden, hidden, dtype=dtype)
            options = False, [], LSTM, hidden, 1, True, False, False, True
            try:
                *_, kept = torch.ops.aten.mkldnn_rnn_layer(x, *weights, biases, biases, state, state.clone(), *options)
            except RuntimeError:  # Some processors do not compute every dtype.
                return False
            if kept.numel() != lstm_workspace(steps, rows, inputs, hidden, dtype):
                return False
    return True
