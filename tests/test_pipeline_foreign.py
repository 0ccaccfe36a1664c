"""Sparse, complex and differentiable parameters beside native ones.

One norm, one skip flag, the same clips.
"""

from __future__ import annotations

import math
import sys
import types

import cases
import pytest
import torch
from separate_passes import Trio, assert_untouched, make_grads, snapshot
from torch.distributed.fsdp._flat_param import FlatParameter

LIMITS = ({"max_grad_norm": 1.0}, {"max_grad_norm_per_param": 1.0}, {"skip_nonfinite": True})


def sparse_grad(rows: list[int], seed: int, scale: float = 1.0) -> torch.Tensor:
    """Returns an uncoalesced gradient of shape (6, 3) in which rows may repeat."""
    values = cases.random((len(rows), 3), seed, scale=scale)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (6, 3))


def separately_clipped(params, scale, value, own, limit):
    """Unscales and clips dense float64 copies of the gradients; returns (gradients, norm)."""
    shadows = []
    for param in params:
        grad = param.grad
        wide = torch.complex128 if grad.is_complex() else torch.float64
        shadow = torch.nn.Parameter(torch.zeros(grad.shape, dtype=wide))
        shadow.grad = (grad.to_dense() if grad.is_sparse else grad).to(wide) / scale
        if value is not None:
            shadow.grad.clamp_(-value, value)
        if own is not None:
            torch.nn.utils.clip_grad_norm_([shadow], own)
        shadows.append(shadow)
    norm = torch.nn.utils.get_total_norm([shadow.grad for shadow in shadows])
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(shadows, limit)
    return [shadow.grad for shadow in shadows], norm


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("name", ("SGD", "Adagrad"))
@pytest.mark.parametrize("value", (None, 0.5))
@pytest.mark.parametrize("own", (None, 0.7))
@pytest.mark.parametrize("limit", (None, 0.9))
def test_sparse_gradients_share_the_norm(backend, name, value, own, limit):
    """Coalesced values count beside a dense neighbour, and gradients stay as they are."""
    if cases.device_of(backend) != "cpu":
        pytest.skip("the reference below is on the CPU")
    entry = cases.TABLE[name]
    params = cases.make_params(((6, 3), (5,)))
    ours, wide = cases.copies(params), cases.copies(params, torch.float64)
    optimizer = cases.make_fused(
        entry,
        ours,
        backend,
        lr=0.1,
        max_grad_norm=limit,
        max_grad_norm_per_param=own,
        max_grad_value=value,
    )
    truth = cases.make_stock(entry, wide, lr=0.1)
    for step, rows in enumerate(([0, 2, 2], [5, 5, 5, 1], [3])):
        grad = sparse_grad(rows, step, 4.0)
        ours[0].grad, ours[1].grad = grad.clone(), cases.random((5,), 50 + step, scale=4.0)
        dense = ours[1].grad.clone()
        optimizer.grad_scale = torch.tensor(4.0)
        grads, norm = separately_clipped(ours, 4.0, value, own, limit)
        optimizer.step()
        # A row that a step does not touch stays as it is: a dense zero does that for SGD without
        # momentum and for Adagrad.
        for param, seen in zip(wide, grads, strict=True):
            param.grad = seen
        truth.step()
        assert torch.equal(ours[1].grad, dense)
        assert torch.equal(ours[0].grad._values(), grad._values())
        assert torch.equal(ours[0].grad._indices(), grad._indices())
        if limit is not None:
            # Coalescing adds in float32, one rounding more than elsewhere.
            torch.testing.assert_close(optimizer.last_grad_norm.double(), norm, rtol=4e-7, atol=0)
    for param, right in zip(ours, wide, strict=True):
        # Three steps of a handful of float32 roundings each.
        torch.testing.assert_close(param.double(), right, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("own", (None, 0.7))
@pytest.mark.parametrize("limit", (None, 0.9))
def test_complex_parameters_share_the_norm(backend, entry, own, limit):
    """A complex gradient's norm is that of its real and imaginary parts."""
    if cases.device_of(backend) != "cpu":
        pytest.skip("the reference below is on the CPU")

    def values(seed, dtype):
        return torch.complex(cases.random((4,), seed), cases.random((4,), seed + 1)).to(dtype)

    real = cases.random((5,), 3)
    ours = [torch.nn.Parameter(values(1, torch.complex64)), torch.nn.Parameter(real.clone())]
    wide = [torch.nn.Parameter(values(1, torch.complex128)), torch.nn.Parameter(real.double())]
    optimizer = cases.make_fused(
        entry, ours, backend, lr=0.1, max_grad_norm=limit, max_grad_norm_per_param=own
    )
    truth = cases.make_stock(entry, wide, lr=0.1)
    for step in range(3):
        ours[0].grad = values(10 * step + 5, torch.complex64) * 8
        ours[1].grad = cases.random((5,), 70 + step, scale=8.0)
        optimizer.grad_scale = torch.tensor(8.0)
        grads, norm = separately_clipped(ours, 8.0, None, own, limit)
        optimizer.step()
        for param, seen in zip(wide, grads, strict=True):
            param.grad = seen
        truth.step()
        if limit is not None:
            torch.testing.assert_close(optimizer.last_grad_norm.double(), norm, rtol=3e-7, atol=0)
    for param, right in zip(ours, wide, strict=True):
        torch.testing.assert_close(param.to(right.dtype), right, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("backend", cases.backends())
def test_complex_gradients_have_no_order_to_clamp_by(backend):
    """max_grad_value in a complex parameter's group is refused, and nothing has been changed."""
    device = cases.device_of(backend)
    params = [
        torch.nn.Parameter(torch.ones(3, device=device)),
        torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device)),
    ]
    optimizer = cases.make_fused(cases.TABLE["SGD"], params, backend, max_grad_value=1.5)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"max_grad_value is 1\.5.*complex"):
        optimizer.step()
    assert bool((params[0] == 1).all())
    assert bool((params[1] == 1).all())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("bad", (0, 1, 2))
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_one_bad_gradient_skips_all(entry, backend, bad):
    """Inf in a native, a complex or another group's parameter leaves all and their states."""
    device = cases.device_of(backend)
    params = [
        torch.nn.Parameter(cases.random((4,), 1, device=device)),
        torch.nn.Parameter(cases.random((3,), 2, dtype=torch.complex64, device=device)),
        torch.nn.Parameter(cases.random((5,), 3, torch.float64, device)),
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    optimizer = cases.make_fused(entry, groups, backend, skip_nonfinite=True, max_grad_norm=1.0)
    run = cases.Run(params, optimizer)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = cases.random(param.shape, 10 * step + i, param.dtype, device)
        if step != 1:
            params[bad].grad[-1] = math.inf
        before = {n: v for n, v in snapshot(run).items() if not v.is_complex()}
        imaginary = {n: v.clone() for n, v in run.tensors().items() if v.is_complex()}
        optimizer.step()
        assert bool(optimizer.last_step_skipped) == (step != 1)
        if step != 1:
            now = run.tensors()
            assert all(torch.equal(now[name], value) for name, value in imaginary.items())
            real = {n: v for n, v in snapshot(run).items() if n in before}
            cases.assert_same_bits(real, before)
            assert not bool(torch.isfinite(optimizer.last_grad_norm))


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("name", ("SGD", "Adagrad"))
@pytest.mark.parametrize("bad", ("sparse", "dense"))
def test_one_bad_gradient_skips_sparse_and_dense(backend, name, bad):
    """Inf among a sparse gradient's values, or beside it, also in the very first step."""
    params = cases.make_params(((6, 3), (5,)), device=cases.device_of(backend))
    options = {"momentum": 0.9} if name == "SGD" else {}
    run = cases.run_fused(cases.TABLE[name], params, backend, skip_nonfinite=True, **options)
    for step in range(4):
        grad = sparse_grad([0, 2, 2], step).to(params[0].device)
        run.params[1].grad = cases.random((5,), step, device=str(params[0].device))
        if step != 2:
            (grad._values() if bad == "sparse" else run.params[1].grad).view(-1)[-1] = math.nan
        run.params[0].grad = grad
        before = {n: v.clone() for n, v in run.tensors().items()}
        run.optimizer.step()
        assert bool(run.optimizer.last_step_skipped) == (step != 2)
        if step != 2:
            now = {n: v for n, v in run.tensors().items() if n in before}
            dense = [n for n in before if not before[n].is_sparse]
            cases.assert_same_bits({n: now[n] for n in dense}, {n: before[n] for n in dense})


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_differentiable_groups_are_clipped(entry, backend):
    """Under scale, clips and skip flag, with gradients that come from a graph."""
    params = cases.make_params(((4,), (2, 3)), device=cases.device_of(backend))
    ours = cases.copies(params)
    stock = cases.run_stock(entry, params)
    leaves = [param.detach().clone().requires_grad_() for param in ours]
    live = [leaf.clone() for leaf in leaves]
    optimizer = cases.make_fused(
        entry, live, backend, differentiable=True, max_grad_norm=1.0, skip_nonfinite=True
    )
    grads = make_grads(params, 1, 8.0)
    for param, grad in zip(live, grads, strict=True):
        param.grad = grad
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    for param, grad in zip(stock.params, grads, strict=True):
        param.grad = grad / 8.0
    norm = torch.nn.utils.clip_grad_norm_(stock.params, 1.0)
    stock.optimizer.step()
    torch.testing.assert_close(optimizer.last_grad_norm, norm, rtol=1e-6, atol=0)
    for param, right in zip(live, stock.params, strict=True):
        torch.testing.assert_close(param.detach(), right.detach())
    sum(param.sum() for param in live).backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("backend", cases.backends())
def test_a_parameter_listed_twice_still_shares_norm_and_skip(backend):
    """Overlapping memory takes torch's rules, the rest stays native; one norm for both."""
    storage = torch.ones(6, device=cases.device_of(backend))
    params = [
        torch.nn.Parameter(storage[:4]),
        torch.nn.Parameter(storage[2:]),
        torch.nn.Parameter(torch.ones(3, device=storage.device)),
    ]
    optimizer = cases.make_fused(
        cases.TABLE["SGD"], params, backend, lr=1.0, max_grad_norm=5.5, skip_nonfinite=True
    )
    for param in params:
        param.grad = torch.full_like(param, 11 / math.sqrt(11))
    optimizer.step()
    assert float(optimizer.last_grad_norm) == pytest.approx(11.0, rel=1e-6)
    step = 0.5 * 11 / math.sqrt(11)
    expected = [1 - step, 1 - step, 1 - 2 * step, 1 - 2 * step, 1 - step, 1 - step]
    assert storage.tolist() == pytest.approx(expected, rel=1e-5)
    assert params[2].tolist() == pytest.approx([1 - step] * 3, rel=1e-5)
    run = cases.Run(params, optimizer)
    params[1].grad[0] = math.nan
    before = snapshot(run)
    optimizer.step()
    assert_untouched(run, before)


class FakeDTensor(torch.Tensor):
    """Stands for torch's: a subclass with a dispatch of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Runs on plain tensors."""

        def plain(value):
            if isinstance(value, cls):
                return value.as_subclass(torch.Tensor)
            return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

        return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: next(iter(limits)))
