"""Finds the compiled extension and says why it cannot be used when it cannot."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

REBUILD = "reinstall fusedopt with `pip install --no-build-isolation .`"


def build_info() -> Any | None:
    """Returns what setup.py noted of the build; None when fusedopt was not installed."""
    try:
        return importlib.import_module("fusedopt._build_info")
    except ImportError:
        return None


@functools.cache
def _find() -> tuple[ModuleType | None, str | None]:
    """Returns (extension, why not)."""
    info = build_info()
    if info is None:
        return None, f"fusedopt was not installed but imported from its sources; {REBUILD}"
    if not info.BACKENDS:
        left_out = "; ".join(f"{piece}: {why}" for piece, why in info.LEFT_OUT.items())
        return None, f"it was built without the extension ({left_out}); {REBUILD}"
    if info.TORCH_VERSION != torch.__version__:
        return None, (
            f"the extension was built for torch {info.TORCH_VERSION}, but this is torch"
            f" {torch.__version__}; {REBUILD}"
        )
    try:
        return importlib.import_module("fusedopt._C"), None
    except ImportError as error:
        return None, f"the extension does not load ({error}); {REBUILD}"


def module() -> ModuleType:
    """Returns the extension; call only where ``unavailable()`` is None."""
    extension, reason = _find()
    if extension is None:
        raise RuntimeError(f"fusedopt's extension is not there: {reason}")
    return extension


def unavailable() -> str | None:
    """Says why the extension cannot be used and what to do about it; None when it can."""
    return _find()[1]


def expected(piece: str) -> bool:
    """Whether the absence of a native backend is worth a warning: nobody chose to go without it."""
    info = build_info()
    return info is not None and piece in info.WANTED
