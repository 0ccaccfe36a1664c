"""How a plan's rows are cut into pieces and launches, and the sizes of blocks, with their reasons.

Used by launch.py; numbers only, no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fusedopt.kernels import table

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


_TENSOR_WORDS = table.TENSOR_WORDS.value


class Row(NamedTuple):
    """One parameter: addresses, and what decides which launch serves it.

    ``types`` are those of param, grad and states.
    """

    param: int
    states: tuple[int, ...]
    step: int
    step_type: torch.dtype
    layout: tuple[int, ...]
    numel: int
    group: int
    variant: int
    types: tuple[torch.dtype, ...]


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


def describe(rows: Sequence[Row], length: int) -> tuple[list[int], list[Launch], int]:
    """The words of rows and pieces, the launches over the pieces, and how many pieces there are.

    Rows of the same types and variant share a launch; launches that read the same type of gradient
    stand together.
    """
    words = [0] * (len(rows) * _TENSOR_WORDS)
    pieces: list[int] = []
    launches: list[Launch] = []

    def key(index: int) -> tuple[str, ...]:
        row = rows[index]
        compute = row.types[0] == torch.float64
        return (str(row.types[1]), str(compute), *map(str, row.types), str(row.variant))

    count = 0
    for index in sorted(range(len(rows)), key=key):
        row = rows[index]
        if not launches or (launches[-1].types, launches[-1].variant) != (row.types, row.variant):
            launches.append(Launch(row.types, row.variant, count, 0))
        begins = range(0, max(row.numel, 1), length)
        at = index * _TENSOR_WORDS
        words[at + table.PARAM.value] = row.param
        for state, address in enumerate(row.states):
            words[at + table.STATE.value + state] = address
        words[at + table.STEP.value] = row.step
        words[at + table.STEP_TYPE.value] = table.NUMBER_TYPES[row.step_type]
        words[at + table.GROUP.value] = row.group
        words[at + table.PIECES.value] = len(begins)
        words[at + table.FIRST_PIECE.value] = count
        for begin in begins:
            pieces += (begin, min(length, row.numel - begin), index)
        launches[-1].count += len(begins)
        count += len(begins)
    return words + pieces, launches, count


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