def test_a_local_norm_over_dtensors_is_refused(limits, monkeypatch):
    """By name, before anything is changed."""
    name = "torch.distributed.tensor"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(DTensor=FakeDTensor))
    plain = torch.nn.Parameter(torch.ones(3))
    shard = torch.ones(3).as_subclass(FakeDTensor).requires_grad_()
    plain.grad, shard.grad = torch.ones(3), torch.ones(3).as_subclass(FakeDTensor)
    optimizer = cases.TABLE["SGD"].fused([plain, shard], lr=1.0, **limits)
    with pytest.raises(NotImplementedError, match=r"FakeDTensor.*shard"):
        optimizer.step()
    assert bool((plain == 1).all())


@pytest.mark.parametrize("backend", ("auto", "torch"))
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: next(iter(limits)))
def test_a_local_norm_over_fsdp_flat_parameters_is_refused(limits, backend):
    """FSDP1's flat parameters are of type Parameter, but `isinstance` tells them apart."""
    shard = FlatParameter(torch.ones(3))
    assert isinstance(shard, FlatParameter)
    shard.grad = torch.ones(3)
    optimizer = cases.TABLE["SGD"].fused([shard], lr=1.0, backend=backend, **limits)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="shard"):
            optimizer.step()
    assert bool((shard == 1).all())


