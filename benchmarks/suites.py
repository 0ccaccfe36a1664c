"""Which cases the two suites consist of."""

from __future__ import annotations

from collections.abc import Iterator

from workloads import ALGORITHMS, Case

# Cost against the number of tensors, and of elements: a picture each.
_TINY = ("tiny1", "tiny10", "tiny100", "tiny1000")
_ONE = ("one1K", "one16K", "one256K", "one4M", "one64M")


def _spread(device: str) -> Iterator[Case]:
    """What both suites share."""

    def case(algorithm: str, workload: str, parameter_set: str, dtype: str = "float32") -> Case:
        return Case(algorithm, workload, parameter_set, dtype, device)

    for algorithm in ALGORITHMS:
        yield case(algorithm, "bare", "gpt2")
    yield case("AdamW", "chain", "gpt2")
    yield case("AdamW", "clip", "gpt2")
    for algorithm in ALGORITHMS:
        yield case(algorithm, "bare", "tiny1000")
        yield case(algorithm, "chain", "tiny1000")
        yield case(algorithm, "groups", "tiny300")
    for algorithm in ALGORITHMS:
        yield case(algorithm, "bare", "resnet18")
        yield case(algorithm, "chain", "resnet18")
    yield case("AdamW", "groups", "resnet18")
    for dtype in ("bfloat16", "float16", "float64"):
        yield case("AdamW", "bare", "resnet18", dtype)
    yield case("AdamW", "chain", "resnet18", "bfloat16")
    for parameter_set in (*_TINY, *_ONE):
        yield case("AdamW", "bare", parameter_set)


def _full(device: str) -> Iterator[Case]:
    """What takes long, or much memory."""
    for workload in ("bare", "chain", "groups"):
        yield Case("AdamW", workload, "tiny10000", "float32", device)
    for workload in ("bare", "chain"):
        yield Case("AdamW", workload, "llama1b", "float32", device)
        yield Case("AdamW", workload, "llama1b", "bfloat16", device)
    for algorithm in ALGORITHMS:
        yield Case(algorithm, "chain", "gpt2", "float32", device)
        for dtype in ("bfloat16", "float16"):
            yield Case(algorithm, "bare", "resnet18", dtype, device)


def _collect(device: str, full: bool, *more: Case) -> list[Case]:
    cases = [*more, *_spread(device), *(_full(device) if full else ())]
    return list(dict.fromkeys(cases))


def cpu_cases(full: bool) -> list[Case]:
    """Returns the cases for a CPU.

    Args:
        full: Also what takes minutes or much memory.
    """
    return _collect("cpu", full)


def gpu_cases(full: bool) -> list[Case]:
    """Returns the cases for a GPU: those for a CPU, and one with a billion parameters.

    Args:
        full: Also what takes minutes or much memory.
    """
    return _collect("cuda", full, Case("AdamW", "bare", "one1G", "float32", "cuda"))
