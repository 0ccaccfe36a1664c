"""Options, test generation and fixtures of the benchmark suites."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from implementations import names_for
from interleave import Interleaved, replay_clock
from workloads import Case


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what ``run.py`` passes on."""
    group = parser.getgroup("fusedopt benchmarks")
    group.addoption("--full", action="store_true", help="also what takes minutes or much memory")
    group.addoption("--minutes", type=float, default=9.0, help="start no new case after so long")
    group.addoption("--effort", type=float, default=1.0, help="factor on the time for a case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test of every case and implementation in the module's ``cases(full)``."""
    if "implementation" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full")
    pairs = [
        (case.id, name) for case in metafunc.module.cases(full) for name in names_for(case, full)
    ]
    ids = [f"{case}-{name}" for case, name in pairs]
    metafunc.parametrize(("case", "implementation"), pairs, ids=ids)


@pytest.fixture(scope="session")
def interleaved(request: pytest.FixtureRequest) -> Interleaved:
    """Measures each case once, all its implementations in turn."""
    return Interleaved(request.session)


@pytest.fixture
def record(request: pytest.FixtureRequest, interleaved: Interleaved) -> Callable[[Case, str], None]:
    """Returns a function that hands one implementation's samples to pytest-benchmark."""

    def play_back(case: Case, name: str) -> None:
        found = interleaved.outcome(case, name)
        # Only now: a test that was skipped or failed leaves no benchmark behind.
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = case.id
        benchmark.extra_info.update(found.extra_info)
        replay_clock.load(found.samples)
        benchmark.pedantic(lambda: None, rounds=len(found.samples), iterations=1)

    return play_back
