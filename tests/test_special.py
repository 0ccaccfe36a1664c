"""Parameters that no kernel takes, beside those that kernels take; the bugs of stock torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import (
    CAPTURABLE,
    COUNTED,
    ENTRIES,
    TABLE,
    Run,
    assert_close,
    assert_same_bits,
    backends,
    device_of,
    make_fused,
    make_params,
    make_stock,
    native_backends,
    random,
    richest,
    run_fused,
    run_stock,
    set_grads,
)

from fusedopt import backends as library_backends
from fusedopt.plain.rule import PlainRule

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
NATIVE = pytest.mark.parametrize("backend", native_backends())
SPARSE = [entry for entry in TABLE.values() if entry.sparse]
DENSE = [entry for entry in TABLE.values() if not entry.sparse]
SHAPES = ((6, 3), (7,), (4, 3))


def sparse_grad(param: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns a sparse gradient in which one row appears twice."""
    values = random((3, param.shape[1]), seed, device=str(param.device))
    values = values.to(param.dtype)
    return torch.sparse_coo_tensor([[0, 3, 0]], values, param.shape, check_invariants=True)


def step_sparse(run: Run, seed: int) -> None:
    """Runs a step in which the first parameter's gradient is sparse."""
    set_grads(run.params, seed)
    run.params[0].grad = sparse_grad(run.params[0], seed)
    run.optimizer.step()


@pytest.mark.parametrize("entry", SPARSE, ids=lambda entry: entry.name)
@BACKENDS
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_gradients(entry, backend, maximize):
    """As torch, also when a parameter's gradient is sparse in some steps and dense in others."""
    options = {"maximize": maximize, "lr": 0.1}
    start = make_params(SHAPES, device=device_of(backend))
    runs = run_stock(entry, start, **options), run_fused(entry, start, backend, **options)
    for run in runs:
        step_sparse(run, 1)
        run.steps(1, first=2)
        step_sparse(run, 3)
        step_sparse(run, 4)
    assert_close(runs[1].tensors(), runs[0].tensors())
    assert runs[1].optimizer.backend_of(runs[1].params[1]) == backend


@pytest.mark.parametrize("entry", DENSE, ids=lambda entry: entry.name)
@BACKENDS
@pytest.mark.parametrize("place", [0, 2])
def test_sparse_gradients_that_torch_refuses(entry, backend, place):
    """The same text, and neighbours before and after it are untouched."""
    start = make_params(((6, 3), (5, 2), (6, 3)), device=device_of(backend))
    texts = []
    for run in (run_stock(entry, start), run_fused(entry, start, backend)):
        run.steps(1)
        set_grads(run.params, 2)
        run.params[place].grad = sparse_grad(run.params[place], 2)
        before = {name: value.clone() for name, value in run.tensors().items()}
        with pytest.raises(RuntimeError, match="sparse") as caught:
            run.optimizer.step()
        texts.append(str(caught.value))
    assert_same_bits(run.tensors(), before)
    assert texts[0] == texts[1]


@BACKENDS
def test_torch_rules_take_parameters_in_their_order(backend):
    """As torch: which of two that are one memory comes first, the last bit of the result shows."""
    grad = 2.0**24  # 1 - grad + grad is 1 in float32, and 1 + grad - grad is 0
    results = []
    for make in (make_stock, lambda *args, **options: make_fused(*args, backend, **options)):
        rows = torch.nn.Parameter(torch.ones(4, 2, device=device_of(backend)))
        pairs = torch.nn.Parameter(torch.view_as_complex(rows.detach()))
        optimizer = make(TABLE["SGD"], [pairs, rows], lr=1.0)
        pairs.grad = torch.full_like(pairs, complex(grad, grad))
        rows.grad = torch.full_like(rows, -grad).to_sparse(1)
        optimizer.step()
        results.append(rows.detach())
    assert torch.equal(*results)
    assert (results[0] == 1).all()


@BACKENDS
def test_adagrad_refuses_sparse_decay(backend):
    """Torch's text, before anything is changed."""
    run = run_fused(
        TABLE["Adagrad"], make_params(SHAPES, device=device_of(backend)), backend, weight_decay=0.1
    )
    before = {name: value.clone() for name, value in run.tensors().items()}
    with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse"):
        step_sparse(run, 1)
    assert_same_bits(run.tensors(), before)


