"""The bookkeeping of a step in Python, for where there is no extension: csrc/python/plan.cpp again.

What a step reads and writes, and whether that still holds. Asked of a thousand parameters in every
step, so it asks in as few calls as tell the truth.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from fusedopt.kernels import launch
from fusedopt.kernels.groups import Groups, ParamGroups, same
from fusedopt.kernels.layout import Likeness, layout_words
from fusedopt.kernels.live import bring_up, encode_groups
from fusedopt.kernels.pieces import Row
from torch import Tensor

Slot = tuple[int, Tensor, Tensor | None]
State = Mapping[Tensor, dict[str, Any]]

# The address of what has no element: 0 would mean that there is no gradient.
_NOWHERE = 16

# Called through map, which costs a third of a loop in Python.
_values_of: Any = dict.values
_address_of: Any = Tensor.data_ptr


class Books:
    """What is known of one optimizer's parameters on one device; the twin of `_C.TablePlan`.

    Args:
        rule: name of the rule, as in ``fusedopt.kernels``.
        device: where all parameters are.
        slots: (index of the group, parameter, counter of applied steps: a 0-dim float32 or float64
            tensor on the device, or None). A parameter whose state or counter is missing takes no
            part, and ``begin`` reports its first gradient.
        param_groups: the optimizer's groups.
        state: the optimizer's state; it is read, never written.

    Attributes:
        rows_version: another number after every ``begin`` that changed what ``rows`` returns.

    Raises:
        ValueError: a state does not fit its parameter.
    """

    def __init__(
        self,
        rule: str,
        device: torch.device,
        slots: Sequence[Slot],
        param_groups: ParamGroups,
        state: State,
    ) -> None:
        self._device = device
        self._rule = launch.load_rule(rule)
        self._groups = Groups(self._rule, device, param_groups)
        self._group_words = encode_groups(self._groups.rows)
        self.rows_version = 0
        self._read_state(slots, state)

    def _read_state(self, slots: Sequence[Slot], state: State) -> None:
        """Splits the slots into those that the kernels serve and those without state."""
        self._params: list[Tensor] = []
        self._group_of: list[int] = []
        self._counters: list[Tensor] = []
        self._states: list[tuple[Tensor, ...]] = []
        self._stateless: list[Tensor] = []
        self._entries: list[dict[str, Any]] = []
        for group, param, counter in slots:
            entry = state.get(param, {})
            names = launch.state_names(self._rule, self._groups.variants[group])
            tensors: tuple[Any, ...] = tuple(entry.get(name) for name in names)
            if counter is None or not all(isinstance(tensor, Tensor) for tensor in tensors):
                self._stateless.append(param)
                continue
            for name, tensor in zip(names, tensors, strict=True):
                self._check_state(name, tensor, param)
            self._params.append(param)
            self._group_of.append(group)
            self._counters.append(counter)
            self._states.append(tensors)
            self._entries.append(entry)
        self._state_keys, self._state_entries = list(state.keys()), list(state.values())
        self._entry_values = list(chain.from_iterable(map(_values_of, self._entries)))
        self._watched = [*self._params, *chain.from_iterable(self._states), *self._counters]
        self._addresses = list(map(_address_of, self._watched))
        self._likeness = Likeness(self._params)
        # What the rows take for granted about each gradient: until one is seen, that it is like its
        # parameter.
        self._grad_types = [param.dtype for param in self._params]
        self._grad_strides = [param.stride() for param in self._params]
        self._expect([], [])

    def _check_state(self, name: str, tensor: Tensor, param: Tensor) -> None:
        fits = tensor.shape == param.shape and tensor.device == param.device
        if not fits or tensor.dtype not in launch.TYPES or tensor.layout != torch.strided:
            raise ValueError(
                f"state {name!r} of {self._groups.name_of(param)} is {_describe(tensor)}; expected "
                f"a floating-point tensor like the parameter, {_describe(param)}. Load a matching "
                "checkpoint, or delete optimizer.state[parameter]"
            )

    def begin(
        self, param_groups: ParamGroups, state: State
    ) -> tuple[bool, list[Tensor], list[Tensor]] | None:
        """Checks everything that the coming step relies on and takes in what has changed.

        Nothing but the books is touched.

        Returns:
            None when the books hold. Else (rebuild, missing, foreign): whether others have to be
            made; the parameters with a first gradient but without state; those that are left out of
            this step, because their gradient is sparse or of a type that no kernel reads.

        Raises:
            KeyError, TypeError: a group lacks one of torch's keys, or holds what is no number.
            ValueError: a gradient of another shape or on another device than its parameter, or not
                floating; a limit that is not above 0.
        """
        changed = self._groups.refresh(param_groups)
        if changed is None or not self._holds(state):
            return True, [], []
        if changed:
            self._group_words = encode_groups(self._groups.rows)
        missing, foreign = self._survey_stateless()
        addresses = self._known_grads()
        if addresses is None:
            addresses, unread = self._survey_grads()
            foreign += unread
        self._grads = self._spread(addresses)
        return (False, missing, foreign) if missing or foreign else None

    def _holds(self, state: State) -> bool:
        """Whether parameters, states and counters are in the memory that the rows describe.

        Of states and counters only the address is asked: a tensor that got other strides or another
        type without getting other memory costs as much again to notice.
        """
        return (
            same(state.keys(), self._state_keys)
            and same(state.values(), self._state_entries)
            and same(list(chain.from_iterable(map(_values_of, self._entries))), self._entry_values)
            and list(map(_address_of, self._watched)) == self._addresses
            and self._likeness.match(self._params)
        )

    def _expect(self, active: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Remembers which parameters have gradients, and what those are like."""
        members = set(active)
        self._active = list(active)
        self._active_params = [self._params[index] for index in active]
        self._idle_params = [
            param for index, param in enumerate(self._params) if index not in members
        ]
        self._expected = Likeness(grads)

    def _known_grads(self) -> list[int] | None:
        """The addresses of the gradients if they are those of the last step in everything else."""
        if any(param.grad is not None for param in self._idle_params):
            return None
        grads: Any = [param.grad for param in self._active_params]
        return list(map(_address_of, grads)) if self._expected.match(grads) else None

    def _survey_stateless(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the parameters without state: (with a gradient, with one that no kernel reads)."""
        missing: list[Tensor] = []
        foreign: list[Tensor] = []
        for param in self._stateless:
            if param.grad is not None:
                (missing if self._reads(param.grad, param) else foreign).append(param)
        return missing, foreign

    def _reads(self, grad: Tensor, param: Tensor) -> bool:
        """Whether the kernels can read a gradient.

        Raises ValueError for one that cannot belong to the parameter.
        """
        if grad.layout != torch.strided or grad.is_neg() or grad._is_zerotensor():
            return False
        if (
            grad.shape != param.shape
            or grad.device != param.device
            or grad.dtype not in launch.TYPES
        ):
            raise ValueError(
                f"the gradient of {self._groups.name_of(param)} is {_describe(grad)}; expected a "
                f"floating-point tensor shaped like the parameter, {_describe(param)}. "
                "Set parameter.grad = None and run backward again"
            )
        return True

    def _survey_grads(self) -> tuple[list[int], list[Tensor]]:
        """Looks at every gradient: (addresses, parameters whose gradient no kernel reads)."""
        active, grads, foreign = [], [], []
        types, strides = list(self._grad_types), list(self._grad_strides)
        for index, param in enumerate(self._params):
            grad = param.grad
            if grad is None:
                continue
            if not self._reads(grad, param):
                foreign.append(param)
                continue
            active.append(index)
            grads.append(grad)
            types[index], strides[index] = grad.dtype, grad.stride()
        if types != self._grad_types or strides != self._grad_strides:
            self._grad_types, self._grad_strides = types, strides
            self.rows_version += 1
        self._expect(active, grads)
        return list(map(_address_of, grads)), foreign

    def _spread(self, addresses: list[int]) -> list[int]:
        """The addresses of the active gradients as a column for all rows, 0 for the others."""
        if len(self._active) == len(self._params) and 0 not in addresses:
            return addresses
        column = [0] * len(self._params)
        for index, address in zip(self._active, addresses, strict=True):
            column[index] = address or _NOWHERE
        return column

    def rows(self) -> list[Row]:
        """The parameters whose state exists, as the tables need them."""
        return list(map(self._row, range(len(self._params))))

    def _row(self, index: int) -> Row:
        param, states = self._params[index], self._states[index]
        strides = [param.stride(), self._grad_strides[index], *(state.stride() for state in states)]
        return Row(
            param.data_ptr(),
            tuple(state.data_ptr() for state in states),
            self._counters[index].data_ptr(),
            self._counters[index].dtype,
            layout_words(param.shape, strides),
            param.numel(),
            self._group_of[index],
            self._groups.variants[self._group_of[index]],
            (param.dtype, self._grad_types[index], *(state.dtype for state in states)),
        )

    def write(self, words: array[int]) -> tuple[int, int]:
        """Brings words up to the step that began last: group rows, then the gradients' addresses.

        Returns:
            The range [first, last) of words that changed.
        """
        return bring_up(words, self._group_words + array("q", self._grads))

    def needs_reduce(self, max_grad_norm: float | None, skip_nonfinite: bool) -> bool:
        """Whether a step with these settings needs the reduce pass."""
        limits = (row.max_grad_norm_per_param for row in self._groups.rows)
        return max_grad_norm is not None or skip_nonfinite or any(map(math.isfinite, limits))


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
