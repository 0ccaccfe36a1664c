"""What the project set out to reach, as questions to the records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from records import TORCH, TORCH_EAGER, Machine, best, speed_up

Measure = Callable[[Machine], float | None]


@dataclass(frozen=True)
class Target:
    """One row: a figure, what it is compared with, and the bounds it should keep."""

    work: str
    against: str
    bound: float
    aim: float | None
    measure: Measure
    at_most: bool = False
    unit: str = ""

    def met(self, value: float) -> bool:
        """Whether a measured value keeps the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


def _ratio(case: str, ours: str, others: tuple[str, ...]) -> Measure:
    def measure(machine: Machine) -> float | None:
        cell = machine.cell(case)
        other = best(cell, others)
        return speed_up(cell[ours], other) if ours in cell and other is not None else None

    return measure


def _share(case: str, ours: str, limit: str) -> Measure:
    def measure(machine: Machine) -> float | None:
        record = machine.cell(case).get(ours)
        return None if record is None else record.gb_per_s / record.info[limit]

    return measure


def _clip_share(case: str, ours: str) -> Measure:
    def measure(machine: Machine) -> float | None:
        cell = machine.cell(case)
        if ours not in cell or f"{ours}-unclipped" not in cell:
            return None
        clipped, plain = cell[ours], cell[f"{ours}-unclipped"]
        rounds = zip(clipped.samples, plain.samples, strict=True)
        seconds = statistics.median(longer - shorter for longer, shorter in rounds)
        moved = clipped.info["bytes_per_step"] - plain.info["bytes_per_step"]
        return moved / seconds / 1e9 / clipped.info["read_gb_per_s"]

    return measure


def _field(case: str, ours: str, name: str, factor: float = 1.0) -> Measure:
    def measure(machine: Machine) -> float | None:
        record = machine.cell(case).get(ours)
        return None if record is None else record.info[name] * factor

    return measure


def _row(work: str, against: str, bounds: tuple[float, float | None], measure: Measure) -> Target:
    return Target(work, against, *bounds, measure)


_FUSED = ("torch-fused",)
_CHAIN = "unscale + inf check + clip + decay + AdamW"
_GPT2 = "GPT-2 sized"
_TINY = "1000 tensors of 64, fresh gradients"


def _cpu() -> Iterator[Target]:
    ours = "fusedopt-cpu"

    def ratio(case: str, others: tuple[str, ...]) -> Measure:
        return _ratio(f"{case}-float32", ours, others)

    for name in ("AdamW", "Adagrad"):
        case = f"{name}-bare-gpt2"
        yield _row(f"{name}, {_GPT2}", "torch fused", (1.0, None), ratio(case, _FUSED))
        yield _row(
            f"{name}, {_GPT2}, bytes per second",
            "memory updated in place",
            (0.9, 1.0),
            _share(f"{case}-float32", ours, "inplace_gb_per_s"),
        )
    in_place = _share("Lion-bare-gpt2-float32", ours, "inplace_gb_per_s")
    lion = f"Lion, {_GPT2}, bytes per second"
    yield _row(lion, "memory updated in place", (0.9, 1.0), in_place)
    best_torch = ratio("SGD-bare-gpt2", TORCH)
    yield _row(f"SGD with momentum, {_GPT2}", "best of torch", (2.0, 2.4), best_torch)
    for name, bounds in (("RMSprop", (3.0, 3.2)), ("Adadelta", (6.0, 7.0))):
        eager = ratio(f"{name}-bare-gpt2", TORCH_EAGER)
        yield _row(f"{name}, {_GPT2}", "best of torch eager", bounds, eager)
    yield _row(f"Adam, {_TINY}", "torch fused", (30, 60), ratio("Adam-bare-tiny1000", _FUSED))
    groups = ratio("AdamW-groups-tiny300", _FUSED)
    yield _row("AdamW, 300 groups of one tensor of 64", "torch fused", (15, 40), groups)
    chain = "torch fused, unscale_, clip_grad_norm_, scaler.step"
    yield _row(f"{_CHAIN}, {_GPT2}", chain, (1.7, 1.9), ratio("AdamW-chain-gpt2", _FUSED))
    yield _row(f"{_CHAIN}, {_TINY}", chain, (45, 90), ratio("AdamW-chain-tiny1000", _FUSED))
    clip = "AdamW-clip-gpt2"
    unclipped = ratio(clip, (f"{ours}-unclipped",))
    yield _row(f"AdamW with clip, {_GPT2}", "ours without clip", (0.85, 0.88), unclipped)
    share = _clip_share(f"{clip}-float32", ours)
    yield _row("what that clip adds, bytes per second", "torch.sum", (1.0, None), share)


def _gpu() -> Iterator[Target]:
    ours = "fusedopt-cuda"

    def ratio(case: str, others: tuple[str, ...], mine: str = ours) -> Measure:
        return _ratio(f"{case}-float32", mine, others)

    sets = {"one64M": "64 Mi in one tensor", "gpt2": _GPT2, "one1G": "1 Gi in one tensor"}
    for parameter_set, label in sets.items():
        share = _share(f"AdamW-bare-{parameter_set}-float32", ours, "copy_gb_per_s")
        yield _row(
            f"AdamW, {label}, bytes per second", "device-to-device copy", (0.92, 0.96), share
        )
    yield _row(f"AdamW, {_GPT2}", "torch fused", (1.0, 1.15), ratio("AdamW-bare-gpt2", _FUSED))
    chain = "torch fused chain"
    yield _row(f"{_CHAIN}, {_GPT2}", chain, (1.5, 1.8), ratio("AdamW-chain-gpt2", _FUSED))
    yield _row(f"{_CHAIN}, {_TINY}", chain, (20, 40), ratio("AdamW-chain-tiny1000", _FUSED))
    for name in ("RMSprop", "Adadelta"):
        eager = ratio(f"{name}-bare-gpt2", TORCH_EAGER)
        yield _row(f"{name}, {_GPT2}", "best of torch eager", (3, 5), eager)
    launches = {"bare-tiny1000": 1, "groups-tiny300": 1, "chain-tiny1000": 2, "bare-gpt2": 1}
    for case, count in launches.items():
        found = _field(f"AdamW-{case}-float32", ours, "launches")
        yield Target(f"launches, AdamW-{case}", "", count, count, found, at_most=True)
    for backend, most, aim in (("cuda", 100, 60), ("triton", 150, None)):
        host = _field("AdamW-bare-tiny1000-float32", f"fusedopt-{backend}", "host_seconds", 1e6)
        work = f"host time of step(), {backend}, {_TINY}"
        yield Target(work, "", most, aim, host, at_most=True, unit=" us")
    for case in ("AdamW-bare-gpt2", "AdamW-chain-gpt2"):
        same = ratio(case, (ours,), "fusedopt-triton")
        yield _row(f"{case}, triton", "ours on cuda", (0.95, 1.0), same)
    tiny = ratio("AdamW-chain-tiny1000", _FUSED, "fusedopt-triton")
    yield _row(f"{_CHAIN}, triton, {_TINY}", chain, (8, None), tiny)


def targets_of(machine: Machine) -> list[Target]:
    """Returns the rows that concern a machine."""
    return list(_gpu() if machine.device_type == "cuda" else _cpu())
