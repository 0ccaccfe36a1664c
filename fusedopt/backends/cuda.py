"""CUDA kernels for parameters on NVIDIA GPUs: one launch for all of them, two with a norm."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from . import extension

NAME = "cuda"


@functools.cache
def unavailable() -> str | None:
    """Says why this backend does not work here and what to do about it; None when it works."""
    if (reason := extension.unavailable()) is not None:
        return reason
    info = importlib.import_module("fusedopt._build_info")
    if "cuda" not in info.BACKENDS:
        why = info.LEFT_OUT.get("cuda", "it was not asked for")
        return f"it was built without the CUDA kernels ({why}); {extension.REBUILD}"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs; use backend='triton'"
    if not torch.cuda.is_available():
        return "this torch sees no NVIDIA GPU; install a CUDA build of torch and a driver"
    return extension.module().cuda_unavailable() or None


def expected() -> bool:
    """Whether its absence is a surprise that deserves a warning."""
    return extension.expected()


def serves(device: torch.device) -> bool:
    """Whether parameters on ``device`` are this backend's."""
    return device.type == "cuda"


def make_plan(
    rule: str,
    device: torch.device,
    slots: list[tuple[int, torch.Tensor, torch.Tensor | None]],
    param_groups: list[dict[str, Any]],
    state: dict[torch.Tensor, Any],
) -> Any:
    """Returns the plan of these parameters; see ``csrc/python/cuda_plan.h``.

    Raises:
        RuntimeError: If the kernels hold no code for this GPU.
    """
    native = extension.module()
    if reason := native.cuda_unavailable(device.index):
        raise RuntimeError(f"backend='cuda' cannot serve {device}: {reason}")
    return native.CudaPlan(rule, device.index, slots, param_groups, state)
