"""Runs the interpreted Triton tests in a process of their own.

Whether Triton interprets or compiles is decided when it is imported, and the tests beside these
compile.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already"
)
@pytest.mark.parametrize(
    "module", ["test_triton_kernels.py", "test_triton_plan.py", "test_triton_reduce.py"]
)
def test_interpreted(module):
    """Passes when every test of the module passes under the interpreter, and at least one ran."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
