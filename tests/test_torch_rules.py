"""Parameters that take torch's rules: refused before anything is changed, or as torch has it."""

from __future__ import annotations

import importlib
import inspect
import math

import pytest
import torch
from cases import (
    ENTRIES,
    IN_TORCH,
    TABLE,
    Run,
    assert_close,
    assert_same_bits,
    backends,
    copies,
    device_of,
    make_fused,
    make_params,
    random,
    richest,
    run_fused,
    run_stock,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())


def complex_params(backend: str) -> list[torch.nn.Parameter]:
    """Returns a real and two complex parameters: the latter take torch's rules everywhere."""
    device = device_of(backend)
    kinds = (torch.float32, torch.complex64, torch.complex64)
    return [
        torch.nn.Parameter(random((4, 3), i, dtype=kind, device=device))
        for i, kind in enumerate(kinds)
    ]


def set_complex_grads(run: Run, seed: int) -> None:
    """Gives every parameter a gradient of its own type."""
    for i, param in enumerate(run.params):
        values = random((*param.shape, 2), 10 * seed + i).to(param.device)
        param.grad = torch.view_as_complex(values) if param.is_complex() else values[..., 0]


def damage() -> dict[str, tuple]:
    """Returns ways to spoil the last parameter's state or gradient, and what must be said.

    Each takes (optimizer, parameter, name of a state). `None` as a name: SGD has no such state.
    """

    def state(make):
        def spoil(optimizer, param, name):
            optimizer.state[param][name] = make(optimizer.state[param][name])

        return spoil

    def group(name, value):
        def spoil(optimizer, param, _):
            optimizer.param_groups[0][name] = value

        return spoil

    like = "expected a tensor like the parameter"
    where = "state '{state}' of parameter 2 of param group 0"
    return {
        "expanded": (
            state(lambda t: t[:1, :1].expand(t.shape)),
            ValueError,
            where + " is a view whose elements share memory",
        ),
        "conjugated": (
            state(lambda t: t.conj() if t.is_complex() else t[:1].expand(t.shape)),
            ValueError,
            where + " is a view whose elements share memory or are conjugated",
        ),
        "integers": (
            state(lambda t: torch.ones(t.shape, dtype=torch.int32, device=t.device)),
            ValueError,
            where + " is int32 [4, 3]",
        ),
        "sparse": (state(lambda t: t.to_sparse()), ValueError, where + " is sparse beside"),
        "shape": (state(lambda t: t[:2]), ValueError, where + " is complex64 [2, 3]"),
        "list": (state(lambda t: [1.0]), ValueError, where + f" is [1.0]; {like}"),
        "lr": (group("lr", "fast"), TypeError, "'lr' of param group 0 is 'fast'; expected a"),
        "lr of two": (
            group("lr", torch.ones(2)),
            (TypeError, ValueError),
            "'lr' of param group 0 is",
        ),
        "decay": (group("weight_decay", None), TypeError, "'weight_decay' of param group 0 is"),
    }


@OURS
@BACKENDS
@pytest.mark.parametrize("case", damage())
def test_refused_before_anything_is_changed(entry, backend, case):
    """Neighbours of both kinds and the parameter itself keep their bits; repaired, it goes on."""
    spoil, error, text = damage()[case]
    runs = []
    for _ in range(2):
        params = complex_params(backend)
        runs.append(Run(params, make_fused(entry, params, backend, **richest(entry))))
        for seed in range(2):
            set_complex_grads(runs[-1], seed)
            runs[-1].optimizer.step()
    spoilt, sound = runs
    optimizer, param = spoilt.optimizer, spoilt.params[2]
    name = entry.states[0]
    if case == "conjugated" and entry.name == "SGD":
        pytest.skip("SGD's rule takes complex tensors as they are")
    if case == "decay" and not entry.takes("weight_decay"):
        pytest.skip("there is no weight decay")
    kept = dict(optimizer.state[param]), dict(optimizer.param_groups[0])
    spoil(optimizer, param, name)
    set_complex_grads(spoilt, 5)
    with pytest.raises(error) as caught:
        optimizer.step()
    assert text.format(state=name) in str(caught.value)
    optimizer.state[param].update(kept[0])
    optimizer.param_groups[0].update(kept[1])
    for ours, theirs in zip(spoilt.params, sound.params, strict=True):
        assert torch.equal(ours, theirs)
        for key, value in sound.optimizer.state[theirs].items():
            assert torch.equal(optimizer.state[ours][key], value)
    for run in runs:
        set_complex_grads(run, 6)
        run.optimizer.step()
    assert all(map(torch.equal, spoilt.params, sound.params))


