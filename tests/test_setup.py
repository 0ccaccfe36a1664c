"""How setup.py reads this machine, without building anything."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
PATH = Path(__file__).resolve().parent.parent / "setup.py"


@pytest.fixture(scope="module")
def setup():
    """The module, which builds only as a script."""
    spec = importlib.util.spec_from_file_location("fusedopt_setup", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("asked", "passes"),
    [
        ("8.0+PTX 8.6 9.0", ["arch=compute_80,code=[sm_80,sm_86,sm_90,compute_80]"]),
        # The front end of 7.5 knows no native conversions: it compiles for nobody else.
        ("7.5;9.0", ["arch=compute_75,code=[sm_75]", "arch=compute_90,code=[sm_90]"]),
        ("7.0+PTX, 7.5", ["arch=compute_70,code=[sm_70,sm_75,compute_70]"]),
        (
            "9.0a 8.0 9.0",
            ["arch=compute_90a,code=[sm_90a]", "arch=compute_80,code=[sm_80,sm_90]"],
        ),
        ("10.0f+PTX", ["arch=compute_100f,code=[sm_100f,compute_100f]"]),
        ("12.0 12.0 8.9", ["arch=compute_89,code=[sm_89,sm_120]"]),
    ],
)
def test_architectures(setup, asked, passes):
    """One pass of the front end for what it compiles alike; letters and PTX as asked."""
    assert list(setup.make_passes(setup.parse_architectures(asked))) == passes


@pytest.mark.parametrize("asked", ["80", "8.0b", "9.0-PTX", "Hopper"])
def test_unreadable_architectures(setup, asked):
    """An item that is none is named."""
    with pytest.raises(SystemExit, match=re.escape(repr(asked))):
        setup.parse_architectures(f"8.0 {asked}")


def program(folder, name, script):
    """Puts a program into a folder."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("printf '7.5\\n9.0\\n'", "7.5 9.0"),
        ("echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", ""),
        ("echo '[N/A]'", ""),
        (None, ""),
    ],
)
def test_gpus_of_this_machine(setup, tmp_path, monkeypatch, script, found):
    """They are what nvidia-smi says; nothing, where it is missing or has nothing to say."""
    if script is not None:
        program(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert setup.local_architectures() == found


def test_gpus_only_add(setup, tmp_path, monkeypatch):
    """A GPU adds itself to the list, if nvcc knows it, unless the list was given."""
    program(tmp_path, "nvcc", "for n in 75 80 90; do echo compute_$n; done")
    monkeypatch.setattr(setup, "try_compiler", lambda *arguments: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CUDACXX", shutil.which("nvcc"))
    common = "arch=compute_80,code=[sm_80,sm_90,compute_80]"
    assert setup.find_nvcc()[1] == (common,)
    program(tmp_path, "nvidia-smi", "printf '7.5\\n12.1\\n'")
    assert set(setup.find_nvcc()[1]) == {common, "arch=compute_75,code=[sm_75]"}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup.find_nvcc()[1] == ("arch=compute_90,code=[sm_90]",)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 10.0")
    with pytest.raises(SystemExit, match=r"'10\.0'.*knows only 75, 80, 90"):
        setup.find_nvcc()


@pytest.mark.parametrize(
    ("choice", "system", "wanted"),
    [
        ("auto", "Linux", ("cpu", "cuda")),
        ("cuda", "Linux", ("cpu", "cuda")),
        ("cpu", "Linux", ("cpu",)),
        ("none", "Linux", ()),
        ("auto", "Darwin", ()),
    ],
)
def test_what_is_missed(setup, monkeypatch, choice, system, wanted):
    """Only what nobody chose to go without, where there could be native kernels."""
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    assert setup.Recipe(choice).wanted() == wanted
