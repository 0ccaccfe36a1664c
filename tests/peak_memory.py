"""Prints by how many bytes a step raises the memory in use, as JSON: {"Adam float32": 8192, ...}.

test_memory.py gives it a process of its own, whose memory nobody else moves. "control" is what one
temporary as large as the parameter would do.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
from cases import TABLE, Entry, make_fused, richest

MEGABYTE = 2**20
#: Of the parameter. malloc maps blocks above 32 MiB anew each time, so that a temporary cannot hide
#: in memory that was freed before.
SIZE = 40 * MEGABYTE
CLIPS = {"max_grad_norm": 1.0, "max_grad_norm_per_param": 1.0, "skip_nonfinite": True}


def _in_use(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def rise(action: Callable[[], object]) -> int:
    """Returns how many bytes more than now were in use at the peak of an action."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _in_use("VmRSS")
    action()
    return _in_use("VmHWM") - before


def step_rises(entry: Entry, dtype: torch.dtype) -> int:
    """Returns the rise of a second step with every clip."""
    param = torch.nn.Parameter(torch.ones(SIZE // dtype.itemsize, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = make_fused(entry, [param], "cpu", **richest(entry), **CLIPS)
    optimizer.step()
    return rise(optimizer.step)


if __name__ == "__main__":
    rises = {
        f"{name} {str(dtype).removeprefix('torch.')}": step_rises(entry, dtype)
        for name, entry in TABLE.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    plain = torch.ones(SIZE // 4)
    print(json.dumps({**rises, "control": rise(lambda: plain + 1)}))
