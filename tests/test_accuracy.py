"""Our rounding error, measured against torch's rules in float64, is at most twice plain torch's."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from cases import (
    CASES,
    COUNTING,
    DTYPES,
    ENTRIES,
    assert_accurate,
    assert_close,
    assert_same_bits,
    backends,
    device_of,
    make_params,
    native_backends,
    oracle,
    oracle_steps,
    richest,
    run_fused,
    run_stock,
    set_grads,
    states,
)

SHAPES = ((1000,), (33, 7), (1,), ())
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("entry, options", **CASES)
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_oracle(entry, options, backend, dtype):
    """Every variant, over ten steps in which the size of the gradients changes."""
    start = make_params(SHAPES, dtype, device_of(backend))
    ours = run_fused(entry, start, backend, **options)
    stock = run_stock(entry, start, **options)
    truth = oracle(entry, start, **options)
    for first, scale in ((1, 1.0), (4, 30.0), (7, 1e-2)):
        ours.steps(3, first, scale=scale)
        stock.steps(3, first, scale=scale)
        oracle_steps(truth, start, 3, first, scale=scale)
    assert_accurate(ours.tensors(), stock.tensors(), truth.tensors())


@pytest.mark.parametrize("entry", **ENTRIES)
@pytest.mark.parametrize("backend", native_backends())
@pytest.mark.parametrize("grad_dtype", HALVES, ids=str)
def test_half_gradients_of_float32_parameters(entry, backend, grad_dtype):
    """They are widened, never rounded again: the same as torch's rule on the widened gradients."""
    start = make_params(SHAPES, torch.float32, device_of(backend))
    options = richest(entry)
    ours = run_fused(entry, start, backend, **options)
    stock = run_stock(entry, start, **options)
    truth = oracle(entry, start, **options)
    for seed in range(1, 5):
        set_grads(ours.params, seed, grad_dtype)
        for run in (stock, truth):
            for param, like in zip(run.params, ours.params, strict=True):
                param.grad = like.grad.to(param.dtype)
            run.optimizer.step()
        ours.optimizer.step()
    assert_accurate(ours.tensors(), stock.tensors(), truth.tensors())


@pytest.mark.parametrize("entry", **ENTRIES)
@pytest.mark.parametrize("backend", native_backends())
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_state_of_half_parameters(entry, backend, dtype):
    """A state put into float32 by hand is kept in it, with float32's accuracy."""
    start = make_params(SHAPES, dtype, device_of(backend))
    options = {**richest(entry), **entry.known(weight_decay=0.0)}
    ours = run_fused(entry, start, backend, **options).steps(1)
    for entries in ours.optimizer.state.values():
        for name in entry.states:
            if name in entries:
                entries[name] = torch.zeros_like(entries[name], dtype=torch.float32)
    wide = run_stock(entry, [p.detach().float() for p in ours.params], **options).steps(1)
    for entries in wide.optimizer.state.values():
        for name in entry.states:
            if name in entries:
                entries[name].zero_()
    for seed in range(2, 6):
        set_grads(ours.params, seed)
        for param, like in zip(wide.params, ours.params, strict=True):
            param.grad = like.grad.float()
            # So that rounding the parameter is the only difference, and does not add up.
            param.data.copy_(like.data)
        ours.optimizer.step()
        wide.optimizer.step()
    for own, theirs in zip(states(ours.optimizer), states(wide.optimizer), strict=True):
        assert all(own[name].dtype != dtype for name in own)
        assert_close(own, theirs)
    for own, theirs in zip(ours.params, wide.params, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.data, theirs.data.to(dtype))


@pytest.mark.parametrize("entry", **ENTRIES)
@pytest.mark.parametrize("backend", backends())
def test_all_dtypes_in_one_group(entry, backend):
    """Each parameter is read in its own type, wherever it stands in the group."""
    options = richest(entry)
    start = [
        param
        for shape in SHAPES
        for dtype in DTYPES
        for param in make_params([shape], dtype, device_of(backend))
    ]
    mixed = run_fused(entry, start, backend, **options).steps(3).tensors()
    for dtype in DTYPES:
        kept = [i for i, param in enumerate(start) if param.dtype == dtype]
        alone = run_fused(entry, [start[i] for i in kept], backend, **options)
        for seed in range(1, 4):
            set_grads(start, seed)
            for param, i in zip(alone.params, kept, strict=True):
                param.grad = start[i].grad
            alone.optimizer.step()
        places = dict(enumerate(kept))
        expected = {
            f"{name.rpartition(' ')[0]} {places[int(name.rpartition(' ')[2])]}": value
            for name, value in alone.tensors().items()
        }
        assert_same_bits({name: mixed[name] for name in expected}, expected)


@pytest.mark.parametrize("entry", **COUNTING)
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("step", [1000, 123_457, 10_000_000])
def test_late_steps(entry, backend, step):
    """Bias corrections and decayed rates are right after any number of steps."""
    start = make_params(SHAPES, torch.float32, device_of(backend))
    options = {**richest(entry), **({"lr_decay": 1e-3} if entry.takes("lr_decay") else {})}
    runs = (
        run_fused(entry, start, backend, **options),
        run_stock(entry, start, **options),
        oracle(entry, start, **options),
    )
    for run in runs:
        more = functools.partial(oracle_steps, run, start) if run is runs[2] else run.steps
        more(1)
        for entries in run.optimizer.state.values():
            entries["step"] = torch.tensor(float(step))
        more(2, first=2)
        assert all(entries["step"] == step + 2 for entries in run.optimizer.state.values())
    assert_accurate(*(run.tensors() for run in runs))


@pytest.mark.parametrize("entry, options", **CASES)
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values_propagate(entry, options, backend, dtype):
    """Without a skip, inf and nan reach exactly the elements that they reach in torch."""
    for step in (1.0, 10.0):
        start = make_params([(40,)], dtype, device_of(backend))
        runs = (run_fused(entry, start, backend, **options), run_stock(entry, start, **options))
        for run in runs:
            run.steps(1).advance(step)
            for _ in range(2):
                set_grads(run.params, 7)
                for at, value in ((3, math.inf), (17, -math.inf), (20, math.nan), (39, 0.0)):
                    run.params[0].grad[at] = value
                run.optimizer.step()
        ours, stock = (run.tensors() for run in runs)
        for name, value in ours.items():
            expected = stock[name].to(value.dtype)
            assert torch.equal(value.isnan(), expected.isnan()), name
            assert torch.equal(value.isinf(), expected.isinf()), name
            if dtype == torch.float32:
                torch.testing.assert_close(value, expected, equal_nan=True, msg=name)
