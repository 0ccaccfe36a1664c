"""How a plan's rows are cut into pieces and launches, and the sizes of blocks, with their reasons.

Used by launch.py; numbers only, no memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fusedopt.kernels.rows import PIECE, Row

# 8 elements a thread: the fewest with which half types still move 16 bytes at a time. Few registers
# a thread keep several programs on a multiprocessor, each with all its loads in flight, which is
# more than memory's latency asks for.
BLOCK = 1024
THREADS = 128
# What a masked block holds: 2 elements a thread. 8 of them, each access with its own address and
# mask, took three times the registers of the unmasked loop and left two programs on a
# multiprocessor instead of six.
EDGE = 256
# The reduce pass has one operand to keep in flight instead of four, so it takes 8 accesses of 16
# bytes a thread at a time (with half as many threads for half types), and half of that with masks.
REDUCE_BLOCK = 4 * BLOCK
REDUCE_EDGE = 2 * BLOCK
# Partial results that it adds up at a time.
PAIRS = 256
# A program spends about two microseconds on its row and the rule's constants, so pieces should be
# long; but every multiprocessor should get several rounds of the programs that it holds, or the
# last round leaves most of them idle. Their lengths are powers of two: the order of sums
# (csrc/core/sum_order.h) asks for that.
MIN_PIECE = 2 * BLOCK
MAX_PIECE = 32 * BLOCK
PROGRAMS_PER_PROCESSOR = 32


@dataclass
class Launch:
    """A run of pieces that one kernel serves."""

    types: tuple[torch.dtype, ...]
    variant: int
    first: int
    count: int

    @property
    def compute_type(self) -> torch.dtype:
        """What the rule computes in: double for double parameters, else float."""
        return torch.float64 if self.types[0] == torch.float64 else torch.float32


def piece_length(numel: int, processors: int) -> int:
    """How many elements a piece has at most, for ``numel`` elements in all."""
    wanted = numel // (processors * PROGRAMS_PER_PROCESSOR)
    return max(min(1 << max(wanted.bit_length() - 1, 0), MAX_PIECE), MIN_PIECE)


def cut(
    rows: Sequence[Row], variants: Sequence[int], length: int
) -> tuple[bytes, array[int], list[Launch]]:
    """Cuts rows into pieces and launches over them.

    Rows of the same types and variant share a launch; launches that read the same type of gradient
    stand together. What has no state yet is left out. ``variants`` are those of the groups.

    Returns:
        The pieces, the first and the number of those of each row, and the launches.
    """

    def key(index: int) -> tuple[str, ...]:
        row = rows[index]
        compute = row.types[0] == torch.float64
        return (str(row.types[1]), str(compute), *map(str, row.types), str(variants[row.group]))

    pieces: list[bytes] = []
    spans = array("q", bytes(16 * len(rows)))
    launches: list[Launch] = []
    for index in sorted((i for i, row in enumerate(rows) if row.step), key=key):
        row = rows[index]
        kind = row.types, variants[row.group]
        if not launches or (launches[-1].types, launches[-1].variant) != kind:
            launches.append(Launch(*kind, len(pieces), 0))
        begins = range(0, max(row.numel, 1), length)
        spans[2 * index], spans[2 * index + 1] = len(pieces), len(begins)
        pieces += (PIECE.pack(at, min(length, row.numel - at), index) for at in begins)
        launches[-1].count += len(begins)
    return b"".join(pieces), spans, launches


def merge_for_reduce(launches: Sequence[Launch]) -> list[Launch]:
    """Fewer launches: to the reduce pass only gradient and compute types matter."""
    merged: list[Launch] = []
    for launch in launches:
        last = merged[-1] if merged else None
        if last and (last.types[1], last.compute_type) == (launch.types[1], launch.compute_type):
            last.count += launch.count
        else:
            merged.append(Launch(launch.types, launch.variant, launch.first, launch.count))
    return merged
