"""What a CPU step runs on, set for a while: threads and vector instructions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Makes the CPU loops use one of their instruction sets for a while."""
    from fusedopt import _C

    before = _C.instruction_set()
    _C.use_instruction_set(name)
    try:
        assert _C.instruction_set() == name
        yield
    finally:
        _C.use_instruction_set(before)


def instruction_sets() -> list[str]:
    """Returns what this CPU can run."""
    from fusedopt import _C

    return _C.instruction_sets()
