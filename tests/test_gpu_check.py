"""The driver of the checks on a GPU, with programs that stand in for its stages."""

import importlib.util
import json
import sys
import tarfile
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "gpu_check.py"
TESTS = """
import time
def test_good(): pass
def test_bad(): assert {good}
def test_slow(): time.sleep({seconds})
"""


@pytest.fixture
def gpu_check(monkeypatch):
    """The module, with limits of a test."""
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 2)
    monkeypatch.setattr(module, "LIMITS", dict.fromkeys(module.LIMITS, 3))
    return module


def job(gpu_check, check, name, good=True, seconds=0):
    """A job of three small tests."""
    path = check.output / f"test_{name}.py"
    path.write_text(TESTS.format(good=good, seconds=seconds))
    return gpu_check.pytest_job(check, name, [path], "")


def test_verdicts(gpu_check, tmp_path, capsys):
    """A job that runs out of time says how far it came, and hides no other; all is in one file."""
    check = gpu_check.Check(tmp_path / "records", seconds=18)
    check.output.mkdir()
    good = job(gpu_check, check, "good")
    check.run("tests", [good, gpu_check.Job("lost", [sys.executable, "-c", "1 / 0"])])
    stages = check.run(
        "times",
        [
            job(gpu_check, check, "slow", seconds=60),
            job(gpu_check, check, "bad", good=False, seconds=60),
            gpu_check.Job("deaf", ["sh", "-c", "trap '' INT; sleep 60"]),
        ],
    )
    assert [stage.status for stage in stages] == ["out of time", "failed", "out of time"]
    assert stages[0].counts["passed"] == 2 and stages[1].counts["failures"] == 1
    assert check.summarise() == 1
    said = capsys.readouterr().out
    assert "slow: out of time; 2 passed" in said and "ended after its limit" in said
    assert "ZeroDivisionError" in said
    summary = json.loads((check.output / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["good", "lost", "slow", "bad", "deaf"]
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        names = archive.getnames()
    assert {"records/summary.json", "records/good.xml", "records/deaf.log"} <= set(names)


@pytest.mark.parametrize(
    ("statuses", "code", "verdict"),
    [
        (["passed", "not run"], 0, "passed"),
        (["passed", "out of time"], 2, "is incomplete"),
        (["out of time", "failed"], 1, "FAILED"),
    ],
)
def test_exit_status(gpu_check, tmp_path, capsys, statuses, code, verdict):
    """Tells a failure from a lack of time."""
    check = gpu_check.Check(tmp_path / "records", seconds=60)
    check.output.mkdir()
    for status in statuses:
        check.finish(gpu_check.Stage("a stage", status))
    assert check.summarise() == code
    assert f"gpu-check {verdict}" in capsys.readouterr().out


def test_time_left_over_is_used(gpu_check, tmp_path, monkeypatch, capsys):
    """A stage may take what earlier ones have left, but not what later ones need."""
    monkeypatch.setattr(gpu_check, "LIMITS", {"report": 10, "tests": 100, "sanitizer": 50})
    check = gpu_check.Check(tmp_path, seconds=200)
    for name in gpu_check.LIMITS:
        check.run(name, [gpu_check.Job(name, ["true"])])
    said = capsys.readouterr().out
    assert "-- tests, at most 150 s" in said and "-- sanitizer, at most 200 s" in said
    check.deadline = check.start
    (stage,) = check.run("sanitizer", [gpu_check.Job("late", ["true"])])
    assert stage.status == "out of time" and "no time was left" in stage.detail


def test_missing_modules_are_named(gpu_check, monkeypatch):
    """Files that need what the image lacks are left out by name."""
    monkeypatch.setattr(gpu_check, "_has", lambda module: module != "expecttest")
    files, left_out = gpu_check.suite_files()
    assert any(text.endswith("needs expecttest") for text in left_out)
    assert len(files) > 10 and not any(path.name == "test_parity.py" for path in files)


def test_a_breakdown_leaves_what_was_found(gpu_check, tmp_path, monkeypatch):
    """An error of the driver itself is one failed stage more, and the archive is written."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "records")])
    monkeypatch.setattr(gpu_check, "report", lambda check: 1 / 0)
    assert gpu_check.main() == 1
    assert "ZeroDivisionError" in (tmp_path / "records" / "summary.json").read_text()
    assert (tmp_path / "records.tar.gz").exists()
