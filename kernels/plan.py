"""The step plan in Python, for where there is no extension: csrc/python/plan.cpp over Triton.

It keeps the books: what a step reads and writes, and whether that still holds. Tables in device
memory and launches are launch.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from fusedopt.kernels import launch
from fusedopt.kernels.groups import Groups, ParamGroups, same
from fusedopt.kernels.launch import Tables
from fusedopt.kernels.layout import Strides, layout_words
from fusedopt.kernels.pieces import Row
from torch import Tensor

Slot = tuple[int, Tensor, Tensor | None]
State = Mapping[Tensor, Mapping[str, Any]]

# Called through map, which costs a third of a loop in Python.
_values_of: Any = dict.values
_address_of: Any = Tensor.data_ptr
_dtype_of: Any = attrgetter("dtype")
_size_of: Any = Tensor.size
_strides_of: Any = Tensor.stride
_device_of: Any = Tensor.get_device
_is_negated: Any = Tensor.is_neg
_bytes_of: Any = attrgetter("nbytes")


class TritonPlan:
    """What the steps of one optimizer's parameters on one device have in common; takes the steps.

    Args:
        rule: name of the rule, as in ``fusedopt.kernels``.
        device: where all parameters are.
        slots: (index of the group, parameter, counter of applied steps: a 0-dim float32 tensor on
            the device). A parameter whose counter is None or whose state is missing takes no part,
            and ``begin`` reports its first gradient.
        param_groups: the optimizer's groups.
        state: the optimizer's state; it is read, never written.

    Raises:
        ValueError: a counter or a state does not fit its parameter.
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
        self._device_index = -1 if self._device.type == "cpu" else self._device.index
        self._groups = Groups(self._rule, self._device, param_groups)
        self._read_state(slots, state)
        self._tables: Tables | None = None
        self._reduced = False

    def _read_state(self, slots: Sequence[Slot], state: State) -> None:
        """Splits the slots into those that the kernels serve and those without state."""
        self._params: list[Tensor] = []
        self._group_of: list[int] = []
        self._counters: list[Tensor] = []
        self._states: list[tuple[Tensor, ...]] = []
        self._stateless: list[Tensor] = []
        entries = []
        for index, (group, param, counter) in enumerate(slots):
            entry = state.get(param, {})
            names = launch.state_names(self._rule, self._groups.variants[group])
            tensors: tuple[Any, ...] = tuple(entry.get(name) for name in names)
            if counter is None or any(tensor is None for tensor in tensors):
                self._stateless.append(param)
                continue
            self._check_counter(index, counter)
            for name, tensor in zip(names, tensors, strict=True):
                self._check_state(name, tensor, param)
            self._params.append(param)
            self._group_of.append(group)
            self._counters.append(counter)
            self._states.append(tensors)
            entries.append(entry)
        self._state_keys = list(state.keys())
        self._state_entries = list(state.values())
        self._entries = entries
        self._entry_values = list(chain.from_iterable(map(_values_of, entries)))
        self._watched = [*self._params, *chain.from_iterable(self._states)]
        self._addresses = list(map(_address_of, self._watched))
        self._bytes = list(map(_bytes_of, self._params))
        self._sizes = list(map(_size_of, self._params))
        self._strides = Strides(map(_strides_of, self._params), self._params)
        # What the tables take for granted about each gradient: until one is seen, that it is like
        # its parameter.
        self._grad_types = [param.dtype for param in self._params]
        self._grad_strides = [param.stride() for param in self._params]
        self._activate([])

    def _check_counter(self, index: int, counter: Tensor) -> None:
        if counter.dtype != torch.float32 or counter.dim() != 0 or counter.device != self._device:
            raise ValueError(
                f"the counter of slot {index} is {_describe(counter)}; expected a 0-dim float32 "
                f"tensor on {self._device}"
            )

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

        Nothing of the model is touched.

        Returns:
            None when the plan holds. Else (rebuild, missing, foreign): whether another plan has to
            be made; the parameters with a first gradient but without state; those that this plan
            leaves out of this step, because their gradient is sparse or of a type that no kernel
            reads.

        Raises:
            ValueError: a gradient of another shape or on another device than its parameter, or not
                floating.
        """
        self._reduced = False
        changed = self._groups.refresh(param_groups)
        if changed is None or not self._holds(state):
            return True, [], []
        if self._tables is not None:
            for index in changed:
                self._tables.set_group(index, self._groups.rows[index])
        missing, foreign = self._survey_stateless()
        addresses = self._known_grads()
        if addresses is None:
            if list(map(_size_of, self._params)) != self._sizes:
                return True, [], []
            addresses, unread = self._survey_grads()
            foreign += unread
        self._current_tables().set_grads(self._spread(addresses))
        return (False, missing, foreign) if missing or foreign else None

    def _holds(self, state: State) -> bool:
        """Whether parameters and states are in the memory that this plan was made for."""
        return (
            same(state.keys(), self._state_keys)
            and same(state.values(), self._state_entries)
            and same(list(chain.from_iterable(map(_values_of, self._entries))), self._entry_values)
            and list(map(_address_of, self._watched)) == self._addresses
            and list(map(_bytes_of, self._params)) == self._bytes
            and self._strides.match(self._params)
        )

    def _activate(self, active: Sequence[int]) -> None:
        """Remembers which parameters have gradients, and what is expected of those."""
        members = set(active)
        self._active = list(active)
        self._active_params = [self._params[index] for index in active]
        self._idle_params = [
            param for index, param in enumerate(self._params) if index not in members
        ]
        self._active_sizes = [self._sizes[index] for index in active]
        self._active_types = [self._grad_types[index] for index in active]
        self._active_strides = Strides(
            (self._grad_strides[index] for index in active), self._active_params
        )

    def _known_grads(self) -> list[int] | None:
        """The addresses of the gradients if they are those of the last step in everything else.

        A few calls for all.
        """
        if any(param.grad is not None for param in self._idle_params):
            return None
        grads = [param.grad for param in self._active_params]
        try:
            addresses = list(map(_address_of, grads))
        except (TypeError, RuntimeError):  # one is None or sparse
            return None
        known = (
            list(map(_dtype_of, grads)) == self._active_types
            and list(map(_size_of, grads)) == self._active_sizes
            and self._active_strides.match(grads)
            and list(map(_device_of, grads)) == [self._device_index] * len(grads)
            and not any(map(_is_negated, grads))
        )
        return addresses if known else None

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
        active, addresses, foreign = [], [], []
        types, strides = list(self._grad_types), list(self._grad_strides)
        for index, param in enumerate(self._params):
            grad = param.grad
            if grad is None:
                continue
            if not self._reads(grad, param):
                foreign.append(param)
                continue
            active.append(index)
            addresses.append(grad.data_ptr())
            types[index], strides[index] = grad.dtype, grad.stride()
        if types != self._grad_types or strides != self._grad_strides:
            self._grad_types, self._grad_strides = types, strides
            self._tables = None
        self._activate(active)
        return addresses, foreign

    def _spread(self, addresses: list[int]) -> list[int]:
        """The addresses of the active gradients as a column for all rows, 0 for the others."""
        if len(self._active) == len(self._params) and 0 not in addresses:
            return addresses
        column = [0] * len(self._params)
        for index, address in zip(self._active, addresses, strict=True):
            # An empty tensor may have no memory, and 0 would mean that there is no gradient.
            column[index] = address or self._counters[index].data_ptr()
        return column

    def _current_tables(self) -> Tables:
        """The tables, made when there are none.

        A graph under capture gets its own, which no later step changes.
        """
        capturing = launch.capturing(self._device)
        if self._tables is None or capturing or self._tables.captured:
            rows = [self._row(index) for index in range(len(self._params))]
            self._tables = Tables(self._rule, self._device, rows, len(self._groups.rows))
            for index, row in enumerate(self._groups.rows):
                self._tables.set_group(index, row)
        return self._tables

    def _row(self, index: int) -> Row:
        param, states = self._params[index], self._states[index]
        strides = [param.stride(), self._grad_strides[index], *(state.stride() for state in states)]
        return Row(
            param.data_ptr(),
            tuple(state.data_ptr() for state in states),
            self._counters[index].data_ptr(),
            layout_words(param.shape, strides),
            param.numel(),
            self._group_of[index],
            self._groups.variants[self._group_of[index]],
            (param.dtype, self._grad_types[index], *(state.dtype for state in states)),
        )

    @property
    def control(self) -> Tensor:
        """What the last ``step`` left: float64 (unscale, clip, norm, nonfinite, skip)."""
        return self._begun().control

    def reduce(self, unscale: Tensor) -> Tensor:
        """The reduce pass under a multiplier.

        Returns:
            float64 (sum over tensors of their squared clipped norms, non-finite flag).
        """
        tables = self._begun()
        tables.reduce(unscale=unscale)
        self._reduced = True
        return tables.sums

    def apply(self, control: Tensor) -> None:
        """The apply pass under a control block.

        Parameters are clipped one by one as a ``reduce`` since ``begin`` found, if there was one.
        """
        self._begun().apply(control, controlled=True, clip_per_param=self._reduced)

    def step(
        self,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | float | None,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
    ) -> Tensor:
        """The whole step: one launch, or two when a norm or the non-finite flag is asked for.

        Returns the control block.
        """
        tables = self._begun()
        grad_scale, found_inf = self._bring(grad_scale), self._bring(found_inf)
        limited = any(row.max_grad_norm_per_param != math.inf for row in self._groups.rows)
        if max_grad_norm is None and not skip_nonfinite and not limited:
            tables.apply(
                tables.control, controlled=False, grad_scale=grad_scale, found_inf=found_inf
            )
            return tables.control
        tables.set_settings(math.inf if max_grad_norm is None else max_grad_norm, skip_nonfinite)
        tables.reduce(grad_scale=grad_scale, found_inf=found_inf, control=tables.control)
        tables.apply(tables.control, controlled=True, clip_per_param=limited)
        return tables.control

    def _bring(self, number: Tensor | float | None) -> Tensor | None:
        """A number of the scaler's as a tensor on the device."""
        if number is None or isinstance(number, Tensor):
            return number if number is None else number.to(self._device)
        return torch.tensor(number, dtype=torch.float64, device=self._device)

    def _begun(self) -> Tables:
        if self._tables is None:
            raise RuntimeError(
                "the plan was asked for a pass before begin(); call begin() first in every step"
            )
        return self._tables


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" ({tensor.layout})"
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}{layout}"
