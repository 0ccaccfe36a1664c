"""The Triton reduce kernel, interpreted on the CPU.

Norms, coefficients, the non-finite flag and the control block.

Run by test_triton_interpreted.py, or by hand with TRITON_INTERPRET=1.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process with TRITON_INTERPRET=1; test_triton_interpreted.py starts one",
        allow_module_level=True,
    )

import triton_tools
from fusedopt.kernels import launch
from fusedopt.kernels.host_plan import layout_words
from fusedopt.kernels.pieces import BLOCK, MIN_PIECE
from fusedopt.kernels.rows import GroupRow, Row

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
INF = math.inf


def make_tables(
    grads, param_types=None, limits=((INF, INF),), groups=None, layouts=None, missing=()
):
    """Tables over gradients alone: the reduce pass reads nothing else."""
    rows = [
        Row(
            0,
            (),
            8,  # never read
            F32,
            0,
            grad.numel(),
            groups[i] if groups else 0,
            (param_type, grad.dtype),
        )
        for i, (grad, param_type) in enumerate(
            zip(grads, param_types or [F32] * len(grads), strict=True)
        )
    ]
    rows_of_groups = [GroupRow((0.0,) * 7, value, norm) for value, norm in limits]
    addresses = [0 if i in missing else grad.data_ptr() for i, grad in enumerate(grads)]
    tables = triton_tools.make_tables("sgd", rows, rows_of_groups, addresses, layouts)
    tables.kept = grads  # addresses alone keep nothing alive
    return tables


def sum_squares(grad, unscale=1.0, limit=INF, compute_type=F32):
    """The sum in float64 of the gradients after unscaling and clamping."""
    grad = grad.to(compute_type) * torch.tensor(unscale, dtype=compute_type)
    return float(grad.clamp(-limit, limit).double().square().sum())


def test_sums_over_types_sizes_and_pieces():
    """Several launches, one sum; the same bits when run again."""
    torch.manual_seed(0)
    types = [(F32, F32), (F32, BF16), (F16, F16), (F64, F64), (F32, F32)]
    sizes = [5 * BLOCK + 3, BLOCK, 17, BLOCK + 1, 0]
    grads = [torch.randn(n, dtype=F64).to(grad) for n, (_, grad) in zip(sizes, types, strict=True)]
    tables = make_tables(grads, [param for param, _ in types])
    unscale = torch.tensor(0.3, dtype=F64)
    tables.reduce(unscale=unscale)
    first = tables.sums.clone()
    expected = sum(
        sum_squares(grad, 0.3, compute_type=F64 if param == F64 else F32)
        for grad, (param, _) in zip(grads, types, strict=True)
    )
    torch.testing.assert_close(first, torch.tensor([expected, 0.0], dtype=F64), rtol=1e-14, atol=0)
    tables.reduce(unscale=unscale)
    assert torch.equal(first, tables.sums)
    assert not tables._tickets.any()


def test_clips_by_value_per_parameter_and_globally():
    """Two groups with limits of their own under one global norm."""
    torch.manual_seed(1)
    grads = [torch.randn(n) for n in (300, 3 * BLOCK, 40)]
    limits = ((0.5, 2.0), (INF, INF))
    tables = make_tables(grads, limits=limits, groups=[0, 1, 0])
    tables.set_settings(1.5, False)
    tables.reduce(grad_scale=torch.tensor(4.0), control=tables.control)
    total = 0.0
    for index, grad in enumerate(grads):
        value, norm_limit = limits[[0, 1, 0][index]]
        norm = math.sqrt(sum_squares(grad, 0.25, value))
        coef = min(1.0, norm_limit / (norm + 1e-6)) if norm_limit != INF else 1.0
        assert float(tables._coefs[index]) == pytest.approx(coef, rel=1e-14)
        total += (norm * coef) ** 2
    norm = math.sqrt(total)
    expected = [0.25, min(1.0, 1.5 / (norm + 1e-6)), norm, 0.0, 0.0]
    torch.testing.assert_close(
        tables.control, torch.tensor(expected, dtype=F64), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_nonfinite_is_judged_on_raw_elements(bad, dtype):
    """One bad element at the very end, and the flag skips only when asked to."""
    grads = [torch.ones(BLOCK + 9, dtype=dtype), torch.ones(3, dtype=dtype)]
    tables = make_tables(grads)
    tables.set_settings(INF, True)
    tables.reduce(control=tables.control)
    assert tables.control[3:].tolist() == [0.0, 0.0]
    grads[0][-1] = bad
    tables.reduce(control=tables.control)
    assert tables.control[3:].tolist() == [1.0, 1.0]
    tables.set_settings(INF, False)
    tables.reduce(control=tables.control)
    assert tables.control[3:].tolist() == [1.0, 0.0]


def test_finite_gradients_never_count_as_overflow():
    """Neither sums beyond float32 nor an infinite multiplier; doubles beyond float32 are inf."""
    for wide, counts in ((3.4e38, 0.0), (3.5e38, 1.0)):
        tables = make_tables([torch.full((5,), 1e30), torch.tensor([wide, 0.0], dtype=F64)])
        tables.set_settings(INF, True)
        tables.reduce(grad_scale=torch.tensor(0.0), control=tables.control)
        assert tables.control[3:].tolist() == [counts, counts]
    tables = make_tables([torch.full((5,), 1e30)])
    tables.reduce(control=tables.control)
    assert float(tables.control[2]) == pytest.approx(
        math.sqrt(5) * float(torch.tensor(1e30)), rel=1e-14
    )


def test_nan_comes_through_the_coefficients():
    """A norm that is NaN makes both coefficients NaN."""
    tables = make_tables([torch.tensor([1.0, math.nan])], limits=((1.0, 1.0),))
    tables.set_settings(1.0, False)
    tables.reduce(control=tables.control)
    assert tables.control[1:3].isnan().all()
    assert tables._coefs.isnan().all()


def test_missing_gradients_count_as_zeros():
    """Also when all are missing."""
    tables = make_tables([torch.ones(5), torch.full((2 * BLOCK,), math.nan)], missing=(1,))
    tables.reduce(control=tables.control, found_inf=torch.tensor(3.0))
    assert tables.control.tolist() == [1.0, 1.0, math.sqrt(5.0), 0.0, 1.0]
    tables.take(triton_tools.host_of([GroupRow((0.0,) * 7, INF, INF)], [0, 0]))
    tables.reduce(control=tables.control)
    assert tables.control.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_strided_and_misaligned_gradients():
    """Only the elements of the view count, not those between them."""
    wide = torch.full((40, 60), math.nan)
    view = wide.t()[1:50:2, 3:30]
    view.fill_(2.0)
    shifted = torch.ones(BLOCK * 2 + 4)[1:]
    layout = layout_words(view.shape, [view.stride(), view.stride()])
    tables = make_tables([view, shifted], layouts=[layout, ()])
    tables.reduce()
    assert tables.sums.tolist() == [4.0 * view.numel() + shifted.numel(), 0.0]


def test_more_partial_results_than_fit_at_once(monkeypatch):
    """Many pieces and many tensors are added up in several rounds, in the same order."""
    torch.manual_seed(2)
    many = [torch.randn(7 * MIN_PIECE + 5), *(torch.randn(1 + i % 5) for i in range(20))]
    tables = make_tables(many)
    tables.reduce()
    expected = tables.sums.clone()
    torch.testing.assert_close(
        expected[0], sum(grad.double().square().sum() for grad in many), rtol=1e-14, atol=0
    )
    monkeypatch.setattr(launch, "PAIRS", 4)
    tables = make_tables(many)
    for _ in range(2):
        tables.reduce()
        assert torch.equal(tables.sums, expected)
        assert not tables._tickets.any()