def refused(params, optimizer, error, text) -> None:
    """Steps and expects an error; parameters keep their bits, the last one its state too."""

    def bits() -> list[torch.Tensor]:
        state = optimizer.state.get(params[-1], {})
        return [t.detach().clone() for t in (*params, *map(torch.as_tensor, state.values()))]

    before = bits()
    with pytest.raises(error, match=text):
        optimizer.step()
    after = bits()
    assert len(after) == len(before)
    for value, kept in zip(after, before, strict=True):
        assert torch.equal(value.to_dense(), kept.to_dense())


@BACKENDS
@OURS
def test_sparse_gradients(entry, backend):
    """With L2 decay no rule takes them, some take none at all."""
    params = [torch.nn.Parameter(p.detach()) for p in make_params([(6, 3)] * 3, seed=3)]
    optimizer = make_fused(entry, params, backend, lr=0.1, **entry.known(weight_decay=0.1))
    if device_of(backend) != "cpu":
        pytest.skip("on the CPU")
    set_grads(params, 1)
    params[2].grad = torch.sparse_coo_tensor([[0, 4]], torch.ones(2, 3), (6, 3))
    text = "sparse gradients"
    if entry.sparse:
        text = "weight_decay option is not compatible with sparse gradients, and it is 0.1"
    refused(params[2:], optimizer, RuntimeError, text)
    assert torch.equal(params[0], make_params([(6, 3)], seed=3)[0])
    params[2].grad = None
    optimizer.step()


@BACKENDS
def test_sparse_momentum_beside_a_dense_gradient(backend):
    """Sparse gradients made it so."""
    params = make_params([(6, 3)] * 2)
    optimizer = TABLE["SGD"].fused(params, lr=0.1, momentum=0.9, backend="torch")
    for _ in range(2):
        set_grads(params, 1)
        params[1].grad = torch.sparse_coo_tensor([[0, 4]], torch.ones(2, 3), (6, 3))
        optimizer.step()
    set_grads(params, 2)
    refused(params, optimizer, ValueError, "state 'momentum_buffer' of parameter 1 .* is sparse")


@OURS
def test_gradients_of_another_type(entry):
    """Rules that mix them with a state by lerp refuse them, the others take them, as torch's do."""
    outcomes = []
    for kind in (entry.stock, entry.fused):
        extras = {"backend": "torch"} if kind is entry.fused else entry.serial
        params = make_params([(4,), (5,)], torch.float64)
        run = Run(
            params, kind(params, **{**richest(entry), **entry.known(weight_decay=0.0)}, **extras)
        )
        run.steps(1)
        set_grads(params, 2)
        params[1].grad_dtype = None
        params[1].grad = random((5,), 3, torch.float32)
        before = {name: value.clone() for name, value in run.tensors().items()}
        try:
            run.optimizer.step()
            outcomes.append(run.tensors())
        except (RuntimeError, ValueError) as error:
            outcomes.append(type(error))
            if kind is entry.fused:
                assert "torch's rule cannot mix with a gradient of float32 [5]" in str(error)
                assert_same_bits(run.tensors(), before)
    if isinstance(outcomes[0], dict):
        assert_same_bits(*outcomes)
    else:
        assert outcomes == [RuntimeError, ValueError]


@OURS
@BACKENDS
def test_parameters_that_no_rule_updates(entry, backend):
    """Expanded, made in inference mode, a leaf of a differentiable step."""
    neighbour = torch.nn.Parameter(torch.ones(3, device=device_of(backend)))
    with torch.inference_mode():
        inference = torch.ones(3, device=neighbour.device)
    expanded = torch.ones(1, device=neighbour.device).expand(3).requires_grad_()
    for bad, text in (
        (inference, "inference tensor"),
        (expanded, "single memory location.*parameter 1 of param group 0"),
    ):
        params = [neighbour, bad]
        optimizer = make_fused(entry, params, backend)
        neighbour.grad = torch.ones_like(neighbour)
        with torch.inference_mode(bad is inference):
            bad.grad = torch.ones(3, device=neighbour.device)
        refused(params, optimizer, (RuntimeError, ValueError), text)
    optimizer = make_fused(entry, [neighbour], backend, differentiable=True)
    refused([neighbour], optimizer, RuntimeError, "parameter 0 of param group 0 is a leaf")


