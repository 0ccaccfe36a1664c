"""Native loops for parameters in the CPU's memory, compiled for several instruction sets."""

from __future__ import annotations

from typing import Any

import torch

from . import extension
from .interface import Plan, Slot

NAME = "cpu"


def unavailable(device: torch.device | None = None) -> str | None:
    """Says why this backend does not work here and what to do about it; None when it works."""
    return extension.unavailable()


def expected() -> bool:
    """Whether its absence is a surprise that deserves a warning."""
    return extension.expected(NAME)


def serves(device: torch.device) -> bool:
    """Whether parameters on ``device`` are this backend's."""
    return device.type == "cpu"


def make_plan(
    rule: str,
    device: torch.device,
    slots: list[Slot],
    param_groups: list[dict[str, Any]],
    state: Any,
) -> Plan:
    """Returns the plan of these parameters; see ``csrc/python/plan.h``."""
    return extension.module().CpuPlan(rule, slots, param_groups, state)
