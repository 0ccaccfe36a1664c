"""The three clips, alone and combined, against torch's utilities one after another."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
from separate_passes import Trio, bad_steps, make_grads

STEPS = 5
CLIPS = {
    "none": ({}, None),
    "value": ({"max_grad_value": 0.4}, None),
    "per_param": ({"max_grad_norm_per_param": 0.7}, None),
    "global": ({}, 1.5),
    "value_per_param": ({"max_grad_value": 0.4, "max_grad_norm_per_param": 0.7}, None),
    "value_global": ({"max_grad_value": 0.4}, 1.5),
    "per_param_global": ({"max_grad_norm_per_param": 0.7}, 0.9),
    "all": ({"max_grad_value": 0.4, "max_grad_norm_per_param": 0.7}, 0.9),
}
PLAIN = {entry.name: cases.richest(entry) for entry in cases.TABLE.values()}


def mixed_params(device: str) -> list[torch.nn.Parameter]:
    """Parameters of every type, an empty one among them."""
    shapes = ((37,), (4, 5), (0,), (), (3, 7))
    return [
        param
        for i, dtype in enumerate(cases.DTYPES)
        for param in cases.make_params(shapes, dtype, device, seed=10 * i)
    ]


def train(trio: Trio, scale: float, poison: float, missing_late: bool = True) -> None:
    """Steps with overflows first, midway and last, and gradients that come late or stay out."""
    count = len(trio.ours.params)
    for step in range(STEPS):
        missing = {1: {0, count - 1}, 2: {3}}.get(step, {count - 1} if step < 3 else set())
        grads = make_grads(
            trio.ours.params,
            step + 1,
            scale,
            sorted(missing) if missing_late else (),
            poison if step in bad_steps(STEPS) else None,
        )
        trio.step(grads, scale if scale != 1.0 else None)
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_combination_with_every_type(entry, backend, clips, dtype):
    """Alone and combined, under a scale, with inf in the first, a middle and the last step."""
    group, limit = CLIPS[clips]
    params = cases.make_params(cases.SHAPES, dtype, cases.device_of(backend))
    trio = Trio(
        entry, backend, params, [group], PLAIN[entry.name], max_grad_norm=limit, skip_nonfinite=True
    )
    train(trio, 64.0, math.inf)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_all_types_share_one_norm(entry, backend):
    """One optimizer with float32, float64, float16 and bfloat16 parameters, nan as the overflow."""
    group, limit = CLIPS["all"]
    params = mixed_params(cases.device_of(backend))
    trio = Trio(
        entry, backend, params, [group], PLAIN[entry.name], max_grad_norm=limit, skip_nonfinite=True
    )
    train(trio, 1.0, math.nan)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry, options", **cases.CASES)
def test_every_variant(entry, options, backend):
    """All hyperparameters of the list under the global clip, maximize and decoupled decay too."""
    params = cases.make_params(device=cases.device_of(backend))
    trio = Trio(entry, backend, params, [{}], options, max_grad_norm=2.0, skip_nonfinite=True)
    train(trio, 1.0, math.inf)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_clips_differ_per_group(entry, backend):
    """Four groups with their own limits, learning rates and direction under one global norm."""
    groups = [
        {"max_grad_value": 0.3, "lr": 0.01},
        {"max_grad_norm_per_param": 0.5, "maximize": True},
        {"max_grad_value": 0.9, "max_grad_norm_per_param": 1.1, **entry.known(weight_decay=0.1)},
        {},
    ]
    params = cases.make_params(cases.SHAPES + ((5,), (6, 2)), device=cases.device_of(backend))
    trio = Trio(
        entry, backend, params, groups, PLAIN[entry.name], max_grad_norm=1.0, skip_nonfinite=True
    )
    train(trio, 32.0, math.inf)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_a_group_added_later_joins_the_norm(entry, backend):
    """It has its own clips, and the defaults for the rest, from its first step on."""
    device = cases.device_of(backend)
    params = cases.make_params(((9,), (3, 3)), device=device)
    trio = Trio(entry, backend, params, [{}], {"lr": 0.1}, max_grad_norm=0.8)
    trio.step(make_grads(trio.ours.params, 1))
    late = cases.make_params(((11,), (2,)), device=device, seed=7)
    for run in trio.runs():
        own = cases.copies(late, run.params[0].dtype)
        run.optimizer.add_param_group({"params": own, "max_grad_value": 0.2})
        run.params += own
    for seed in (2, 3):
        trio.step(make_grads(trio.ours.params, seed))
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
def test_constructor_defaults_reach_groups_that_say_nothing(backend):
    """The constructor's limits are what a group without its own has."""
    entry = cases.TABLE["SGD"]
    params = cases.make_params(((5,), (6,)), device=cases.device_of(backend))
    ours = cases.copies(params)
    groups = [{"params": ours[:1]}, {"params": ours[1:], "max_grad_value": 9.0}]
    optimizer = cases.make_fused(
        entry, groups, backend, lr=1.0, max_grad_value=0.25, max_grad_norm_per_param=3.0
    )
    for group, value in zip(optimizer.param_groups, (0.25, 9.0), strict=True):
        assert group["max_grad_value"] == value
        assert group["max_grad_norm_per_param"] == 3.0
    for param in ours:
        param.grad = torch.full_like(param, 100.0)
    optimizer.step()
    # The first: clamped to 0.25 a element, norm 0.56 under 3. The second: 9 an element, norm 22
    # clipped to 3.
    assert torch.equal(params[0] - ours[0], params[0] - (params[0] - 0.25))
    torch.testing.assert_close((params[1] - ours[1]).norm().item(), 3.0)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_infinite_limits_measure_only(entry, backend):
    """With infinite limits everything but the norm has the bits of a step without any."""
    device = cases.device_of(backend)
    params = cases.make_params(device=device)
    measured = cases.run_fused(
        entry,
        params,
        backend,
        max_grad_norm=math.inf,
        max_grad_norm_per_param=math.inf,
        max_grad_value=math.inf,
    )
    plain = cases.run_fused(entry, params, backend)
    for poison in (None, None, math.inf):
        for run in (measured, plain):
            seed = 5 if poison is None else 6
            for param, grad in zip(
                run.params, make_grads(params, seed, 100, poison=poison), strict=True
            ):
                param.grad = grad
            run.optimizer.step()
        cases.assert_same_bits(measured.tensors(), plain.tensors())
        norm = torch.cat([p.grad.double().flatten() for p in measured.params]).norm()
        torch.testing.assert_close(
            measured.optimizer.last_grad_norm, norm.float(), rtol=1.2e-7, atol=0
        )
        assert plain.optimizer.last_grad_norm is None


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("factors", [*itertools.product((0.5, 2.0), repeat=2)], ids=str)
def test_limits_changed_between_steps_count_at_once(backend, factors):
    """Limits are read at every step: the optimizer's attribute and the groups' keys."""
    entry = cases.TABLE["Adam"]
    params = cases.make_params(device=cases.device_of(backend))
    trio = Trio(entry, backend, params, [{"max_grad_value": 0.5}], max_grad_norm=2.0)
    trio.step(make_grads(params, 1))
    trio.ours.optimizer.max_grad_norm *= factors[0]
    for run in trio.runs():
        run.optimizer.param_groups[0]["max_grad_value"] *= factors[1]
    trio.step(make_grads(params, 2))
    for run in trio.runs():
        run.optimizer.param_groups[0]["max_grad_value"] = None
        run.optimizer.param_groups[0]["max_grad_norm_per_param"] = 0.5
    trio.step(make_grads(params, 3))
    trio.ours.optimizer.max_grad_norm = None
    trio.step(make_grads(params, 4))
    trio.check()


