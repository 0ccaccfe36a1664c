"""The same bits whatever threads, vector instructions and memory a native backend runs on."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    TABLE,
    assert_same_bits,
    lay_out,
    make_params,
    native_backends,
    run_fused,
)
from machine import instruction_set, instruction_sets, threads

pytestmark = pytest.mark.skipif("cpu" not in native_backends(), reason="no native extension")

CPU_CASES = pytest.mark.parametrize("entry, options", **CASES)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: All that the passes may do to gradients on the way.
CLIPS = {"max_grad_norm_per_param": 0.3, "max_grad_value": 0.5, "max_grad_norm": 1.1}
#: More than two units of work of 16 Ki elements, in odd places, beside small ones.
SHAPES = ((2 * 16384 + 77,), (3,), (0,), (129, 130), (511,), ())
#: What arithmetic likes to stumble over: overflow, underflow, both zeros.
VALUES = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e38, -1e-38, 1e-44, 6e-8, 65504.0, 1e-20)


def trained(entry, options, dtype, transform, layout="contiguous", shapes=SHAPES):
    """Returns everything after an early and two late steps, the last with awkward values."""
    start = make_params(shapes, dtype, layout=layout)
    run = run_fused(entry, start, "cpu", **options, **transform)
    for own, param in zip(run.params, start, strict=True):
        own.data = lay_out(param.detach(), layout)
    run.steps(1, layout=layout).advance().steps(1, first=2, layout=layout)
    if not transform:
        for param in run.params[:2]:
            awkward = torch.tensor(VALUES[: param.numel()], dtype=torch.float64).to(dtype)
            param.grad.view(-1)[-awkward.numel() :] = awkward
        run.optimizer.step()
        return run.tensors()
    return run.steps(1, first=3, layout=layout).tensors()


@CPU_CASES
@ALL_DTYPES
def test_instruction_sets_and_threads(entry, options, dtype):
    """Every instruction set, with one thread and with two."""
    for transform in ({}, CLIPS):
        with threads(1):
            expected = trained(entry, options, dtype, transform)
        for name in instruction_sets():
            for count in (1, 2) if name == instruction_sets()[0] else (1,):
                with threads(count), instruction_set(name):
                    assert_same_bits(trained(entry, options, dtype, transform), expected)


@CPU_CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_memory_layouts(entry, options, dtype):
    """Aligned or not, with gaps or in another order: vector body, scalar tail and staging agree."""
    shapes = ((7, 3, 5, 4), (33, 18), (1031,))
    for transform, layouts in (
        ({"max_grad_value": 0.5}, LAYOUTS[1:]),
        # A norm adds up in the order of the elements in memory, which is another one in the rest.
        (CLIPS, ("misaligned", "every_second")),
    ):
        expected = trained(entry, options, dtype, transform, shapes=shapes)
        for layout in layouts:
            own = trained(entry, options, dtype, transform, layout, shapes)
            assert_same_bits(own, expected)


@CPU_CASES
def test_neighbours_make_no_difference(entry, options):
    """A parameter alone gives the same bits as one among many."""
    start = make_params(((5,), (40, 3), (1000,)), seed=3)
    together = run_fused(entry, start, "cpu", **options).steps(3)
    for i in range(len(start)):
        alone = run_fused(entry, start[i : i + 1], "cpu", **options)
        for seed in (1, 2, 3):
            together.steps(0)
            like = run_fused(entry, start, "cpu", **options)
            like.steps(1, first=seed)
            alone.params[0].grad = like.params[i].grad
            alone.optimizer.step()
        expected = together.tensors()
        own = alone.tensors()
        assert_same_bits(own, {name: expected[name[:-1] + str(i)] for name in own})


def test_norm_has_one_order():
    """The norm is the same number on every instruction set and for any number of threads."""
    norms = set()
    for name in instruction_sets():
        for count in (1, 2):
            with threads(count), instruction_set(name):
                start = make_params(((100_003,), (777,)), torch.bfloat16)
                run = run_fused(TABLE["SGD"], start, "cpu", max_grad_norm=math.inf).steps(1)
                norms.add(run.optimizer._pipeline.control[2].item())
    assert len(norms) == 1


def test_unknown_instruction_set():
    """The message names what was asked for."""
    from fusedopt import _C

    with pytest.raises(ValueError, match="'sse9' is not one of those this CPU runs"):
        _C.use_instruction_set("sse9")
