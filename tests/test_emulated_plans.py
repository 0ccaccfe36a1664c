"""The CUDA backend on an emulated GPU: what a real one does not show, or shows by crashing.

Run by test_emulated_cuda.py, or by hand with FUSEDOPT_EMULATED_CUDA naming the library.
"""

from __future__ import annotations

import gc
import math
import threading
import time

import emulated_cuda
import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    Run,
    assert_same_bits,
    copies,
    make_fused,
    make_params,
    richest,
    set_grads,
)
from gpu_tools import share_grads, snapshot, step_both, twins

from fusedopt import _control

if not emulated_cuda.EMULATED:
    pytest.skip(
        "needs a process with an emulated GPU; test_emulated_cuda.py starts one",
        allow_module_level=True,
    )

emulation = emulated_cuda.emulation
OURS = pytest.mark.parametrize("entry", **ENTRIES)
ADAMW = TABLE["AdamW"]
SHAPES = ((1000,), (3, 7), (1,), (40, 30))
#: Updates that the host may be ahead of the device: csrc/cuda/staging.h's kBuffers.
RING = 8


def grads_ahead(gpu, cpu, count):
    """Steps the CPU's twin; returns the gradients of each step, on the GPU."""
    sets = []
    for seed in range(1, count + 1):
        set_grads(cpu.params, seed)
        sets.append([param.grad.cuda() for param in cpu.params])
        cpu.optimizer.step()
    emulation.synchronize()
    return sets


def step_with(run, grads):
    """Steps with gradients that are there already: nothing but the step reaches the device."""
    for param, grad in zip(run.params, grads, strict=True):
        param.grad = grad
    run.optimizer.step()


def clear_grads(run):
    """Lets the next gradients be of any type."""
    for param in run.params:
        param.grad = None
        if hasattr(param, "grad_dtype"):
            param.grad_dtype = None


def opened_after(ready):
    """A thread that opens the gate once `ready`, which asks Python and so needs its lock."""

    def work():
        while not ready():
            time.sleep(0.001)
        emulation.open_gate()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@OURS
def test_a_host_far_ahead(entry):
    """Each step finds its own table, however late it runs; only a full ring waits."""
    gpu, cpu = twins(entry, "cuda", SHAPES, **richest(entry))
    sets = grads_ahead(gpu, cpu, 1 + 3 * RING)
    step_with(gpu, sets[0])
    before = emulation.counts().waits
    for i, grads in enumerate(sets[1:]):
        step_with(gpu, grads)
        assert (emulation.counts().waits > before) is (i >= RING)
    assert_same_bits(gpu.tensors(), cpu.tensors())


def test_a_full_ring_waits_without_the_interpreters_lock():
    """Another thread of Python must be able to do what the device waits for."""
    gpu, cpu = twins(ADAMW, "cuda", SHAPES)
    sets = grads_ahead(gpu, cpu, 1 + 2 * RING)
    step_with(gpu, sets[0])
    emulation.synchronize()
    emulation.enqueue_gate(0)
    before = emulation.counts().waits
    thread = opened_after(lambda: emulation.counts().waits > before)
    for grads in sets[1:]:
        step_with(gpu, grads)
    thread.join()
    assert_same_bits(gpu.tensors(), cpu.tensors())


def test_a_plan_goes_without_the_interpreters_lock():
    """Its pinned memory has to be read before it is freed."""
    gpu, cpu = twins(ADAMW, "cuda", SHAPES)
    sets = grads_ahead(gpu, cpu, 2)
    step_with(gpu, sets[0])
    emulation.synchronize()
    emulation.enqueue_gate(0)
    step_with(gpu, sets[1])
    started = threading.Event()
    thread = opened_after(started.is_set)
    started.set()
    del gpu
    gc.collect()
    thread.join()


def test_a_table_is_made_without_the_interpreters_lock():
    """A copy from pageable memory may wait for the stream."""
    gpu, cpu = twins(ADAMW, "cuda", SHAPES)
    set_grads(gpu.params, 1)
    gpu.optimizer.step()
    clear_grads(gpu)
    set_grads(gpu.params, 2, dtype=torch.bfloat16)
    emulation.synchronize()
    emulation.set_patient(False)
    emulation.enqueue_gate(0)
    before = emulation.counts().copies
    thread = opened_after(lambda: emulation.counts().copies > before)
    try:
        gpu.optimizer.step()
    finally:
        emulation.set_patient(True)
        thread.join()


def test_plans_replaced_in_flight():
    """Gradients of other types and layouts make new tables while the old ones are being read."""
    gpu, cpu = twins(ADAMW, "cuda", SHAPES)
    for seed, (dtype, layout) in enumerate(
        [(None, "contiguous"), (torch.bfloat16, "contiguous"), (torch.float16, "every_second")] * 4
    ):
        for run in (gpu, cpu):
            clear_grads(run)
        step_both(gpu, cpu, seed, layout, dtype=dtype)
    assert_same_bits(gpu.tensors(), cpu.tensors())


