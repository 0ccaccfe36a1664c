"""The plan of the Triton backend: the steps of one optimizer's parameters on one device.

A host plan knows which rows, groups and gradients a step has; memory and launches are launch.py's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fusedopt.kernels import launch
from fusedopt.kernels.launch import Tables
from torch import Tensor

from fusedopt import _control
from fusedopt.backends.interface import Findings


class TritonPlan:
    """What the steps of one optimizer's parameters on one device have in common; takes the steps.

    Args:
        rule: name of the rule, as in ``fusedopt.kernels``.
        device: where all parameters are.
        host: of these parameters, the extension's `_C.TablePlan` or its twin in host_plan.py.
        group_count: how many groups there are.

    Attributes:
        control: what the last ``step`` left: float64 (unscale, clip, norm, nonfinite, skip).
    """

    def __init__(self, rule: str, device: torch.device, host: Any, group_count: int) -> None:
        self._rule = launch.load_rule(rule)
        self._device = device
        self._host = host
        self._group_count = group_count
        self._tables: Tables | None = None
        self._version = 0
        self._ready = False
        self._reduced = False
        self.control = torch.zeros(len(_control.ORDER), dtype=torch.float64, device=device)

    def begin(self, param_groups: Any, state: Any) -> Findings | None:
        """Checks everything that the coming step relies on and takes in what has changed.

        Returns and raises what the host plan does.
        """
        self._ready = self._reduced = False
        findings = self._host.begin(param_groups, state)
        if findings is None or not (findings[0] or findings[1]):
            self._current_tables().take(self._host)
            self._ready = True
        return findings

    def end(self) -> None:
        """Ends what ``begin`` began."""
        self._ready = False
        self._host.end()

    def _current_tables(self) -> Tables:
        """The tables, made when there are none.

        A graph under capture gets its own, which no later step changes.
        """
        tables, version = self._tables, self._host.rows_version
        if (
            tables is None
            or tables.captured
            or version != self._version
            or launch.capturing(self._device)
        ):
            tables = Tables(self._rule, self._device, self._host, self._group_count, self.control)
            self._tables, self._version = tables, version
        return tables

    def reduce(self, unscale: Tensor) -> Tensor:
        """The reduce pass under a multiplier.

        Returns:
            float64 (sum over tensors of their squared clipped norms, non-finite flag).
        """
        tables = self._begun()
        tables.reduce(unscale=unscale)
        self._reduced = True
        return tables.sums

    def apply(self, control: Tensor) -> None:
        """The apply pass under a control block.

        Parameters are clipped one by one as a ``reduce`` since ``begin`` found, if there was one.
        """
        self._begun().apply(control, controlled=True, clip_per_param=self._reduced)
        self._host.bump_versions()

    def step(
        self,
        param_groups: Any,
        state: Any,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | float | None,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
    ) -> Findings | None:
        """The whole step: one launch, or two when a norm or the non-finite flag is asked for.

        Returns:
            None when it was done; else what ``begin`` asks for.
        """
        try:
            findings = self.begin(param_groups, state)
            if findings is None:
                self._run(grad_scale, found_inf, max_grad_norm, skip_nonfinite)
            return findings
        finally:
            self.end()

    def _run(
        self,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | float | None,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
    ) -> None:
        tables = self._begun()
        if tables.empty:
            unscale = _control.unscale_factor(grad_scale, self._device)
            self.control.copy_(
                _control.settle([], unscale, found_inf, max_grad_norm, skip_nonfinite)
            )
            return
        grad_scale = self._bring("grad_scale", grad_scale)
        found_inf = self._bring("found_inf", found_inf)
        if self._host.needs_reduce(max_grad_norm, skip_nonfinite):
            limit = math.inf if max_grad_norm is None else max_grad_norm
            tables.set_settings(limit, skip_nonfinite)
            tables.reduce(grad_scale=grad_scale, found_inf=found_inf, control=self.control)
            tables.apply(self.control, controlled=True, clip_per_param=True)
        else:
            tables.apply(self.control, controlled=False, grad_scale=grad_scale, found_inf=found_inf)
        self._host.bump_versions()

    def _bring(self, name: str, number: Tensor | float | None) -> Tensor | None:
        """A number of the scaler's as a tensor on the device."""
        if number is None:
            return None
        _control.check_one_number(name, number)
        if isinstance(number, Tensor):
            return number.to(self._device)
        return torch.tensor(number, dtype=torch.float64, device=self._device)

    def _begun(self) -> Tables:
        if self._tables is None or not self._ready:
            raise RuntimeError(
                "the plan was asked for a pass before begin() found it in order; call begin() first"
                " in every step"
            )
        return self._tables
