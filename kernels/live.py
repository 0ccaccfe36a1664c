"""What changes from step to step, in the words that the kernels read: groups, then gradients.

Written by the Python books; csrc/python/table_plan.cpp writes the same for those of the extension.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from itertools import count

from fusedopt.kernels import table
from fusedopt.kernels.groups import GroupRow

_GROUP = struct.Struct(f"={table.MAX_HYPER}d2d2q")


def encode_groups(rows: Iterable[GroupRow]) -> array[int]:
    """The groups' rows as table.py describes them, one after the other."""
    words = array("q")
    for row in rows:
        unused = (0.0,) * (table.MAX_HYPER - len(row.hyper))
        address, lr_type = (0, 0) if row.lr is None else (row.lr[0], table.NUMBER_TYPES[row.lr[1]])
        limits = (row.max_grad_value, row.max_grad_norm_per_param)
        words.frombytes(_GROUP.pack(*row.hyper, *unused, *limits, address, lr_type))
    return words


def bring_up(words: array[int], wanted: array[int]) -> tuple[int, int]:
    """Makes the first of ``words`` those that are ``wanted``.

    Returns:
        The range [first, last) that changed; (0, 0) when nothing did.
    """
    held = words[: len(wanted)]
    if held == wanted:
        return 0, 0
    first = next(i for i, now, then in zip(count(), wanted, held, strict=False) if now != then)
    backwards = zip(count(), reversed(wanted), reversed(held), strict=False)
    last = len(wanted) - next(i for i, now, then in backwards if now != then)
    words[first:last] = wanted[first:last]
    return first, last
