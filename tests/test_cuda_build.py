"""The machine code of the CUDA kernels, read without a GPU.

What the build left in build/cmake is judged for every architecture in it; where that is missing or
older than the sources, the kernels are compiled for one architecture.
"""

import json
import re
from pathlib import Path

import kernel_costs
import pytest
import torch
from kernel_costs import CSRC, NAMES, ROOT, RULES, functions

SOURCES = [path for folder in ("cuda", "core", "rules") for path in (CSRC / folder).iterdir()]
APPLY = "fusedopt_cuda_apply_{}.dir/csrc/cuda/apply.cu.o"
REDUCE = "fusedopt_cuda.dir/csrc/cuda/reduce.cu.o"
RECORD = ROOT / "benchmarks" / "results" / "kernels_sm_90.json"


def or_skip(function, *arguments):
    """Calls a function of kernel_costs; skips, with its name, for want of a program."""
    try:
        return function(*arguments)
    except kernel_costs.MissingToolError as missing:
        pytest.skip(f"{missing} is not on this machine")


def dump(*arguments):
    """What cuobjdump says of an object file."""
    return or_skip(kernel_costs.dump, *arguments)


def dump_sass(path):
    """The disassembly for one architecture of those in an object file."""
    return or_skip(kernel_costs.dump_hopper, path, "--dump-sass")


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The object files with kernels: {rule or "reduce": path}."""
    built = ROOT / "build" / "cmake" / "CMakeFiles"
    paths = {rule: built / APPLY.format(rule) for rule in RULES} | {"reduce": built / REDUCE}
    newest = max(path.stat().st_mtime for path in SOURCES)
    if all(path.exists() and path.stat().st_mtime >= newest for path in paths.values()):
        return paths
    return or_skip(kernel_costs.compile_all, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("name", NAMES)
def test_no_spills(objects, name):
    """Nothing of any kernel lives in local memory, on any architecture."""
    kernels = functions(dump(objects[name], "--dump-resource-usage"))
    assert kernels
    for kernel, usage in kernels:
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, f"{kernel}: {usage}"
        # 3 blocks of 256 threads fit a multiprocessor, or 2 for mixed types in float64.
        most = 128 if "MixedId" in kernel else 80
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= most, f"{kernel}: {usage}"


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
    """The usual reduce kernel reads gradients 16 bytes at a time, several under way."""
    kernels = [
        len(re.findall(r"\bLDG\.E\.128", code))
        for _, code in functions(dump_sass(objects["reduce"]))
    ]
    assert len(kernels) == 2 and max(kernels) >= 16


@pytest.mark.parametrize("name", NAMES)
def test_exact_arithmetic(objects, name):
    """Division and roots are rounded correctly, nothing is contracted or flushed to zero."""
    code = dump(objects[name], "--dump-ptx")
    assert ".entry" in code
    # Where fused, the product is exact: the square of a float in double, or 0.
    fused = {"fma.rn.f64", "fma.rn.f32", "fma.rn.f16x2", "fma.rn.bf16x2"}
    found = set(re.findall(r"\b(?:fma|mad)\.[\w.]*[fx][\w.]*", code))
    assert found <= (fused if name == "reduce" else set())
    assert ".approx" not in code
    assert ".ftz" not in code
    # At least 1 is divided by the loss scale.
    inexact = r"\b(?:div|rcp|sqrt)\.(?!rn\.f|[us]\d)[\w.]+"
    assert re.search(r"\b(?:div|rcp)\.rn\.f64", code) and not re.findall(inexact, code)


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


def test_costs_do_not_grow(objects):
    """No main loop has more instructions than recorded, or fewer bytes under way.

    When they shrink, or grow for a reason: `python tests/kernel_costs.py` and `make report`.
    """
    record = {
        (cost["kernel"], cost["types"]): cost for cost in json.loads(RECORD.read_text())["kernels"]
    }
    costs = {(cost.kernel, cost.types): cost for cost in or_skip(kernel_costs.costs, objects)}
    assert costs.keys() == record.keys()
    for key, cost in costs.items():
        # Room for what another compiler of the same generation does differently.
        assert cost.instructions <= 1.03 * record[key]["instructions"], key
        assert cost.blocks >= record[key]["blocks"], key
        assert cost.kilobytes >= record[key]["kilobytes"], key


def test_costs_of_a_known_loop():
    """Counts a loop made up for the purpose: the short way, without the slow way around."""
    lines = [
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P0 BRA 0x30",
        "LDG.E.128 R8, desc[UR4][R2.64+0x10]",
        "F2F.F64.F32 R12, R4",
        "@!P1 BRA 0x60",
        "CALL.REL.NOINC 0x200",
        "STG.E.128 desc[UR4][R2.64], R8",
        "@P2 BRA 0x0",
        "EXIT",
    ]
    code = "".join(f"/*{16 * i:04x}*/ {line} ;\n" for i, line in enumerate(lines))
    (path,) = kernel_costs.main_loops(kernel_costs.parse(code))
    assert [each.address // 16 for each in path] == [0, 1, 2, 3, 4, 6, 7]
    assert kernel_costs.bytes_under_way(path) == 32
    assert kernel_costs.H200.blocks(64) == 4
    assert kernel_costs.H200.blocks(65) == 3


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
