"""A step keeps nothing alive and needs no memory that grows with the model."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    assert_close,
    backends,
    copies,
    device_of,
    make_params,
    native_backends,
    richest,
    run_fused,
    run_stock,
    set_grads,
)
from torch.multiprocessing.reductions import StorageWeakRef

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
MEGABYTE = 2**20


@pytest.fixture
def no_collector():
    """Switches the garbage collector off: what a reference count frees must not wait for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@OURS
@BACKENDS
@pytest.mark.usefixtures("no_collector")
def test_zero_grad_frees_the_gradients(entry, backend):
    """Nothing of ours holds a gradient between two steps."""
    run = run_fused(
        entry, make_params([(6, 4), (9,)], device=device_of(backend)), backend, **richest(entry)
    )
    for seed in (1, 2):
        set_grads(run.params, seed)
        storages = [StorageWeakRef(param.grad.untyped_storage()) for param in run.params]
        objects = [weakref.ref(param.grad) for param in run.params]
        run.optimizer.step()
        assert not any(storage.expired() for storage in storages)
        run.optimizer.zero_grad()
        assert all(storage.expired() for storage in storages)
        assert all(reference() is None for reference in objects)


@OURS
@BACKENDS
@pytest.mark.usefixtures("no_collector")
def test_optimizer_is_freed_with_its_last_reference(entry, backend):
    """As torch's is: state is as large as the model and must not wait for the collector."""
    # The first optimizer of a process imports modules, and frames of that stay for a while.
    run_stock(entry, make_params()).steps(1)
    gc.collect()
    for make in (run_stock, lambda *args, **options: run_fused(*args, backend, **options)):
        start = make_params([(6, 4)], device=device_of(backend))
        run = make(entry, start, **richest(entry)).steps(2)
        storages = [
            StorageWeakRef(tensor.untyped_storage())
            for name, tensor in run.tensors().items()
            if not name.startswith("step")
        ]
        assert len(storages) >= 2
        optimizer = weakref.ref(run.optimizer)
        del run
        assert optimizer() is None
        assert all(storage.expired() for storage in storages)


@pytest.mark.skipif("cpu" not in native_backends(), reason="no native extension")
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system keeps no peak of memory"
)
def test_no_memory_that_grows_with_the_model():
    """A step with every clip over a parameter of 40 MiB takes less than 4 MiB more."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here)}
    command = [sys.executable, here / "peak_memory.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rises = json.loads(done.stdout)
    assert rises.pop("control") > 36 * MEGABYTE
    assert len(rises) == 2 * len(TABLE)
    assert {name: rise for name, rise in rises.items() if rise > 4 * MEGABYTE} == {}


@OURS
@pytest.mark.parametrize("backend", native_backends())
def test_step_allocates_no_tensors_per_parameter(entry, backend):
    """What torch's allocator hands out in a step does not depend on the number of parameters."""
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("Triton's interpreter allocates for every program that it runs")
    allocated = []
    for count in (2, 40):
        params = make_params([(64,)] * count, device=device_of(backend))
        run = run_fused(entry, params, backend, max_grad_norm=1.0, **richest(entry)).steps(2)
        with torch.profiler.profile(profile_memory=True) as profile:
            run.optimizer.step()
        events = profile.key_averages()
        allocated.append(sum(max(event.self_cpu_memory_usage, 0) for event in events))
    assert allocated[0] == allocated[1]


@BACKENDS
def test_share_memory(backend):
    """Adagrad's share_memory() moves the sums under the same tensors, and the step follows."""
    entry = TABLE["Adagrad"]
    if device_of(backend) != "cpu":
        pytest.skip("for memory of the host")
    start = make_params([(6, 4), (9,)])
    runs = run_stock(entry, start), run_fused(entry, start, backend)
    for run in runs:
        run.steps(1)
        run.optimizer.share_memory()
        for param in run.params:
            param.share_memory_()
        run.steps(2, first=2)
    for entries in runs[1].optimizer.state.values():
        assert entries["sum"].is_shared()
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
def test_counters_of_a_copy_are_its_own(entry, backend):
    """Counters live in one buffer; a copied optimizer or checkpoint has another."""
    start = make_params([(6, 4), (9,)], device=device_of(backend))
    run = run_fused(entry, start, backend).steps(1)
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    twin = run_fused(entry, copies(start), backend)
    twin.optimizer.load_state_dict(copy.deepcopy(checkpoint))
    run.steps(3, first=2)
    for entries in checkpoint["state"].values():
        assert entries.get("step", 1) == 1
    if entry.has_step:
        assert all(entries["step"] == 4 for entries in run.optimizer.state.values())
    twin.steps(1)
    if entry.has_step:
        assert all(entries["step"] == 2 for entries in twin.optimizer.state.values())
