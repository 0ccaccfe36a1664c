"""Measures all implementations of a case in turn: a machine that changes speed changes it for all.

One round takes one sample of every implementation. What is timed is the step alone: fresh gradients
are put in place, and the scaler's scale is updated, while the clock stands still.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import probes
import torch
from implementations import IMPLEMENTATIONS, Implementation, Runner, versions
from torch import Tensor
from verify import MULTIPLIERS, STEPS, Reference
from workloads import LOSS_SCALE, Case, fill

MIN_ROUNDS = 8
MAX_ROUNDS = 101
#: Below so many elements every step gets newly allocated gradients; above, two sets take turns.
_FRESH_BELOW = 2**21
#: A sample is the mean of as many steps in a row as fit into this time, between these bounds: a
#: short step is not measured against what other implementations left in the caches, and on a GPU
#: the launch of one hides behind another.
_SAMPLE_SECONDS = 0.02
_REPETITIONS = {"cpu": (1, 50), "cuda": (4, 50)}
_HOST_SAMPLES = 21


class Gradients:
    """The gradients of a case: two sets in turn, or new ones every time."""

    def __init__(self, case: Case, params: list[Tensor]) -> None:
        """Allocates them: a set to start from, and two that are handed out."""
        self._case = case
        self._params = params
        self._source = [torch.empty_like(param) for param in params]
        # Squares of small numbers are nothing in float16.
        fill(self._source, seed=1, scale=8.0 if case.dtype == "float16" else 1.0)
        self._fresh = case.elements() < _FRESH_BELOW
        self._sets = [[torch.empty_like(g) for g in self._source] for _ in range(2)]
        self._turn = 0
        self.rewind()

    def rewind(self) -> None:
        """Starts anew: what is handed out next is what was handed out first."""
        self._turn = 0
        for _ in self._sets:
            self.restore()
            self._turn ^= 1

    def restore(self, multiplier: float = 1.0) -> None:
        """Makes the set that comes next what it was: stock unscaling and clipping write into it."""
        factor = multiplier * (-1.0 if self._turn else 1.0)
        if self._case.scaled:
            factor *= LOSS_SCALE
        for grad, source in zip(self._sets[self._turn], self._source, strict=True):
            torch.mul(source, factor, out=grad)

    def install(self) -> list[Tensor]:
        """Gives every parameter a gradient that is elsewhere in memory than its last one."""
        grads = self._sets[self._turn]
        self._turn ^= 1
        if self._fresh:
            grads = torch._foreach_mul(grads, 1.0)
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = grad
        return list(grads)

    @property
    def need_restoring(self) -> bool:
        """Whether a step may have written into the two sets."""
        return self._case.needs_norm and not self._fresh


@dataclass
class Measurement:
    """What one implementation did in a case."""

    samples: list[float] = field(default_factory=list)
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Entrant:
    runner: Runner
    measurement: Measurement
    repetitions: int = 1

    def sample(self, grads: Gradients) -> float:
        """Times some steps in a row, on a GPU with a synchronisation at the end: their mean."""
        if grads.need_restoring and self.repetitions == 1:
            grads.restore()
        elif grads.need_restoring:
            grads.rewind()
        device = self.runner.case.device
        step, settle = self.runner.step, self.runner.settle
        probes.synchronize(device)
        total = 0.0
        for _ in range(self.repetitions):
            grads.install()
            start = time.perf_counter()
            step()
            total += time.perf_counter() - start
            settle()
        start = time.perf_counter()
        probes.synchronize(device)
        return (total + time.perf_counter() - start) / self.repetitions


def measure(case: Case, names: list[str], seconds: float) -> dict[str, Measurement | Exception]:
    """Verifies and measures implementations in turn.

    Args:
        case: The work.
        names: Of those implementations that can run it here.
        seconds: How long the rounds may take, all together; ``MIN_ROUNDS`` are taken in any case.

    Returns:
        For each name its measurement, or the error that kept it from being measured.
    """
    params: list[Tensor] = [
        torch.nn.Parameter(torch.empty(shape, dtype=case.torch_dtype, device=case.device))
        for shape in case.shapes()
    ]
    grads = Gradients(case, params)
    limit = 2.0 * case.elements() ** 0.5
    outcomes: dict[str, Measurement | Exception] = {}
    entrants = []
    references: dict[Case, Reference] = {}
    for name in names:
        try:
            entrants.append(_enter(IMPLEMENTATIONS[name], case, params, grads, limit, references))
            outcomes[name] = entrants[-1].measurement
        except Exception as error:  # One that fails must not take the others with it.
            outcomes[name] = error
    if not entrants:
        return outcomes
    grads.rewind()
    bandwidth = probes.Bandwidth(case.device)
    _run_rounds(case, entrants, grads, bandwidth, seconds)
    states = next(iter(references.values())).states
    for entrant in entrants:
        entrant.measurement.extra_info |= {
            **_describe(entrant, case, params, states),
            **bandwidth.record(),
            **_probe(entrant, grads),
        }
    return outcomes


def _enter(
    implementation: Implementation,
    case: Case,
    params: list[Tensor],
    grads: Gradients,
    limit: float,
    references: dict[Case, Reference],
) -> _Entrant:
    """Builds a runner, takes its first steps, and holds them against the reference."""
    # So small that what three steps change shows in a half type's few digits, too.
    fill(params, seed=2, scale=0.05 if case.torch_dtype.itemsize > 2 else 0.002)
    grads.rewind()
    runner = Runner(implementation, case, params, limit)
    reference = references.get(runner.case)
    fresh = reference is None
    if fresh:
        reference = references[runner.case] = Reference(runner.case, params, limit)
    seconds = []
    for multiplier in MULTIPLIERS[:STEPS]:
        grads.restore(multiplier)
        handed_out = grads.install()
        if fresh:
            reference.step(handed_out)
        seconds.append(_timed(runner))
        runner.settle()
    error = reference.check(runner)
    usual = min(seconds[1:])
    entrant = _Entrant(runner, Measurement())
    low, high = _REPETITIONS[case.device]
    entrant.repetitions = min(high, max(low, round(_SAMPLE_SECONDS / usual)))
    entrant.measurement.extra_info = {"seconds_of_one": usual, "error_of_allowed": error}
    if implementation.compiles:
        entrant.measurement.extra_info["compile_seconds"] = sum(seconds) - STEPS * usual
    return entrant


def _timed(runner: Runner) -> float:
    start = time.perf_counter()
    runner.step()
    probes.synchronize(runner.case.device)
    return time.perf_counter() - start


def _run_rounds(
    case: Case,
    entrants: list[_Entrant],
    grads: Gradients,
    bandwidth: probes.Bandwidth,
    seconds: float,
) -> None:
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for number in range(MAX_ROUNDS):
            if number < MIN_ROUNDS:
                bandwidth.sample()
            # Whoever starts a round finds other caches than the rest: take turns.
            first = number % len(entrants)
            for entrant in entrants[first:] + entrants[:first]:
                entrant.measurement.samples.append(entrant.sample(grads))
            if number + 1 >= MIN_ROUNDS and time.perf_counter() - started > seconds:
                break
    finally:
        gc.enable()
    # The first round after other work is a warm-up.
    for entrant in entrants:
        del entrant.measurement.samples[0]


def _describe(entrant: _Entrant, case: Case, params: list[Tensor], states: int) -> dict[str, Any]:
    elements = case.elements()
    return {
        "implementation": entrant.runner.implementation.name,
        "algorithm": case.algorithm,
        "workload": case.workload,
        "parameter_set": case.parameter_set,
        "shapes": [
            [list(shape), len(list(same))] for shape, same in itertools.groupby(case.shapes())
        ],
        "tensors": len(params),
        "elements": elements,
        "groups": len(case.groups(params)),
        "options": case.options(),
        "dtype": case.dtype,
        "device": probes.device_name(case.device),
        "device_type": case.device,
        "bytes_per_step": entrant.runner.case.bytes_per_step(states),
        "resident_bytes": (2 + states) * elements * case.torch_dtype.itemsize,
        "last_level_cache_bytes": probes.last_level_cache_bytes(case.device),
        "instruction_set": probes.instruction_set(case.device),
        "threads": torch.get_num_threads(),
        "versions": versions(entrant.runner.implementation),
        "repetitions": entrant.repetitions,
    }


def _probe(entrant: _Entrant, grads: Gradients) -> dict[str, Any]:
    """Asks once, outside the rounds, for what a clock does not show."""
    runner = entrant.runner
    device = runner.case.device

    def one(watch: Callable[[Callable[[], Any]], Any]) -> Any:
        grads.install()
        found = watch(runner.step)
        runner.settle()
        return found

    found = {"peak_extra_bytes": one(lambda step: probes.peak_extra_bytes(device, step))}
    if device == "cuda":
        host = statistics.median(one(probes.host_seconds) for _ in range(_HOST_SAMPLES))

        def step_and_settle() -> None:
            runner.step()
            runner.settle()

        grads.rewind()
        grads.install()
        repetitions = min(10, entrant.repetitions)
        found["host_seconds"] = host
        found["device_seconds"] = probes.device_seconds(step_and_settle, repetitions, host)
        found |= one(probes.count_launches)
    return found
