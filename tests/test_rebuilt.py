"""An optimizer rebuilt from another's attributes: it steps, whatever becomes of the other."""

from __future__ import annotations

import copy

import pytest
from cases import (
    ENTRIES,
    assert_close,
    backends,
    device_of,
    make_params,
    richest,
    run_fused,
    run_stock,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), ())


def share_attributes(optimizer):
    """The same attributes in another object of the class, as pickling helpers make it."""
    other = object.__new__(type(optimizer))
    other.__dict__.update(optimizer.__dict__)
    return other


def share_instance(optimizer):
    """The same attributes in an object of a class made on the spot, as wrappers do."""
    other = object.__new__(type(f"Own{type(optimizer).__name__}", (type(optimizer),), {}))
    other.__dict__ = optimizer.__dict__
    return other


def reduce_by_hand(optimizer):
    """What copy and pickle do, without them."""
    make, arguments, state, *_ = optimizer.__reduce_ex__(4)
    other = make(*arguments)
    other.__setstate__(state)
    return other


HOW = [copy.copy, share_attributes, share_instance, reduce_by_hand]


@OURS
@BACKENDS
@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("keep", [False, True])
def test_goes_on(entry, backend, how, steps_before, keep):
    """Groups, state and settings are shared; the first one is freed, or steps in turn."""
    if keep and how in (copy.copy, reduce_by_hand) and device_of(backend) != "cpu":
        pytest.skip("what a copy is made of has counters on the host, so each counts for itself")
    start = make_params(SHAPES, device=device_of(backend))
    runs = (
        run_stock(entry, start, **richest(entry)),
        run_fused(entry, start, backend, **richest(entry)),
    )
    for run in runs:
        run.steps(steps_before)
        first, other = run.optimizer, how(run.optimizer)
        run.optimizer = other
        if not keep:
            del first
        for seed in range(5, 9):
            set_grads(run.params, seed)
            other.step()
            if keep:
                set_grads(run.params, seed + 10)
                first.step()
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
def test_keeps_the_settings(entry, backend, how):
    """Those that are ours."""
    run = run_fused(
        entry, make_params(SHAPES, device=device_of(backend)), backend, max_grad_norm=0.5
    )
    other = how(run.optimizer)
    del run.optimizer
    assert (other.max_grad_norm, other.backend) == (0.5, backend)
    set_grads(run.params, 1)
    other.step()
    assert other.last_grad_norm > 0.5