def test_memory_of_a_plan_on_two_streams():
    """A plan that goes while another stream runs its kernels: nobody gets its memory meanwhile."""
    gpu, cpu = twins(ADAMW, "cuda", SHAPES, max_grad_norm=1.0)
    sets = grads_ahead(gpu, cpu, 2)
    step_with(gpu, sets[0])
    emulation.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step_with(gpu, sets[1])
    tensors = {name: value for name, value in gpu.tensors().items() if "step" not in name}
    # What is the user's own stays; the plan and its memory go.
    counters = [entries["step"] for entries in gpu.optimizer.state.values()]
    del gpu
    gc.collect()
    # Whoever asks for memory of these sizes on the first stream writes to it at once.
    taken = [torch.zeros(n, dtype=torch.uint8, device="cuda") for n in range(512, 100_000, 512)]
    emulation.synchronize()
    wanted = {name: value for name, value in cpu.tensors().items() if "step" not in name}
    assert_same_bits(tensors, wanted)
    del taken, counters


def test_memory_comes_from_torch():
    """One allocation of torch's a plan; of the runtime's own only the pinned ring."""
    gpu, cpu = twins(ADAMW, "cuda", SHAPES, max_grad_norm=1.0, max_grad_norm_per_param=0.5)
    set_grads(cpu.params, 1)
    share_grads(gpu, cpu)
    before = emulation.counts().allocations
    emulation.listen()
    gpu.optimizer.step()
    calls = emulation.take_calls()
    assert "cudaMalloc" not in calls and calls.count("cudaHostAlloc") == 1
    emulation.listen()
    del gpu
    gc.collect()
    assert "cudaFree" not in emulation.take_calls()
    assert emulation.counts().allocations == before


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_parameters_that_never_had_a_gradient(kind):
    """Their rows are in the table too."""
    start = make_params(SHAPES, kind)
    runs = []
    for device, backend in (("cuda", "cuda"), ("cpu", "cpu")):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in copies(start)]
        runs.append(Run(params, make_fused(ADAMW, params, backend, max_grad_norm=1.0)))
    gpu, cpu = runs
    for seed in (1, 2, 3):
        set_grads(cpu.params, seed)
        for param in cpu.params[seed:]:
            param.grad = None
        share_grads(gpu, cpu)
        for run in runs:
            run.optimizer.step()
    assert_same_bits(
        {n: t for n, t in gpu.tensors().items() if n.startswith("param")},
        {n: t for n, t in cpu.tensors().items() if n.startswith("param")},
    )


@OURS
@pytest.mark.parametrize("clips", [{}, {"max_grad_norm": 0.5}], ids=["bare", "clipped"])
def test_rows_of_mixed_types(entry, clips):
    """They have a launch of their own beside that of their neighbours, under one norm."""
    gpu, cpu = twins(entry, "cuda", SHAPES, **richest(entry), **clips)
    step_both(gpu, cpu, 1)
    for run in (gpu, cpu):
        entries = run.optimizer.state[run.params[1]]
        name = next(name for name in entry.states if name in entries)
        entries[name] = entries[name].double()
        run.optimizer.zero_grad()
    for seed in (2, 3, 4):
        set_grads(cpu.params[:1] + cpu.params[2:], seed)
        set_grads(cpu.params[1:2], seed, dtype=torch.float64)
        share_grads(gpu, cpu)
        cpu.optimizer.step()
        before = emulation.counts().launches
        gpu.optimizer.step()
        assert emulation.counts().launches - before == (3 if clips else 2)
    assert_same_bits(gpu.tensors(), cpu.tensors())


@pytest.mark.parametrize(
    "scale, found",
    [
        (1e-3, 0.0),
        (3.0, 1e-50),
        (torch.tensor(1e-3, dtype=torch.float64), torch.tensor(0.0)),
        (torch.tensor(0.7), torch.tensor(1e-50, dtype=torch.float64)),
        (torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([0])),
    ],
    ids=str,
)
@pytest.mark.parametrize("clips", [{}, {"skip_nonfinite": True}], ids=["bare", "reduced"])
def test_numbers_of_a_scaler_keep_their_bits(scale, found, clips):
    """Not rounded to float32 on the way to the device."""
    gpu, cpu = twins(TABLE["SGD"], "cuda", SHAPES, torch.float64, momentum=0.9, **clips)
    for run in (gpu, cpu):
        run.optimizer.grad_scale, run.optimizer.found_inf = scale, found
    for seed in (1, 2):
        step_both(gpu, cpu, seed)
    assert_same_bits(gpu.tensors(), cpu.tensors())
    skipped = [run.optimizer.last_step_skipped.item() for run in (gpu, cpu)]
    assert skipped == [bool(found != 0)] * 2


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_numbers_of_a_scaler_are_single(name):
    """As on the CPU."""
    gpu, _ = twins(ADAMW, "cuda", SHAPES)
    set_grads(gpu.params, 1)
    before = snapshot(gpu)
    setattr(gpu.optimizer, name, torch.ones(2))
    with pytest.raises(ValueError, match=f"{name} is a tensor of 2 elements"):
        gpu.optimizer.step()
    after = gpu.tensors()
    assert_same_bits({n: after[n] for n in before}, before)