@OURS
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(entry, backend, dtype):
    """Torch's rule, beside native neighbours in the same group."""
    device = device_of(backend)
    options = richest(entry)
    runs = []
    for make in (make_stock, lambda *args, **kw: make_fused(*args, backend, **kw)):
        parts = torch.complex(random((5, 2), 1), random((5, 2), 2)).to(dtype=dtype, device=device)
        params = [torch.nn.Parameter(parts), *make_params(SHAPES, device=device)]
        run = Run(params, make(entry, params, **options))
        for seed in (1, 2, 3):
            set_grads(params[1:], seed)
            grad = torch.complex(random((5, 2), 30 + seed), random((5, 2), 40 + seed))
            params[0].grad = grad.to(dtype=dtype, device=device)
            run.optimizer.step()
        runs.append(run)
    assert [runs[1].optimizer.backend_of(p) for p in params[:2]] == ["torch", backend]
    for ours, stock in zip(*(run.tensors().values() for run in reversed(runs)), strict=True):
        torch.testing.assert_close(ours, stock)


@OURS
@BACKENDS
def test_complex_parameters_have_no_value_limit(entry, backend):
    """The message says why and what to do."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device_of(backend)))]
    optimizer = make_fused(entry, params, backend, max_grad_value=1.0)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"max_grad_value is 1\.0.*max_grad_value=None"):
        optimizer.step()
    assert (params[0] == 1).all()


@OURS
@BACKENDS
def test_differentiable(entry, backend):
    """Autograd sees through the step what it sees through torch's."""
    device = device_of(backend)
    results = []
    for make in (make_stock, lambda *args, **kw: make_fused(*args, backend, **kw)):
        start = random((5,), 1, torch.float64, device).requires_grad_()
        grad = random((5,), 2, torch.float64, device).requires_grad_()
        param = start.clone()
        optimizer = make(entry, [param], differentiable=True, **richest(entry))
        param.grad = grad * 1.0
        optimizer.step()
        # SGD's first momentum is detached from the gradient, in torch too.
        seen = torch.autograd.grad(param.square().sum(), (start, grad), allow_unused=True)
        results.append([param, *seen])
    for ours, stock in zip(*reversed(results), strict=True):
        assert (ours is None) == (stock is None)
        if ours is not None:
            torch.testing.assert_close(ours, stock)


class Named(torch.nn.Parameter):
    """A subclass that changes nothing."""


class Logged(torch.Tensor):
    """A subclass that wants to see every operation."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        """Does what Tensor does."""
        return super().__torch_function__(function, kinds, args, kwargs or {})


@OURS
@BACKENDS
def test_subclass_that_changes_nothing(entry, backend):
    """It is as native as a Parameter."""
    device = device_of(backend)
    values = random((4, 3), 1, device=device)
    params = [Named(values.clone())]
    ours = Run(params, make_fused(entry, params, backend, **richest(entry))).steps(2)
    stock = run_stock(entry, [values], **richest(entry)).steps(2)
    torch.testing.assert_close(ours.params[0].detach(), stock.params[0].detach(), check_dtype=True)
    assert ours.optimizer.backend_of(params[0]) == backend


@OURS
def test_subclass_with_its_own_operations(entry):
    """Torch's rule under "auto"; refused by name under an explicit backend."""
    values = random((4, 3), 1)
    params = [values.clone().as_subclass(Logged).requires_grad_(), *make_params(SHAPES)]
    run = Run(params, entry.fused(params, **richest(entry)))
    plain = run_stock(entry, [values, *make_params(SHAPES)], **richest(entry))
    for each in (run, plain):
        for seed in (1, 2):
            set_grads(each.params, seed)
            each.optimizer.step()
    torch.testing.assert_close(params[0].detach().as_subclass(torch.Tensor), plain.params[0].data)
    assert run.optimizer.backend_of(params[0]) == "torch"
    for backend in native_backends():
        optimizer = make_fused(entry, params, backend)
        with pytest.raises(
            ValueError, match=rf"parameter 0 of .* is a Logged.*backend='{backend}'"
        ):
            optimizer.step()


@OURS
def test_meta_parameters(entry):
    """A step on the meta device runs through torch's rules under "auto"."""
    params = [torch.nn.Parameter(torch.ones(3, 2, device="meta"))]
    optimizer = entry.fused(params, **richest(entry))
    params[0].grad = torch.ones(3, 2, device="meta")
    optimizer.step()
    assert all(
        value.device.type == "meta"
        for name, value in optimizer.state[params[0]].items()
        if name not in COUNTED and value is not None
    )


