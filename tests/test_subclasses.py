"""Subclasses of ours that override what torch's classes call."""

from __future__ import annotations

import pytest
import torch
from cases import (
    ENTRIES,
    Run,
    assert_close,
    backends,
    copies,
    device_of,
    make_params,
    richest,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), ())


@OURS
@BACKENDS
@pytest.mark.parametrize("limit", [None, 0.5])
def test_an_overridden_init_group_is_called(entry, backend, limit):
    """By torch's rule; it sees gradients that are clipped, as after torch's utility."""

    def make(base):
        class Centred(base):
            def _init_group(self, group, params, grads, *others):
                result = super()._init_group(group, params, grads, *others)
                grads[:] = [grad - grad.mean() for grad in grads]
                return result

        return Centred

    start = make_params(SHAPES, device=device_of(backend))
    theirs, ours = copies(start), copies(start)
    stock = make(entry.stock)(theirs, **richest(entry))
    fused = make(entry.fused)(ours, backend=backend, max_grad_norm=limit, **richest(entry))
    for seed in range(3):
        for params in (theirs, ours):
            set_grads(params, seed)
        given = [param.grad for param in ours]
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(theirs, limit)
        stock.step()
        fused.step()
        assert all(param.grad is grad for param, grad in zip(ours, given, strict=True))
    assert_close(Run(ours, fused).tensors(), Run(theirs, stock).tensors())


@OURS
@BACKENDS
@pytest.mark.parametrize("limit", [None, 1e9])
def test_own_gradients_and_groups(entry, backend, limit):
    """It may take gradients from elsewhere, look at a whole group and write to it."""

    def make(base):
        class Own(base):
            def _init_group(self, group, params, grads, *others):
                group["calls"] = group.get("calls", 0) + 1
                group["lr"] = 0.01 * group["calls"]
                for param in group["params"]:
                    param.grad = param.main_grad
                result = super()._init_group(group, params, grads, *others)
                size = max(grad.abs().max() for grad in grads)
                grads[:] = [grad / size for grad in grads]
                for param in group["params"]:
                    param.grad = None
                return result

        return Own

    start = make_params(SHAPES, device=device_of(backend))
    theirs, ours = copies(start), copies(start)
    stock = make(entry.stock)(theirs, **entry.serial, **richest(entry))
    fused = make(entry.fused)(ours, backend=backend, max_grad_value=limit, **richest(entry))
    for seed in range(3):
        for params in (theirs, ours):
            set_grads(params, seed)
            for param in params:
                param.main_grad, param.grad = param.grad, None
        stock.step()
        fused.step()
    assert fused.param_groups[0]["calls"] == 3
    assert fused.param_groups[0]["lr"] == stock.param_groups[0]["lr"]
    assert_close(Run(ours, fused).tensors(), Run(theirs, stock).tensors())


@OURS
@BACKENDS
def test_an_init_group_put_in_place_later(entry, backend):
    """From the next step on it is called."""
    params = make_params(SHAPES, device=device_of(backend))
    run = Run(params, entry.fused(params, backend=backend, **richest(entry))).steps(1)
    calls, own = [], run.optimizer._init_group

    def count(group, *lists):
        calls.append(len(group["params"]))
        return own(group, *lists)

    run.optimizer._init_group = count
    run.steps(1)
    assert calls == [len(params)]
    del run.optimizer._init_group
    run.steps(1)
    assert len(calls) == 1
    assert run.optimizer.backend_of(params[0]) == backend


@OURS
@BACKENDS
def test_an_own_init_group_is_known_before_the_first_step(entry, backend):
    """Who updates is told rightly, nothing is made for kernels, and limits are checked."""

    class Own(entry.fused):
        def _init_group(self, group, *lists):
            return super()._init_group(group, *lists)

    params = make_params(SHAPES, device=device_of(backend))
    optimizer = Own(params, backend=backend, **richest(entry))
    made = len(optimizer.state)  # torch's Adagrad makes its own at once
    set_grads(params, 1)
    assert optimizer.backend_of(params[0]) == "torch"
    assert len(optimizer.state) == made
    before = copies(params)
    optimizer.param_groups[0]["max_grad_value"] = -1.0
    with pytest.raises(ValueError, match="max_grad_value is -1.0 in param group 0"):
        optimizer.step()
    for param, start in zip(params, before, strict=True):
        assert torch.equal(param, start)
    optimizer.param_groups[0].update(max_grad_value=None, decoupled_weight_decay=True)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