def test_flat_parameters_without_a_norm_are_updated():
    """Only what would be local is refused."""
    shard = FlatParameter(torch.ones(3))
    shard.grad = torch.ones(3)
    cases.TABLE["SGD"].fused([shard], lr=0.5, max_grad_value=0.5).step()
    assert bool((shard == 0.75).all())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_native_parameters_beside_foreign_ones_equal_torch(entry, backend):
    """Two of four share memory and take torch's rules, under scale, clips and skips like all."""
    storage = cases.random((20,), 5, device=cases.device_of(backend))
    params = [
        *cases.make_params(((7,), (2, 2)), device=cases.device_of(backend)),
        storage[:10],
    ]
    trio = Trio(
        entry,
        backend,
        params,
        [{"max_grad_norm_per_param": 1.0}, {"max_grad_value": 0.5}],
        cases.richest(entry),
        max_grad_norm=0.8,
        skip_nonfinite=True,
    )
    for run in trio.runs():
        late = torch.nn.Parameter(run.params[2].detach()[5:5])
        twin = torch.nn.Parameter(run.params[2].detach().view(2, 5))
        run.optimizer.add_param_group({"params": [late, twin], "lr": 0.01})
        run.params += [late, twin]
    for step in range(4):
        poison = math.inf if step in (0, 2) else None
        missing = [4] if step % 2 else [2]
        trio.step(make_grads(trio.ours.params, step, 4.0, missing, poison), 4.0)
    trio.check()
