"""The comparisons on a CPU; ``python benchmarks/run.py cpu`` runs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from interleave import replay_clock
from suites import cpu_cases as cases
from workloads import Case

__all__ = ["cases"]


@pytest.mark.benchmark(timer=replay_clock)
def test_step(record: Callable[[Case, str], None], case: str, implementation: str) -> None:
    """One implementation in one case, measured in turn with all others of it."""
    record(Case.parse(case, "cpu"), implementation)
