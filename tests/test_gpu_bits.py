"""GPU and CPU give the same bits for the same gradients and the same multiplier."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    ENTRIES,
    LAYOUTS,
    TABLE,
    Run,
    assert_same_bits,
    copies,
    make_fused,
    make_params,
    richest,
    set_grads,
)
from gpu_tools import (
    GPU_BACKENDS,
    MIXED,
    SAME,
    set_exact_grads,
    set_scale,
    share_grads,
    step_both,
    twins,
)

if not torch.cuda.is_available():
    pytest.skip("this torch sees no GPU here", allow_module_level=True)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", GPU_BACKENDS)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: More than two pieces of work, in odd places, beside small ones, one element and none.
SHAPES = ((2 * 65536 + 77,), (3,), (0,), (129, 130), (511,), ())
#: What arithmetic likes to stumble over: overflow, underflow, both zeros.
VALUES = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e38, -1e-38, 1e-44, 6e-8, 65504.0, 1e-20)


@pytest.mark.parametrize("entry, options", **CASES)
@BACKENDS
@ALL_DTYPES
def test_every_variant(entry, options, backend, dtype):
    """Parameters and every state, through ordinary and awkward gradients."""
    if backend == "triton" and dtype != torch.float32 and options != richest(entry):
        pytest.skip("compiling takes long; the other types are tried with the richest variant")
    gpu, cpu = twins(entry, backend, SHAPES, dtype, **options)
    step_both(gpu, cpu, 1)
    for run in (gpu, cpu):
        run.advance()
    step_both(gpu, cpu, 2)
    set_grads(cpu.params, 3)
    for param in cpu.params[:2]:
        awkward = torch.tensor(VALUES[: param.numel()], dtype=torch.float64).to(dtype)
        param.grad.view(-1)[-awkward.numel() :] = awkward
    share_grads(gpu, cpu)
    for run in (gpu, cpu):
        run.optimizer.step()
    assert_same_bits(gpu.tensors(), cpu.tensors())


@OURS
@BACKENDS
@ALL_DTYPES
def test_value_clip_and_scale(entry, backend, dtype):
    """The multiplier and the clamp of every element; a scale that is no power of two."""
    gpu, cpu = twins(entry, backend, SHAPES, dtype, **richest(entry), max_grad_value=0.5)
    for seed, scale in ((1, 3.0), (2, 1024.0), (3, 0.7)):
        for run in (gpu, cpu):
            set_scale(run, scale, 0.0)
        step_both(gpu, cpu, seed, scale=scale)
    assert_same_bits(gpu.tensors(), cpu.tensors())


@OURS
@BACKENDS
@ALL_DTYPES
@pytest.mark.parametrize("limit", ["max_grad_norm", "max_grad_norm_per_param"])
def test_norm_clips(entry, backend, dtype, limit):
    """Where sums are exact the norm has one value, and everything after it the same bits."""
    options = {**richest(entry), limit: 1.1, "max_grad_value": 1.5}
    gpu, cpu = twins(entry, backend, SHAPES, dtype, **options)
    for run in (gpu, cpu):
        set_scale(run, 8.0)
    for seed in (1, 2, 3):
        set_exact_grads(cpu.params, seed, scale=8.0)
        share_grads(gpu, cpu)
        for run in (gpu, cpu):
            run.optimizer.step()
    assert_same_bits(gpu.tensors(), cpu.tensors())
    if limit == "max_grad_norm":
        assert gpu.optimizer.last_grad_norm.item() == cpu.optimizer.last_grad_norm.item() > 1.1


@OURS
@BACKENDS
def test_norm_of_ordinary_gradients(entry, backend):
    """The sum of squares is made in one order, so that its bits are the CPU's."""
    gpu, cpu = twins(entry, backend, SHAPES, **richest(entry), max_grad_norm=0.3)
    step_both(gpu, cpu, 1)
    ours, theirs = (run.optimizer._pipeline.control.cpu() for run in (gpu, cpu))
    assert ours.tolist() == theirs.tolist()


