"""The norm has the same bits on every backend, instruction set and number of threads.

Held against the order of csrc/core/sum_order.h, written down once more with whole tensors. The
emulated CUDA kernels are held against it in tests/cpp, with pieces of several lengths.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch
from test_bits import instruction_set, instruction_sets, threads
from torch import Tensor

LANES, ROWS = 16, 8
STRIP = LANES * ROWS
#: Heads and tails of strips and of pieces, none, one, and more than one piece of 16 Ki.
SHAPES = ((1,), (0,), (15,), (16,), (129,), (1024,), (40, 77), (2 * 16384 + 4113,), *((3,),) * 9)
BACKENDS = pytest.mark.parametrize("backend", cases.native_backends())


def add_neighbours(values: Tensor) -> Tensor:
    """Returns the sum of neighbours, then of neighbours of those."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    while values.numel() > 1:
        values = torch.nn.functional.pad(values, (0, values.numel() % 2))
        values = values[::2] + values[1::2]
    return values[0]


def sum_squares(grad: Tensor, unscale: float, limit: float) -> Tensor:
    """Returns the sum of one gradient's squares after unscaling and the clamp."""
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    x = grad.flatten().to(compute) * torch.tensor(unscale, dtype=compute)
    x = x.clamp(-limit, limit).double()
    strips = torch.nn.functional.pad(x, (0, -x.numel() % STRIP)).view(-1, ROWS, LANES)
    lanes = torch.zeros(strips.shape[0], LANES, dtype=torch.float64)
    for row in strips.unbind(1):
        lanes += row * row
    return add_neighbours(lanes.flatten())


def expected_norm(
    grads: list[Tensor | None], unscale: float, limit: float, own: float
) -> tuple[float, list[float]]:
    """Returns the norm over all gradients and the coefficient of each one's own norm."""
    totals, clips = [], []
    for grad in grads:
        total = torch.zeros(()).double() if grad is None else sum_squares(grad, unscale, limit)
        if own != math.inf:
            norm = total.sqrt()
            clips.append(min(1.0, own / (norm.item() + 1e-6)))
            total = (norm * clips[-1]).square()
        totals.append(total)
    return add_neighbours(torch.stack(totals)).sqrt().item(), clips


def wide_grads(params: list[Tensor], layout: str = "contiguous") -> list[Tensor]:
    """Returns gradients of all magnitudes, so that every sum rounds."""
    grads = []
    for seed, param in enumerate(params):
        values = cases.random(param.shape, seed, torch.float64)
        values *= torch.exp2(cases.random(param.shape, seed + 1000, torch.float64) * 6).clamp(
            max=64
        )
        grads.append(cases.lay_out(values.to(param.dtype), layout).to(param.device))
    return grads


def measure(
    backend: str, dtype: torch.dtype, layout: str = "contiguous", name: str = "SGD", **limits
) -> None:
    """Takes a step and compares norm and coefficient with what they have to be."""
    scale = 3.0
    params = cases.make_params(SHAPES, dtype, cases.device_of(backend), layout)
    optimizer = cases.make_fused(cases.TABLE[name], params, backend, max_grad_norm=0.7, **limits)
    grads = wide_grads(params, layout)
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = None if index % 5 == 4 else grad
    optimizer.grad_scale = torch.tensor(scale, device=params[0].device)
    optimizer.step()
    norm, _ = expected_norm(
        [None if param.grad is None else param.grad.cpu() for param in params],
        1.0 / scale,
        limits.get("max_grad_value", math.inf),
        limits.get("max_grad_norm_per_param", math.inf),
    )
    control = optimizer._pipeline.control.tolist()
    assert control[2] == norm
    assert control[1] == 0.7 / (norm + 1e-6)


@BACKENDS
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    "limits",
    ({}, {"max_grad_value": 0.5}, {"max_grad_norm_per_param": 0.3, "max_grad_value": 2.0}),
    ids=("norm", "value", "all"),
)
def test_one_order(backend, dtype, limits):
    """Every type, with and without the limits that stand before the norm."""
    measure(backend, dtype, **limits)


@BACKENDS
@pytest.mark.parametrize("layout", ("misaligned", "every_second"))
def test_memory_does_not_matter(backend, layout):
    """A lane is a place in the tensor, not in memory."""
    for dtype in (torch.float32, torch.bfloat16):
        measure(backend, dtype, layout)


@BACKENDS
def test_parameters_without_state_keep_their_place(backend):
    """Those that never had a gradient are zeros among the sums."""
    measure(backend, torch.float64, name="AdamW")
    measure(backend, torch.float32, name="AdamW", max_grad_norm_per_param=0.3)


@pytest.mark.parametrize("name", instruction_sets() if "cpu" in cases.native_backends() else [])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_instruction_sets_and_threads(name, dtype):
    """The CPU's loops of every kind."""
    with instruction_set(name):
        for count in (1, 2):
            with threads(count):
                measure("cpu", dtype)
                measure("cpu", dtype, max_grad_value=0.5)


@BACKENDS
def test_an_infinite_multiplier_makes_no_nan(backend):
    """What pads a strip counts for nothing, whatever it would be multiplied by."""
    param = torch.nn.Parameter(torch.zeros(5, device=cases.device_of(backend)))
    optimizer = cases.make_fused(cases.TABLE["SGD"], [param], backend, max_grad_norm=1.0)
    param.grad = torch.ones_like(param)
    optimizer.grad_scale = torch.tensor(0.0, device=param.device)
    optimizer.step()
    assert optimizer.last_grad_norm.item() == math.inf
