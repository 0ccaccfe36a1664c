"""Param groups as the kernels read them; csrc/python/groups.cpp in Python, for host_plan.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from fusedopt.kernels.rows import NUMBER_TYPES, GroupRow
from torch import Tensor

from fusedopt import _control

# What torch asks for its truth only, although rules read it as 0 or 1.
_FLAGS = ("maximize", "nesterov", "decoupled_weight_decay")
# Whoever replaced a group may know nothing of our key; torch's must all be there.
_OPTIONAL = "decoupled_weight_decay"


def read_group(
    rule: ModuleType, device: torch.device, index: int, group: Mapping[str, Any]
) -> GroupRow:
    """The numbers of a group.

    Raises:
        KeyError: it lacks one of torch's keys.
        TypeError: a hyperparameter is no number.
        ValueError: a hyperparameter is a tensor of several elements, or a limit is not above 0.
    """
    lr = _lr_on_device(device, group)
    names = rule.HYPER if lr is None else rule.HYPER[1:]
    hyper = [_number(index, group, name) for name in names]
    flags = [bool(_value(index, group, name)) for name in rule.VARIANTS]
    return GroupRow(
        (*([] if lr is None else [0.0]), *hyper),
        _limit(index, group, "max_grad_value"),
        _limit(index, group, "max_grad_norm_per_param"),
        lr,
        sum(flag << bit for bit, flag in enumerate(flags)),
    )


def _lr_on_device(device: torch.device, group: Mapping[str, Any]) -> tuple[int, torch.dtype] | None:
    lr = group.get("lr")
    if not isinstance(lr, Tensor) or lr.device != device or device.type == "cpu":
        return None
    return (lr.data_ptr(), lr.dtype) if lr.numel() == 1 and lr.dtype in NUMBER_TYPES else None


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
        _control.check_one_number(what, value)
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