@OURS
@BACKENDS
@pytest.mark.parametrize("types", [*SAME, *MIXED], ids=str)
def test_types(entry, backend, types):
    """Parameters, gradients and states of different types."""
    dtype, grad_dtype, *state_dtypes = types
    gpu, cpu = twins(entry, backend, SHAPES, dtype, **richest(entry), max_grad_norm=200.0)
    step_both(gpu, cpu, 1, dtype=grad_dtype)
    for run in (gpu, cpu):
        for entries in run.optimizer.state.values():
            names = [name for name in entry.states if name in entries]
            for name, kind in zip(names, itertools.cycle(state_dtypes)):
                entries[name] = entries[name].to(kind)
    for seed in (2, 3):
        step_both(gpu, cpu, seed, dtype=grad_dtype)
    assert_same_bits(gpu.tensors(), cpu.tensors())
    norms = [run.optimizer.last_grad_norm.item() for run in (gpu, cpu)]
    assert norms[0] == norms[1] > 200.0
    assert not torch.equal(gpu.params[0].cpu(), make_params(SHAPES, dtype)[0])
    assert gpu.optimizer.backend_of(gpu.params[0]) == backend


@OURS
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("same_for_grads", [True, False], ids=["both", "parameters"])
def test_memory_layouts(entry, backend, dtype, layout, same_for_grads):
    """Aligned or not, with gaps or in another order; the gradient in the same way or not."""
    shapes = ((7, 3, 5, 4), (33, 18), (70_001,), (1,))
    gpu, cpu = twins(entry, backend, shapes, dtype, layout, **richest(entry), max_grad_value=0.5)
    for seed in (1, 2):
        step_both(gpu, cpu, seed, layout if same_for_grads else "contiguous")
    assert_same_bits(gpu.tensors(), cpu.tensors())
    assert gpu.optimizer.backend_of(gpu.params[0]) == backend


@OURS
@BACKENDS
def test_many_groups(entry, backend):
    """Groups of every setting of their own, two types in one optimizer, some without gradient."""
    start = make_params([(1 + 37 * i,) for i in range(60)])
    start += make_params([(5, i) for i in range(20)], torch.bfloat16)
    runs = []
    for device, name in (("cuda", backend), ("cpu", "cpu")):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in copies(start)]
        groups = [
            {"params": params[i::8], "lr": 0.01 * (i + 1), **entry.known(weight_decay=0.02 * i)}
            for i in range(8)
        ]
        groups[3]["max_grad_value"] = 0.25
        groups[4] |= entry.known(decoupled_weight_decay=True)
        runs.append(Run(params, make_fused(entry, groups, name, **richest(entry))))
    gpu, cpu = runs
    for seed in (1, 2, 3):
        set_grads(cpu.params, seed)
        for param in cpu.params[seed::5]:
            param.grad = None
        share_grads(gpu, cpu)
        cpu.optimizer.param_groups[2]["lr"] = gpu.optimizer.param_groups[2]["lr"] = 0.1 * seed
        for run in runs:
            run.optimizer.step()
    assert_same_bits(gpu.tensors(), cpu.tensors())


@OURS
@BACKENDS
def test_fresh_gradients_while_the_host_runs_ahead(entry, backend):
    """Gradients of new memory in every step, many steps ahead of the device.

    Tables of later steps must not overtake the launches that read the earlier ones.
    """
    shapes = ((1000,), (3, 7), (70_001,), (1,)) * 10
    gpu, cpu = twins(entry, backend, shapes, **richest(entry))
    sets = []
    for seed in range(1, 21):
        set_grads(cpu.params, seed)
        sets.append([param.grad.cuda() for param in cpu.params])
        cpu.optimizer.step()
    gpu.optimizer.zero_grad()
    for param, grad in zip(gpu.params, sets[0], strict=True):
        param.grad = grad.clone()
    gpu.optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(5e8))
    for step, grads in enumerate(sets[1:]):
        gpu.optimizer.zero_grad()
        gap = torch.full((1000 * step + 1,), math.nan, device="cuda")
        for param, grad in zip(gpu.params, grads, strict=True):
            param.grad = grad.clone()
        gpu.optimizer.step()
        del gap
    assert_same_bits(gpu.tensors(), cpu.tensors())


@BACKENDS
def test_backends_of_one_optimizer_can_change(backend):
    """Training goes on with the same bits after the backend was switched."""
    entry = TABLE["AdamW"]
    gpu, cpu = twins(entry, backend, SHAPES, **richest(entry))
    for seed, name in enumerate((backend, *GPU_BACKENDS, backend), start=1):
        gpu.optimizer.backend = name
        step_both(gpu, cpu, seed)
    assert_same_bits(gpu.tensors(), cpu.tensors())