@OURS
@BACKENDS
def test_negative_and_conjugate_views(entry, backend):
    """A parameter behind a lazy minus sign, a gradient behind a lazy conjugation."""
    device = device_of(backend)
    runs = []
    for lazy in (False, True):
        base = (torch.ones(3, dtype=torch.complex128, device=device) * 1j).conj().imag.detach()
        assert base.is_neg()
        twin = torch.nn.Parameter(random((4,), 2, torch.complex64, device))
        params = [base if lazy else base.resolve_neg().clone(), twin]
        run = Run(params, make_fused(entry, params, backend, lr=0.1))
        for seed in range(2):
            params[0].grad = random((3,), seed, torch.float64, device)
            grad = torch.complex(random((4,), seed), random((4,), 9 + seed)).to(device).conj()
            twin.grad = grad if lazy else grad.resolve_conj()
            run.optimizer.step()
        runs.append([param.detach().resolve_neg() for param in params])
    # Torch's rule and a native one differ by roundings.
    torch.testing.assert_close(*runs)


@OURS
@BACKENDS
def test_step_that_is_not_there(entry, backend):
    """A state without its counter, under torch's rules."""
    if not entry.has_step:
        pytest.skip("counts no steps")
    params = complex_params(backend)
    run = Run(params, make_fused(entry, params, backend))
    set_complex_grads(run, 1)
    run.optimizer.step()
    step = run.optimizer.state[params[2]].pop("step")
    refused(params, run.optimizer, KeyError, "param group 0, or another.*has no 'step'")
    run.optimizer.state[params[2]]["step"] = 1
    with pytest.raises(TypeError, match="'step' in the state of parameter 2 .* is 1; expected"):
        run.optimizer.step()
    run.optimizer.state[params[2]]["step"] = step
    run.optimizer.step()


@OURS
def test_decoupled_decay_with_a_tensor_lr_of_one_dimension(entry):
    """Any tensor of one element will do; a 0-dim parameter must not be broadcast."""
    options = entry.known(weight_decay=0.5, decoupled_weight_decay=True)
    finished = []
    for lr in (0.25, torch.tensor([0.25])):
        param = torch.nn.Parameter(torch.tensor(1 + 2j))
        param.grad = torch.tensor(0.5 - 1j)
        entry.fused([param], lr=lr, **options).step()
        finished.append(param.detach())
    torch.testing.assert_close(*finished)


def test_finite_gradients_beyond_the_parameters_range():
    """A float64 gradient of a float32 parameter, unscaled into range: not an overflow."""
    params = [
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(2, dtype=torch.cfloat)),
    ]
    optimizer = make_fused(TABLE["SGD"], params, "torch", max_grad_norm=1e9, skip_nonfinite=True)
    params[0].grad_dtype = params[1].grad_dtype = None
    params[0].grad = torch.full((3,), 2e200, dtype=torch.float64)
    params[1].grad = torch.full((2,), 1e200, dtype=torch.complex128)
    optimizer.grad_scale = torch.tensor(1e200, dtype=torch.float64)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert optimizer.last_grad_norm == pytest.approx(math.sqrt(3 * 4 + 2), rel=1e-6)


@OURS
@BACKENDS
def test_a_parameter_that_was_refused_is_a_kernels_again(entry, backend):
    """What had it take the plain rule is gone with what was refused."""
    run = run_fused(entry, make_params([(4, 3)], device=device_of(backend)), backend).steps(1)
    (param,) = run.params
    memory = param.data
    param.data = memory[:1].clone().expand(param.shape)
    with pytest.raises(RuntimeError, match="single memory location"):
        run.steps(1)
    param.data = memory
    run.steps(1)
    assert run.optimizer.backend_of(param) == backend


@OURS
@BACKENDS
def test_a_parameter_listed_twice_counts_once(entry, backend):
    """In the norm, as in clip_grad_norm_ over the model's parameters; it is updated twice."""
    device = device_of(backend)
    start = [torch.ones(3, device=device), torch.ones(2, device=device)]
    finished = []
    for ours in (False, True):
        first, second = params = copies(start)
        with pytest.warns(UserWarning, match="duplicate parameters"):
            if ours:
                optimizer = entry.fused([first, second, first], backend=backend, max_grad_norm=1.0)
            else:
                optimizer = entry.stock([first, second, first], **entry.serial)
        first.grad, second.grad = random((3,), 1).to(device) * 2, random((2,), 2).to(device)
        if not ours:
            norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        finished.append([param.detach() for param in params])
    torch.testing.assert_close(optimizer.last_grad_norm, norm)
    torch.testing.assert_close(*finished)


