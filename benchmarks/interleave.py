"""Measures a case once for all its tests, and plays the samples back to pytest-benchmark."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable

import pytest
import torch
from implementations import IMPLEMENTATIONS
from measure import Measurement, measure
from workloads import Case, free_memory


class ReplayClock:
    """A clock that pytest-benchmark reads twice a round, and that then shows a sample taken before.

    pytest-benchmark measures one test to its end before the next. Here all implementations of a
    case are measured in turn, and each test's samples are played back through the documented
    ``timer`` argument.
    """

    __name__ = "interleaved_perf_counter"

    def __init__(self) -> None:
        """Starts without samples."""
        self._pending: list[float] = []
        self._now = 0.0
        self._running = False

    def load(self, samples: list[float]) -> None:
        """Sets what the next rounds will have taken."""
        self._pending = list(reversed(samples))
        self._running = False

    def __call__(self) -> float:
        """Returns the time; every second call is a sample later than the one before."""
        if self._running:
            self._now = self._pending.pop()
        else:
            self._now = 0.0
        self._running = not self._running
        return self._now


replay_clock = ReplayClock()


class Interleaved:
    """The measurements of the current case, taken when its first test asks for them."""

    def __init__(self, session: pytest.Session) -> None:
        """Looks through the collected tests for who belongs to which case."""
        config = session.config
        self._deadline = time.monotonic() + 60 * config.getoption("--minutes")
        self._effort = config.getoption("--effort")
        self._say = _progress_line(config)
        self._wanted: dict[str, list[str]] = {}
        for item in session.items:
            params = item.callspec.params  # type: ignore[attr-defined]
            self._wanted.setdefault(params["case"], []).append(params["implementation"])
        self._current: str | None = None
        self._outcomes: dict[str, Measurement | Exception | str] = {}

    def outcome(self, case: Case, name: str) -> Measurement:
        """Returns what one implementation did in a case; skips or fails the test if nothing."""
        if case.id != self._current:
            self._current = case.id
            self._outcomes = {}
            self._outcomes = self._measure(case)
            # Optimizers and their parameters refer to each other.
            gc.collect()
            if case.device == "cuda":
                torch.cuda.empty_cache()
        found = self._outcomes[name]
        if isinstance(found, str):
            pytest.skip(found)
        if isinstance(found, Exception):
            raise found
        return found

    def _measure(self, case: Case) -> dict[str, Measurement | Exception | str]:
        names = self._wanted[case.id]
        number = list(self._wanted).index(case.id) + 1
        if time.monotonic() > self._deadline:
            return dict.fromkeys(names, "no time left for this case; raise --minutes")
        obstacles = {name: IMPLEMENTATIONS[name].obstacle(case) for name in names}
        able = [name for name, obstacle in obstacles.items() if obstacle is None]
        needed, free = case.memory_needed(len(able)), free_memory(case.device)
        if needed > 0.95 * free:
            reason = f"needs {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free"
            return dict.fromkeys(names, reason)
        started = time.perf_counter()
        self._say(f"[{number}/{len(self._wanted)}] {case.id}: {', '.join(able)}")
        measured = measure(case, able, self._effort * case.seconds())
        self._say(f" {time.perf_counter() - started:.1f} s\n")
        return {**{k: v for k, v in obstacles.items() if v is not None}, **measured}


def _progress_line(config: pytest.Config) -> Callable[[str], None]:
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(text, end="", file=sys.stderr, flush=True)

    return say
