"""How tensors lie in memory: the words that the kernels' element path reads, and whether they hold.

Used by the plan.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

# Called through map, which costs a third of a loop in Python.
_is_contiguous: Any = Tensor.is_contiguous
_strides_of: Any = Tensor.stride


def layout_words(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The words of a row's layout; none where every operand is dense in the same order."""
    dims = [dim for dim, size in enumerate(shape) if size != 1]
    sizes = [shape[dim] for dim in dims]
    kept = [[stride[dim] for dim in dims] for stride in strides]
    if 0 in sizes or (all(stride == kept[0] for stride in kept) and is_dense(sizes, kept[0])):
        return ()
    return (len(dims), *sizes, *chain.from_iterable(kept))


def is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides, in some order of the dimensions, number the elements without gaps."""
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if stride != expected:
            return False
        expected *= size
    return True


class Strides:
    """The strides that tensors of known shapes must have, asked in the cheapest way that tells."""

    def __init__(self, strides: Iterable[tuple[int, ...]], likes: Sequence[Tensor]) -> None:
        self._strides = list(strides)
        self._contiguous = all(
            stride == torch.empty(like.shape, device="meta").stride()
            for stride, like in zip(self._strides, likes, strict=True)
        )

    def match(self, tensors: Sequence[Any]) -> bool:
        """Whether the tensors have the strides, one by one."""
        if self._contiguous:
            return all(map(_is_contiguous, tensors))
        return list(map(_strides_of, tensors)) == self._strides
