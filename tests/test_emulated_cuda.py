"""Runs the tests of the CUDA backend on an emulated GPU, in processes of their own.

There "cuda" is a device of torch whose memory and streams are those of tests/cpp/emulation: the
backend's host code as it is, its kernels compiled for the CPU, operations of torch done by the
CPU's kernels. The tests are the table of tests that all backends pass, with the stories of the
fuzzer, those for real GPUs, and those that only an emulation can run (test_emulated_plans.py).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated_cuda
import pytest

HERE = Path(__file__).parent
LIBRARY = Path(
    os.environ.get("FUSEDOPT_EMULATED_LIBRARY", HERE.parent / "build/cmake/fusedopt_emulated.so")
)
TABLE = sorted(
    path.name
    for path in HERE.glob("test_*.py")
    if "backend" in path.read_text()
    and not path.name.startswith(("test_triton_", "test_gpu_", "test_emulated_"))
)
ONLY_CUDA = ["-k", "not triton"]
#: What one process runs; two at a time. Neighbours in the table take about as long as each other.
PARTS = {
    "table, even": ["--backend=cuda", *TABLE[::2]],
    "table, odd": ["--backend=cuda", *TABLE[1::2]],
    "bits": [*ONLY_CUDA, "test_gpu_bits.py"],
    "steps and graphs": [*ONLY_CUDA, "test_gpu_steps.py", "test_gpu_graphs.py"],
    "plans": ["test_emulated_plans.py"],
}

pytestmark = [
    pytest.mark.skipif(emulated_cuda.EMULATED, reason="this process emulates already"),
    pytest.mark.skipif(
        not LIBRARY.exists(), reason=f"no {LIBRARY.name}; `make test-cpp` builds it"
    ),
]


def run(arguments):
    """Runs pytest with the emulated GPU."""
    # One thread each: the tensors are small, and threads of two processes would wait for each
    # other.
    environment = {**os.environ, emulated_cuda.VARIABLE: str(LIBRARY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def runs():
    """All parts, each a future."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {part: pool.submit(run, arguments) for part, arguments in PARTS.items()}


@pytest.mark.parametrize("part", PARTS)
def test_emulated(runs, part):
    """Passes when every test of the part passes on the emulated GPU, and at least one ran."""
    done = runs[part].result()
    assert done.returncode == 0, done.stdout + done.stderr
