"""What is asked of the machine: bandwidth, names, caches, peak memory, launches, device time."""

from __future__ import annotations

import functools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusedopt

#: Kernels are queued behind a pause of so many cycles a second of the host's work, which must not
#: show in their time: half as long again at 2 GHz.
_PAUSE_CYCLES_PER_SECOND = 3e9
_LONGEST_PAUSE_SECONDS = 0.5


def synchronize(device: str) -> None:
    """Waits until the device has done all its work; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def device_name(device: str) -> str:
    """Returns what the machine calls its GPU or CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    match = re.search(r"model name\s*:\s*(.+)", info)
    name = match[1] if match else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """Returns the device's name as that of a folder."""
    plain = re.sub(r"\((r|tm)\)|processor|\bcpu\b|@", " ", device_name(device).lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-")


@functools.cache
def last_level_cache_bytes(device: str) -> int | None:
    """Returns the size of the largest cache, None where the machine does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [text.read_text(encoding="ascii").strip() for text in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in found), default=None)


def instruction_set(device: str) -> str:
    """Returns what the kernels are compiled for here."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    if fusedopt.backends.extension.unavailable() is None:
        return fusedopt.backends.extension.module().instruction_set()
    return torch.backends.cpu.get_capability()


class Bandwidth:
    """Samples of what the machine's memory gives, taken between the rounds of a measurement."""

    def __init__(self, device: str) -> None:
        """Allocates two buffers, far larger than any cache."""
        self._device = device
        self._source, self._target = _buffers(device)
        self._copies: list[float] = []
        self._updates: list[float] = []
        self._reads: list[float] = []

    def sample(self) -> None:
        """Times one copy, one update in place, as an optimizer's are, and one reading."""
        # A GPU needs several in a row, or the launch shows.
        repeats = 5 if self._device == "cuda" else 1
        once = self._source.nbytes * repeats
        for samples, bytes_moved, work in (
            (self._copies, 2 * once, lambda: self._target.copy_(self._source)),
            (self._updates, 2 * once, lambda: self._target.add_(1.0)),
            (self._reads, once, lambda: self._source.sum()),
        ):
            synchronize(self._device)
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            synchronize(self._device)
            samples.append(bytes_moved / (time.perf_counter() - start) / 1e9)

    def record(self) -> dict[str, float]:
        """Returns the medians, counting bytes read and bytes written."""
        return {
            "copy_gb_per_s": statistics.median(self._copies),
            "inplace_gb_per_s": statistics.median(self._updates),
            "read_gb_per_s": statistics.median(self._reads),
        }


@functools.cache
def _buffers(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    elements = 2**28 if device == "cuda" else 2**26
    return torch.ones(elements, device=device), torch.ones(elements, device=device)


def peak_extra_bytes(device: str, step: Callable[[], Any]) -> int | None:
    """Returns by how much memory in use rises during one step; None where it cannot be seen.

    On a GPU that is torch's allocator; on a CPU the high-water mark of the whole process.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    before = _resident("VmHWM")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"{field}:\s*(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def device_seconds(step: Callable[[], None], repetitions: int, host: float) -> float:
    """Returns the GPU's own time for one step, by events, in a queue that is never empty.

    Args:
        step: Puts the work of one step into the queue.
        repetitions: How many steps a sample takes.
        host: Seconds that one step keeps the host.
    """
    busy = min(_LONGEST_PAUSE_SECONDS, host * repetitions)
    samples = []
    for _ in range(5):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_PAUSE_CYCLES_PER_SECOND * busy))
        first.record()
        for _ in range(repetitions):
            step()
        last.record()
        torch.cuda.synchronize()
        samples.append(first.elapsed_time(last) / 1e3 / repetitions)
    return statistics.median(samples)


def host_seconds(step: Callable[[], Any]) -> float:
    """Returns how long one step keeps the host, on an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def count_launches(step: Callable[[], Any]) -> dict[str, int]:
    """Returns how many kernels, and how many copies and fills, one step puts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("Optimizer.")
    ]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    return {"launches": len(on_device) - copies, "copies": copies}
