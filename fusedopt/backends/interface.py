"""What a backend is to the step pipeline."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

#: A parameter of a plan: the index of its group, itself, and its counter of steps if it has one.
Slot = tuple[int, Tensor, Tensor | None]
#: What a plan cannot go on without: whether it is outdated, parameters whose state is to be
#: created, parameters that take the plain rule in this step.
Findings = tuple[bool, list[Tensor], list[Tensor]]


class Plan(Protocol):
    """Everything about the steps of a device's parameters that stays the same between them.

    It looks at all of it anew at every step, and keeps nothing alive outside of one.
    """

    #: float64[5] in the order of ``StepControl``: what the last step left.
    control: Tensor

    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: Any,
        grad_scale: Any,
        found_inf: Any,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
    ) -> Findings | None:
        """Runs a whole step, or returns what stands against it, with nothing changed."""

    def begin(self, param_groups: list[dict[str, Any]], state: Any) -> Findings | None:
        """Begins a step that several plans, or plain rules too, do together."""

    def reduce(self, unscale: Tensor) -> Tensor:
        """Returns float64[2]: the sum of squares of all gradients, and any that is not finite."""

    def apply(self, control: Tensor) -> None:
        """Updates parameters, states and counters as the step's control says."""

    def end(self) -> None:
        """Lets go of what a step keeps alive."""


class Backend(Protocol):
    """Where a step's loops run: a module of `fusedopt.backends`."""

    NAME: str

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """Says why it does not work here and what to do about it; None when it works."""

    def expected(self) -> bool:
        """Whether its absence is a surprise that deserves a warning."""

    def serves(self, device: torch.device) -> bool:
        """Whether parameters on ``device`` are this backend's."""

    def make_plan(
        self,
        rule: str,
        device: torch.device,
        slots: list[Slot],
        param_groups: list[dict[str, Any]],
        state: Any,
    ) -> Plan:
        """Returns the plan of these parameters."""
