"""Everything that can only be checked on a GPU, with the installed package: `make gpu-check`.

Ends by itself, leaves logs, junit files and summary.json in one folder and in one archive beside
it, prints a summary last. The exit status is 0 only when every stage that this machine has the
tools for was run and passed, 1 when one failed, 2 when none did but some ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

PASSED, FAILED, NOT_RUN, OUT_OF_TIME = "passed", "failed", "not run", "out of time"
#: What is kept for each stage, in seconds; together below --seconds. A stage may also take what the
#: stages before it have left of theirs.
LIMITS = {
    "report": 40,
    "tests": 260,
    "times": 60,
    "sanitizer": 80,
}
#: How long a process that ran out of time gets to write down what it has.
GRACE = 5
#: Processes for the existing suite. Triton compiles, which takes most of its time.
WORKERS = {"cuda": 3, "triton": 5}
#: Threads of each process that runs tests: there are about as many processes as cores.
THREADS = "2"
#: Names by which the tests of a file for GPUs are shared by processes.
SHARES = {"test_gpu_bits": ("every_variant", "not every_variant")}
#: Modules that a test file may need, by what in its text says so.
OPTIONAL_MODULES = {"hypothesis": "hypothesis", "torch.testing._internal": "expecttest"}
#: Tests of all backends in one loop, which have no backend in their name.
LOOPS = "group_settings_are_read_every_step or many_dimensions"

PROBE = """
import json, platform, torch
import fusedopt
try:
    import triton
    triton_version = triton.__version__
except ImportError:
    triton_version = None
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({
    "fusedopt": fusedopt.__version__, "torch": torch.__version__, "triton": triton_version,
    "cuda": torch.version.cuda, "python": platform.python_version(),
    "devices": [torch.cuda.get_device_name(i) for i in range(count)],
    "capability": ["%d.%d" % torch.cuda.get_device_capability(i) for i in range(count)],
    "obstacles": {n: fusedopt.backends.load(n).unavailable() for n in fusedopt.backends.NATIVE},
}))
"""


@dataclass
class Stage:
    """What became of one stage."""

    name: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Job:
    """A process that is to be started; its output goes to `<name>.log`."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    junit: Path | None = None


