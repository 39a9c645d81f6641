"""A run's state as JSON and tensors: what is read is what was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from localgrad.run.state import from_json, to_json

KEYS = st.text() | st.integers() | st.none() | st.booleans()
PLAIN = KEYS | st.floats()
NESTED = st.recursive(
    PLAIN, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner), max_leaves=20
)


def same(a: Any, b: Any) -> bool:
    """Of equal types throughout; a NaN is one."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(same, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@given(NESTED)
def test_plain_values_come_back(state: Any) -> None:
    text, tensors = to_json(state)
    assert tensors == {}
    assert same(from_json(text, {}), state)


LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT,
    "one channel": lambda t: t[:, :1].contiguous().contiguous(memory_format=torch.channels_last),
    "with gaps": lambda t: t[..., ::2],
    "expanded": lambda t: t[:1].expand(5, -1, -1, -1),
    "a number": lambda t: t.sum(),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_tensors_come_back_as_they_lay_in_memory(name: str) -> None:
    tensor = LAID_OUT[name](torch.randn(3, 4, 6, 5))
    text, tensors = to_json({"a": [tensor]})
    read = from_json(text, {key: t.contiguous() for key, t in tensors.items()})["a"][0]
    assert torch.equal(read, tensor)
    if name not in ("with gaps", "expanded"):  # those are packed
        assert read.stride() == tensor.stride()


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, b"bytes", print])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint holds no"):
        to_json({"x": [value]})
