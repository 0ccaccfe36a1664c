"""The machine code of the CUDA kernels, read without a GPU.

What the build left in build/cmake is judged for every architecture in it; where that is missing or
older than the sources, the kernels are compiled for one architecture.
"""

import importlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path for folder in ("cuda", "core", "rules") for path in (ROOT / "csrc" / folder).iterdir()
]
RULES = sorted(path.stem for path in (ROOT / "csrc" / "rules").glob("*.h") if path.stem != "common")
APPLY = "fusedopt_cuda_apply_{}.dir/csrc/cuda/apply.cu.o"
REDUCE = "fusedopt_cuda.dir/csrc/cuda/reduce.cu.o"
FLAGS = [
    *("-std=c++20", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"),
    *("-gencode", "arch=compute_90,code=[sm_90,compute_90]", f"-I{ROOT / 'csrc'}"),
]


def find(name, *places):
    """The path of a program, or a skip that names it."""
    found = shutil.which(name) or next((p for p in places if p and shutil.which(p)), None)
    if found is None:
        pytest.skip(f"{name} is not on this machine")
    return str(found)


def compile_object(nvcc, source, target, *flags):
    """Compiles one CUDA source for one architecture."""
    command = [nvcc, *FLAGS, *flags, "-c", str(ROOT / "csrc" / "cuda" / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The object files with kernels: {rule or "reduce": path}."""
    built = ROOT / "build" / "cmake" / "CMakeFiles"
    paths = {rule: built / APPLY.format(rule) for rule in RULES} | {"reduce": built / REDUCE}
    newest = max(path.stat().st_mtime for path in SOURCES)
    if all(path.exists() and path.stat().st_mtime >= newest for path in paths.values()):
        return paths
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = find("nvcc", os.environ.get("CUDACXX"), "/usr/local/bin/nvcc", f"{home}/bin/nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "rules_list.inc").write_text("".join(f"FUSEDOPT_RULE({rule})\n" for rule in RULES))
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        jobs = {"reduce": pool.submit(compile_object, nvcc, "reduce.cu", folder / "reduce.o")}
        for rule in RULES:
            flags = [f"-DFUSEDOPT_RULE={rule}", f'-DFUSEDOPT_RULE_HEADER="rules/{rule}.h"']
            target = folder / f"{rule}.o"
            jobs[rule] = pool.submit(compile_object, nvcc, "apply.cu", target, *flags)
        return {name: job.result() for name, job in jobs.items()}


def dump(path, *options):
    """What cuobjdump says of an object file."""
    wheel = importlib.util.find_spec("triton")
    folder = Path(wheel.origin).parent / "backends" / "nvidia" / "bin" if wheel else Path()
    command = [find("cuobjdump", folder / "cuobjdump"), *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dump_sass(path):
    """The disassembly for one architecture of those in an object file: Hopper's, if it is there."""
    found = set(re.findall(r"\bsm_\d+a?\b", dump(path, "--list-elf")))
    return dump(
        path, "--gpu-architecture", "sm_90" if "sm_90" in found else min(found), "--dump-sass"
    )


def functions(text):
    """Splits a dump into (name of the kernel, its part)."""
    parts = re.split(r"\bFunction\s*:?\s+(\S+?):?\s", text)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", [*RULES, "reduce"])
def test_no_spills(objects, name):
    """Nothing of any kernel lives in local memory, on any architecture."""
    kernels = functions(dump(objects[name], "--dump-resource-usage"))
    assert kernels
    for kernel, usage in kernels:
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, f"{kernel}: {usage}"
        # 3 blocks of 256 threads fit a multiprocessor.
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 80, f"{kernel}: {usage}"


@pytest.mark.parametrize("rule", RULES)
def test_wide_accesses(objects, rule):
    """Every apply kernel reads and writes 16 bytes at a time and knows that it is global memory."""
    kernels = functions(dump_sass(objects[rule]))
    assert len(kernels) >= 6
    for kernel, code in kernels:
        assert "apply_kernel" in kernel
        loads = len(re.findall(r"\bLDG\.E\.128", code))
        stores = len(re.findall(r"\bSTG\.E\.128", code))
        # Parameter and gradient are read, the parameter is written; so is every state.
        assert loads >= 2 and stores >= 1, f"{kernel}: {loads} wide loads, {stores} wide stores"
        assert loads > stores, f"{kernel}: {loads} wide loads, {stores} wide stores"
        assert not re.search(r"\b(LD|ST)\.E\.128", code), f"{kernel} has generic wide accesses"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{kernel} uses local memory"


def test_wide_loads_of_reduce(objects):
    """The reduce kernel reads gradients 16 bytes at a time, several under way."""
    ((_, code), *_) = functions(dump_sass(objects["reduce"]))
    assert len(re.findall(r"\bLDG\.E\.128", code)) >= 16


@pytest.mark.parametrize("name", [*RULES, "reduce"])
def test_exact_arithmetic(objects, name):
    """Division and roots are rounded correctly, nothing is contracted or flushed to zero."""
    code = dump(objects[name], "--dump-ptx")
    assert ".entry" in code
    assert "fma." not in code
    assert ".approx" not in code
    assert ".ftz" not in code
    # SGD divides only once, 1 by the loss scale.
    assert "rcp.rn.f64" in code if name == "sgd" else "div.rn.f64" in code
    assert name in ("sgd", "reduce") or ("div.rn.f32" in code and "sqrt.rn.f32" in code)


def test_noted_architectures(objects):
    """What `python -m fusedopt` reports is what the binary holds."""
    info = pytest.importorskip("fusedopt._build_info")
    if not info.CUDA_CODES or ROOT / "build" not in objects["sgd"].parents:
        pytest.skip("these kernels are not what was installed")
    found = [
        re.sub("sm", kind, name)
        for kind, option in (("sm", "--list-elf"), ("compute", "--list-ptx"))
        for name in re.findall(r"\bsm_\d+[af]?\b", dump(objects["sgd"], option))
    ]
    assert sorted(found) == sorted(info.CUDA_CODES)


def test_library_without_a_driver():
    """The extension loads on any machine and says what stands in the way of using a GPU."""
    native = pytest.importorskip("fusedopt._C")
    if not hasattr(native, "cuda_unavailable"):
        pytest.skip("fusedopt was built without the CUDA kernels")
    reason = native.cuda_unavailable()
    if torch.cuda.is_available():
        assert reason == ""
    elif not Path("/proc/driver/nvidia").exists():
        assert "no NVIDIA driver" in reason
        assert native.cuda_unavailable(0) == reason