class Check:
    """The stages, one after another, within one limit of time."""

    def __init__(self, output: Path, seconds: float) -> None:
        self.output = output
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.stages: list[Stage] = []
        self.machine: dict[str, Any] = {}

    def log(self, name: str) -> Path:
        """Returns the file for the output of a job."""
        return self.output / f"{name.replace(' ', '-')}.log"

    def finish(self, stage: Stage) -> Stage:
        """Keeps and prints what became of a stage."""
        self.stages.append(stage)
        counts = ", ".join(f"{n} {what}" for what, n in stage.counts.items() if n)
        words = [f"{stage.name}: {stage.status}", counts, stage.detail, f"{stage.seconds:.0f} s"]
        print("; ".join(word for word in words if word), flush=True)
        return stage

    def run(self, name: str, jobs: Sequence[Job]) -> list[Stage]:
        """Runs jobs side by side, as far as time allows, and returns their stages."""
        start = time.monotonic()
        names = list(LIMITS)
        later = sum(LIMITS[other] for other in names[names.index(name) + 1 :])
        limit = max(self.deadline - start - later, min(LIMITS[name], self.deadline - start))
        if limit < 2 * GRACE:
            detail = "no time was left; raise --seconds"
            return [self.finish(Stage(job.name, OUT_OF_TIME, detail)) for job in jobs]
        print(f"-- {name}, at most {limit:.0f} s", flush=True)
        with contextlib.ExitStack() as stack:
            running = [self._start(job, stack) for job in jobs]
            _await(running, start + limit - GRACE)
            late = [process for process in running if process.poll() is None]
            for process in late:
                os.killpg(process.pid, signal.SIGINT)
            _await(late, start + limit)
        stages = []
        for job, process in zip(jobs, running, strict=True):
            stage = Stage(job.name, PASSED, seconds=time.monotonic() - start)
            if process in late:
                stage.status, stage.detail = OUT_OF_TIME, f"ended after its limit of {limit:.0f} s"
            elif process.returncode != 0:
                stage.status, stage.detail = FAILED, f"exit status {process.returncode}"
            stages.append(self.finish(self._judge(job, stage)))
        return stages

    def _start(self, job: Job, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        log = stack.enter_context(self.log(job.name).open("wb"))
        environment = {**os.environ, **job.environment}
        environment.pop("TRITON_INTERPRET", None)
        process = subprocess.Popen(
            job.command,
            cwd=HERE,  # Not the checkout, whose fusedopt would be imported.
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(_end, process)
        return process

    def _judge(self, job: Job, stage: Stage) -> Stage:
        """Adds what the job wrote to how it ended."""
        log = self.log(job.name)
        if job.junit is not None:
            _count(job.junit, log, stage)
        if stage.status != PASSED:
            stage.detail += f", see {log.name}: {_last_line(log)}"
        return stage

    def summarise(self) -> int:
        """Writes summary.json and the archive, prints the summary, returns the exit status."""
        found = {stage.status for stage in self.stages}
        verdict, status = (
            ("FAILED", 1)
            if FAILED in found
            else ("is incomplete: nothing failed, but time ran out", 2)
            if OUT_OF_TIME in found
            else ("passed", 0)
        )
        summary = {
            "passed": status == 0,
            "seconds": round(time.monotonic() - self.start, 1),
            "machine": self.machine,
            "stages": [asdict(stage) for stage in self.stages],
        }
        text = json.dumps(summary, indent=1) + "\n"
        (self.output / "summary.json").write_text(text, encoding="utf-8")
        print(f"\nsummary, {summary['seconds']:.0f} s, records in {self.output}")
        for stage in self.stages:
            print(f"  {stage.status:12}{stage.name}")
            if stage.status != PASSED:
                print(f"              {stage.detail}")
        archive = shutil.make_archive(
            str(self.output), "gztar", self.output.parent, self.output.name
        )
        print(f"all of it in one file: {archive}")
        print(f"gpu-check {verdict}")
        return status


def _await(processes: Sequence[subprocess.Popen[bytes]], until: float) -> None:
    """Waits for processes, and for the clock at most."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that still runs, with all that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "nothing was printed"


def _count(path: Path, log: Path, stage: Stage) -> None:
    """Reads how many tests passed; a stage in which none did has not passed, one that failed has.

    Pytest writes its junit file last: of one that had no time for that, the log is read.
    """
    if path.exists():
        suite = next(xml.etree.ElementTree.parse(path).getroot().iter("testsuite"))
        found = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        found["passed"] = found.pop("tests") - sum(found.values())
    else:
        words = re.findall(
            r" (PASSED|FAILED|ERROR|SKIPPED)\b", log.read_text(encoding="utf-8", errors="replace")
        )
        names = {"FAILED": "failures", "ERROR": "errors", "SKIPPED": "skipped", "PASSED": "passed"}
        found = {name: words.count(word) for word, name in names.items()}
    stage.counts = found
    if found["failures"] or found["errors"]:
        stage.status = FAILED
    elif found["passed"] == 0 and stage.status == PASSED:
        stage.status, stage.detail = FAILED, "not one test passed"


def python(*arguments: str | Path) -> list[str]:
    """Returns the command for this Python."""
    return [sys.executable, *map(str, arguments)]


def pytest_job(check: Check, name: str, files: Sequence[Path], keywords: str) -> Job:
    """Returns a job that runs the tests of `files` whose names have `keywords`."""
    junit = check.output / f"{name.replace(' ', '-')}.xml"
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command = python("-m", "pytest", *options, "-k", keywords, *files)
    return Job(name, command, {"OMP_NUM_THREADS": THREADS, "MKL_NUM_THREADS": THREADS}, junit)


def suite_files() -> tuple[list[Path], list[str]]:
    """Returns the test files that go through backends, and what is missing for others."""
    files, left_out = [], []
    for path in sorted(HERE.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name.startswith("test_gpu_") or '"backend", ' not in text:
            continue
        missing = [m for mark, m in OPTIONAL_MODULES.items() if mark in text and not _has(m)]
        if missing:
            left_out.append(f"{path.name} needs {' and '.join(missing)}")
        else:
            files.append(path)
    return files, left_out


def _has(module: str) -> bool:
    command = python("-c", f"import {module}")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def report(check: Check) -> bool:
    """Prints `python -m fusedopt`; returns whether the CUDA backend runs here."""
    jobs = [
        Job("report", python("-m", "fusedopt")),
        Job("machine", python("-c", PROBE)),
    ]
    stages = check.run("report", jobs)
    print(check.log("report").read_text(encoding="utf-8", errors="replace"))
    if any(stage.status != PASSED for stage in stages):
        detail = "fusedopt does not start here; run make gpu-install with this Python"
        check.finish(Stage("gpu", FAILED, f"{detail} ({sys.executable})"))
        return False
    check.machine = json.loads(_last_line_whole(check.log("machine")))
    obstacle = check.machine["obstacles"]["cuda"]
    if not check.machine["devices"]:
        obstacle = f"this torch ({check.machine['torch']}) sees no GPU; run this where one is"
    elif obstacle:
        obstacle = f"the cuda backend does not work: {obstacle}"
    check.finish(Stage("gpu", FAILED if obstacle else PASSED, obstacle or ""))
    return not obstacle


def _last_line_whole(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip().splitlines()[-1]


def gpu_jobs(check: Check, backends: Sequence[str]) -> list[Job]:
    """Returns jobs for the tests that only a GPU can run."""
    jobs = []
    for path in sorted(HERE.glob("test_gpu_*.py")):
        for backend in backends:
            # What is not a matter of one backend goes with the first.
            others = [f"not {name}" for name in backends if name != backend]
            words = [backend] if backend != backends[0] else others
            for i, share in enumerate(SHARES.get(path.stem, ("",)), start=1):
                keywords = " and ".join([*words, *([share] if share else [])])
                jobs.append(pytest_job(check, f"{path.stem} {backend} {i}", [path], keywords))
    return jobs


def suite_jobs(check: Check, backends: Sequence[str]) -> list[Job]:
    """Returns jobs for the existing suite."""
    files, left_out = suite_files()
    if left_out:
        check.finish(Stage("suite, some files", NOT_RUN, "; ".join(left_out)))
    jobs = []
    for backend in backends:
        keywords = f"cuda or {LOOPS}" if backend == "cuda" else backend
        for i in range(WORKERS[backend]):
            share = files[i :: WORKERS[backend]]
            jobs.append(pytest_job(check, f"suite {backend} {i + 1}", share, keywords))
    return jobs


def sanitizer(check: Check) -> None:
    """Runs a few small steps under memcheck and racecheck."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin"])
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        detail = f"compute-sanitizer is neither on PATH nor in {home}/bin"
        check.finish(Stage("compute-sanitizer", NOT_RUN, detail))
        return
    jobs = [
        Job(
            name,
            [
                tool,
                "--tool",
                name,
                *options,
                "--error-exitcode",
                "9",
                *python(HERE / "gpu_small.py"),
            ],
            # Every tensor an allocation of its own, or nothing is out of bounds.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        # torch asks the runtime for things that it can do without; we check every call of ours.
        for name, options in {"memcheck": ["--report-api-errors", "no"], "racecheck": []}.items()
    ]
    check.run("sanitizer", jobs)


def times(check: Check) -> None:
    """Measures and prints a first table."""
    job = Job("times", python(HERE / "gpu_times.py", check.output / "times.json"))
    check.run("times", [job])
    log = check.log("times")
    if log.exists():
        print(log.read_text(encoding="utf-8", errors="replace"))


def main() -> int:
    """Runs all stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--seconds", type=float, default=450, help="end after so long")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    check = Check(output, arguments.seconds)
    try:
        run_stages(check)
    except Exception as error:  # What the stages before have found must come out all the same.
        traceback.print_exc()
        check.finish(Stage("gpu-check itself", FAILED, repr(error)))
    return check.summarise()


def run_stages(check: Check) -> None:
    """Runs the stages, as far as there is a GPU and time."""
    if report(check):
        obstacle = check.machine["obstacles"]["triton"]
        backends = ["cuda"] if obstacle else ["cuda", "triton"]
        if obstacle:
            check.finish(Stage("triton", NOT_RUN, obstacle))
        jobs = [*gpu_jobs(check, backends), *suite_jobs(check, backends)]
        check.run("tests", jobs)
        times(check)
        sanitizer(check)


if __name__ == "__main__":
    sys.exit(main())
