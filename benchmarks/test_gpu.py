"""The comparisons on a GPU; ``python benchmarks/run.py gpu`` runs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleave import replay_clock
from suites import gpu_cases as cases
from workloads import Case

__all__ = ["cases"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no GPU here")


@pytest.mark.benchmark(timer=replay_clock)
def test_step(record: Callable[[Case, str], None], case: str, implementation: str) -> None:
    """One implementation in one case, measured in turn with all others of it."""
    record(Case.parse(case, "cuda"), implementation)
