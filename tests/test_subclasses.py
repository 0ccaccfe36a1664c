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
