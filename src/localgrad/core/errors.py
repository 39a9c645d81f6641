"""Errors for a person: one sentence, and an exit code that scripts read."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the caller can correct. The sentence says what is wrong and what would be right. Exit code 2."""

    exit_code = 2
    shared = True  # All ranks of a run raise it, so one of them prints it.


class RunError(RuntimeError):
    """A fault during a run, such as a damaged file or a loss that is not finite. Exit code 3."""

    exit_code = 3
    shared = False


def unknown(kind: str, name: str, options: Iterable[str]) -> UserError:
    """Makes the error for a name that does not exist. It offers the nearest name that does.

    >>> print(unknown("method", "dgll", ["bp", "dgl"]))
    unknown method 'dgll': did you mean 'dgl'? (bp, dgl)
    """
    names = sorted(options)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else "choose one of "
    return UserError(f"unknown {kind} '{name}': {hint}({', '.join(names)})")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. It does not load PyTorch.

    CUDA's allocator raises an error of its own class, and the CPU's allocator only has a sentence.
    """
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "could not create a memory")
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")
    known = isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    return refused or known or any(word in str(error) for word in words)


def callers_level() -> int:
    """The `stacklevel` for `warnings.warn` in the calling function, so that the warning names a line of user code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("localgrad."):
        frame, level = frame.f_back, level + 1
    return level
