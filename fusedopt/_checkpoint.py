"""What checkpoints and pickles hold, and what a checkpoint must hold to be taken.

A checkpoint is looked at whole before anything is written, so one that does not fit leaves the
optimizer as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._control import check_limit, describe
from ._counters import StepCounters
from ._settings import GROUP_KEYS
from .plain.rule import PlainRule, Training

_REMEDY = (
    "load what state_dict() of an optimizer of the same class over the same parameters returned;"
    " nothing has been changed"
)


def settled_state(rule: PlainRule, counters: StepCounters, training: Training) -> Any:
    """Returns the state as the plain optimizer would have it; itself if that is what it is."""
    unset = counters.unset_buffers(training.state)
    by_device: dict[torch.device, list[Tensor]] = {}
    for group in training.param_groups:
        if group.get("capturable") or group.get("fused"):
            continue
        for param in group["params"]:
            if param.device.type != "cpu":
                by_device.setdefault(param.device, []).append(param)
    if not unset and not by_device:
        return training.state
    settled = training.state.copy()
    for params in by_device.values():
        for param, scalars in counters.on_host(training.state, params).items():
            settled[param] = {**training.state[param], **scalars}
    for param in unset:
        entries = {k: v for k, v in settled[param].items() if k != rule.starts_unset}
        if entries:
            settled[param] = entries
        else:
            del settled[param]
    return settled


def settle(
    rule: PlainRule, counters: StepCounters, training: Training, packed: dict[str, Any]
) -> None:
    """Puts the settled state into a state dict that torch has just made."""
    settled = settled_state(rule, counters, training)
    if settled is training.state:
        return
    ids = {
        param: key
        for group, saved in zip(training.param_groups, packed["param_groups"], strict=True)
        for param, key in zip(group["params"], saved["params"], strict=True)
    }
    packed["state"] = {ids.get(param, param): entries for param, entries in settled.items()}


def check(rule: PlainRule, training: Training, checkpoint: dict[str, Any]) -> None:
    """Raises for a checkpoint that does not fit; changes nothing.

    Raises:
        KeyError: For a group or a parameter's state that lacks what the rule needs.
        TypeError: For what is no dict, list or tensor where one belongs.
        ValueError: For other numbers of groups or parameters, or tensors of another shape.
    """
    for name, kind in (("state", Mapping), ("param_groups", list)):
        if name not in checkpoint:
            raise KeyError(f"state_dict has no {name!r}; {_REMEDY}")
        if not isinstance(checkpoint[name], kind):
            raise TypeError(
                f"{name!r} of state_dict is a {type(checkpoint[name]).__name__}; expected a"
                f" {'dict' if kind is Mapping else 'list'}: {_REMEDY}"
            )
    groups = training.param_groups
    saved_groups = checkpoint["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups:"
            f" {len(saved_groups)}, expected {len(groups)}; {_REMEDY}"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        full = _check_group(rule, training.defaults, index, group, saved)
        needed = rule.needed_state(full, training.defaults)
        for position, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if key in checkpoint["state"]:
                name = f"parameter {position} of param group {index}"
                _check_entries(rule, checkpoint["state"][key], param, needed, name)


def keep_scalars(rule: PlainRule, training: Training, checkpoint: dict[str, Any]) -> None:
    """Gives the scalars of a checkpoint that torch has just taken back their type.

    Torch leaves that of ``step`` alone, and rounds all else to the parameters'.
    """
    for group, saved in zip(training.param_groups, checkpoint["param_groups"], strict=True):
        for param, key in zip(group["params"], saved["params"], strict=True):
            given, taken = checkpoint["state"].get(key, {}), training.state.get(param, {})
            for name in rule.scalars:
                value, own = given.get(name), taken.get(name)
                if not isinstance(value, Tensor) or not isinstance(own, Tensor):
                    continue
                if own.dtype != value.dtype:
                    taken[name] = value.detach().to(own.device, copy=True)


def _check_group(
    rule: PlainRule, defaults: dict[str, Any], index: int, group: dict[str, Any], saved: Any
) -> dict[str, Any]:
    """Returns a saved group with what the plain class fills in where it lacks keys."""
    where = f"in param group {index} of state_dict"
    if not isinstance(saved, dict):
        raise TypeError(
            f"param group {index} of state_dict is a {type(saved).__name__}; expected a dict:"
            f" {_REMEDY}"
        )
    if not isinstance(saved.get("params"), (list, tuple)):
        raise TypeError(
            f"'params' is {saved.get('params')!r} {where}; expected a list of keys of its 'state':"
            f" {_REMEDY}"
        )
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of"
            f" optimizer's group: {len(saved['params'])} parameters {where}, expected"
            f" {len(group['params'])}; {_REMEDY}"
        )
    full = {**rule.filled_keys, **saved}
    for name in defaults:
        if name not in full and name not in GROUP_KEYS:
            raise KeyError(f"there is no {name!r} {where}; {_REMEDY}")
    for name in ("max_grad_norm_per_param", "max_grad_value"):
        check_limit(name, saved.get(name), where)
    return full


def _check_entries(
    rule: PlainRule, entries: Any, param: Tensor, needed: set[str], name: str
) -> None:
    if not isinstance(entries, dict):
        raise TypeError(
            f"the state of {name} in state_dict is a {type(entries).__name__}; expected a dict:"
            f" {_REMEDY}"
        )
    if not entries:
        return
    if missing := sorted(needed - entries.keys()):
        raise KeyError(f"the state of {name} in state_dict has no {missing[0]!r}; {_REMEDY}")
    for key in {*rule.counted, *rule.states} & entries.keys():
        value = entries[key]
        if value is None and key not in needed:
            continue
        where = f"{key!r} in the state of {name} in state_dict"
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        is_counted = key in rule.counted
        if not isinstance(value, Tensor) and not (is_counted and is_number):
            raise TypeError(f"{where} is {value!r}; expected a tensor: {_REMEDY}")
        if is_counted:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{where} is {describe(value)}; expected one number: {_REMEDY}")
            continue
        fits = value.is_complex() if param.is_complex() else value.is_floating_point()
        if value.shape != param.shape or not fits:
            raise ValueError(
                f"{where} is {describe(value)}; expected a tensor like the parameter,"
                f" {describe(param)}: {_REMEDY}"
            )
