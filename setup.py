"""Decides what this machine can build, lets CMake build it and records it in _build_info.py.

FUSEDOPT_BUILD chooses: auto (default: whatever the toolchain here allows), cpu, cuda (and cpu),
none (pure Python).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = ("cpu", "cuda")
CHOICES = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 11)
# The GPUs to compile for when TORCH_CUDA_ARCH_LIST, whose language this is, is not set. Those of
# this machine come to it.
CUDA_ARCHITECTURES = "8.0+PTX 8.6 8.9 9.0 10.0 12.0"

CXX_PROBE = """
#include <Python.h>
#include <omp.h>
#include <concepts>
int threads() { return omp_get_max_threads(); }
#ifdef __x86_64__
bool newest() { return __builtin_cpu_supports("x86-64-v4"); }
#endif
"""
CUDA_PROBE = """
#include <cuda_runtime.h>
#include <concepts>
__global__ void probe(float* out) { *out = 1.0f; }
void launch(float* out) { probe<<<1, 1>>>(out); }
"""


class MissingPieceError(Exception):
    """A piece of the toolchain is not there; the text names it and the way to get it."""


@dataclass(frozen=True)
class Recipe:
    """What is built, what is left out and why."""

    choice: str
    torch_version: str | None = None
    backends: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)
    # What nvcc's --gencode gets, one front-end pass each.
    cuda_passes: tuple[str, ...] = ()

    def wanted(self) -> tuple[str, ...]:
        """Returns the backends whose absence is a surprise."""
        wanted = {"none": (), "cpu": ("cpu",)}.get(self.choice, NATIVE)
        return wanted if platform.system() == "Linux" else ()

    def summary(self) -> str:
        """Says in one line what FUSEDOPT_BUILD led to."""
        built = " and ".join(self.backends) or "nothing native (pure Python)"
        against = f" against torch {self.torch_version}" if self.backends else ""
        # One piece is often missing for several backends.
        reasons: dict[str, list[str]] = {why: [] for why in self.left_out.values()}
        for piece, why in self.left_out.items():
            reasons[why].append(piece)
        left_out = "".join(f"; left out {' and '.join(reasons[why])}: {why}" for why in reasons)
        return f"fusedopt: FUSEDOPT_BUILD={self.choice} builds {built}{against}{left_out}"


def read_choice() -> str:
    """Returns FUSEDOPT_BUILD, checked; also checks that torch is there unless it is not needed."""
    choice = os.environ.get("FUSEDOPT_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(
            f"fusedopt: FUSEDOPT_BUILD={choice!r} is unknown; choose one of {', '.join(CHOICES)}"
        )
    if choice != "none" and importlib.util.find_spec("torch") is None:
        sys.exit(
            "fusedopt: torch cannot be imported by this build; install torch, then run `pip "
            "install --no-build-isolation .` (FUSEDOPT_BUILD=none builds without native code)"
        )
    return choice


def make_recipe(choice: str) -> Recipe:
    """Looks for the toolchain; a missing piece is left out under auto and fatal when asked for."""
    unwanted = {"none": NATIVE, "cpu": ("cuda",)}.get(choice, ())
    left_out = dict.fromkeys(unwanted, f"FUSEDOPT_BUILD={choice}")
    if choice == "none":
        return Recipe(choice, left_out=left_out)
    torch_version = find_torch()
    programs: dict[str, str] = {}
    missing: dict[str, str] = {}
    passes: tuple[str, ...] = ()
    try:
        programs["cxx"] = find_cxx()
        programs["cmake"] = find_program("cmake", "CMAKE_BIN_DIR")
        programs["ninja"] = find_program("ninja", "BIN_DIR")
        if choice != "cpu":
            try:
                programs["nvcc"], passes = find_nvcc()
            except MissingPieceError as reason:
                missing["cuda"] = str(reason)
    except MissingPieceError as reason:
        missing = dict.fromkeys(NATIVE, str(reason))
    if choice != "auto" and missing:
        first = next(iter(missing.values()))
        sys.exit(f"fusedopt: FUSEDOPT_BUILD={choice} cannot be built here: {first}")
    left_out |= missing
    backends = tuple(piece for piece in NATIVE if piece not in left_out)
    return Recipe(choice, torch_version, backends, left_out, programs, passes)


def find_torch() -> str:
    """Returns the version of the torch to build against."""
    try:
        import torch
    except Exception as error:  # A broken torch raises OSError as well as ImportError.
        sys.exit(
            f"fusedopt: importing torch failed ({error}); repair it, or set FUSEDOPT_BUILD=none"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        sys.exit(f"fusedopt: torch {torch.__version__} is too old; install torch {oldest} or newer")
    return str(torch.__version__)


def find_program(name: str, directory_attribute: str) -> str:
    """Returns the path of cmake or ninja, from the package of that name or else from PATH."""
    try:
        directory = getattr(__import__(name), directory_attribute)
        found = shutil.which(name, path=directory)
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if not found:
        raise MissingPieceError(f"{name} not found (pip install {name})")
    return found


def find_cxx() -> str:
    """Returns the command of a C++ compiler that can build the extension, after trying it."""
    if platform.system() != "Linux":
        raise MissingPieceError(f"native kernels are for Linux, this is {platform.system()}")
    asked = os.environ.get("CXX")
    candidates = (asked,) if asked else ("c++", "g++", "clang++")
    command = next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)
    if command is None:
        raise MissingPieceError(
            f"no C++ compiler ({', '.join(candidates)}) found (apt install g++, or set CXX)"
        )
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise MissingPieceError(f"{include}/Python.h not found (apt install python3-dev)")
    flags = ["-std=c++20", "-fopenmp", "-shared", "-fPIC", f"-I{include}"]
    if platform.machine() == "x86_64":
        flags.append("-march=x86-64-v4")
    try_compiler(
        [*shlex.split(command), *flags], "probe.cpp", CXX_PROBE, "g++ 12 or newer is needed"
    )
    return command


def find_nvcc() -> tuple[str, tuple[str, ...]]:
    """Returns the path of a working nvcc and what it is to compile for."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    nvcc = next((path for place in places if place and (path := shutil.which(place))), None)
    if nvcc is None:
        raise MissingPieceError(
            "nvcc not found (install the CUDA toolkit, or set CUDACXX or CUDA_HOME)"
        )
    flags = ["-std=c++20", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    try_compiler([nvcc, *flags], "probe.cu", CUDA_PROBE, "CUDA 12 or newer is needed")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = re.findall(r"compute_(\d+)", listed.stdout)
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        items = parse_architectures(asked)
        if unknown := [item for item, number, _, _ in items if number not in known]:
            sys.exit(
                f"fusedopt: TORCH_CUDA_ARCH_LIST has {unknown[0]!r}, "
                f"but {nvcc} knows only {', '.join(known)}"
            )
    else:
        items = parse_architectures(f"{CUDA_ARCHITECTURES} {local_architectures()}")
        items = [item for item in items if item[1] in known]
    return nvcc, make_passes(items)


def local_architectures() -> str:
    """Returns the compute capabilities of the GPUs of this machine; they only add to the list."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(re.findall(r"^\d+\.\d$", answer.stdout, re.MULTILINE))


def parse_architectures(asked: str) -> list[tuple[str, str, str, bool]]:
    """Translates torch's "8.0 9.0a+PTX" into (item, "90", "a", whether PTX is asked for) each."""
    result = []
    for item in re.split(r"[;,\s]+", asked.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            sys.exit(
                f"fusedopt: TORCH_CUDA_ARCH_LIST has {item!r}; "
                "expected items like 8.0, 9.0a or 9.0+PTX"
            )
        result.append((item, match[1] + match[2], match[3], match[4] is not None))
    return result


def make_passes(items: list[tuple[str, str, str, bool]]) -> tuple[str, ...]:
    """Groups architectures by what nvcc's front end does differently for them.

    A pass compiles for its oldest one, whose PTX runs on newer GPUs too; the kernels use nothing
    that only newer ones have. But below 8.0 there are no native conversions of half types, and what
    has a letter is only for itself.
    """
    passes: dict[str, list[tuple[int, str, bool]]] = {}
    for _, number, letter, ptx in items:
        kind = number + letter if letter else "below 8.0" if int(number) < 80 else "from 8.0"
        passes.setdefault(kind, []).append((int(number), letter, ptx))
    result = []
    for members in passes.values():
        numbers = sorted({(number, letter) for number, letter, _ in members})
        oldest = f"compute_{numbers[0][0]}{numbers[0][1]}"
        codes = [f"sm_{number}{letter}" for number, letter in numbers]
        if any(ptx for _, _, ptx in members):
            codes.append(oldest)
        result.append(f"arch={oldest},code=[{','.join(codes)}]")
    return tuple(result)


def try_compiler(command: list[str], name: str, source: str, hint: str) -> None:
    """Compiles and links a small library; raises MissingPieceError when that fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(source)
        arguments = [*command, str(path), "-o", str(path.with_suffix(".so"))]
        tried = subprocess.run(arguments, capture_output=True, text=True)
    if tried.returncode != 0:
        lines = (tried.stderr or tried.stdout).strip().splitlines()
        error = next(
            (line for line in lines if "error" in line), lines[-1] if lines else "no message"
        )
        raise MissingPieceError(f"{command[0]} cannot compile a trial ({error.strip()}); {hint}")


class BuildPy(build_py):
    """Copies the Python files and adds fusedopt/_build_info.py."""

    def run(self) -> None:
        """Starts from an empty folder: nothing of an earlier build may slip into a wheel."""
        print(RECIPE.summary(), flush=True)
        package = Path(self.get_package_dir("fusedopt"))
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
            package = Path(self.build_lib, "fusedopt")
        super().run()
        facts = {
            "TORCH_VERSION": RECIPE.torch_version,
            "BACKENDS": RECIPE.backends,
            "WANTED": RECIPE.wanted(),
            "LEFT_OUT": RECIPE.left_out,
            "CUDA_CODES": re.findall(r"(?<=[[,])(?:sm|compute)_\w+", " ".join(RECIPE.cuda_passes)),
        }
        lines = ['"""What setup.py built; written by it."""', ""]
        lines += [f"{name} = {value!r}" for name, value in facts.items()]
        package.mkdir(parents=True, exist_ok=True)
        Path(package, "_build_info.py").write_text("\n".join(lines) + "\n")


class BuildExt(build_ext):
    """Lets CMake build the extension in build/cmake, which is kept between builds."""

    def build_extension(self, ext: Extension) -> None:
        """Configures, compiles and puts the module where setuptools wants it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / "cmake"
        programs = RECIPE.programs
        stamp = "\n".join([str(folder), *programs.values()])
        stamp_file = folder / "toolchain.txt"
        # CMake cannot change the compiler of a folder, nor use one that was moved.
        if not stamp_file.exists() or stamp_file.read_text() != stamp:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        stamp_file.write_text(stamp)
        cuda = "cuda" in RECIPE.backends
        configure = [
            *(programs["cmake"], "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)),
            f"-DCMAKE_MAKE_PROGRAM={programs['ninja']}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFUSEDOPT_CUDA={'ON' if cuda else 'OFF'}",
            f"-DFUSEDOPT_CUDA_PASSES={';'.join(RECIPE.cuda_passes)}",
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.environ.get("MAX_JOBS")
        jobs = jobs or str(len(os.sched_getaffinity(0)))
        build = [programs["cmake"], "--build", str(folder), "--target", "_C", "--parallel", jobs]
        environment = os.environ | {"CXX": programs["cxx"], "CUDACXX": programs.get("nvcc", "")}
        for command in (configure, build):
            if subprocess.run(command, env=environment).returncode != 0:
                sys.exit(
                    f"fusedopt: `{shlex.join(command)}` failed, its messages are above "
                    "(FUSEDOPT_BUILD=none installs without native kernels)"
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


if __name__ == "__main__":
    # Commands that only ask for metadata must work without torch and without a compiler; dist_info
    # is the first step of an installation and must fail before pip starts to download dependencies.
    if {"egg_info", "sdist", "clean"}.isdisjoint(sys.argv):
        CHOICE = read_choice()
        RECIPE = Recipe(CHOICE) if "dist_info" in sys.argv else make_recipe(CHOICE)
    else:
        RECIPE = Recipe("none")

    setup(
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
        ext_modules=[Extension("fusedopt._C", [])] if RECIPE.backends else [],
    )