def spread(places, **options):
    """Parameters on several devices in turn."""
    params = [
        torch.nn.Parameter(param.detach().to(places[i % len(places)]))
        for i, param in enumerate(make_params(SHAPES))
    ]
    return Run(params, make_fused(ADAMW, params, "auto", **options))


def test_tables_replaced_by_a_step_over_several_plans():
    """Without a norm the apply pass is what finds that the gradients have another type."""
    run, alone = spread(["cuda:0", "cuda:1", "cpu"]), spread(["cpu"])
    for seed, dtype in enumerate([None, torch.bfloat16, torch.float16, None]):
        for each in (run, alone):
            clear_grads(each)
        set_grads(alone.params, seed, dtype=dtype)
        share_grads(run, alone)
        for each in (run, alone):
            each.optimizer.step()
    assert_same_bits(run.tensors(), alone.tensors())


def test_clips_of_a_step_that_failed_are_forgotten(monkeypatch):
    """Between the passes something raises; the next step asks for no clip."""
    run, alone = spread(["cuda:0", "cuda:1"], max_grad_norm_per_param=0.1), spread(["cpu"])
    set_grads(alone.params, 1)
    share_grads(run, alone)
    with monkeypatch.context() as patch:
        patch.setattr(_control, "settle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.optimizer.step()
    run.optimizer.param_groups[0]["max_grad_norm_per_param"] = None
    for each in (run, alone):
        each.optimizer.step()
    assert_same_bits(run.tensors(), alone.tensors())


def test_no_context_on_a_device_that_has_no_part():
    """A fresh thread starts on device 0; a step on device 1 leaves that one alone."""
    run = spread(["cuda:1"], max_grad_norm=1.0).steps(1)
    set_grads(run.params, 2)
    emulation.synchronize()
    emulation.forget_contexts()
    errors = []

    def work():
        try:
            for _ in range(2):
                run.optimizer.step()
            run.optimizer.param_groups[0]["params"].pop()
            run.optimizer.step()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert emulation.has_context(1) and not emulation.has_context(0)


@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("clips", [{}, {"max_grad_norm": 0.5}], ids=["bare", "clipped"])
def test_any_call_of_the_runtime_may_fail(fresh, clips):
    """A clear error, nothing changed, nothing lost, and the next step is as if nothing had been."""
    failed = []
    for nth in range(1, 60):
        gpu, cpu = twins(ADAMW, "cuda", SHAPES, **clips)
        if not fresh:
            step_both(gpu, cpu, 1)
        set_grads(cpu.params, 2)
        share_grads(gpu, cpu)
        before = snapshot(gpu)
        allocations = emulation.counts().allocations
        emulation.fail_call(nth)
        try:
            gpu.optimizer.step()
            raised = None
        except RuntimeError as error:
            raised = str(error)
        name = emulation.failed_call()
        emulation.fail_call(0)
        if name:
            failed.append(name)
        if raised is not None:
            after = gpu.tensors()
            assert "unknown error" in raised, (name, raised)
            assert_same_bits({n: after[n] for n in before}, before)
            gpu.optimizer.step()
        cpu.optimizer.step()
        assert_same_bits(gpu.tensors(), cpu.tensors())
        set_grads(cpu.params, 3)
        share_grads(gpu, cpu)
        for run in (gpu, cpu):
            run.optimizer.step()
        assert_same_bits(gpu.tensors(), cpu.tensors())
        assert emulation.counts().allocations <= allocations + (1 if fresh else 0)
        del gpu
        gc.collect()
        if not name:
            break
    assert not name, "there are more calls than were made to fail"
    assert {"cudaLaunchKernel", "cudaMemcpyAsync"} <= set(failed)
    assert fresh is ("cudaHostAlloc" in failed)


def test_a_graph_outlives_the_plan():
    """Its tables stay, whatever is made in their place; and a graph may need new ones."""
    entry = TABLE["Adam"]
    gpu, _ = twins(entry, "cuda", SHAPES, capturable=True, max_grad_norm=math.inf)
    start = make_params(SHAPES)
    cpu = Run(start, make_fused(entry, start, "cpu", max_grad_norm=math.inf))
    step_both(gpu, cpu, 1)
    # Another layout than in the warm-up: tables are made during the capture.
    set_grads(cpu.params, 2)
    share_grads(gpu, cpu, "every_second")
    static = [param.grad for param in gpu.params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.optimizer.step()
    gpu.optimizer.max_grad_norm = None
    pipeline = gpu.optimizer._pipeline
    pipeline.reset()
    gc.collect()
    for n in range(1, 200):
        torch.zeros(512 * n, dtype=torch.uint8, device="cuda")
    graph.replay()
    cpu.optimizer.step()
    assert_same_bits(gpu.tensors(), cpu.tensors())
    del static
