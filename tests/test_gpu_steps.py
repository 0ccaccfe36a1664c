"""Steps on a GPU: launches, synchronisation, skips, several devices, checkpoints, huge tensors."""

from __future__ import annotations

import contextlib
import copy
import math

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
    run_fused,
    set_grads,
)
from gpu_tools import (
    GPU_BACKENDS,
    seen_by_profiler,
    set_exact_grads,
    set_scale,
    share_grads,
    snapshot,
    step_both,
    twins,
)

import fusedopt

if not torch.cuda.is_available():
    pytest.skip("this torch sees no GPU here", allow_module_level=True)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", GPU_BACKENDS)
SHAPES = ((40_003,), (5, 7), (1,), (129, 130))
NORMS = {
    "bare": {},
    "global": {"max_grad_norm": 1.0},
    "every": {"max_grad_norm": 1.0, "max_grad_norm_per_param": 0.5, "max_grad_value": 0.3},
    "skip": {"skip_nonfinite": True},
}
#: Calls by which the host waits for the device, or allocates on it.
WAITING = {
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMalloc", "cudaFree"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2"),
}


def fresh_grads(params):
    """Sets new gradients without waiting for the device."""
    for param in params:
        param.grad = torch.randn_like(param)


@contextlib.contextmanager
def no_synchronisation():
    """Makes torch raise where it would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OURS
@BACKENDS
@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
def test_no_synchronisation(entry, backend, options):
    """Neither torch nor the backend itself waits, with gradients of new memory in every step."""
    params = make_params(SHAPES, device="cuda")
    run = Run(params, make_fused(entry, params, backend, **richest(entry), **options))

    def step():
        fresh_grads(params)
        run.optimizer.step()

    step()
    step()
    with no_synchronisation():
        for _ in range(5):
            step()
        assert run.optimizer.last_step_skipped is not None
        assert (run.optimizer.last_grad_norm is None) is ("max_grad_norm" not in options)
    calls = seen_by_profiler(run.optimizer.step)[2]
    assert calls
    assert not WAITING.intersection(calls)


@BACKENDS
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fusedopt.GradScaler])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_no_synchronisation_with_a_scaler(backend, scaler_class, unscale_first):
    """Both scalers, with and without `unscale_`; inf in between halves the scale and skips."""
    params = make_params(SHAPES, device="cuda")
    optimizer = make_fused(TABLE["AdamW"], params, backend, max_grad_norm=1.0, fused=True)
    scaler = scaler_class("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))

    def step():
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(2):
        fresh_grads(params)
        step()
    with no_synchronisation():
        for _ in range(3):
            fresh_grads(params)
            step()
        fresh_grads(params)
        params[1].grad.fill_(math.inf)
        step()
    assert optimizer.last_step_skipped.item()
    assert scaler.get_scale() == 512.0
    assert {entries["step"].item() for entries in optimizer.state.values()} == {5.0}


@OURS
@BACKENDS
@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("groups", [1, 50])
def test_launches(entry, backend, options, groups):
    """One launch for all tensors of all groups, two with a norm; at most one copy of pointers."""
    params = make_params([(1 + 7 * i,) for i in range(500)], device="cuda")
    rows = [
        {
            "params": params[i::groups],
            "lr": 0.01 * (i + 1),
            **entry.known(weight_decay=0.01 * (i % 3 + 1)),
        }
        for i in range(groups)
    ]
    run = Run(params, make_fused(entry, rows, backend, **{**richest(entry), **options}))
    fresh_grads(params)
    run.optimizer.step()
    fresh_grads(params)
    run.optimizer.step()
    kernels, copied, _ = seen_by_profiler(run.optimizer.step)
    assert len(kernels) == (2 if options else 1), kernels
    assert not copied
    kept = [param.grad for param in params]
    fresh_grads(params)
    kernels, copied, _ = seen_by_profiler(run.optimizer.step)
    assert len(kernels) == (2 if options else 1), kernels
    assert len(copied) <= 1, copied
    del kept


@OURS
@BACKENDS
@pytest.mark.parametrize("how", ["inf", "nan", "found_inf"])
@pytest.mark.parametrize("applied", [0, 2])
def test_skip_changes_nothing(entry, backend, how, applied):
    """Parameters, states, counters and gradients; the next step goes on as if nothing had been."""
    gpu, cpu = twins(entry, backend, SHAPES, **richest(entry), skip_nonfinite=how != "found_inf")
    for seed in range(1, applied + 1):
        step_both(gpu, cpu, seed)
    set_grads(cpu.params, 10)
    share_grads(gpu, cpu)
    if how == "found_inf":
        set_scale(gpu, 1.0, 1.0)
    else:
        gpu.params[-1].grad[3, 5] = float(how)
    grads = [param.grad.clone() for param in gpu.params]
    before = snapshot(gpu)
    gpu.optimizer.step()
    assert gpu.optimizer.last_step_skipped.item()
    after = gpu.tensors()
    for name, value in before.items():
        assert_same_bits({name: after[name]}, {name: value})
    for param, grad in zip(gpu.params, grads, strict=True):
        assert_same_bits({"": param.grad}, {"": grad})
    if how == "found_inf":
        set_scale(gpu, 1.0, 0.0)
    for seed in (20, 21):
        step_both(gpu, cpu, seed)
    assert not gpu.optimizer.last_step_skipped.item()
    assert_same_bits(gpu.tensors(), cpu.tensors())


def spread(entry, start, places, **options):
    """Returns a run whose parameters lie on several devices in turn."""
    params = [
        torch.nn.Parameter(param.detach().to(places[i % len(places)]))
        for i, param in enumerate(copies(start))
    ]
    return Run(params, make_fused(entry, params, "auto", **richest(entry), **options))


def compare_spread(entry, places):
    """Trains on several devices and on the CPU alone, under one norm and one skip flag."""
    start = make_params((*SHAPES, (3, 3), (1000,)))
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    run, alone = spread(entry, start, places, **options), spread(entry, start, ["cpu"], **options)
    for seed, bad in ((1, None), (2, 0), (3, 1), (4, None)):
        set_exact_grads(alone.params, seed)
        if bad is not None:
            alone.params[bad].grad.view(-1)[0] = math.inf
        share_grads(run, alone)
        for each in (run, alone):
            each.optimizer.step()
            assert each.optimizer.last_step_skipped.item() is (bad is not None)
        assert_same_bits(run.tensors(), alone.tensors())


@OURS
def test_gpu_and_cpu_in_one_optimizer(entry):
    """One norm over both, one decision to skip."""
    compare_spread(entry, ["cuda:0", "cpu"])


@OURS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("places", [("cuda:0", "cuda:1"), ("cuda:1", "cpu", "cuda:0")], ids=str)
def test_two_gpus(entry, places):
    """One norm over both, wherever the current device is."""
    compare_spread(entry, places)


@OURS
@BACKENDS
def test_counters_and_checkpoints(entry, backend):
    """Counters live on the device; `state_dict` has them where stock torch would."""
    flags = [{}]
    if entry.takes("capturable"):
        flags.append({"capturable": True})
    if entry.name in ("Adam", "AdamW"):
        flags.append({"fused": True})
    for flag in flags:
        start = make_params(SHAPES, device="cuda")
        run = run_fused(entry, start, backend, **richest(entry), **flag).steps(2)
        saved = copy.deepcopy(run.optimizer.state_dict())
        for live, entries in zip(
            run.optimizer.state.values(), saved["state"].values(), strict=True
        ):
            if entry.has_step:
                assert live["step"].device.type == "cuda"
                for name in ("step", *entry.scalars):
                    assert entries[name].device.type == ("cuda" if flag else "cpu")
                assert entries["step"].item() == 2
            assert all(entries[name].is_cuda for name in entry.states if name in entries)
        resumed = run_fused(entry, run.params, backend, **richest(entry), **flag)
        resumed.optimizer.load_state_dict(saved)
        for each in (run, resumed):
            each.steps(2, first=5)
        assert_same_bits(resumed.tensors(), run.tensors())


@pytest.mark.parametrize(
    "name, options",
    [("SGD", {"momentum": 0.9}), ("AdamW", {"weight_decay": 0.1})],
    ids=["SGD", "AdamW"],
)
@BACKENDS
def test_more_elements_than_32_bits_count(backend, name, options):
    """One bfloat16 tensor beyond 2^31 elements, under its norm; some places against the CPU."""
    count, width = 2**31 + 4099, 4096
    states = len(TABLE[name].states[:2])
    needed = 2 * count * (2 + states) + 2**32
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    starts = (0, 2**30 - 5, 2**31 - width // 2, count - width)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        torch.manual_seed(1)
        param = torch.nn.Parameter(torch.randn(count, dtype=torch.bfloat16, device="cuda"))
        param.grad = torch.randn(count, dtype=torch.bfloat16, device="cuda")

    def piece_of(tensor, at):
        return tensor.detach()[at : at + width].to("cpu", copy=True)

    slices = [torch.nn.Parameter(piece_of(param, at)) for at in starts]
    for at, piece in zip(starts, slices, strict=True):
        piece.grad = piece_of(param.grad, at)
    optimizer = make_fused(TABLE[name], [param], backend, max_grad_norm=math.inf, **options)
    expected = make_fused(TABLE[name], slices, "cpu", **options)
    for _ in range(2):
        optimizer.step()
        expected.step()
    for at, piece in zip(starts, slices, strict=True):
        own = {"param": piece_of(param, at)}
        theirs = {"param": piece.detach()}
        for key in TABLE[name].states:
            if key in expected.state[piece]:
                own[key] = piece_of(optimizer.state[param][key], at)
                theirs[key] = expected.state[piece][key]
        assert_same_bits(own, theirs)
    squares = [part.double().square().sum() for part in param.grad.split(2**27)]
    norm = torch.stack(squares).sum().sqrt()
    control = optimizer._pipeline.control
    torch.testing.assert_close(control[2], norm, rtol=1e-10, atol=0)
    del optimizer, param
    torch.cuda.empty_cache()
