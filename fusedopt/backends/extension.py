"""Finds the compiled extension and says why it cannot be used when it cannot."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

REBUILD = "reinstall fusedopt with `pip install --no-build-isolation .`"


@functools.cache
def _find() -> tuple[ModuleType | None, str | None, bool]:
    """Returns (extension, why not, whether it was built at all)."""
    try:
        info = importlib.import_module("fusedopt._build_info")
    except ImportError:
        return None, f"fusedopt was not installed but imported from its sources; {REBUILD}", False
    if not info.BACKENDS:
        left_out = "; ".join(f"{piece}: {why}" for piece, why in info.LEFT_OUT.items())
        return None, f"it was built without the extension ({left_out}); {REBUILD}", False
    if info.TORCH_VERSION != torch.__version__:
        return (
            None,
            f"the extension was built for torch {info.TORCH_VERSION}, but this is torch"
            f" {torch.__version__}; {REBUILD}",
            True,
        )
    try:
        return importlib.import_module("fusedopt._C"), None, True
    except ImportError as error:
        return None, f"the extension does not load ({error}); {REBUILD}", True


def module() -> ModuleType:
    """Returns the extension; call only where ``unavailable()`` is None."""
    extension, reason, _ = _find()
    if extension is None:
        raise RuntimeError(f"fusedopt's extension is not there: {reason}")
    return extension


def unavailable() -> str | None:
    """Says why the extension cannot be used and what to do about it; None when it can."""
    return _find()[1]


def expected() -> bool:
    """Whether the extension was built, so that its absence is worth a warning."""
    return _find()[2]
