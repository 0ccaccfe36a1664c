"""What the tests on a GPU share: twins on GPU and CPU, and what a step puts on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import emulated_cuda
import torch
from cases import (
    DTYPES,
    Entry,
    Run,
    device_of,
    lay_out,
    make_fused,
    make_params,
    native_backends,
)
from cases import set_grads as set_random_grads
from torch import Tensor

#: The backends of ours that run on a GPU here.
GPU_BACKENDS = tuple(name for name in native_backends() if device_of(name) == "cuda")
#: Types of parameters, gradients and states, in turn; those of the parameters where there is none.
SAME = tuple((dtype, dtype) for dtype in DTYPES)
MIXED = (
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    # Those that no kernel is made for alone.
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float64, torch.float16),
    (torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16, torch.float16, torch.float32),
)

_RANGE = "the step that is looked at"


def twins(
    entry: Entry,
    backend: str,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    **options: Any,
) -> tuple[Run, Run]:
    """Returns the same parameters with our optimizer twice: on the GPU and, contiguous, on the CPU.

    Args:
        entry: Which optimizer.
        backend: Of the one on the GPU.
        shapes: Of the parameters.
        dtype: Of the parameters.
        layout: Of the parameters on the GPU.
        **options: For both optimizers.
    """
    start = make_params(shapes, dtype)
    on_gpu = [torch.nn.Parameter(lay_out(p.detach().cuda(), layout)) for p in start]
    return (
        Run(on_gpu, make_fused(entry, on_gpu, backend, **options)),
        Run(start, make_fused(entry, start, "cpu", **options)),
    )


def share_grads(gpu: Run, cpu: Run, layout: str = "contiguous") -> None:
    """Gives the parameters on the GPU new tensors with the gradients of their twins."""
    for own, twin in zip(gpu.params, cpu.params, strict=True):
        if twin.grad is None:
            own.grad = None
            continue
        grad = lay_out(twin.grad.to(own.device), layout)
        if grad.dtype != own.dtype and hasattr(own, "grad_dtype"):
            own.grad_dtype = grad.dtype
        own.grad = grad


def step_both(gpu: Run, cpu: Run, seed: int, layout: str = "contiguous", **grads: Any) -> None:
    """Steps both with the same random gradients."""
    set_random_grads(cpu.params, seed, **grads)
    share_grads(gpu, cpu, layout)
    cpu.optimizer.step()
    gpu.optimizer.step()


def set_exact_grads(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Sets gradients whose squares add up to the same number in every order.

    They are small multiples of a quarter, exact in every type, so that a norm has one value
    although GPU and CPU add in different orders.
    """
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        numbers = torch.randint(-8, 9, param.shape, generator=generator) * (0.25 * scale)
        param.grad = numbers.to(device=param.device, dtype=param.dtype)


def set_scale(run: Run, scale: float, found_inf: float | None = None) -> None:
    """Tells the optimizer what a gradient scaler tells it, by tensors beside its parameters."""
    device = run.params[0].device
    run.optimizer.grad_scale = torch.tensor(scale, device=device)
    if found_inf is not None:
        run.optimizer.found_inf = torch.tensor(found_inf, device=device)


def snapshot(run: Run) -> dict[str, Tensor]:
    """Returns copies of everything that training changes."""
    return {name: tensor.clone() for name, tensor in run.tensors().items()}


def seen_by_profiler(step: Callable[[], Any]) -> tuple[list[str], list[str], list[str]]:
    """Runs a step under torch's profiler.

    Returns:
        Kernels, copies and fills on the device, and the calls of the CUDA runtime by the host.
    """
    if emulated_cuda.EMULATED:
        return emulated_cuda.seen_by_runtime(step)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(_RANGE):
            step()
        torch.cuda.synchronize()
    kernels, copies, calls = [], [], []
    events = list(profile.events())
    on_gpu = torch.autograd.DeviceType.CUDA
    whole = next(e for e in events if e.name == _RANGE and e.device_type != on_gpu).time_range
    for event in events:
        if event.device_type == on_gpu:
            annotation = getattr(event, "is_user_annotation", False) or event.name == _RANGE
            if annotation or event.name.startswith("Optimizer."):
                continue
            (copies if event.name.startswith(("Memcpy", "Memset")) else kernels).append(event.name)
        elif event.name.startswith("cu") and whole.start <= event.time_range.start <= whole.end:
            calls.append(event.name)
    return kernels, copies, calls
