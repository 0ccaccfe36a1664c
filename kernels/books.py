"""The bookkeeping of a step in Python, for where there is no extension: csrc/python/plan.cpp again.

What a step reads and writes, and whether that still holds. Asked of a thousand parameters in every
step, so it asks in as few calls as tell the truth.
"""

from __future__ import annotations

import math
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from fusedopt.kernels import launch
from fusedopt.kernels.groups import Groups, ParamGroups, ids
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

    Between steps it keeps none of the optimizer's tensors alive: what it remembers are ids,
    addresses and likenesses, to compare with those of what groups and state hold by then.

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
        # Of the step that has begun: what the rows describe, and what is kept alive with that.
        self._tensors: list[Tensor] = []
        self._kept: list[Any] = []
        self._read_state(slots, state)

    def _read_state(self, slots: Sequence[Slot], state: State) -> None:
        """Splits the slots into those that the kernels serve and those without state."""
        members = list(chain.from_iterable(self._groups.members))
        entries = {id(param): entry for param, entry in state.items()}
        params, states, counters = [], [], []
        self._group_of: list[int] = []
        self._state_counts: list[int] = []
        self._stateless: list[tuple[int, int]] = []
        own_entries = []
        for group, param, counter in slots:
            entry = entries.get(id(param), {})
            if id(param) in entries:
                own_entries.append(entry)
            tensors = [entry.get(name) for name in self._names(group)]
            fit = all(isinstance(each, Tensor) and _fits(each, param) for each in tensors)
            if counter is None or not fit:
                self._stateless.append((members.index(id(param)), group))
                continue
            params.append(param)
            counters.append(counter)
            states += tensors
            self._group_of.append(group)
            self._state_counts.append(len(tensors))
        self._key_ids, self._entry_ids = ids(state.keys()), ids(state.values())
        self._entry_places = _places(own_entries, state.values())
        self._value_ids = ids(_all_values(own_entries))
        self._steps = [(counter.data_ptr(), counter.dtype) for counter in counters]
        # Where to find what is watched: among all groups' parameters and the values of the state.
        place_of = {each: place for place, each in enumerate([*members, *self._value_ids])}
        # Counters that no state holds are ours to keep.
        self._hidden_counters = [each for each in counters if id(each) not in place_of]
        watched = [*params, *states, *(each for each in counters if id(each) in place_of)]
        self._watched_places = [place_of[id(each)] for each in watched]
        self._types = list(map(type, watched))
        self._addresses = list(map(_address_of, watched))
        self._likeness = Likeness(watched)
        self._written = _bounds([*params, *states])
        # What the rows take for granted about each gradient: until one is seen, that it is like its
        # parameter.
        self._grad_types = [param.dtype for param in params]
        self._grad_strides = [param.stride() for param in params]
        self._expect([], [])

    def _names(self, group: int) -> tuple[str, ...]:
        return launch.state_names(self._rule, self._groups.variants[group])

    def _check_state(self, group: int, entry: dict[str, Any], param: Tensor) -> None:
        """Raises ValueError for a state that does not fit: it hinders a step that needs it."""
        for name in self._names(group):
            tensor = entry.get(name)
            if isinstance(tensor, Tensor) and not _fits(tensor, param):
                raise ValueError(
                    f"state {name!r} of {self._groups.name_of(param)} is {_describe(tensor)}; "
                    f"expected a floating-point tensor like the parameter, {_describe(param)}. Load"
                    " a matching checkpoint, or delete optimizer.state[parameter]"
                )

    def begin(
        self, param_groups: ParamGroups, state: State
    ) -> tuple[bool, list[Tensor], list[Tensor]] | None:
        """Checks everything that the coming step relies on and takes in what has changed.

        Nothing but the books is touched. What the step works on is kept alive until ``end``.

        Returns:
            None when the books hold. Else (rebuild, missing, foreign): whether others have to be
            made; the parameters with a first gradient but without state; those that are left out of
            this step, because their gradient is sparse or of a type that no kernel reads.

        Raises:
            KeyError, TypeError: a group lacks one of torch's keys, or holds what is no number.
            ValueError: a gradient or a state of another shape or on another device than its
                parameter, or not floating; a limit that is not above 0.
        """
        self.end()
        changed = self._groups.refresh(param_groups)
        found = None if changed is None else self._find(param_groups, state)
        if found is None:
            return True, [], []
        members, watched = found
        if changed:
            self._group_words = encode_groups(self._groups.rows)
        missing, foreign = self._survey_stateless(members, state)
        params = watched[: len(self._group_of)]
        grads = [param.grad for param in params]
        self._keep(grads)
        addresses = self._known_grads(grads)
        if addresses is None:
            addresses, unread = self._survey_grads(params, grads)
            foreign += unread
        if not missing and self._writes_grads(addresses):
            # torch's rules go through the parameters in their order, so that results are defined.
            self._expect([], [])
            addresses = []
            own = [*params, *(members[place] for place, _ in self._stateless)]
            foreign = [param for param in own if param.grad is not None]
        self._tensors = watched
        self._grads = self._spread(addresses)
        return (False, missing, foreign) if missing or foreign else None

    def end(self) -> None:
        """Lets go of the step's tensors."""
        self._tensors, self._kept = [], []

    def _keep(self, tensors: Sequence[Any]) -> None:
        """Keeps what addresses are asked of alive until ``end``.

        Where other threads may put other memory under the tensors, that memory too; asking for it
        costs as much as all the rest.
        """
        self._kept.append(tensors)
        if threading.active_count() > 1:
            self._kept += [each.untyped_storage() for each in tensors if _has_memory(each)]

    def bump_versions(self) -> None:
        """Tells autograd that the step wrote parameters and states."""
        first = len(self._group_of)
        written = []
        for index, address in enumerate(self._grads):
            last = first + self._state_counts[index]
            if address != 0:
                written += [self._tensors[index], *self._tensors[first:last]]
            first = last
        torch.autograd.graph.increment_version(written)

    def _find(
        self, param_groups: ParamGroups, state: State
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """All parameters, and what the rows describe: parameters, states, counters.

        None when those are others than they were, or elsewhere.
        """
        by_group = [list(group.get("params", ())) for group in param_groups]
        if (
            list(map(ids, by_group)) != self._groups.members
            or not isinstance(state, dict)
            or ids(state.keys()) != self._key_ids
            or ids(state.values()) != self._entry_ids
        ):
            return None
        members = list(chain.from_iterable(by_group))
        entries = list(state.values())
        values = _all_values(entries[place] for place in self._entry_places)
        if ids(values) != self._value_ids:
            return None
        pool = [*members, *values]
        watched = [pool[place] for place in self._watched_places]
        self._keep(watched)
        if (
            list(map(type, watched)) == self._types
            and list(map(_address_of, watched)) == self._addresses
            and self._likeness.match(watched)
        ):
            return members, watched
        return None

    def _expect(self, active: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Remembers which parameters have gradients, and what those are like."""
        members = set(active)
        self._active = list(active)
        self._idle = [index for index in range(len(self._group_of)) if index not in members]
        self._expected = Likeness(grads)
        self._spans = list(map(_span, grads))

    def _known_grads(self, grads: Sequence[Tensor | None]) -> list[int] | None:
        """The addresses of the gradients if they are those of the last step in everything else."""
        if any(grads[index] is not None for index in self._idle):
            return None
        active: Any = [grads[index] for index in self._active]
        return list(map(_address_of, active)) if self._expected.match(active) else None

    def _survey_stateless(
        self, members: Sequence[Tensor], state: State
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of the parameters without state: (with a gradient, with one that no kernel reads)."""
        missing: list[Tensor] = []
        foreign: list[Tensor] = []
        for place, group in self._stateless:
            param = members[place]
            if param.grad is None:
                continue
            if not self._reads(param.grad, param):
                foreign.append(param)
                continue
            self._check_state(group, state.get(param, {}), param)
            missing.append(param)
        return missing, foreign

    def _writes_grads(self, addresses: Sequence[int]) -> bool:
        """Whether a gradient lies in memory that the step writes."""
        ends = [address + span for address, span in zip(addresses, self._spans, strict=True)]
        before = list(map(bisect_right, repeat(self._written), addresses))
        # Odd: behind the beginning of a tensor, before its end. Another at the end: one in between.
        return any(place & 1 for place in before) or before != list(
            map(bisect_left, repeat(self._written), ends)
        )

    def _reads(self, grad: Tensor, param: Tensor) -> bool:
        """Whether the kernels can read a gradient.

        Raises ValueError for one that cannot belong to the parameter.
        """
        if grad.layout != torch.strided or grad.is_neg() or grad._is_zerotensor():
            return False
        if not _fits(grad, param):
            raise ValueError(
                f"the gradient of {self._groups.name_of(param)} is {_describe(grad)}; expected a "
                f"floating-point tensor shaped like the parameter, {_describe(param)}. "
                "Set parameter.grad = None and run backward again"
            )
        return True

    def _survey_grads(
        self, params: Sequence[Tensor], all_grads: Sequence[Tensor | None]
    ) -> tuple[list[int], list[Tensor]]:
        """Looks at every gradient: (addresses, parameters whose gradient no kernel reads)."""
        active, grads, foreign = [], [], []
        types, strides = list(self._grad_types), list(self._grad_strides)
        for index, (param, grad) in enumerate(zip(params, all_grads, strict=True)):
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
        count = len(self._group_of)
        if len(addresses) == count and 0 not in addresses:
            return addresses
        column = [0] * count
        for index, address in zip(self._active, addresses, strict=True):
            column[index] = address or _NOWHERE
        return column

    def rows(self) -> list[Row]:
        """The parameters whose state exists, as the tables need them; of a step that has begun."""
        rows, first = [], len(self._group_of)
        for index, group in enumerate(self._group_of):
            last = first + self._state_counts[index]
            param, states = self._tensors[index], self._tensors[first:last]
            strides = [
                param.stride(),
                self._grad_strides[index],
                *(state.stride() for state in states),
            ]
            rows.append(
                Row(
                    self._addresses[index],
                    tuple(self._addresses[first:last]),
                    *self._steps[index],
                    layout_words(param.shape, strides),
                    param.numel(),
                    group,
                    self._groups.variants[group],
                    (param.dtype, self._grad_types[index], *(state.dtype for state in states)),
                )
            )
            first = last
        return rows

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


def _all_values(entries: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(_values_of, entries)))


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _places(objects: Iterable[Any], among: Iterable[Any]) -> list[int]:
    place_of = {id(each): place for place, each in enumerate(among)}
    return [place_of[id(each)] for each in objects]


def _fits(tensor: Tensor, param: Tensor) -> bool:
    """Whether a gradient or a state can belong to a parameter."""
    return (
        tensor.shape == param.shape
        and tensor.device == param.device
        and tensor.dtype in launch.TYPES
    )


def _span(tensor: Tensor) -> int:
    """How many bytes lie between a tensor's first and the end of its last element."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _bounds(tensors: Iterable[Tensor]) -> list[int]:
    """Where tensors begin and end, one after the other in memory; they do not overlap."""
    ranges = sorted((each.data_ptr(), each.data_ptr() + _span(each)) for each in tensors)
    return [bound for first, last in ranges if first < last for bound in (first, last)]


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
