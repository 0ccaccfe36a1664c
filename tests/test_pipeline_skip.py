"""Skipped steps leave everything as it was, and only what must be skipped is."""

from __future__ import annotations

import copy
import io
import math
import pickle

import cases
import pytest
import torch
from separate_passes import Trio, assert_untouched, bad_steps, make_grads, separate_step, snapshot

BAD = (math.inf, -math.inf, math.nan)
#: Without those that stock torch cannot go on with: decoupled decay where torch has none.
TORCH_CASES = [
    pytest.param(*case, id=name)
    for case, name in zip(cases.CASES["argvalues"], cases.CASES["ids"], strict=True)
    if "decoupled" not in name or case[0].name in ("Adam", "AdamW")
]


def set_grads(run: cases.Run, grads) -> None:
    """Gives a run copies of the gradients."""
    for param, grad in zip(run.params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry, options", **cases.CASES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_training_with_skips_is_training_without_those_steps(entry, options, backend, dtype):
    """Bit for bit: ours with bad steps in between against ours that never saw them."""
    params = cases.make_params(dtype=dtype, device=cases.device_of(backend))
    skipping = cases.run_fused(entry, params, backend, skip_nonfinite=True, **options)
    plain = cases.run_fused(entry, params, backend, **options)
    for step in range(6):
        bad = step in bad_steps(6) | {1}
        grads = make_grads(params, step, poison=BAD[step % 3] if bad else None)
        set_grads(skipping, grads)
        before = snapshot(skipping)
        skipping.optimizer.step()
        assert bool(skipping.optimizer.last_step_skipped) == bad
        if bad:
            assert_untouched(skipping, before)
        else:
            set_grads(plain, grads)
            plain.optimizer.step()
    cases.assert_same_bits(skipping.tensors(), plain.tensors())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("size, skips", [(3.4e38, False), (3.5e38, True)])
def test_beyond_the_type_of_the_arithmetic(backend, size, skips):
    """Kernels would compute with inf where a wider gradient does not fit; torch's rules do not."""
    if backend == "cuda":
        pytest.skip("whether kernels or torch's rules take such a gradient depends on the build")
    params = cases.make_params([(5,)], device=cases.device_of(backend))
    run = cases.run_fused(cases.TABLE["SGD"], params, backend, skip_nonfinite=True, lr=1e-38)
    run.params[0].grad_dtype = torch.float64
    run.params[0].grad = torch.full_like(run.params[0].detach(), size, dtype=torch.float64)
    run.optimizer.step()
    assert bool(run.optimizer.last_step_skipped) == (skips and backend != "torch")
    assert run.params[0].isfinite().all()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry, options", TORCH_CASES)
@pytest.mark.parametrize("skips", (1, 2))
def test_checkpoint_right_after_a_skipped_first_step(entry, options, backend, skips):
    """Stock torch, a reload into ours, a deepcopy and a pickle go on as if nothing had happened."""
    params = cases.make_params(device=cases.device_of(backend))
    # Stock torch takes over our groups, and with them what says whether it goes one by one.
    options = {**entry.serial, **options}
    ours = cases.run_fused(entry, params, backend, skip_nonfinite=True, **options)
    for _ in range(skips):
        set_grads(ours, make_grads(params, 1, poison=math.nan))
        ours.optimizer.step()
    file = io.BytesIO()
    torch.save(ours.optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    for entries in saved["state"].values():
        assert "momentum_buffer" not in entries or entry.name != "SGD"
        assert float(entries.get("step", 0)) == 0

    stock, untouched = (
        cases.run_stock(entry, params, **options),
        cases.run_stock(entry, params, **options),
    )
    stock.optimizer.load_state_dict(copy.deepcopy(saved))
    again = cases.run_fused(entry, params, backend, **options)
    again.optimizer.load_state_dict(copy.deepcopy(saved))
    twins = [ours, again]
    for clone in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        optimizer = clone(ours.optimizer)
        own = [p for group in optimizer.param_groups for p in group["params"]]
        twins.append(cases.Run(own, optimizer))
    for run in (stock, untouched, *twins):
        for seed in (2, 3, 4):
            set_grads(run, make_grads(params, seed))
            run.optimizer.step()
    cases.assert_same_bits(stock.tensors(), untouched.tensors())
    for run in twins[1:]:
        cases.assert_same_bits(run.tensors(), ours.tensors())
    cases.assert_close(ours.tensors(), stock.tensors())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("nesterov", (False, True))
def test_sgd_momentum_of_late_parameters_after_skips(backend, nesterov):
    """Each parameter's first applied gradient is its momentum, undampened, after any skips."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    options |= {"nesterov": True} if nesterov else {"dampening": 0.7}
    params = cases.make_params(((5,), (6,), (7,)), device=cases.device_of(backend))
    trio = Trio(cases.TABLE["SGD"], backend, params, [{}], options, skip_nonfinite=True)
    missing = [(1, 2), (2,), (2,), (), (0,), ()]
    for step, absent in enumerate(missing):
        poison = math.inf if step in (0, 1, 3) else None
        trio.step(make_grads(params, step, missing=absent, poison=poison))
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("poison", BAD)
def test_any_single_element_is_found(backend, dtype, poison):
    """In vector body, tail, single elements, second tensor and second group, under every clip."""
    device = cases.device_of(backend)
    params = cases.make_params(((67,), (), (0,), (3, 5)), dtype, device)
    groups = [{"params": params[:2], "max_grad_value": 1.0}, {"params": params[2:]}]
    optimizer = cases.make_fused(
        cases.TABLE["Adam"],
        groups,
        backend,
        skip_nonfinite=True,
        max_grad_norm=1.0,
        max_grad_norm_per_param=0.5,
    )
    run = cases.Run(params, optimizer)
    places = [(0, i) for i in (0, 1, 15, 31, 63, 64, 66)] + [(1, 0), (3, 0), (3, 14)]
    for which, at in places:
        set_grads(run, make_grads(params, 3))
        params[which].grad.view(-1)[at] = poison
        before = snapshot(run)
        optimizer.step()
        assert bool(optimizer.last_step_skipped), (which, at)
        assert_untouched(run, before)
    set_grads(run, make_grads(params, 3))
    optimizer.step()
    assert not optimizer.last_step_skipped


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("clip", (None, 1e-3), ids=("measure", "value"))
def test_large_finite_gradients_are_no_overflow(backend, clip):
    """The squares of 1e30 in float32 and 1e200 in float64 overflow, but the step is not skipped."""
    device = cases.device_of(backend)
    params = [torch.nn.Parameter(torch.ones(100, device=device)) for _ in range(2)]
    optimizer = cases.make_fused(
        cases.TABLE["SGD"],
        params,
        backend,
        lr=1.0,
        max_grad_norm=10.0,
        max_grad_value=clip,
        skip_nonfinite=True,
    )
    for param in params:
        param.grad = torch.full_like(param, 1e30)
    optimizer.step()
    assert not optimizer.last_step_skipped
    size = 1e30 if clip is None else clip
    expected = float(torch.tensor(size)) * math.sqrt(200)
    assert float(optimizer.last_grad_norm) == pytest.approx(expected, rel=1.2e-7)
    step = size * min(1.0, 10.0 / expected)
    # Two roundings of the gradient, one of the difference.
    torch.testing.assert_close(
        params[0].detach(), torch.full_like(params[0], 1 - step), rtol=4e-7, atol=0
    )


@pytest.mark.parametrize("backend", cases.backends())
def test_an_overflowing_sum_is_no_overflow(backend):
    """The norm of float64 gradients may be inf though no element is: that skips nothing."""
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.float64, device=cases.device_of(backend)))
    optimizer = cases.make_fused(
        cases.TABLE["SGD"], [param], backend, max_grad_norm=math.inf, skip_nonfinite=True
    )
    param.grad = torch.full_like(param, 1e200)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert optimizer.last_grad_norm == math.inf
    assert float(param.detach()[0]) == pytest.approx(-1e197)


@pytest.mark.parametrize("backend", cases.backends())
def test_overflow_made_by_unscaling_is_no_raw_overflow(backend):
    """What a tiny grad_scale makes infinite is not what skip_nonfinite looks at."""
    param = torch.nn.Parameter(torch.ones(4, device=cases.device_of(backend)))
    optimizer = cases.make_fused(cases.TABLE["SGD"], [param], backend, skip_nonfinite=True)
    param.grad = torch.full_like(param, 1e30)
    optimizer.grad_scale = torch.tensor(1e-20, device=param.device)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert bool((param == -math.inf).all())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("poison", BAD)
@pytest.mark.parametrize("clips", ({}, {"max_grad_value": 0.5}, {"max_grad_norm_per_param": 0.5}))
@pytest.mark.parametrize("limit", (None, 0.5))
def test_without_skip_inf_and_nan_propagate_as_in_torch(entry, backend, poison, clips, limit):
    """Every element that torch makes inf or nan is so with us, and the norm is as torch's."""
    params = cases.make_params(((5,), (4, 2)), device=cases.device_of(backend))
    trio = Trio(entry, backend, params, [clips, {}], {"lr": 0.1}, max_grad_norm=limit)
    trio.step(make_grads(params, 1))
    trio.step(make_grads(params, 2, poison=poison))
    trio.check()
    trio.step(make_grads(params, 3))
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("flag", (0.0, 1.0, 2.0, 16.0, math.nan))
def test_found_inf_counts_when_it_is_not_zero(entry, backend, flag):
    """Sums over devices give 2 and more, which skip finite gradients; zero skips nothing."""
    params = cases.make_params(device=cases.device_of(backend))
    trio = Trio(entry, backend, params, [{}], cases.richest(entry))
    trio.step(make_grads(params, 1, 8.0), 8.0, flag)
    trio.step(make_grads(params, 2, 8.0), 8.0)
    trio.step(make_grads(params, 3, 8.0), 8.0, flag)
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
def test_preset_attributes_as_plain_numbers(backend):
    """`grad_scale` and `found_inf` may be numbers or one element, and stay what they were."""
    params = cases.make_params(device=cases.device_of(backend))
    runs = []
    for scale, flag in ((4.0, 0), (torch.tensor([4.0]), torch.tensor([0.0])), (4, None)):
        run = cases.run_fused(cases.TABLE["Adam"], params, backend)
        run.optimizer.grad_scale, run.optimizer.found_inf = scale, flag
        run.steps(2)
        assert run.optimizer.grad_scale is scale
        assert run.optimizer.found_inf is flag
        runs.append(run)
    for run in runs[1:]:
        cases.assert_same_bits(run.tensors(), runs[0].tensors())


@pytest.mark.parametrize("backend", cases.backends())
def test_without_skip_and_clip_a_bad_step_is_not_reported_as_skipped(backend):
    """`last_step_skipped` says what happened, not what the gradients were."""
    run = cases.run_fused(
        cases.TABLE["SGD"], cases.make_params(device=cases.device_of(backend)), backend
    )
    set_grads(run, make_grads(run.params, 1, poison=math.nan))
    run.optimizer.step()
    assert not run.optimizer.last_step_skipped


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_skip_nonfinite_switched_on_and_off(entry, backend):
    """It is read at every step."""
    params = cases.make_params(((6,), (2, 2)), device=cases.device_of(backend))
    ours = cases.run_fused(entry, params, backend)
    stock = cases.run_stock(entry, params)
    for step, (skip, poison) in enumerate(
        [(True, math.inf), (False, None), (True, None), (True, math.nan), (False, math.inf)]
    ):
        ours.optimizer.skip_nonfinite = skip
        grads = make_grads(params, step, poison=poison)
        set_grads(ours, grads)
        ours.optimizer.step()
        separate_step(stock, grads, skip=skip and poison is not None)
        cases.assert_close(
            {n: v.nan_to_num() for n, v in ours.tensors().items() if n.startswith("param")},
            {n: v.nan_to_num() for n, v in stock.tensors().items() if n.startswith("param")},
        )
