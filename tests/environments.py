"""Runs the suite under another Python or torch: `make test-oldest`, `test-newest`, `test-pythons`.

Every pair gets a virtual environment under build/environments, kept between runs, in which fusedopt
is built and installed; the CMake folder is the common one, so that only what sees Python or torch
is compiled again.

Example:
    python tests/environments.py --torch 2.11.0 -- --thin -k adam
    python tests/environments.py --python 3.10 3.13
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REQUIREMENTS = HERE / "environments.txt"
ENVIRONMENTS = ROOT / "build" / "environments"
TORCH = "2.13.0"
#: CUDA's libraries are gigabytes. All but the driver and those that the requirements name.
_STAND_INS = re.compile(r"lib(cu(?!da\.|dart\.|pti\.)|nv|nccl)")
_FUNCTION = r" U ((?:cu[a-z]|cuFile|nv|nccl)\w+)(?:@(\S+))?$"

PLACE = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
TRITON = "import importlib.metadata as m; print(*m.requires('torch'), sep='\\n')"


def find_python(version: str) -> str | None:
    """Returns the path of the interpreter of a version such as 3.12, from PATH or pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
    for path in filter(None, candidates):
        # pyenv's shims exist for versions that are not switched on, and fail.
        command = [str(path), "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        if read(*command, check=False).strip() == version:
            return str(path)
    return None


def read(*command: str | Path, check: bool = True) -> str:
    """Returns what a program prints."""
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one Python and one torch."""

    interpreter: str
    version: str
    torch: str

    @property
    def folder(self) -> Path:
        """Where it is."""
        return ENVIRONMENTS / f"python{self.version}-torch{self.torch}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def pip(self, *arguments: str | Path) -> None:
        """Installs something without its dependencies."""
        command = [self.python, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps"]
        options = ["--disable-pip-version-check", *arguments]
        # The constraints of a machine are not about environments that are to have another torch.
        environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
        subprocess.run([*command, *options], cwd=ROOT, env=environment, check=True)

    def create(self) -> None:
        """Makes the environment unless it is there, with torch and all that tests need."""
        stamp = self.folder / "requirements.stamp"
        wanted = REQUIREMENTS.read_text(encoding="utf-8")
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([self.interpreter, "-m", "venv", self.folder], check=True)
        self.pip(f"torch=={self.torch}", "-r", REQUIREMENTS)
        # A torch that names no Triton of its own works with the one of the development environment.
        named = re.search(r"^triton[^;\n]*", read(self.python, "-c", TRITON), re.M)
        development = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
        self.pip(named[0] if named else re.search(r"^triton==\S+", development, re.M)[0])
        stand_in_for_cuda(Path(read(self.python, "-c", PLACE).strip(), "lib"))
        stamp.write_text(wanted, encoding="utf-8")

    def test(self, options: list[str]) -> int:
        """Installs fusedopt and runs pytest; returns its exit status."""
        self.pip("--no-build-isolation", "--force-reinstall", ".")
        # From here, Python finds the installed package and not its sources.
        subprocess.run([self.python, "-m", "fusedopt"], cwd=HERE, check=True)
        return subprocess.run([self.python, "-m", "pytest", "-q", *options], cwd=HERE).returncode


def stand_in_for_cuda(folder: Path) -> None:
    """Lets a CUDA build of torch load without CUDA's libraries, on a machine without a GPU.

    Every library that torch's own in `folder` need gets a stand-in beside them, with the functions
    that they look for under the same versions; nobody calls them where there is no driver.
    """
    needed: set[str] = set()
    functions: dict[str, set[str]] = defaultdict(set)
    versions: dict[str, set[str]] = defaultdict(set)
    for library in (*folder.glob("lib*torch*.so"), *folder.glob("libc10*.so")):
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", read("readelf", "-Wd", library)))
        symbols = read("nm", "-D", "--undefined-only", library)
        for name, version in re.findall(_FUNCTION, symbols, re.M):
            functions[version].add(name)
        for part in read("readelf", "-WV", library).split("File: ")[1:]:
            versions[part.split()[0]] |= set(re.findall(r"Name: (\S+)", part))
    for name in sorted(filter(_STAND_INS.match, needed)):
        nodes = versions[name] or {""}
        # What has no version may come from any library that has none.
        sources = {node: functions[node] for node in nodes}
        source = "".join(f"int {f}(void) {{ return 1; }}\n" for fs in sources.values() for f in fs)
        script = folder / f"{name}.map"
        script.write_text("".join(f"{node} {{ global: *; }};\n" for node in nodes))
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", "-xc", "-", "-o", folder / name]
            + [f"-Wl,-soname,{name}", f"-Wl,--version-script,{script}"],
            input=source,
            text=True,
            check=True,
        )
        script.unlink()


def main() -> int:
    """Runs the suite in every environment asked for, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--python", nargs="+", metavar="3.N", help="default: this Python")
    parser.add_argument("--torch", default=TORCH)
    parser.add_argument("options", nargs="*", help="after --: pytest's")
    arguments = parser.parse_args()
    this = "{}.{}".format(*sys.version_info)
    outcomes = {}
    for version in arguments.python or [this]:
        interpreter = sys.executable if version == this else find_python(version)
        if interpreter is None:
            outcomes[version] = "is not on this machine"
            continue
        start = time.monotonic()
        environment = Environment(interpreter, version, arguments.torch)
        environment.create()
        status = environment.test(arguments.options)
        seconds = time.monotonic() - start
        outcomes[version] = f"{f'FAILED ({status})' if status else 'passed'} in {seconds:.0f} s"
    for version, outcome in outcomes.items():
        print(f"Python {version}, torch {arguments.torch}: {outcome}")
    tried = [outcome for outcome in outcomes.values() if "machine" not in outcome]
    return 0 if tried and all(outcome.startswith("passed") for outcome in tried) else 1


if __name__ == "__main__":
    sys.exit(main())
