"""The plan of the Triton backend: the steps of one optimizer's parameters on one device.

Which rows, groups and gradients a step has is kept in books, the extension's (`_C.TablePlan`) where
there is one and books.py's elsewhere; memory and launches are launch.py's.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from fusedopt.kernels import launch
from fusedopt.kernels.launch import Tables
from fusedopt.kernels.pieces import Row
from torch import Tensor

from fusedopt import _control

Attention = tuple[bool, list[Tensor], list[Tensor]]


class Books(Protocol):
    """What the plan asks; see books.py and csrc/python/table_plan.h."""

    @property
    def rows_version(self) -> int:
        """Another number whenever ``rows`` returns something else."""

    def begin(self, param_groups: Any, state: Any) -> Attention | None:
        """Checks everything, takes in what has changed, and keeps it alive until ``end``."""

    def end(self) -> None:
        """Lets go of what ``begin`` keeps alive."""

    def bump_versions(self) -> None:
        """Tells autograd that the step wrote parameters and states."""

    def rows(self) -> Sequence[tuple[Any, ...]]:
        """The fields of a `Row` for each parameter whose state exists."""

    def write(self, words: array[int]) -> tuple[int, int]:
        """Brings the words of groups and gradients up; returns the range that changed."""

    def needs_reduce(self, max_grad_norm: float | None, skip_nonfinite: bool) -> bool:
        """Whether a step with these settings needs the reduce pass."""


class TritonPlan:
    """What the steps of one optimizer's parameters on one device have in common; takes the steps.

    Args:
        rule: name of the rule, as in ``fusedopt.kernels``.
        device: where all parameters are.
        books: of the parameters.
        group_count: how many groups the books have.

    Attributes:
        control: what the last ``step`` left: float64 (unscale, clip, norm, nonfinite, skip).
    """

    def __init__(self, rule: str, device: torch.device, books: Books, group_count: int) -> None:
        self._rule = launch.load_rule(rule)
        self._device = device
        self._books = books
        self._group_count = group_count
        self._tables: Tables | None = None
        self._version = 0
        self._ready = False
        self._reduced = False
        self.control = torch.zeros(5, dtype=torch.float64, device=device)

    def begin(self, param_groups: Any, state: Any) -> Attention | None:
        """Checks everything that the coming step relies on and takes in what has changed.

        Nothing of the model is touched. What the step works on is kept alive until ``end``, unless
        there is something to rebuild or missing.

        Returns:
            None when the plan holds. Else (rebuild, missing, foreign), as the books say: whether
            another plan has to be made; the parameters with a first gradient but without state;
            those that this plan leaves out of this step.

        Raises:
            KeyError, TypeError, ValueError: as the books say.
        """
        self._ready = self._reduced = False
        attention = self._books.begin(param_groups, state)
        if attention is None or not (attention[0] or attention[1]):
            self._current_tables().take(self._books.write)
            self._ready = True
        return attention

    def end(self) -> None:
        """Ends what ``begin`` began."""
        self._ready = False
        self._books.end()

    def _current_tables(self) -> Tables:
        """The tables, made when there are none.

        A graph under capture gets its own, which no later step changes.
        """
        tables, version = self._tables, self._books.rows_version
        if (
            tables is None
            or tables.captured
            or version != self._version
            or launch.capturing(self._device)
        ):
            rows = [Row._make(row) for row in self._books.rows()]
            tables = Tables(self._rule, self._device, rows, self._group_count, self.control)
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
        self._books.bump_versions()

    def step(
        self,
        param_groups: Any,
        state: Any,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | float | None,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
    ) -> Attention | None:
        """The whole step: one launch, or two when a norm or the non-finite flag is asked for.

        Returns:
            None when it was done; else what ``begin`` asks for.
        """
        try:
            attention = self.begin(param_groups, state)
            if attention is None:
                self._run(grad_scale, found_inf, max_grad_norm, skip_nonfinite)
            return attention
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
        if self._books.needs_reduce(max_grad_norm, skip_nonfinite):
            limit = math.inf if max_grad_norm is None else max_grad_norm
            tables.set_settings(limit, skip_nonfinite)
            tables.reduce(grad_scale=grad_scale, found_inf=found_inf, control=self.control)
            tables.apply(self.control, controlled=True, clip_per_param=True)
        else:
            tables.apply(self.control, controlled=False, grad_scale=grad_scale, found_inf=found_inf)
        self._books.bump_versions()

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
