"""Turns a run's state into JSON text and tensors, and back.

JSON has no tuples, and its keys are text. So every container is written as `{"list": [...]}`, `{"tuple": [...]}` or
`{"dict": [[key, value], ...]}`, and a tensor as `{"tensor": number, "stride": [...]}`. Nothing in such a file can name
a function, so reading one runs no code.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)


def to_json(state: Any) -> tuple[str, dict[str, Tensor]]:
    """Splits nested dictionaries, lists, tuples, plain values and tensors.

    Returns:
        The JSON text, and each tensor by the number that stands for it in the text.

    Raises:
        TypeError: The state holds something else.
    """
    tensors: dict[str, Tensor] = {}

    def written(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": len(tensors) - 1, "stride": list(value.stride())}
        if isinstance(value, dict):
            return {"dict": [[written(key), written(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"tuple" if isinstance(value, tuple) else "list": [written(item) for item in value]}
        if type(value) not in _PLAIN:
            raise TypeError(f"a checkpoint holds no {type(value).__name__}")
        return value

    return json.dumps(written(state)), tensors


def from_json(text: str | bytes, tensors: dict[str, Tensor]) -> Any:
    """The state that `to_json` has split, with each tensor in its old memory format. `tensors` is emptied.

    Raises:
        ValueError: The text is not what `to_json` writes. KeyError, TypeError and RecursionError are possible too.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            if type(value) not in _PLAIN:
                raise ValueError("a list that is not marked as one")
            return value
        match value:
            case {"tensor": int(number), "stride": list(stride), **rest} if not rest:
                return with_stride(tensors.pop(str(number)), stride)
            case {"dict": list(pairs), **rest} if not rest:
                return {read(key): read(item) for key, item in pairs}
            case {"list": list(items), **rest} if not rest:
                return [read(item) for item in items]
            case {"tuple": list(items), **rest} if not rest:
                return tuple(read(item) for item in items)
        raise ValueError("a container of an unknown kind")

    return read(json.loads(text))


def with_stride(tensor: Tensor, stride: list[int]) -> Tensor:
    """The tensor with this stride if the stride leaves no gaps in memory, otherwise the tensor as it is."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    if tuple(stride) == tensor.stride() or extent != tensor.numel() or min(stride, default=0) < 0:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
