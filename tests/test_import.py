"""What `import fusedopt` costs and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import NAMES

import fusedopt

HERE = Path(__file__).parent
#: The package that this process imported, wherever it is installed.
PATH = os.pathsep.join(
    [str(Path(fusedopt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
)


def python(code: str) -> str:
    """Runs code in a fresh interpreter, away from the repository, and returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": PATH}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_time():
    """At most 100 ms on top of torch, the best of several; measured as processor time."""
    code = (
        "import torch, time; start = time.process_time(); import fusedopt;"
        " print(time.process_time() - start)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.1


@pytest.mark.parametrize("step", [False, True])
def test_modules_left_alone(step):
    """Neither triton nor dynamo comes along, not even with an optimizer on the CPU."""
    code = """
import json, sys, torch
with_torch = set(sys.modules)
import fusedopt
if {step}:
    param = torch.nn.Parameter(torch.ones(3))
    stock = torch.optim.Adam([param], fused=True)
    param.grad = torch.ones(3)
    stock.step()
    with_torch |= set(sys.modules)
    fusedopt.Adam([param]).step()
print(json.dumps(sorted(set(sys.modules) - with_torch)))
"""
    added = json.loads(python(code.replace("{step}", str(step))))
    unwanted = ("triton", "torch._dynamo", "torch._inductor", "fusedopt.kernels")
    assert [name for name in added if name.startswith(unwanted)] == []


def test_nothing_is_compiled():
    """Neither compiler nor any other program is started."""
    code = """
import subprocess, os, torch
def refuse(*args, **kwargs):
    raise SystemExit("a program was started: " + repr(args))
subprocess.Popen.__init__ = os.system = os.posix_spawn = refuse
import fusedopt
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
fusedopt.AdamW([param], max_grad_norm=1.0).step()
print("done")
"""
    assert python(code) == "done"


def test_kernels_has_no_top_level_name():
    """A popular package is called kernels: ours answers to fusedopt.kernels only."""
    code = """
import importlib.util, fusedopt
spec = importlib.util.find_spec("kernels")
ours = importlib.util.find_spec("fusedopt.kernels")
print(spec is None or spec.origin != ours.origin)
"""
    assert python(code) == "True"
    code = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
try:
    import kernels
except ImportError as error:
    print("fusedopt.kernels" in str(error))
"""
    assert python(code) == "True"


def test_public_names():
    """Exactly the public face, and nothing else without an underscore but modules."""
    assert set(fusedopt.__all__) == {*NAMES, "GradScaler", "__version__", "from_torch"}
    for name in fusedopt.__all__:
        assert getattr(fusedopt, name) is not None
    assert fusedopt.__version__


def test_types_are_declared():
    """Type checkers read our annotations only where the marker is installed."""
    assert (Path(fusedopt.__file__).parent / "py.typed").exists()


def test_overview_on_the_command_line():
    """`python -m fusedopt` says for every backend whether it works here."""
    text = python("import runpy; runpy.run_module('fusedopt', run_name='__main__')")
    for word in ("cpu", "torch", "fusedopt"):
        assert word in text
