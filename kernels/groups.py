"""Param groups as the kernels read them: numbers and limits, read again every step.

csrc/python/groups.cpp in Python, used by the Python books.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from fusedopt.kernels import table
from torch import Tensor

from fusedopt._routing import members_of

ParamGroups = Sequence[Mapping[str, Any]]

# What torch asks for its truth only, although rules read it as 0 or 1.
_FLAGS = ("maximize", "nesterov", "decoupled_weight_decay")
# Whoever replaced a group may know nothing of our key; torch's must all be there.
_OPTIONAL = "decoupled_weight_decay"


class GroupRow(NamedTuple):
    """One group: hyperparameters in the rule's order, and limits (infinity: none).

    ``lr`` is the address and type of a learning rate on the device, read there in place of the
    first hyperparameter.
    """

    hyper: tuple[float, ...]
    max_grad_value: float
    max_grad_norm_per_param: float
    lr: tuple[int, torch.dtype] | None


def ids(objects: Iterable[Any]) -> list[int]:
    """What identifies objects that are alive, without keeping them so."""
    return list(map(id, objects))


class Groups:
    """The groups of one optimizer, for one rule on one device.

    Attributes:
        members: the ids of each group's parameters when this was made.
        rows: a GroupRow for each group.
        variants: which variant of the rule each group asks for.

    Raises:
        KeyError: a group lacks one of torch's keys.
        TypeError: a hyperparameter is no number.
        ValueError: a hyperparameter is a tensor of several elements, or a limit is not above 0.
    """

    def __init__(self, rule: ModuleType, device: torch.device, param_groups: ParamGroups) -> None:
        self._rule = rule
        self._device = device
        names = dict.fromkeys(name.partition(".")[0] for name in (*rule.HYPER, *rule.VARIANTS))
        self._needed = names.keys() - {_OPTIONAL}
        self._keys = (*names, "max_grad_value", "max_grad_norm_per_param")
        members_of(param_groups)  # raises for what is none
        self.members = [ids(group["params"]) for group in param_groups]
        self._values = [self._read(group) for group in param_groups]
        self.variants = [self._variant(i, group) for i, group in enumerate(param_groups)]
        self._made_for = list(map(_made_for, param_groups))
        self.rows = [self._resolve(i, group) for i, group in enumerate(param_groups)]

    def refresh(self, param_groups: ParamGroups) -> bool | None:
        """Whether any number has changed; None when what the plan was made for has."""
        if not isinstance(param_groups, (list, tuple)) or len(param_groups) != len(self.members):
            return None
        all_values, rows = list(self._values), list(self.rows)
        for index, group in enumerate(param_groups):
            if not isinstance(group, dict):
                return None
            if _made_for(group) != self._made_for[index]:
                return None
            values = self._read(group)
            if values is not None and values == self._values[index]:
                continue
            if self._variant(index, group) != self.variants[index]:
                return None
            all_values[index] = values
            rows[index] = self._resolve(index, group)
        # Only now: a value that is refused must be found again in the next step.
        changed = rows != self.rows
        self._values, self.rows = all_values, rows
        return changed

    def name_of(self, param: Tensor) -> str:
        """What messages call a parameter."""
        for group, members in enumerate(self.members):
            if id(param) in members:
                return f"parameter {members.index(id(param))} of param group {group}"
        return "a parameter of no param group"

    def _read(self, group: Mapping[str, Any]) -> list[Any] | None:
        """The values of a group; None where one is missing or may change in place."""
        values = [group.get(key) for key in self._keys]
        fixed = group.keys() >= self._needed and not any(map(_may_change, values))
        return values if fixed else None

    def _variant(self, index: int, group: Mapping[str, Any]) -> int:
        flags = (bool(_value(index, group, name)) for name in self._rule.VARIANTS)
        return sum(1 << bit for bit, flag in enumerate(flags) if flag)

    def _resolve(self, index: int, group: Mapping[str, Any]) -> GroupRow:
        lr = self._lr_on_device(group)
        names = self._rule.HYPER if lr is None else self._rule.HYPER[1:]
        hyper = [_number(index, group, name) for name in names]
        if lr is not None:
            hyper.insert(0, 0.0)
        return GroupRow(
            tuple(hyper),
            _limit(index, group, "max_grad_value"),
            _limit(index, group, "max_grad_norm_per_param"),
            lr,
        )

    def _lr_on_device(self, group: Mapping[str, Any]) -> tuple[int, torch.dtype] | None:
        lr = group.get("lr")
        if not isinstance(lr, Tensor) or lr.device != self._device or lr.device.type == "cpu":
            return None
        return (
            (lr.data_ptr(), lr.dtype)
            if lr.numel() == 1 and lr.dtype in table.NUMBER_TYPES
            else None
        )


def _made_for(group: Mapping[str, Any]) -> tuple[bool, bool]:
    """What was checked when a plan was made: whether a graph may capture it, the kind of dict."""
    return bool(group.get("capturable")), type(group).__getitem__ is dict.__getitem__


def _may_change(value: Any) -> bool:
    """Whether a value can become another in place: a tensor, a list, a tuple that holds one."""
    if isinstance(value, tuple):
        return any(map(_may_change, value))
    return not isinstance(value, (int, float, type(None)))


def _value(index: int, group: Mapping[str, Any], name: str) -> Any:
    """What the name of a rule stands for: what is at a key, or an item of that."""
    key, _, item = name.partition(".")
    if key not in group:
        if key == _OPTIONAL:
            return False
        raise KeyError(
            f"param group {index} has no {key!r}; add groups with add_param_group, which fills in "
            "the defaults"
        )
    if not item:
        return group[key]
    try:
        first, second = group[key]
        return second if item == "1" else first
    except (TypeError, ValueError):
        raise TypeError(
            f"{key!r} of param group {index} is {group[key]!r}; expected 2 numbers"
        ) from None


def _number(index: int, group: Mapping[str, Any], name: str) -> float:
    value = _value(index, group, name)
    if name in _FLAGS:
        return float(bool(value))
    return _to_float(value, f"{name.partition('.')[0]!r} of param group {index}")


def _limit(index: int, group: Mapping[str, Any], key: str) -> float:
    """A limit of a group; infinity where there is none."""
    value = group.get(key)
    if value is None:
        return math.inf
    what = f"{key!r} of param group {index}"
    limit = _to_float(value, what)
    if not limit > 0.0:
        raise ValueError(f"{what} is {limit:f}; expected a number above 0, or None for no limit")
    return limit


def _to_float(value: Any, what: str) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{what} is a tensor of {value.numel()} elements; expected a number or a tensor of "
                "one element"
            )
        return float(value.item())
    try:
        return math.ldexp(value, 0)  # float() would take text
    except OverflowError:
        raise ValueError(
            f"{what} is too large for a float; expected a number of at most 1.8e308"
        ) from None
    except TypeError:
        raise TypeError(
            f"{what} is {value!r}; expected a number or a tensor of one element"
        ) from None