@pytest.mark.parametrize("entry", **CAPTURABLE)
@BACKENDS
@pytest.mark.parametrize("later", [False, True])
def test_capturable_on_the_cpu(entry, backend, later):
    """Torch's text, before anything is changed; also for what is written into a group later."""
    if device_of(backend) != "cpu":
        pytest.skip("for memory of the host")
    texts = []
    for make in (make_stock, lambda *args, **kw: make_fused(*args, backend, **kw)):
        params = make_params(SHAPES)
        run = Run(params, make(entry, params, capturable=not later)).steps(int(later))
        run.optimizer.param_groups[0]["capturable"] = True
        before = [param.detach().clone() for param in params]
        with pytest.raises(AssertionError) as caught:
            run.steps(1)
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@BACKENDS
def test_capturable_where_torch_does_not_know_it(name, backend):
    """One more key of a group that nobody reads."""
    optimizer = make_fused(TABLE[name], make_params(SHAPES, device=device_of(backend)), backend)
    optimizer.param_groups[0]["capturable"] = True
    Run(optimizer.param_groups[0]["params"], optimizer).steps(2)


@BACKENDS
@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}], ids=str)
def test_stock_bug_1_skipped_first_step(backend, options):
    """Fused SGD keeps uninitialised memory as momentum after a first step that is skipped."""
    start = make_params(SHAPES, device=device_of(backend))
    options = {"momentum": 0.9, "lr": 0.1, **options}
    ours = run_fused(TABLE["SGD"], start, backend, **options)
    for seed in (7, 8):
        ours.optimizer.found_inf = torch.ones((), device=device_of(backend))
        ours.steps(1, first=seed)
    del ours.optimizer.found_inf
    assert ours.optimizer.last_step_skipped
    assert_same_bits(
        dict(enumerate(p.detach() for p in ours.params)), dict(enumerate(p.detach() for p in start))
    )
    expected = run_stock(TABLE["SGD"], start, **options).steps(3)
    assert_close(ours.steps(3).tensors(), expected.tensors())


@BACKENDS
def test_stock_bug_2_late_gradient(backend):
    """Fused SGD with momentum raises TypeError when one parameter's first gradient comes later."""
    start = make_params(SHAPES, device=device_of(backend))
    runs = [
        run_stock(TABLE["SGD"], start, momentum=0.9, dampening=0.1),
        run_fused(TABLE["SGD"], start, backend, momentum=0.9, dampening=0.1),
    ]
    for run in runs:
        set_grads(run.params, 1)
        run.params[1].grad = None
        run.optimizer.step()
        run.steps(2, first=2)
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
def test_stock_bug_3_strides(entry, backend):
    """Fused kernels ignore strides: a row-major gradient of a column-major parameter."""
    column_major = torch.nn.Parameter(random((5, 4), 1, device=device_of(backend)).t())
    grads = [random((4, 5), seed, device=device_of(backend)) for seed in (2, 3)]
    runs = [
        run_stock(entry, [column_major], **richest(entry)),
        run_fused(entry, [column_major], backend, **richest(entry)),
    ]
    for run in runs:
        for grad in grads:
            run.params[0].grad = grad
            run.optimizer.step()
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
def test_stock_bug_4_amp_flag(entry):
    """A copied or loaded fused optimizer no longer tells GradScaler that it unscales by itself."""
    optimizer = entry.fused(make_params(), fused=True)
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling


@OURS
@NATIVE
def test_stock_bug_5_one_pass_for_all_groups(entry, backend):
    """One group a layer is one plan, with a norm over all of them."""
    params = make_params([(3,)] * 30, device=device_of(backend))
    groups = [{"params": [param], "lr": 0.01 * i} for i, param in enumerate(params)]
    optimizer = make_fused(entry, groups, backend, max_grad_norm=math.inf)
    Run(params, optimizer).steps(1)
    assert len(optimizer._pipeline._plans) == 1
    norm = torch.cat([param.grad for param in params]).norm()
    torch.testing.assert_close(optimizer.last_grad_norm, norm)


@OURS
def test_without_kernels_torch_takes_a_group_at_once(entry, monkeypatch):
    """Where "auto" finds no backend, a step is torch's own, not one call for each parameter."""
    monkeypatch.setattr(library_backends, "for_device", lambda choice, device: None)
    optimizer = make_fused(entry, make_params([(3,)] * 5), "auto", **richest(entry))
    taken = []
    update = PlainRule.update

    def note(rule, group, grads, training):
        taken.append(len(group["params"]))
        update(rule, group, grads, training)

    monkeypatch.setattr(PlainRule, "update", note)
    Run(optimizer.param_groups[0]["params"], optimizer).steps(1)
    assert taken == [5]
