"""Changes between two steps in any order, drawn by hypothesis."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    ENTRIES,
    INTERPRETED,
    Run,
    assert_close,
    backends,
    copies,
    device_of,
    make_params,
    richest,
    run_fused,
    run_stock,
    set_grads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), (4, 6), ())

STEP = st.tuples(st.just("step"), st.frozensets(st.integers(0, 3), max_size=3))
OPERATION = st.one_of(
    STEP,
    st.tuples(st.just("lr"), st.sampled_from([0.0, 0.01, 0.3])),
    st.tuples(
        st.sampled_from(
            ["maximize", "clone data", "clone state", "drop", "reload", "copy", "strides"]
        ),
        st.integers(0, 3),
    ),
)


def perform(run: Run, seed: int, operation: str, argument) -> Run:
    """Does one operation to an optimizer and its parameters."""
    group = run.optimizer.param_groups[0]
    if operation == "step":
        set_grads(run.params, seed)
        for i in argument:
            run.params[i].grad = None
        run.optimizer.step()
    elif operation == "lr":
        group["lr"] = argument
    elif operation == "maximize":
        group["maximize"] = not group["maximize"]
    elif operation == "clone data":
        run.params[argument].data = run.params[argument].data.clone()
    elif operation == "clone state":
        entries = run.optimizer.state.get(run.params[argument], {})
        entries.update({name: value.clone() for name, value in entries.items()})
    elif operation == "drop" and "lr_decay" not in group:
        run.optimizer.state.pop(run.params[argument], None)
    elif operation == "reload":
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    elif operation == "copy":
        return Run(*copy.deepcopy((run.params, run.optimizer)))
    elif operation == "strides":
        data = run.params[argument].data
        run.params[argument].data = (
            data.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
            if data.dim()
            else data.clone()
        )
    return run


@OURS
@BACKENDS
@settings(deadline=None, max_examples=4 if INTERPRETED else 25)
@given(operations=st.lists(OPERATION, min_size=3, max_size=9))
def test_any_sequence(entry, backend, operations):
    """Steps with anything in between, in any order."""
    start = make_params(SHAPES, device=device_of(backend))
    stock = run_stock(entry, copies(start), **richest(entry))
    ours = run_fused(entry, start, backend, **richest(entry))
    for seed, (operation, argument) in enumerate([*operations, ("step", frozenset())]):
        stock = perform(stock, seed, operation, argument)
        ours = perform(ours, seed, operation, argument)
    assert_close(ours.tensors(), stock.tensors(), factor=4)
