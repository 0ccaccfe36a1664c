"""What is measured: cases, each an algorithm, a workload, a parameter set and a dtype.

A case is one row of a table: every implementation in it does the same work on the same parameters
and gradients.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedopt

#: A new optimizer is measured as soon as the package exports it.
ALGORITHMS = tuple(
    name
    for name in fusedopt.__all__
    if isinstance(kind := getattr(fusedopt, name), type) and issubclass(kind, torch.optim.Optimizer)
)


def plain_class(algorithm: str) -> Any:
    """Returns the class of an algorithm in plain torch: torch's, or ours of what torch lacks."""
    return getattr(fusedopt, algorithm)._rule.plain


#: What each workload does in one step, and whether it reads the gradients once more for a norm.
WORKLOADS = {
    "bare": "the update alone",
    "groups": "the update alone, every tensor in a group of its own",
    "clip": "global-norm clip, update",
    "chain": "unscale, inf check, global-norm clip, weight decay, update",
}
NORM_WORKLOADS = ("clip", "chain")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
#: Settings beyond torch's defaults. SGD without momentum would have no state at all.
_ALWAYS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
_CHAIN_DECAY = {"weight_decay": 0.01}
#: In float16 torch's eps is zero, and a thousandth of a squared gradient has few digits or none.
_FLOAT16 = {"eps": 1e-3, "betas": (0.9, 0.99)}
#: Of the loss, in the chain: a power of two, as scalers keep it, that leaves float16 some room.
LOSS_SCALE = 1024.0

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
Shape = tuple[int, ...]


def _gpt2() -> Iterator[Shape]:
    """GPT-2 (124 M): 148 tensors."""
    width = 768
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from ((width,), (width,))
        yield from ((width, 3 * width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,))
        yield from ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    yield from ((width,), (width,))


def _resnet18() -> Iterator[Shape]:
    """ResNet-18 for ImageNet: 62 tensors, 11.7 M elements."""
    yield from ((64, 3, 7, 7), (64,), (64,))
    inner = 64
    for outer in (64, 128, 256, 512):
        for block in range(2):
            yield from ((outer, inner, 3, 3), (outer,), (outer,))
            yield from ((outer, outer, 3, 3), (outer,), (outer,))
            if block == 0 and inner != outer:
                yield from ((outer, inner, 1, 1), (outer,), (outer,))
            inner = outer
    yield from ((1000, 512), (1000,))


def _llama1b() -> Iterator[Shape]:
    """Llama 3.2 1B, layers first, so that a slice of it is whole layers."""
    width, hidden, key_value = 2048, 8192, 512
    for _ in range(16):
        yield from ((width, width), (key_value, width), (key_value, width), (width, width))
        yield from ((hidden, width), (hidden, width), (width, hidden), (width,), (width,))
    yield from ((128256, width), (width,))


_MODELS: dict[str, Callable[[], Iterator[Shape]]] = {
    "gpt2": _gpt2,
    "resnet18": _resnet18,
    "llama1b": _llama1b,
}


def shapes_of(parameter_set: str, max_elements: int | None = None) -> list[Shape]:
    """Returns the shapes of a parameter set.

    Args:
        parameter_set: ``gpt2``, ``resnet18``, ``llama1b``; ``one64M`` (one tensor of 64 Mi
            elements; K, M, G or nothing); ``tiny1000`` (1000 tensors of 64 elements; any number).
        max_elements: llama1b is cut after the last tensor that fits; the others never are.

    Raises:
        ValueError: If no set is called so.
    """
    if parameter_set in _MODELS:
        shapes = list(_MODELS[parameter_set]())
        if parameter_set == "llama1b" and max_elements is not None:
            totals = itertools.accumulate(torch.Size(shape).numel() for shape in shapes)
            fitting = sum(total <= max_elements for total in totals)
            shapes = shapes[: max(1, fitting)]
        return shapes
    if match := re.fullmatch(r"tiny(\d+)", parameter_set):
        return [(64,)] * int(match[1])
    if match := re.fullmatch(r"one(\d+)([KMG]?)", parameter_set):
        return [(int(match[1]) * _UNITS[match[2]],)]
    raise ValueError(
        f"parameter set is {parameter_set!r}; expected {', '.join(_MODELS)}, tinyN, oneN, oneNK,"
        " oneNM or oneNG"
    )


