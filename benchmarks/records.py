"""Reads the committed records, and answers the questions that tables and plots ask of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: Eager ways of torch.optim, from the plainest.
TORCH_EAGER = ("torch-forloop", "torch-foreach", "torch-fused")
TORCH = (*TORCH_EAGER, "torch-compiled")


@dataclass(frozen=True)
class Record:
    """One implementation in one case."""

    info: dict[str, Any]
    samples: tuple[float, ...]
    seconds: float
    spread: float

    @property
    def name(self) -> str:
        """Of the implementation."""
        return self.info["implementation"]

    @property
    def gb_per_s(self) -> float:
        """What the rule has to move, over the time it took."""
        return self.info["bytes_per_step"] / self.seconds / 1e9

    @property
    def memory_gb_per_s(self) -> float:
        """What this machine's memory gave in the same rounds, copying or updating in place."""
        return max(self.info["copy_gb_per_s"], self.info["inplace_gb_per_s"])

    @property
    def memory_seconds(self) -> float:
        """How long the bytes of the step take at that speed."""
        return self.info["bytes_per_step"] / self.memory_gb_per_s / 1e9

    @property
    def in_cache(self) -> bool:
        """Whether the largest cache can hold all the data, so that memory is no limit."""
        cache = self.info["last_level_cache_bytes"]
        return cache is not None and self.info["resident_bytes"] < cache


Cell = dict[str, Record]


@dataclass
class Machine:
    """All records of one device, and when, from what and with what they were taken."""

    slug: str
    name: str
    device_type: str
    cells: dict[str, Cell]
    runs: list[str]

    def cell(self, case: str) -> Cell:
        """Returns the records of a case, none if it was not measured."""
        return self.cells.get(case, {})

    def backend(self) -> str:
        """Returns the implementation of ours that this device is about."""
        return "fusedopt-cuda" if self.device_type == "cuda" else "fusedopt-cpu"


def load(paths: Iterable[Path]) -> list[Machine]:
    """Returns the machines that record files are about; for each case the newest file counts."""
    contents = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    machines: dict[str, Machine] = {}
    for path, content in sorted(contents, key=lambda item: item[1]["datetime"]):
        cells: dict[str, Cell] = {}
        for entry in content["benchmarks"]:
            info, stats = entry["extra_info"], entry["stats"]
            cells.setdefault(entry["group"], {})[info["implementation"]] = Record(
                info, tuple(stats["data"]), stats["median"], stats["iqr"]
            )
        if not cells:
            continue
        info = next(iter(next(iter(cells.values())).values())).info
        slug = path.parent.name
        machine = machines.setdefault(
            slug, Machine(slug, info["device"], info["device_type"], {}, [])
        )
        machine.cells |= cells
        machine.runs.append(_describe_run(path, content, info))
    return list(machines.values())


def load_committed() -> list[Machine]:
    """Returns the machines under ``benchmarks/results``."""
    return load(sorted(RESULTS.glob("*/*.json")))


def _describe_run(path: Path, content: dict[str, Any], info: dict[str, Any]) -> str:
    commit = content["commit_info"]
    state = ", changed since" if commit.get("dirty") else ""
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    python = content["machine_info"]["python_version"]
    return (
        f"`{path.parent.name}/{path.name}`: {content['datetime'][:10]}, commit"
        f" {str(commit.get('id'))[:9]}{state}; Python {python}, {versions},"
        f" {info['instruction_set']}, {info['threads']} threads"
    )


def speed_up(ours: Record, other: Record) -> float:
    """Returns how many times faster ours is: the median over rounds of the two sides of a round."""
    if len(ours.samples) != len(other.samples):
        return other.seconds / ours.seconds
    pairs = zip(ours.samples, other.samples, strict=True)
    return statistics.median(theirs / mine for mine, theirs in pairs)


def best(cell: Cell, names: Iterable[str]) -> Record | None:
    """Returns the fastest of the named implementations that were measured."""
    found = [cell[name] for name in names if name in cell]
    return min(found, key=lambda record: record.seconds, default=None)
