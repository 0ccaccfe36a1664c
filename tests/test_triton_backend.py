"""What the Triton backend says about itself, and that its rules are described as the C++ rules are.

No kernel runs here.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedopt.backends import triton as backend

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _ask_again():
    """Forgets what the backend found out about this machine."""
    backend._why_not.cache_clear()
    yield
    backend._why_not.cache_clear()


RULES = ["adam", "sgd", "rmsprop", "adagrad", "adadelta"]


def header_constant(text, name):
    """The text between the braces of a constexpr array."""
    return re.search(rf"{name} = \{{(.*?)\}};", text, re.DOTALL).group(1)


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_described_as_in_cpp(rule):
    """The same names in the same order, states under the same variants."""
    pytest.importorskip("triton")
    text = (ROOT / "csrc" / "rules" / f"{rule}.h").read_text()
    module = importlib.import_module(f"fusedopt.kernels.{rule}")
    assert tuple(re.findall(r'"([^"]+)"', header_constant(text, "kHyperNames"))) == module.HYPER
    variants = tuple(re.findall(r'"([^"]+)"', header_constant(text, "kVariantNames")))
    assert variants == module.VARIANTS
    bits = {f"k{name.capitalize()}": 1 << bit for bit, name in enumerate(variants)} | {"0": 0}
    for name, bit in bits.items():
        assert name == "0" or re.search(rf"\b{name} = {bit};", text)
    states = re.findall(r'\{"(\w+)", (\w+)\}', header_constant(text, "kStateNames"))
    assert tuple((name, bits[bit]) for name, bit in states) == module.STATES


def test_kernels_are_no_package_of_their_own():
    """The folder refuses to be imported under the name of another package on PyPI."""
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    with pytest.raises(ImportError, match=r"fusedopt\.kernels.*imported as 'kernels'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_triton_is_imported_on_first_use():
    """Importing the backend costs nothing to those who never use it."""
    code = (
        "import sys, fusedopt.kernels, fusedopt.backends.triton; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


def test_missing_triton_is_named_with_the_remedy(monkeypatch):
    """Without Triton the reason says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backend.unavailable()
    assert "pip install triton" in backend.unavailable()


def test_no_gpu_is_named_with_the_remedy(monkeypatch):
    """Without a GPU the reason says so, and how to try on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in backend.unavailable()
    assert "TRITON_INTERPRET=1" in backend.unavailable()


def test_old_triton_is_named_with_the_remedy(monkeypatch):
    """An old Triton is refused by version, newer ones of any spelling are not."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.unavailable() is None
    for version in ("3.6.0", "3.10.0+git1234", "4.0"):
        backend._why_not.cache_clear()
        monkeypatch.setattr(triton, "__version__", version)
        assert backend.unavailable() is None
    backend._why_not.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert re.search(r"3\.5\.1 is too old.*torch.*2\.11", backend.unavailable())


def test_serves_gpus_and_the_cpu_only_interpreted(monkeypatch):
    """The CPU is served in the interpreter, GPUs outside it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.serves(torch.device("cuda", 1))
    assert not backend.serves(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.serves(torch.device("cpu"))


def test_refuses_cpu_tensors_outside_the_interpreter(monkeypatch):
    """With the way out in the message."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"a parameter on cpu: .*TRITON_INTERPRET=1"):
        backend.make_plan("sgd", torch.device("cpu"), [], [], {})
