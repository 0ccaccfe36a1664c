"""Triton kernels: fused steps on GPUs without a compiled extension, and on GPUs not NVIDIA's."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from . import extension
from .interface import Plan, Slot

NAME = "triton"

_MINIMUM = (3, 6)


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device | None = None) -> str | None:
    """Says why this backend does not work here and what to do about it; None when it works."""
    return _why_not(_interpreting(), torch.cuda.is_available())


@functools.cache
def _why_not(interpreting: bool, has_gpu: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton, in the version that your torch names"
    if not (interpreting or has_gpu):
        return (
            "torch sees no GPU; use a machine with one and a torch built for it "
            "(TRITON_INTERPRET=1 runs on the CPU, slowly)"
        )
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _MINIMUM:
        return (
            f"Triton {triton.__version__} is too old; upgrade torch to 2.11 or newer, which brings "
            "Triton 3.6 or newer"
        )
    return None


def expected() -> bool:
    """Whether its absence is a surprise that deserves a warning."""
    return importlib.util.find_spec("triton") is not None


def serves(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be served: GPUs, and the CPU in Triton's interpreter."""
    return device.type == ("cpu" if _interpreting() else "cuda")


def make_plan(
    rule: str,
    device: torch.device,
    slots: list[Slot],
    param_groups: list[dict[str, Any]],
    state: Any,
) -> Plan:
    """Returns the plan of these parameters; see ``kernels/plan.py``. Imports Triton.

    Raises:
        RuntimeError: If Triton does not work here or cannot serve the device.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"backend='triton' does not work here: {reason}")
    if not serves(device):
        raise RuntimeError(
            f"backend='triton' cannot serve a parameter on {device}: Triton's kernels run on GPUs,"
            " and on the CPU only in its interpreter (TRITON_INTERPRET=1, set before the first"
            " step); move the parameters to a GPU or use backend='auto'"
        )
    if extension.unavailable() is None:
        host = extension.module().TablePlan(rule, device, slots, param_groups, state)
    else:
        host_plan = importlib.import_module("fusedopt.kernels.host_plan")
        host = host_plan.HostPlan(rule, device, slots, param_groups, state)
    plan = importlib.import_module("fusedopt.kernels.plan")
    return plan.TritonPlan(rule, device, host, len(param_groups))


def host_path() -> str:
    """Says what prepares a step on the host: the extension's code or Python's, and why."""
    reason = extension.unavailable()
    return "the extension" if reason is None else f"Python code: {reason}"
