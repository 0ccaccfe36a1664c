"""Sweeps what the CUDA launcher chooses, and writes the GPU's time for each choice as a table.

The length of a piece and the number of blocks that share a multiprocessor, through variables of
the environment that the launcher reads only when they are set (csrc/cuda/tuning.h). The table says
where our choice is not the best; nothing is changed. The kernels have no prefetch distance: each
thread issues all loads of an iteration before it uses the first.

Example:
    python benchmarks/sweep.py --minutes 9
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from probes import device_name, device_seconds, host_seconds
from workloads import Case, fill

import fusedopt

OUTPUT = Path(__file__).resolve().parent.parent / "out" / "sweep"
CASES = (
    "AdamW-bare-gpt2-float32",
    "AdamW-clip-gpt2-float32",
    "AdamW-bare-gpt2-bfloat16",
    "AdamW-clip-gpt2-bfloat16",
    "SGD-bare-gpt2-float32",
    "AdamW-bare-one4M-float32",
    "AdamW-clip-one4M-float32",
    "AdamW-bare-one64M-float32",
    "AdamW-bare-resnet18-float32",
    "AdamW-clip-tiny1000-float32",
)
#: Elements; None is our choice.
LENGTHS = (None, *(2**n for n in range(10, 17)))
#: At most so many; None is as many as registers allow.
BLOCKS = (None, 3, 2, 1)
_LENGTH = "FUSEDOPT_PIECE_LENGTH"
_SHARED = "FUSEDOPT_UNUSED_SHARED_BYTES"

Row = dict[str, Any]


def unused_bytes(blocks: int, per_multiprocessor: int) -> int:
    """Returns the shared memory to ask for so that no more than `blocks` fit a multiprocessor."""
    # CUDA keeps 1 KiB for each block; our kernels use less than another.
    return (per_multiprocessor // blocks - 2048) // 1024 * 1024


def measure(name: str, length: int | None) -> float:
    """Returns the GPU's seconds for a step of one case."""
    if length is None:
        os.environ.pop(_LENGTH, None)
    else:
        os.environ[_LENGTH] = str(length)
    case = Case.parse(name, "cuda")
    like = {"dtype": case.torch_dtype, "device": case.device}
    params = [torch.nn.Parameter(torch.empty(shape, **like)) for shape in case.shapes()]
    for param in params:
        param.grad = torch.empty_like(param)
    fill(params, seed=1)
    fill([param.grad for param in params], seed=2, scale=1e-3)
    limit = 1.0 if case.needs_norm else None
    kind = getattr(fusedopt, case.algorithm)
    optimizer = kind(params, backend="cuda", max_grad_norm=limit, **case.options())
    for _ in range(3):
        optimizer.step()
    return device_seconds(optimizer.step, 20, host_seconds(optimizer.step))


def measure_all(seconds: float) -> None:
    """Prints a line of JSON for each case and length: what one process of the sweep does."""
    deadline = time.monotonic() + seconds
    for name in CASES:
        for length in LENGTHS:
            if time.monotonic() > deadline:
                return
            row = {"case": name, "length": length, "seconds": measure(name, length)}
            print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()


def sweep(minutes: float) -> list[Row]:
    """Runs one process for each number of blocks, which share the time."""
    gpu = torch.cuda.get_device_properties(0)
    rows: list[Row] = []
    deadline = time.monotonic() + 60 * minutes
    for i, blocks in enumerate(BLOCKS):
        environment = dict(os.environ)
        if blocks is not None:
            unused = unused_bytes(blocks, gpu.shared_memory_per_multiprocessor)
            environment[_SHARED] = str(unused)
        seconds = (deadline - time.monotonic()) / (len(BLOCKS) - i)
        command = [sys.executable, __file__, "--one-process", str(seconds - 15)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        rows += [{"blocks": blocks, **json.loads(line)} for line in done.stdout.splitlines()]
        if done.returncode != 0:
            print(f"at most {blocks} blocks: ended with status {done.returncode}", file=sys.stderr)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns the times in Markdown: ours in microseconds, all others relative to it."""
    times = {(row["case"], row["blocks"], row["length"]): row["seconds"] for row in rows}
    head = ["case", "blocks", "ours", *(f"{length // 1024} Ki" for length in LENGTHS if length)]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for case, blocks in dict.fromkeys((row["case"], row["blocks"]) for row in rows):
        ours = times.get((case, None, None))
        cells = [case, str(blocks or "as registers allow")]
        for length in LENGTHS:
            seconds = times.get((case, blocks, length))
            if seconds is None or ours is None:
                cells.append("")
            elif blocks is None and length is None:
                cells.append(f"{1e6 * seconds:.1f} us")
            else:
                cells.append(f"{seconds / ours:.3f}")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Writes sweep.json and sweep.md, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one-process", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (reason := fusedopt.backends.load("cuda").unavailable()) is not None:
        raise SystemExit(f"the cuda backend does not work here: {reason}")
    if arguments.one_process is not None:
        measure_all(arguments.one_process)
        return
    rows = sweep(arguments.minutes)
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"device": device_name("cuda"), "torch": torch.__version__, "rows": rows}
    text = json.dumps(content, indent=1) + "\n"
    (arguments.output / "sweep.json").write_text(text, encoding="utf-8")
    (arguments.output / "sweep.md").write_text(table(rows), encoding="utf-8")
    print(f"{table(rows)}\nrecords in {arguments.output}")


if __name__ == "__main__":
    main()
