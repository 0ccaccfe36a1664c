"""The backends: where a step's loops run.

A native backend is a module of this package (see ``interface.Backend``). What no native backend
takes, plain rules do.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from .interface import Backend

#: Native backends, in the order that "auto" prefers them.
NATIVE = ("cuda", "triton", "cpu")
#: What the ``backend`` argument accepts.
CHOICES = ("auto", *NATIVE, "torch")

_warned: set[str] = set()


def load(name: str) -> Backend:
    """Returns the module of a native backend."""
    backend: Any = importlib.import_module(f"{__name__}.{name}")
    return backend


def check(choice: str) -> str:
    """Returns ``choice`` if it names a backend that works here.

    Raises:
        ValueError: If no backend is called so.
        RuntimeError: If the backend was named explicitly and does not work here.
    """
    if choice not in CHOICES:
        raise ValueError(f"backend is {choice!r}; expected one of {', '.join(map(repr, CHOICES))}")
    if choice in NATIVE and (reason := load(choice).unavailable()) is not None:
        raise RuntimeError(f"backend={choice!r} does not work here: {reason}")
    return choice


def for_device(choice: str, device: torch.device) -> Backend | None:
    """Returns the native backend for parameters on ``device``, or None for torch's rules.

    Raises:
        ValueError: If an explicitly named backend cannot serve the device.
        RuntimeError: If it could, but does not work for it here.
    """
    if choice == "torch":
        return None
    if choice != "auto":
        backend = load(choice)
        if not backend.serves(device):
            raise ValueError(
                f"backend={choice!r} cannot serve a parameter on {device}; move the parameter, or"
                " use backend='auto'"
            )
        if (reason := backend.unavailable(device)) is not None:
            raise RuntimeError(f"backend={choice!r} cannot serve a parameter on {device}: {reason}")
        return backend
    for name in NATIVE:
        backend = load(name)
        # Triton's interpreter serves the CPU too, but nobody gets that without asking for it.
        if not backend.serves(device) or (name == "triton" and device.type == "cpu"):
            continue
        reason = backend.unavailable(device)
        if reason is None:
            return backend
        if reason not in _warned and backend.expected():
            _warned.add(reason)
            warnings.warn(f"fusedopt goes on without its {name} backend: {reason}", stacklevel=2)
    return None
