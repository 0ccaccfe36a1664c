"""Param groups as the kernels read them: numbers and limits, read again every step.

csrc/python/groups.cpp in Python, used by the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import is_
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ParamGroups = Sequence[Mapping[str, Any]]

_LR_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class GroupRow(NamedTuple):
    """One group: hyperparameters in the rule's order, and limits (infinity: none).

    ``lr`` is the address and type of a learning rate on the device, read there in place of the
    first hyperparameter.
    """

    hyper: tuple[float, ...]
    max_grad_value: float
    max_grad_norm_per_param: float
    lr: tuple[int, torch.dtype] | None


def same(now: Any, then: Sequence[Any]) -> bool:
    """Whether two collections hold the same objects in the same order.

    Comparing tensors by value would synchronise.
    """
    return len(now) == len(then) and all(map(is_, now, then))


class Groups:
    """The groups of one optimizer, for one rule on one device.

    Attributes:
        rows: a GroupRow for each group.
        variants: which variant of the rule each group asks for.

    Raises:
        KeyError: a group lacks one of torch's keys.
        ValueError: a limit is not above 0, or a learning rate on the device is not one number.
    """

    def __init__(self, rule: ModuleType, device: torch.device, param_groups: ParamGroups) -> None:
        self._rule = rule
        self._device = device
        names = dict.fromkeys(name.partition(".")[0] for name in (*rule.HYPER, *rule.VARIANTS))
        self._keys = (*names, "max_grad_value", "max_grad_norm_per_param")
        self._members = [tuple(group["params"]) for group in param_groups]
        self._values = [self._read(group) for group in param_groups]
        self.variants = [self._variant(group) for group in param_groups]
        self.rows = [self._resolve(group) for group in param_groups]

    def refresh(self, param_groups: ParamGroups) -> list[int] | None:
        """The groups whose rows have changed; None when parameters or variants are others."""
        if len(param_groups) != len(self._members):
            return None
        changed = []
        for index, group in enumerate(param_groups):
            if not same(group["params"], self._members[index]):
                return None
            values = self._read(group)
            # A tensor or a list may have been changed in place.
            mutable = any(isinstance(value, (Tensor, list)) for value in values)
            if not mutable and same(values, self._values[index]):
                continue
            if self._variant(group) != self.variants[index]:
                return None
            self._values[index] = values
            row = self._resolve(group)
            if row != self.rows[index]:
                self.rows[index] = row
                changed.append(index)
        return changed

    def name_of(self, param: Tensor) -> str:
        """What messages call a parameter."""
        for group, members in enumerate(self._members):
            for index, member in enumerate(members):
                if member is param:
                    return f"parameter {index} of param group {group}"
        return "a parameter of no param group"

    def _read(self, group: Mapping[str, Any]) -> list[Any]:
        return [group.get(key) for key in self._keys]

    def _variant(self, group: Mapping[str, Any]) -> int:
        return sum(1 << bit for bit, name in enumerate(self._rule.VARIANTS) if group[name])

    def _resolve(self, group: Mapping[str, Any]) -> GroupRow:
        hyper = [_value_of(group, name) for name in self._rule.HYPER]
        lr = self._lr_on_device(hyper[0])
        if lr is not None:
            hyper[0] = 0.0
        limits = (_limit(group, "max_grad_value"), _limit(group, "max_grad_norm_per_param"))
        return GroupRow(tuple(map(float, hyper)), *limits, lr)

    def _lr_on_device(self, lr: Any) -> tuple[int, torch.dtype] | None:
        on_device = isinstance(lr, Tensor) and lr.device == self._device
        if not on_device or lr.device.type == "cpu":
            return None
        if lr.numel() != 1 or lr.dtype not in _LR_TYPES:
            raise ValueError(
                f"'lr' of a param group is a tensor of {lr.numel()} elements of {lr.dtype}; "
                "expected one floating-point element"
            )
        return lr.data_ptr(), lr.dtype


def _value_of(group: Mapping[str, Any], name: str) -> Any:
    """The value that a name of a rule's HYPER stands for: a key, or an item of a key's tuple."""
    key, _, item = name.partition(".")
    # Whoever replaced a group may know nothing of our key; torch's must all be there.
    value = group.get(key, False) if key == "decoupled_weight_decay" else group[key]
    return value[int(item)] if item else value


def _limit(group: Mapping[str, Any], key: str) -> float:
    """A limit of a group; infinity where there is none."""
    value = group.get(key)
    limit = math.inf if value is None else float(value)
    if not limit > 0.0:
        raise ValueError(
            f"{key!r} of a param group is {value}; expected a number above 0, or None for no limit"
        )
    return limit
