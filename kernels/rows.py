"""The structs of csrc/core/table.h as Python packs and reads them.

Rows and groups come packed from the extension where there is one; pieces are always cut here. On
the device table.py reads them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch

MAX_STATES = 4
MAX_HYPER = 12
OPERANDS = 2 + MAX_STATES

# In the order of DType.
NUMBER_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NUMBER_OF = {dtype: number for number, dtype in enumerate(NUMBER_TYPES)}

TENSOR = struct.Struct(f"={OPERANDS * 'qB7x'}3qiB3x")
GROUP = struct.Struct(f"={MAX_HYPER}d2dqB3xi")
PIECE = struct.Struct("=qii")


class Row(NamedTuple):
    """A TensorRow: one parameter's addresses, and what decides which launch serves it.

    ``step`` is 0 while the parameter's state does not exist, ``layout`` where all operands are
    dense in the same order. The last of MAX_STATES ``states`` are the rule's scalars. ``types`` are
    those of param, grad and states. The address of the gradient stands elsewhere.
    """

    param: int
    states: tuple[int, ...]
    step: int
    step_type: torch.dtype
    layout: int
    numel: int
    group: int
    types: tuple[torch.dtype, ...]

    def pack(self) -> bytes:
        """The struct; states that are left out are null and of the parameter's type."""
        states = (*self.states, *(0,) * (MAX_STATES - len(self.states)))
        types = (*self.types, *(self.types[0],) * (OPERANDS - len(self.types)))
        operands = zip((self.param, 0, *states), map(_NUMBER_OF.__getitem__, types), strict=True)
        rest = (self.step, self.layout, self.numel, self.group, _NUMBER_OF[self.step_type])
        return TENSOR.pack(*chain.from_iterable(operands), *rest)

    @classmethod
    def unpack(cls, packed: bytes) -> Iterator[Row]:
        """Those of structs that stand one behind the other."""
        for words in TENSOR.iter_unpack(packed):
            operands, (step, layout, numel, group, number) = words[:-5], words[-5:]
            param, _, *states = operands[::2]
            types = tuple(NUMBER_TYPES[each] for each in operands[1::2])
            yield cls(param, tuple(states), step, NUMBER_TYPES[number], layout, numel, group, types)


class GroupRow(NamedTuple):
    """A GroupRow: hyperparameters in the rule's order, limits (infinity: none), and the variant.

    ``lr`` is the address and type of a learning rate on the device, read there in place of the
    first hyperparameter.
    """

    hyper: tuple[float, ...]
    max_grad_value: float
    max_grad_norm_per_param: float
    lr: tuple[int, torch.dtype] | None = None
    variant: int = 0

    def pack(self) -> bytes:
        """The struct."""
        unused = (0.0,) * (MAX_HYPER - len(self.hyper))
        address, dtype = self.lr or (0, NUMBER_TYPES[0])
        limits = (self.max_grad_value, self.max_grad_norm_per_param)
        return GROUP.pack(*self.hyper, *unused, *limits, address, _NUMBER_OF[dtype], self.variant)


def variant_of(packed: bytes | array[int], group: int) -> int:
    """The variant of one of the GroupRows that stand one behind the other."""
    variant: int = GROUP.unpack_from(packed, group * GROUP.size)[-1]
    return variant