def taken(monkeypatch, entry) -> list[tuple]:
    """Returns (number of parameters, foreach, fused) of the calls of torch's function to come."""
    name = inspect.unwrap(entry.stock.step).__module__.rpartition(".")[2]
    module = importlib.import_module(f"torch.optim.{name}")
    function, calls = getattr(module, name), []

    def count(params, *args, foreach=None, fused=None, **kwargs):
        calls.append((len(params), foreach, fused))
        kwargs = {**kwargs, "foreach": foreach}
        if entry.takes("fused"):
            kwargs["fused"] = fused
        return function(params, *args, **kwargs)

    monkeypatch.setattr(module, name, count)
    return calls


@pytest.mark.parametrize("entry", **IN_TORCH)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_the_torch_backend_decides_as_torch_does(entry, options, monkeypatch):
    """Whole groups at once, and what the group says about foreach and fused reaches torch."""
    if "fused" in options and not entry.takes("fused"):
        pytest.skip("torch has no fused form")
    start = make_params([(3,)] * 5)
    calls = taken(monkeypatch, entry)
    ours = run_fused(entry, start, "torch", **richest(entry), **options)
    ours.steps(3)
    stock = copies(start)
    expected = Run(stock, entry.stock(stock, **richest(entry), **options)).steps(3)
    assert_same_bits(ours.tensors(), expected.tensors())
    assert calls[:3] == calls[3:] == [(5, options.get("foreach"), options.get("fused"))] * 3


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad"])
def test_fused_kernels_only_where_they_are_right(name, monkeypatch):
    """They ignore strides; and SGD's takes all momentum buffers or none."""
    entry = TABLE[name]
    start = make_params([(4, 3), (3, 5)], layout="transposed")
    calls = taken(monkeypatch, entry)
    ours = run_fused(entry, start, "torch", **richest(entry), fused=True)
    stock = run_stock(entry, start, **richest(entry))
    for seed in range(3):
        for run in (ours, stock):
            set_grads(run.params, seed, layout="contiguous")
            if seed == 0:
                run.params[0].grad = None
            run.optimizer.step()
    assert {fused for _, _, fused in calls} == {None}
    assert_close(ours.tensors(), stock.tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad"])
def test_fused_kernels_in_half_types(name, dtype):
    """That for SGD on the CPU is wrong from 16 elements on; asked for it, ours stays right."""
    entry = TABLE[name]
    start = make_params([(64,)], dtype)
    options = {**richest(entry), "eps": 1e-3} if entry.has_step else richest(entry)
    ours = run_fused(entry, start, "torch", **options, fused=True).steps(3)
    assert_same_bits(ours.tensors(), run_stock(entry, start, **options).steps(3).tensors())


@pytest.mark.parametrize("entry", **IN_TORCH)
@BACKENDS
def test_groups_with_a_limit_alone_go_one_by_one(entry, backend, monkeypatch):
    """Those that nothing transforms are torch's whole, beside them."""
    device = device_of(backend)
    params = [
        torch.nn.Parameter(torch.ones(2, dtype=torch.cfloat, device=device)) for _ in range(6)
    ]
    groups = [{"params": params[:3]}, {"params": params[3:], "max_grad_norm_per_param": 0.1}]
    optimizer = make_fused(entry, groups, backend)
    calls = taken(monkeypatch, entry)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [count for count, _, _ in calls] == [3, 1, 1, 1]


@OURS
@BACKENDS
def test_numbers_in_tensors_of_one_element(entry, backend):
    """Not only 0-dim ones, whoever updates: the step of a 0-dim parameter is not half a step."""
    start = make_params([(3,), ()], device=device_of(backend))
    runs = []
    for lr in (torch.tensor([0.125]), 0.125):
        run = run_fused(entry, start, backend, **{**richest(entry), "lr": 0.125})
        run.optimizer.param_groups[0]["lr"] = lr
        runs.append(run.steps(2))
    assert_close(runs[0].tensors(), runs[1].tensors())
