"""A first table of times on this GPU, for gpu_check.py; benchmarks/run.py measures thoroughly.

Medians after warm-up, of several samples by CUDA events; ratios within this one run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusedopt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from probes import device_seconds, host_seconds
from workloads import shapes_of

REPETITIONS = 10
Step = Callable[[], Any]


def make_params(parameter_set: str) -> list[torch.nn.Parameter]:
    """Returns the parameters of a set, with gradients."""
    params = []
    for shape in shapes_of(parameter_set):
        param = torch.nn.Parameter(torch.randn(shape, device="cuda"))
        param.grad = torch.randn(shape, device="cuda") * 1e-3
        params.append(param)
    return params


def bare(params: list[torch.nn.Parameter], backend: str | None, name: str = "AdamW") -> Step:
    """Returns the step of ours, or of torch's best."""
    if backend is not None:
        return getattr(fusedopt, name)(params, backend=backend).step
    flag = {"fused": True} if name in ("Adam", "AdamW") else {"foreach": True}
    return getattr(torch.optim, name)(params, **flag).step


def chain(params: list[torch.nn.Parameter], backend: str | None) -> Step:
    """Returns unscale, inf check, clip, decay and update; a scale of one leaves the gradients."""
    settings = {"init_scale": 1.0, "growth_interval": 2**30}
    if backend is not None:
        ours = fusedopt.AdamW(params, backend=backend, weight_decay=0.01, max_grad_norm=1.0)
        own_scaler = fusedopt.GradScaler("cuda", **settings)
        own_scaler.scale(torch.ones((), device="cuda"))

        def own_step() -> None:
            own_scaler.step(ours)
            own_scaler.update()

        return own_step
    stock = torch.optim.AdamW(params, fused=True, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cuda", **settings)
    scaler.scale(torch.ones((), device="cuda"))

    def stock_step() -> None:
        scaler.unscale_(stock)
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        scaler.step(stock)
        scaler.update()

    return stock_step


def warm(step: Step) -> float:
    """Steps until everything is built and compiled; returns the host's seconds for one step."""
    for _ in range(5):
        step()
    return statistics.median(host_seconds(step) for _ in range(5))


def on_device(step: Step) -> float:
    """Returns milliseconds of the GPU for one step."""
    return 1e3 * device_seconds(step, REPETITIONS, warm(step))


def wall(step: Step, count: int = 50) -> float:
    """Returns milliseconds of the clock on the wall for one step, in a loop that never waits."""
    warm(step)
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / count)
    return 1e3 * statistics.median(samples)


def host_with_fresh_gradients(params: list[torch.nn.Parameter], step: Step) -> float:
    """Returns microseconds that one step keeps the host when all gradients have moved."""
    warm(step)
    sets = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    samples = []
    for i in range(40):
        for param, grad in zip(params, sets[i % 2], strict=True):
            param.grad = grad
        samples.append(host_seconds(step))
    return 1e6 * statistics.median(samples)


class Table:
    """Rows that are printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, work: str, who: str, value: float, unit: str, ratio: float | None = None) -> None:
        """Adds a row; `ratio` is how many times better than what it is compared with."""
        self.rows.append({"work": work, "who": who, "value": value, "unit": unit, "ratio": ratio})
        shown = "" if ratio is None else f"{ratio:8.2f}x"
        print(f"{work:34} {who:16} {value:10.4g} {unit:5}{shown}", flush=True)

    def compare(
        self, work: str, unit: str, measure: Callable[[str | None], float], backends: list[str]
    ) -> None:
        """Adds a row for torch, and one for each backend with its ratio."""
        base = measure(None)
        self.add(work, "torch", base, unit)
        for backend in backends:
            value = measure(backend)
            self.add(work, backend, value, unit, base / value)


def copy_rate() -> float:
    """Returns GB/s of a copy of 1 GiB, counting what is read and what is written."""
    source = torch.ones(2**28, device="cuda")
    target = torch.ones_like(source)
    return 2e-6 * source.nbytes / on_device(lambda: target.copy_(source))


def bandwidth(table: Table, backends: list[str]) -> None:
    """Adds bare AdamW on one tensor, against a copy from device to device."""
    copied = copy_rate()
    table.add("copy, device to device, 1 GiB", "torch", copied, "GB/s")
    for backend in (None, *backends):
        params = make_params("one64M")
        # Parameter and two states are read and written, the gradient is read.
        rate = 7 * 4 * 2**26 * 1e-6 / on_device(bare(params, backend))
        table.add("AdamW, 64 Mi float32", backend or "torch fused", rate, "GB/s", rate / copied)


def main() -> None:
    """Measures everything and writes the rows to the file named on the command line."""
    backends = [
        name for name in ("cuda", "triton") if fusedopt.backends.load(name).unavailable() is None
    ]
    table = Table()
    bandwidth(table, backends)
    for name in ("AdamW", "RMSprop", "Adadelta"):
        table.compare(
            f"{name}, GPT-2",
            "ms",
            lambda who, name=name: on_device(bare(make_params("gpt2"), who, name)),
            backends,
        )
    table.compare(
        "chain, GPT-2", "ms", lambda who: on_device(chain(make_params("gpt2"), who)), backends
    )
    table.compare(
        "chain, 1000 x 64, wall clock",
        "ms",
        lambda who: wall(chain(make_params("tiny1000"), who)),
        backends,
    )

    def host(backend: str | None) -> float:
        params = make_params("tiny1000")
        return host_with_fresh_gradients(params, bare(params, backend))

    table.compare("host, AdamW, 1000 x 64, fresh", "us", host, backends)
    Path(sys.argv[1]).write_text(json.dumps(table.rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
