"""CUDA kernels for parameters on NVIDIA GPUs: one launch for all of them, two with a norm."""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import extension
from .interface import Plan, Slot

NAME = "cuda"


def unavailable(device: torch.device | None = None) -> str | None:
    """Says why this backend does not work here and what to do about it; None when it works.

    Args:
        device: Asks for this one: a GPU may be one that the kernels hold no code for.
    """
    if (reason := _why_not()) is not None or device is None:
        return reason
    return _why_not_on(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _why_not() -> str | None:
    if (reason := extension.unavailable()) is not None:
        return reason
    info = extension.build_info()
    assert info is not None
    if "cuda" not in info.BACKENDS:
        return (
            f"it was built without the CUDA kernels ({info.LEFT_OUT['cuda']}); {extension.REBUILD}"
        )
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs; use backend='triton'"
    if torch.version.cuda is None:
        return "this torch is built for the CPU; install a CUDA build of torch"
    if reason := extension.module().cuda_unavailable():
        return reason
    if not torch.cuda.is_available():
        return (
            f"the NVIDIA driver shows a GPU, but torch {torch.__version__} cannot use it;"
            " torch.cuda.init() says why"
        )
    return None


@functools.cache
def _why_not_on(index: int) -> str | None:
    return extension.module().cuda_unavailable(index) or None


def expected() -> bool:
    """Whether its absence is a surprise that deserves a warning."""
    return extension.expected(NAME)


def serves(device: torch.device) -> bool:
    """Whether parameters on ``device`` are this backend's."""
    return device.type == "cuda"


def make_plan(
    rule: str,
    device: torch.device,
    slots: list[Slot],
    param_groups: list[dict[str, Any]],
    state: Any,
) -> Plan:
    """Returns the plan of these parameters; see ``csrc/python/cuda_plan.h``."""
    return extension.module().CudaPlan(rule, device.index, slots, param_groups, state)
