"""The bookkeeping of a step where there is no extension: csrc/python/plan.cpp in plain Python.

Every step reads groups, state and gradients anew; docs/performance.md says what that costs.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from fusedopt.kernels import launch
from fusedopt.kernels.groups import read_group
from fusedopt.kernels.rows import MAX_STATES, NUMBER_TYPES, GroupRow, Row
from torch import Tensor

from fusedopt import _routing
from fusedopt._control import describe
from fusedopt.backends.interface import Findings, Slot

# The address of what has no element: 0 would mean that there is no gradient.
_NOWHERE = 16
# How a tensor has to be beside its parameter, and what to do where it is not.
_GRADIENT = "shaped like", "Set parameter.grad = None and run backward again"
_STATE = "like", "Load a matching checkpoint, or delete optimizer.state[parameter]"


class _Found(NamedTuple):
    """A parameter and what the optimizer's state holds of it by now."""

    group: int
    place: int
    param: Tensor
    entry: Any
    states: list[Any]
    scalars: list[Any]
    counter: Any


class HostPlan:
    """What a step of one optimizer's parameters on one device works on; the twin of `_C.TablePlan`.

    Its contract stands in csrc/python/plan.h and table_plan.h. ``layouts``, ``rows``, ``write`` and
    ``bump_versions`` are about the step that has begun; between steps no tensor is kept alive.

    Args:
        rule: name of the rule, as in ``fusedopt.kernels``.
        device: where all parameters are.
        slots: (index of the group, parameter, counter of applied steps: a 0-dim float32 or float64
            tensor on the device, or None where the state lacks it).
        param_groups: the optimizer's groups.
        state: the optimizer's state; it is read, never written.
    """

    _found: list[_Found]
    _grads: list[Tensor | None]
    _addresses: list[int]
    _kept: list[Any]

    def __init__(
        self,
        rule: str,
        device: torch.device,
        slots: Sequence[Slot],
        param_groups: Any,
        state: dict[Tensor, Any],
    ) -> None:
        self._rule = launch.load_rule(rule)
        self._device = device
        self._groups = self._read_groups(param_groups)
        self._names = [launch.state_names(self._rule, group.variant) for group in self._groups]
        self._scalars = launch.scalar_names(self._rule)
        self._kinds = _kinds(self._groups, param_groups)
        members = _routing.members_of(param_groups)
        self._members = _routing.identities(members)
        place_of = {id(member.param): member.place for member in members}
        # Counters that no state holds are ours to keep.
        self._places = [place_of[id(param)] for _, param, _ in slots]
        self._hidden = [
            None if counter is _entries(state, param).get("step") else counter
            for _, param, counter in slots
        ]
        found = self._find(members, state)
        self._facts = list(map(_facts, found))
        # Whether the state of each exists.
        self._ready = [
            slot.counter is not None
            and all(_fits(each, slot.param) for each in slot.states)
            and all(_is_scalar(each, device) for each in slot.scalars)
            for slot in found
        ]
        # What the rows take for granted about each gradient: until one is seen, that it is like its
        # parameter.
        self._likeness = [(slot.param.dtype, slot.param.stride()) for slot in found]
        self.rows_version = 0
        self.end()

    def begin(self, param_groups: Any, state: Any) -> Findings | None:
        """Checks everything that the coming step relies on and keeps it alive until ``end``.

        Returns:
            None when the plan holds. Else (rebuild, missing, foreign): whether others have to be
            made; the parameters with a first gradient but without state; those that are left out of
            this step, because no kernel reads their gradient or the step writes its memory.

        Raises:
            KeyError, TypeError, ValueError: for groups, gradients and state that do not fit, before
                anything has changed.
        """
        self.end()
        # Comes first, because it may run code of the caller's and so change anything.
        groups = self._read_groups(param_groups)
        members = _routing.members_of(param_groups)
        if (
            _kinds(groups, param_groups) != self._kinds
            or _routing.identities(members) != self._members
            or not isinstance(state, dict)
        ):
            return True, [], []
        found = self._find(members, state)
        # Other threads may put other memory under the tensors.
        self._kept = [
            each.untyped_storage()
            for slot in found
            for each in (slot.param, *slot.states, *slot.scalars, slot.counter)
            if _is_strided(each)
        ]
        # One by one: what thousands of them leave behind would call the garbage collector.
        if any(map(operator.ne, map(_facts, found), self._facts)):
            return True, [], []
        self._groups, self._found = groups, found
        self._grads = [slot.param.grad for slot in found]
        missing, foreign = self._take_grads()
        return (False, missing, foreign) if missing or foreign else None

    def end(self) -> None:
        """Lets go of the step's tensors."""
        self._found, self._grads, self._addresses, self._kept = [], [], [], []

    def _read_groups(self, param_groups: Any) -> list[GroupRow]:
        _routing.members_of(param_groups)  # raises for what is none
        return [
            read_group(self._rule, self._device, index, group)
            for index, group in enumerate(param_groups)
        ]

    def _find(self, members: Sequence[_routing.Member], state: dict[Tensor, Any]) -> list[_Found]:
        """What groups and state hold of our parameters."""
        found = []
        for place, hidden in zip(self._places, self._hidden, strict=True):
            member = members[place]
            entries = _entries(state, member.param)
            states = [entries.get(name) for name in self._names[member.group]]
            scalars = [entries.get(name) for name in self._scalars]
            counter = entries.get("step") if hidden is None else hidden
            found.append(_Found(*member, state.get(member.param), states, scalars, counter))
        return found

    def _take_grads(self) -> tuple[list[Tensor], list[Tensor]]:
        """Looks at every gradient: (parameters that lack state, those that the step leaves out)."""
        missing, foreign, sharing = [], [], []
        likeness = list(self._likeness)
        written = {storage.data_ptr() for storage in self._kept}
        for index, (slot, grad) in enumerate(zip(self._found, self._grads, strict=True)):
            self._addresses.append(0)
            if grad is None:
                continue
            if grad.layout != torch.strided or grad.is_neg() or grad._is_zerotensor():
                foreign.append(slot.param)
                continue
            self._require_fit("the gradient", grad, slot, *_GRADIENT)
            if not self._ready[index]:
                for name, state in zip(self._names[slot.group], slot.states, strict=True):
                    if isinstance(state, Tensor):
                        self._require_fit(f"state {name!r}", state, slot, *_STATE)
                missing.append(slot.param)
            storage = grad.untyped_storage()
            self._kept.append(storage)
            if storage.data_ptr() in written:
                sharing.append(grad)
            likeness[index] = grad.dtype, grad.stride()
            self._addresses[-1] = grad.data_ptr() or _NOWHERE
        if sharing and self._writes(sharing):
            # torch's rules go through the parameters in their order, so that results are defined.
            self._addresses = [0] * len(self._found)
            foreign = [slot.param for slot in self._found if slot.param.grad is not None]
        self.rows_version += likeness != self._likeness
        self._likeness = likeness
        return missing, foreign

    def _require_fit(self, what: str, tensor: Tensor, slot: _Found, like: str, remedy: str) -> None:
        """Raises ValueError for a gradient or state that cannot belong to its parameter."""
        if _fits(tensor, slot.param):
            return
        before = sum(group < slot.group for group, _, _ in self._members)
        raise ValueError(
            f"{what} of parameter {slot.place - before} of param group {slot.group} is"
            f" {describe(tensor)}; expected a floating-point tensor {like} the parameter,"
            f" {describe(slot.param)}. {remedy}"
        )

    def _writes(self, grads: Iterable[Tensor]) -> bool:
        """Whether one of the gradients lies in memory that the step writes."""
        owners = [
            (slot.param, [slot.param, *(slot.states if ready else ())])
            for slot, ready in zip(self._found, self._ready, strict=True)
        ]
        shared = _routing.sharing_memory([*owners, *((grad, [grad]) for grad in grads)])
        return any(param in shared for param, _ in owners)

    def bump_versions(self) -> None:
        """Tells autograd that the step wrote parameters and states."""
        written = []
        for slot, address in zip(self._found, self._addresses, strict=True):
            if address != 0:
                written += [slot.param, *slot.states]
        torch.autograd.graph.increment_version(written)

    def layouts(self) -> bytes:
        """The layouts of all rows, one behind the other."""
        return self._describe(0)[1]

    def rows(self, layouts: int) -> bytes:
        """The TensorRows, for layouts at that address."""
        return self._describe(layouts)[0]

    def _describe(self, address: int) -> tuple[bytes, bytes]:
        rows, layouts = [], array("q")
        for slot, ready, like in zip(self._found, self._ready, self._likeness, strict=True):
            param, (grad_type, grad_stride) = slot.param, like
            states, counter = (slot.states, slot.counter) if ready else ([], None)
            # The last operands are the scalars.
            scalars = slot.scalars if ready else []
            unused = MAX_STATES - len(states) - len(scalars)
            strides = [param.stride(), grad_stride, *(state.stride() for state in states)]
            layout = layout_words(param.shape, strides)
            row = Row(
                param.data_ptr(),
                (*map(_address, states), *(0,) * unused, *map(_address, scalars)),
                0 if counter is None else counter.data_ptr(),
                torch.float32 if counter is None else counter.dtype,
                address + 8 * len(layouts) if layout else 0,
                param.numel(),
                slot.group,
                (
                    param.dtype,
                    grad_type,
                    *(state.dtype for state in states),
                    *(param.dtype,) * unused,
                    *(scalar.dtype for scalar in scalars),
                ),
            )
            rows.append(row.pack())
            layouts.extend(layout)
        return b"".join(rows), layouts.tobytes()

    def write(self, words: array[int]) -> tuple[int, int]:
        """Brings words up to this step: GroupRows, then the gradients' addresses.

        Returns:
            The range [first, last) that was written; (0, 0) when nothing changed.
        """
        wanted = array("q", b"".join(group.pack() for group in self._groups))
        wanted.extend(self._addresses)
        if words[: len(wanted)] == wanted:
            return 0, 0
        words[: len(wanted)] = wanted
        return 0, len(wanted)

    def needs_reduce(self, max_grad_norm: float | None, skip_nonfinite: bool) -> bool:
        """Whether a step with these settings needs the reduce pass."""
        limits = (group.max_grad_norm_per_param for group in self._groups)
        return max_grad_norm is not None or skip_nonfinite or any(map(math.isfinite, limits))


