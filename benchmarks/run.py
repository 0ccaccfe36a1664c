"""Runs a suite of comparisons and leaves its records in one folder.

Example:
    python benchmarks/run.py cpu
    python benchmarks/run.py cpu --select "AdamW-chain-gpt2 and (fusedopt-cpu or torch-fused)"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import probes
import pytest
import records
import report
import torch

HERE = Path(__file__).parent
#: Where selections go, which are no complete record; git does not keep it.
SCRATCH = HERE.parent / "out" / "benchmarks"
#: After that no new case is started, so that a run ends within its limit.
_MINUTES = {"cpu": 9.0, "gpu": 8.0}
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("suite", choices=sorted(_DEVICES))
    parser.add_argument("--full", action="store_true", help="also what takes minutes or memory")
    parser.add_argument("--select", metavar="EXPRESSION", help="pytest's -k, over the tests' ids")
    parser.add_argument("--output", type=Path, help="folder for the records")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's own")
    parser.add_argument("--minutes", type=float, help="start no new case after so long")
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the time for a case")
    return parser.parse_args(arguments)


def record_path(arguments: argparse.Namespace) -> Path:
    """Returns the file for the records; a selection goes to ``out/``."""
    name = arguments.suite + ("-full" if arguments.full else "") + ".json"
    folder = HERE / "results" if arguments.select is None else SCRATCH
    return (arguments.output or folder / probes.slug(_DEVICES[arguments.suite])) / name


def tidy(path: Path) -> dict[str, Any]:
    """Rewrites pytest-benchmark's file with one benchmark a line, and returns its content."""
    content = json.loads(path.read_text(encoding="utf-8"))
    # The flags of a processor are a hundred words that no comparison uses.
    content["machine_info"].get("cpu", {}).pop("flags", None)
    benchmarks = ",\n".join(json.dumps(entry) for entry in content.pop("benchmarks"))
    head = json.dumps(content, indent=1)[:-2]
    path.write_text(f'{head},\n "benchmarks": [\n{benchmarks}\n ]\n}}\n', encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    """Runs the suite, then the report, and returns pytest's exit status."""
    arguments = parse_arguments()
    device = _DEVICES[arguments.suite]
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU here; use `run.py cpu`")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = record_path(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    minutes = arguments.minutes or (60.0 if arguments.full else _MINUTES[arguments.suite])
    os.chdir(HERE.parent)
    options = [
        str(HERE / f"test_{arguments.suite}.py"),
        # The project's own options are for its tests, which leave benchmarks out.
        *("-o", "addopts=", "-o", f"pythonpath={HERE}", "--import-mode=importlib"),
        *("-p", "no:cacheprovider", "-q", "--no-header", "-rfE"),
        f"--benchmark-json={path}",
        "--benchmark-columns=median,iqr,rounds",
        "--benchmark-sort=mean",
        f"--minutes={minutes}",
        f"--effort={arguments.effort}",
        *(["--full"] if arguments.full else []),
        *(["-k", arguments.select] if arguments.select else []),
    ]
    started = time.monotonic()
    status = pytest.main(options)
    if not path.exists() or path.stat().st_size == 0:
        return int(status) or 1
    content = tidy(path)
    print(f"{len(content['benchmarks'])} records in {path}, {time.monotonic() - started:.0f} s")
    if content["commit_info"].get("dirty", True):
        print("not from a clean commit: measure again before committing them")
    if arguments.select is None and arguments.output is None:
        report.write_all()
    report.print_summary(records.load([path]))
    if device == "cuda":
        # A GPU is often on a machine that one file is easily brought back from.
        archive = SCRATCH.parent / f"bench-{path.parent.name}"
        print(f"all of it in one file: {shutil.make_archive(str(archive), 'gztar', path.parent)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