@dataclass(frozen=True)
class Case:
    """One cell of the comparison; its id is ``AdamW-chain-gpt2-float32``."""

    algorithm: str
    workload: str
    parameter_set: str
    dtype: str
    device: str

    @property
    def id(self) -> str:
        """The name in records, and what ``--select`` matches."""
        return f"{self.algorithm}-{self.workload}-{self.parameter_set}-{self.dtype}"

    @classmethod
    def parse(cls, text: str, device: str) -> Case:
        """Returns the case with this id."""
        return cls(*text.split("-"), device=device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of parameters and gradients."""
        return DTYPES[self.dtype]

    @property
    def scaled(self) -> bool:
        """Whether a gradient scaler takes part."""
        return self.workload == "chain"

    @property
    def needs_norm(self) -> bool:
        """Whether the step needs the norm of all gradients."""
        return self.workload in NORM_WORKLOADS

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments that every implementation's constructor gets."""
        options = dict(_ALWAYS.get(self.algorithm, {}))
        if self.scaled:
            options |= _CHAIN_DECAY
        accepted = inspect.signature(getattr(fusedopt, self.algorithm)).parameters
        if self.dtype == "float16":
            options |= {name: value for name, value in _FLOAT16.items() if name in accepted}
        return options

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Returns the param groups."""
        if self.workload == "groups":
            return [{"params": [param]} for param in params]
        return [{"params": params}]

    def shapes(self) -> list[Shape]:
        """Returns the parameters' shapes, on this machine."""
        return shapes_of(self.parameter_set, _max_elements(self.device, self.torch_dtype.itemsize))

    def elements(self) -> int:
        """Returns the number of all parameters' elements."""
        return sum(torch.Size(shape).numel() for shape in self.shapes())

    def seconds(self) -> float:
        """Returns how long the rounds of all implementations may take together."""
        elements = self.elements()
        return 8.0 if elements > 2**25 else 3.0 if elements > 2**20 else 1.5

    def memory_needed(self, implementations: int) -> int:
        """Returns about how many bytes a measurement allocates."""
        sets = 1 + 3 + 2 * implementations
        return sets * self.elements() * self.torch_dtype.itemsize + 2**30

    def bytes_per_step(self, states: int) -> int:
        """Returns what any implementation has to move through memory in one step.

        Parameter and states are read and written once, gradients are read once, and once more
        before that when the update depends on their norm.

        Args:
            states: How many states of the parameter's shape and dtype the rule has.
        """
        passes = 2 + 2 * states + 1 + (1 if self.needs_norm else 0)
        return passes * self.elements() * self.torch_dtype.itemsize


@functools.cache
def _max_elements(device: str, itemsize: int) -> int:
    # Parameter, three sets of gradients, and two states in each of seven implementations.
    return int(0.8 * free_memory(device)) // (18 * itemsize)


def free_memory(device: str) -> int:
    """Returns the bytes that can still be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


# A prime number of different values, so that equal tensors do not start at equal places of them.
_PERIOD = 1_048_583


@functools.cache
def _noise(device: str) -> Tensor:
    """Returns normally distributed numbers, twice over: a window of a period may start anywhere."""
    generator = torch.Generator().manual_seed(2026)
    return torch.randn(_PERIOD, generator=generator).repeat(2).to(device)


def fill(tensors: list[Tensor], seed: int, scale: float = 1.0) -> None:
    """Fills tensors with normally distributed numbers, the same for the same seed.

    The numbers repeat after a period: drawing 1 Gi of them would take longer than the measurement.
    """
    for i, tensor in enumerate(tensors):
        noise = _noise(tensor.device.type)[7919 * (i + 1000 * seed) % _PERIOD :]
        flat = tensor.detach().view(-1)
        for start in range(0, flat.numel(), _PERIOD):
            piece = flat[start : start + _PERIOD]
            piece.copy_(noise[: piece.numel()])
        flat.mul_(scale)
