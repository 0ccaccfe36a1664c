"""A fused twin of a torch optimizer that already trains."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ._optimizer import TWINS


def from_torch(optimizer: torch.optim.Optimizer, **extras: Any) -> Any:
    """Returns a fused twin of ``optimizer``: same parameters, same groups, same state tensors.

    Training goes on where it was; only step counters that are not on their parameter's device are
    copied there. Hooks are not taken over, and a scheduler made for ``optimizer`` must be made
    again for the twin. Stop using ``optimizer`` afterwards: both would write the same state.

    Args:
        optimizer: An instance of a class of ``torch.optim`` that fusedopt has, too.
        **extras: Keyword arguments of the twin's constructor, such as ``max_grad_norm``; they win
            over the optimizer's own, in all its groups.

    Returns:
        An instance of the fusedopt class of the same name.

    Raises:
        TypeError: If there is no fused class for the optimizer.

    Example:
        >>> optimizer = fusedopt.from_torch(torch.optim.AdamW(model.parameters()),
        max_grad_norm=1.0)
    """
    twin_class = TWINS.get(type(optimizer))
    if twin_class is None:
        known = sorted(k.__name__ for k in TWINS if k.__module__.startswith("torch.optim."))
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; expected exactly one of"
            f" {', '.join(f'torch.optim.{name}' for name in known)}. A subclass may have changed"
            " the rule: construct the fusedopt class yourself"
        )
    accepted = inspect.signature(twin_class).parameters
    defaults = {
        name: value
        for name, value in optimizer.defaults.items()
        if name in accepted and not (name == "fused" and value is False)
    }
    groups = []
    for group in optimizer.param_groups:
        params = group["params"]
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        rest = {k: v for k, v in group.items() if k not in ("params", "param_names", *extras)}
        groups.append({"params": params, **rest})
    twin = twin_class(groups, **{**defaults, **extras})
    twin.state.clear()
    for param, entries in optimizer.state.items():
        twin.state[param] = dict(entries)
    return twin
