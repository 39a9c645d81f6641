"""Sizes in bytes, as people write them."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

from localgrad.core.errors import UserError


def parse_bytes(text: str, what: str = "--budget") -> int:
    """Reads a number of bytes from text such as 8GiB, 500 MB or 1e9. Raises UserError, which names `what`.

    GB is 10^9 bytes, GiB or G is 2^30 bytes, and likewise for K, M and T.
    """
    word = text.strip().lower()
    base = 1000 if word.endswith("b") and not word.endswith("ib") else 1024
    number = word.removesuffix("b").removesuffix("i")
    power = {"k": 1, "m": 2, "g": 3, "t": 4}.get(number[-1:], 0)
    try:
        size = int(float(number[:-1] if power else number) * base**power)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{what} takes bytes as 8GiB or 500MiB, not '{text}'")
    return size


def bytes_of(budget: object, whole: Callable[[], int] = lambda: 0, what: str = "budget") -> int:
    """Reads a budget in bytes from a number, from text like "2GiB" or "2GB", or from a share like "50%".

    >>> bytes_of("2GiB"), bytes_of("2GB"), bytes_of(5e8), bytes_of("50%", lambda: 300)
    (2147483648, 2000000000, 500000000, 150)

    Args:
        budget: The budget.
        whole: What a share is a share of, in bytes. It is called for a share only.
        what: The name of the argument for the error.

    Raises:
        UserError: The budget is none of these.
    """
    if isinstance(budget, str) and budget.strip().endswith("%"):
        try:
            share = float(budget.strip()[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise UserError(f"{what} takes a share of backpropagation's memory as 50%, not '{budget}'")
        return int(share * whole())
    if isinstance(budget, str | Real) and not isinstance(budget, bool):
        return parse_bytes(str(budget), what)
    raise UserError(f'{what} takes a number of bytes, or text such as "2GiB" or "50%", not {budget!r}')


def mib(size: float) -> str:
    """Writes a number of bytes for a person to read.

    >>> mib(2**20)
    '1.0 MiB'
    """
    return f"{size / 2**20:.1f} MiB"
