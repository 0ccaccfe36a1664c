"""How tensors lie in memory: the words that the kernels' element path reads, and whether they hold.

Used by the Python books.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

try:
    # What torch.compile asks before it runs compiled code: one call for all tensors, in C++.
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None


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


class Likeness:
    """What tensors were like in everything but their addresses; holds none of them.

    That is sizes, strides, number type, device, and whether they are sparse, negated views or
    inference tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards = _make_guards(tensors)
        self._facts = list(map(_facts, tensors))

    def match(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the tensors are the same in all this, one by one; None never is."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        # The guards also tell whether autocast and the like are as they were.
        return list(map(_facts, tensors)) == self._facts


def _facts(tensor: Tensor | None) -> Any:
    """What a tensor is like; equal for equal ones."""
    if tensor is None:
        return None
    if tensor.layout != torch.strided:
        return tensor.layout
    odd = tensor.is_neg() or tensor._is_zerotensor() or tensor.is_inference()
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, odd


def _make_guards(tensors: Sequence[Tensor]) -> Any:
    """The call for all tensors at once, where this torch has it and it takes these tensors.

    It does not take the same tensor twice, as two parameters may have for a gradient.
    """
    if _TensorGuards is None or not tensors:
        return None
    try:
        guards = _TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
    except (RuntimeError, TypeError, ValueError):
        return None
    return guards if guards.check(*tensors) is True else None
