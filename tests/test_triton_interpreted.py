"""Runs the tests of the Triton backend in its interpreter, on the CPU, in processes of their own.

Whether Triton interprets or compiles is decided when it is imported, and the tests beside these
compile.

Besides the tests of its kernels and plan this is the table of tests that all backends pass, every
test of it that names a backend, thinned (`--thin`, see conftest.py): the interpreter takes 20 ms
for every parameter of every step, which makes two minutes on two cores. Each value of each
parameter occurs in its file, so every optimizer, type, clip, scaler and change does, but not in all
combinations; of an optimizer's variants the table takes one, and test_triton_kernels.py compares
them all with C++. `make test-triton` runs all of it, in about half an hour.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OWN = sorted(path.name for path in HERE.glob("test_triton_*.py"))
TABLE = sorted(
    path.name
    for path in HERE.glob("test_*.py")
    if path.name not in OWN and "backend" in path.read_text() and "_gpu_" not in path.name
)
#: What one process runs; two at a time. Neighbours in the table take about as long as each other.
PARTS = {
    "kernels": ["test_triton_kernels.py", "test_triton_reduce.py"],
    "plan": ["test_triton_plan.py"],
    "table, even": ["--backend=triton", "--thin", *TABLE[::2]],
    "table, odd": ["--backend=triton", "--thin", *TABLE[1::2]],
}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already"
    ),
]


def run(arguments):
    """Runs pytest in Triton's interpreter."""
    # One thread each: the tensors are small, and threads of two processes would wait for each
    # other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
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
def test_interpreted(runs, part):
    """Passes when every test of the part passes under the interpreter, and at least one ran."""
    done = runs[part].result()
    assert done.returncode == 0, done.stdout + done.stderr
