"""Autograd notices that a step wrote what a graph still needs, as with stock torch."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    backends,
    device_of,
    make_fused,
    make_params,
    native_backends,
    richest,
    run_fused,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
NATIVE = pytest.mark.parametrize("backend", native_backends())
STALE = "modified by an inplace operation"


@OURS
@BACKENDS
@pytest.mark.parametrize("clip", [None, 1.0])
def test_backward_through_what_a_step_wrote_is_refused(entry, backend, clip):
    """A loss made before the step; one made after it is fine."""
    device = device_of(backend)
    (param,) = make_params([(2, 2)], device=device)
    other = torch.ones(2, 2, device=device, requires_grad=True)
    optimizer = make_fused(entry, [param], backend, max_grad_norm=clip, **richest(entry))
    for _ in range(2):
        loss = (other @ param).sum()
        param.grad = torch.ones_like(param)
        optimizer.step()
        with pytest.raises(RuntimeError, match=STALE):
            loss.backward()
        (other @ param).sum().backward()


@OURS
@NATIVE
def test_every_step_counts_for_what_it_wrote(entry, backend):
    """Parameters and states with a gradient, and nobody else; the torch backend does no more."""
    run = run_fused(
        entry, make_params([(3,), (2, 2)], device=device_of(backend)), backend, **richest(entry)
    ).steps(1)

    def versions():
        return [
            [param._version, *(run.optimizer.state[param][name]._version for name in states)]
            for param in run.params
        ]

    states = [name for name in run.optimizer.state[run.params[0]] if name in entry.states]
    before = versions()
    for _ in range(2):
        set_grads(run.params, 2)
        run.params[1].grad = None
        run.optimizer.step()
    assert versions() == [[version + 2 for version in before[0]], before[1]]


@pytest.mark.skipif("cpu" not in native_backends(), reason="no native extension")
def test_a_skipped_step_is_no_write():
    """Where the host knows that nothing was written, old graphs stay good."""
    (param,) = params = make_params([(3,)])
    optimizer = make_fused(TABLE["Adam"], params, "cpu", skip_nonfinite=True)
    loss = (param * param).sum()
    param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    assert bool(optimizer.last_step_skipped)
    param.grad = None
    loss.backward()


@BACKENDS
def test_gradients_of_two_networks_that_step_in_turn(backend):
    """As in adversarial training: the second backward would use weights that are gone."""
    device = device_of(backend)
    first, second = (torch.nn.Linear(2, 2, device=device) for _ in range(2))
    optimizers = [
        make_fused(TABLE["Adam"], module.parameters(), backend) for module in (first, second)
    ]
    loss = second(first(torch.ones(1, 2, device=device)).tanh()).square().sum()
    loss.backward(retain_graph=True)
    for optimizer in optimizers:
        optimizer.step()
    with pytest.raises(RuntimeError, match=STALE):
        loss.backward()


@BACKENDS
@pytest.mark.parametrize("place", ["param", "state"])
def test_inference_tensors(backend, place):
    """Written only under ``inference_mode``, as torch has it; refused elsewhere by name."""
    device = device_of(backend)
    if place == "param":
        with torch.inference_mode():
            param = torch.ones(3, device=device)
    else:
        param = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = make_fused(TABLE["Adam"], [param], backend, lr=0.1)
    grad = torch.ones(3, device=device)
    with torch.inference_mode():
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9, device=device))
    with pytest.raises(RuntimeError, match=r"inference tensor.*inference_mode"):
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9, device=device))
    with torch.inference_mode():
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.8, device=device))


@BACKENDS
def test_data_that_is_an_inference_tensor_is_noticed(backend):
    """Put under a parameter that native kernels have written before."""
    device = device_of(backend)
    run = run_fused(TABLE["SGD"], make_params([(3,)], device=device), backend).steps(1)
    with torch.inference_mode():
        moments = torch.ones(3, device=device)
    run.optimizer.param_groups[0]["momentum"] = 0.9
    run.optimizer.state[run.params[0]]["momentum_buffer"] = moments
    before = run.params[0].detach().clone()
    set_grads(run.params, 2)
    with pytest.raises(RuntimeError, match="inference tensor"):
        run.optimizer.step()
    assert torch.equal(before, run.params[0])


@BACKENDS
def test_real_parameters_under_a_fake_mode(backend):
    """Stock raises in the middle; ours before anything is changed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    run = run_fused(TABLE["Adam"], make_params([(3,)], device=device_of(backend)), backend).steps(1)
    before = run.params[0].detach().clone()
    for allow in (False, True):
        with (
            FakeTensorMode(allow_non_fake_inputs=allow),
            pytest.raises(RuntimeError, match="FakeTensorMode"),
        ):
            run.optimizer.step()
    assert torch.equal(before, run.params[0])
    run.optimizer.step()
    assert not torch.equal(before, run.params[0])


@pytest.mark.parametrize("backend", backends())
def test_a_dispatch_mode_sees_the_step(backend):
    """As the one that lets tensors which a graph has saved be written."""
    weight = torch.nn.Parameter(torch.eye(2, device=device_of(backend)))
    optimizer = make_fused(TABLE["SGD"], [weight], backend, lr=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    start = weight.detach().clone()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = (weight @ weight).sum()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        weight.grad = None
        loss.backward()
    assert torch.equal(weight.detach(), start - 1)
    ones = torch.ones_like(start)
    assert torch.equal(weight.grad, ones @ start.t() + start.t() @ ones)
    optimizer.step()  # the kernels' again
    assert optimizer.backend_of(weight) == backend