def layout_words(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The words of a row's Layout; none where every operand is dense in the same order."""
    dims = [dim for dim, size in enumerate(shape) if size != 1]
    sizes = [shape[dim] for dim in dims]
    kept = [[stride[dim] for dim in dims] for stride in strides]
    if 0 in sizes or (all(stride == kept[0] for stride in kept) and _is_dense(sizes, kept[0])):
        return ()
    unused = (0,) * (len(dims) * (2 + MAX_STATES - len(strides)))
    return (len(dims), *sizes, *chain.from_iterable(kept), *unused)


def _is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides, in some order of the dimensions, number the elements without gaps."""
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if stride != expected:
            return False
        expected *= size
    return True


def _entries(state: dict[Tensor, Any], param: Tensor) -> dict[str, Any]:
    entries = state.get(param)
    return entries if isinstance(entries, dict) else {}


def _kinds(groups: list[GroupRow], param_groups: Any) -> list[tuple[int, bool, bool]]:
    """What a plan is made for: the variants, whether a graph may capture it, the kinds of dicts."""
    return [
        (row.variant, bool(group.get("capturable")), type(group).__getitem__ is dict.__getitem__)
        for row, group in zip(groups, param_groups, strict=True)
    ]


def _is_strided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _facts(slot: _Found) -> Any:
    """What must stay as it is, or another plan has to be made; keeps nothing alive."""
    return id(slot.entry), [
        (id(each), each.data_ptr(), each.dtype, each.shape, each.stride(), each.is_neg())
        if _is_strided(each)
        else id(each)
        for each in (slot.param, *slot.states, *slot.scalars, slot.counter)
    ]


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _is_scalar(value: Any, device: torch.device) -> bool:
    """Whether kernels advance it: whoever hands out the counters has replaced what they do not."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 0
        and value.device == device
        and value.dtype in (torch.float32, torch.float64)
    )


def _fits(tensor: Any, param: Tensor) -> bool:
    """Whether a gradient or a state is a tensor that can belong to a parameter."""
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == param.shape
        and tensor.device == param.device
        and tensor.dtype in NUMBER_TYPES
    )