@pytest.mark.parametrize("backend", cases.native_backends())
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("grad_layout", cases.LAYOUTS)
def test_layouts_do_not_change_the_norm(backend, layout, grad_layout):
    """Strides of their own give parameters the bits that contiguous ones have."""
    device = cases.device_of(backend)
    shapes = ((5, 6), (2, 3, 4, 5), (33,))
    finished = []
    for pair in ((layout, grad_layout), ("contiguous", "contiguous")):
        params = cases.make_params(shapes, device=device, layout=pair[0])
        optimizer = cases.make_fused(
            cases.TABLE["Adam"], params, backend, max_grad_norm=1.0, max_grad_norm_per_param=0.8
        )
        for seed in range(3):
            cases.set_grads(params, seed, layout=pair[1])
            optimizer.step()
        # The order of the sum follows memory, so the last bit of the norm may differ.
        finished.append((params, optimizer.last_grad_norm))
    for param, plain in zip(finished[0][0], finished[1][0], strict=True):
        torch.testing.assert_close(param, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(finished[0][1], finished[1][1], rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("backend", cases.backends())
def test_gradients_of_another_type_than_the_parameter(backend):
    """The norm of half gradients of float32 parameters is that of the gradients as they are."""
    params = cases.make_params(((40,), (3, 5)), device=cases.device_of(backend))
    trio = Trio(cases.TABLE["SGD"], backend, params, [{"max_grad_value": 1.2}], max_grad_norm=0.5)
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float16)):
        for param in trio.ours.params:
            param.grad = None
            param.grad_dtype = dtype
        trio.step([grad.to(dtype) for grad in make_grads(params, seed + 1)])
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
def test_the_clip_sees_what_the_closure_left(backend):
    """The closure runs first, once, with gradients enabled; its gradients are the ones measured."""
    param = torch.nn.Parameter(torch.ones(4, device=cases.device_of(backend)))
    optimizer = cases.make_fused(cases.TABLE["SGD"], [param], backend, lr=1.0, max_grad_norm=1.0)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (3 * param).sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert optimizer.last_grad_norm == 6.0
    torch.testing.assert_close(param.detach(), torch.full_like(param, 0.5), rtol=1e-6, atol=0)
