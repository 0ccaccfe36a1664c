"""Limits that make no sense are refused by name, at once, and nothing has changed then."""

from __future__ import annotations

import copy
import math
import re

import cases
import pytest
import torch

BAD = (-1.0, 0, 0.0, -math.inf, math.nan, True, False, "1.0", "inf", [1.0], torch.tensor(1.0), 1j)
BAD_IDS = [repr(value) for value in BAD]
PER_GROUP = ("max_grad_norm_per_param", "max_grad_value")
ALL = ("max_grad_norm", *PER_GROUP)


def params() -> list[torch.nn.Parameter]:
    """Returns two parameters."""
    return cases.make_params(((2,), (3,)))


@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", BAD, ids=BAD_IDS)
def test_refused_by_the_constructor(entry, name, value):
    """The message has the argument, the value and what was expected."""
    text = rf"{name} is {re.escape(repr(value))}.*expected a number above 0"
    with pytest.raises(ValueError, match=text):
        entry.fused(params(), **{name: value})


@pytest.mark.parametrize("name", PER_GROUP)
@pytest.mark.parametrize("value", BAD, ids=BAD_IDS)
def test_refused_by_the_constructor_in_a_group(name, value):
    """Also when the groups come with the constructor."""
    groups = [{"params": params()}, {"params": params(), name: value}]
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))} in param group 1"):
        cases.TABLE["Adam"].fused(groups)


@pytest.mark.parametrize("name", PER_GROUP)
def test_a_bad_default_is_refused_though_every_group_has_its_own(name):
    """It would wait for the group that is added next."""
    groups = [{"params": params(), name: 1.0}]
    with pytest.raises(ValueError, match=rf"{name} is -1\.0"):
        cases.TABLE["Adam"].fused(groups, **{name: -1.0})


@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("name", PER_GROUP)
@pytest.mark.parametrize("value", BAD, ids=BAD_IDS)
def test_refused_by_add_param_group(entry, name, value):
    """The optimizer is what it was, and goes on."""
    run = cases.run_fused(entry, params(), "auto").steps(1)
    group = {"params": params(), name: value}
    before = copy.deepcopy(run.optimizer.state_dict())
    defaults, kept = dict(run.optimizer.defaults), dict(group)
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))} in param group 1"):
        run.optimizer.add_param_group(group)
    assert group.keys() == kept.keys()
    assert run.optimizer.defaults == defaults
    after = run.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    run.steps(1)


@pytest.mark.parametrize("name", ("max_grad_norm", "skip_nonfinite", "backend"))
@pytest.mark.parametrize("value", (None, 1.0))
def test_settings_of_the_whole_optimizer_are_refused_in_groups(name, value):
    """In the constructor and later, whatever the value; groups and defaults lack them too."""
    optimizer = cases.TABLE["SGD"].fused(params(), max_grad_norm=1.0)
    assert name not in optimizer.defaults
    assert name not in optimizer.param_groups[0]
    group = {"params": params(), name: value}
    with pytest.raises(ValueError, match=rf"{name} is {value} in param group 1.*optimizer\.{name}"):
        optimizer.add_param_group(group)
    with pytest.raises(ValueError, match=rf"{name} is {value} in param group 0"):
        cases.TABLE["SGD"].fused([group])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", (1, 1e-30, 2.5, math.inf, None))
def test_good_limits_are_kept_as_they_are(name, value):
    """Integers, tiny ones, infinity and None."""
    optimizer = cases.TABLE["Adam"].fused(params(), **{name: value})
    group = optimizer.param_groups[0]
    assert (group.get(name) if name in PER_GROUP else getattr(optimizer, name)) is value
    cases.Run(optimizer.param_groups[0]["params"], optimizer).steps(1)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("name", PER_GROUP)
@pytest.mark.parametrize("value", (-1.0, 0.0, math.nan))
def test_a_limit_spoiled_later_is_refused_by_the_step(backend, name, value):
    """Written into a group between two steps; nothing is changed by the refused step."""
    own = cases.make_params(((2,), (3,)), device=cases.device_of(backend))
    run = cases.run_fused(cases.TABLE["Adam"], own, backend).steps(1)
    before = {key: tensor.clone() for key, tensor in run.tensors().items()}
    run.optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}.*expected a number above 0"):
        run.steps(1)
    cases.assert_same_bits(run.tensors(), before)
    run.optimizer.param_groups[0][name] = None
    run.steps(1)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("value", (-1.0, 0.0, math.nan))
def test_a_norm_limit_spoiled_later_does_not_pass_silently(backend, value):
    """A senseless limit means neither "no clipping" nor gradients turned around."""
    own = cases.make_params(((2,), (3,)), device=cases.device_of(backend))
    run = cases.run_fused(cases.TABLE["SGD"], own, backend, max_grad_norm=1.0).steps(1)
    before = {key: tensor.clone() for key, tensor in run.tensors().items()}
    with pytest.raises(ValueError, match=r"max_grad_norm.*expected a number above 0"):
        run.optimizer.max_grad_norm = value
        run.steps(1)
    cases.assert_same_bits(run.tensors(), before)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("second", (False, True))
def test_a_gradient_that_does_not_fit_is_refused_before_anything_changes(backend, second):
    """A wrong shape or type in one parameter: no counter, state or neighbour has moved."""
    own = cases.make_params(((4,), (2, 3)), device=cases.device_of(backend))
    run = cases.run_fused(cases.TABLE["Adam"], own, backend, max_grad_norm=1.0)
    if second:
        run.steps(2)
    cases.set_grads(run.params, 9)
    before = {key: tensor.clone() for key, tensor in run.tensors().items()}
    victim = run.params[1]
    good = victim.grad
    victim.grad = None
    victim.grad_dtype = None
    victim.grad = torch.ones(2, 3, dtype=torch.int64, device=victim.device)
    with pytest.raises((ValueError, RuntimeError)):
        run.optimizer.step()
    now = run.tensors()
    cases.assert_same_bits({key: now[key] for key in before}, before)
    victim.grad = good
    run.optimizer.step()
    assert all(entry["step"] == (3 if second else 1) for entry in run.optimizer.state.values())


@pytest.mark.parametrize("backend", cases.backends())
def test_a_limit_beyond_float32_is_none(backend):
    """To torch's rules as to kernels; the groups before it are not updated alone."""
    device = cases.device_of(backend)
    first, second = (torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "max_grad_value": 1e300}]
    optimizer = cases.make_fused(cases.TABLE["SGD"], groups, backend, lr=1.0)
    for param in (first, second):
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    assert first.tolist() == second.tolist() == [0.5] * 3
