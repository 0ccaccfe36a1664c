"""What a step works on stays alive and whole, whatever threads and Python code do meanwhile."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from cases import (
    ENTRIES,
    INTERPRETED,
    TABLE,
    assert_close,
    assert_same_bits,
    backends,
    device_of,
    make_fused,
    make_params,
    native_backends,
    richest,
    run_fused,
    set_grads,
)

NATIVE = pytest.mark.parametrize("backend", native_backends())
SGD, ADAM = TABLE["SGD"], TABLE["Adam"]


def in_thread(work):
    """Starts a thread; `join` raises what it raised."""
    raised = []

    def guarded():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()

    def join():
        thread.join(60)
        assert not thread.is_alive()
        for error in raised:
            raise error

    return join


@NATIVE
def test_gradients_dropped_during_a_step(backend):
    """``zero_grad`` and reuse of the memory while another thread steps: the step sees its own."""
    # Long enough to be under way when the gradients go.
    count = 2000 if INTERPRETED else 1_000_000
    params = make_params([(count,)] * 3, device=device_of(backend))
    start = [param.detach().clone() for param in params]
    optimizer = make_fused(SGD, params, backend, lr=1.0)
    rounds = 2 if INTERPRETED else 10
    for _ in range(rounds):
        for param in params:
            param.grad = torch.ones_like(param)
        begun = threading.Event()
        handle = optimizer.register_step_pre_hook(lambda *args, begun=begun: begun.set())
        join = in_thread(optimizer.step)
        begun.wait(60)
        time.sleep(0.001)
        # Either the step had begun, or it sees no gradient; never somebody else's numbers.
        optimizer.zero_grad()
        junk = [torch.full_like(param, 1e9) for param in params]
        join()
        handle.remove()
        del junk
    for param, before in zip(params, start, strict=True):
        moved = before - param.detach()
        assert 0 <= moved.min() and moved.max() <= rounds + 1e-3


@NATIVE
def test_state_and_parameters_dropped_during_a_step(backend):
    """Everything that a long step writes goes away while it runs."""
    shape = (2000 if INTERPRETED else 1_000_000,)
    for _ in range(1 if INTERPRETED else 4):
        params = make_params([shape, shape], device=device_of(backend))
        optimizer = make_fused(ADAM, params, backend)
        set_grads(params, 1)
        optimizer.step()
        join = in_thread(optimizer.step)
        time.sleep(0.001)
        for param in params:
            param.grad = None
            optimizer.state.pop(param, None)
            param.data = torch.zeros(1, device=param.device)
        optimizer.param_groups[0]["params"].clear()
        del params, param
        join()


@NATIVE
@pytest.mark.parametrize("clip", [None, 1.0])
def test_steps_of_two_threads_follow_one_another(backend, clip):
    """As many steps as were asked for, each whole: the same bits as one thread makes."""
    count = 100 if INTERPRETED else 300_000
    runs = [
        run_fused(ADAM, make_params([(count,)] * 4, device=device_of(backend)), backend)
        for _ in range(2)
    ]
    times = 2 if INTERPRETED else 10
    for run in runs:
        run.optimizer.max_grad_norm = clip
        set_grads(run.params, 1)

    def work(run=runs[0]):
        for _ in range(times):
            run.optimizer.step()

    for join in [in_thread(work), in_thread(work)]:
        join()
    for _ in range(2 * times):
        runs[1].optimizer.step()
    assert_same_bits(runs[0].tensors(), runs[1].tensors())


@NATIVE
def test_a_step_within_hook_or_closure(backend):
    """Both may step the same optimizer, as with torch."""
    run = run_fused(SGD, make_params([(3,)], device=device_of(backend)), backend, lr=1.0)
    (param,) = run.params
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    run.optimizer.step(lambda: run.optimizer.step())
    entered = []

    def hook(optimizer, args, kwargs):
        if not entered:
            entered.append(True)
            optimizer.step()

    run.optimizer.register_step_post_hook(hook)
    run.optimizer.step()
    torch.testing.assert_close(param.detach(), before - 4)


class Meddler:
    """A number that does something when it is read."""

    def __init__(self, value, act):
        self.value, self.act = value, act

    def __float__(self):
        self.act()
        return self.value

    def __mul__(self, other):
        return float(self) * other

    __rmul__ = __mul__

    def __gt__(self, other):
        return self.value > other


def clear_groups(optimizer):
    """Takes all groups away."""
    optimizer.param_groups.clear()


def clear_group(optimizer):
    """Takes a group's content away."""
    optimizer.param_groups[0].clear()


def clear_params(optimizer):
    """Takes a group's parameters away."""
    optimizer.param_groups[0]["params"].clear()


def clear_state(optimizer):
    """Takes all state away."""
    optimizer.state.clear()


def clear_grads(optimizer):
    """Takes the gradients away."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None


@NATIVE
@pytest.mark.parametrize("place", ["lr", "eps", "grad_scale"])
@pytest.mark.parametrize(
    "meddle", [clear_groups, clear_group, clear_params, clear_state, clear_grads]
)
def test_numbers_that_take_things_away(backend, place, meddle):
    """Reading a number may run any code; what the step works on is looked up afterwards."""
    params = make_params([(5,), (2, 2)], device=device_of(backend))
    optimizer = make_fused(ADAM, params, backend)
    optimizer.add_param_group({"params": make_params([(3,)], device=device_of(backend))})
    every = [param for group in optimizer.param_groups for param in group["params"]]
    set_grads(every, 1)
    optimizer.step()
    before = [param.detach().clone() for param in every]
    del params
    number = Meddler(1.0, lambda: meddle(optimizer))
    if place == "grad_scale":
        optimizer.grad_scale = number
    else:
        optimizer.param_groups[1][place] = number
    try:
        optimizer.step()
    except (KeyError, TypeError, RuntimeError) as error:
        # Whatever the others say of it, nothing had been changed.
        assert all(map(torch.equal, before, every)), error


@NATIVE
def test_a_step_within_a_step_is_refused(backend):
    """By a number of the caller's own type; nothing is changed."""
    run = run_fused(ADAM, make_params([(5,)], device=device_of(backend)), backend).steps(1)
    before = {name: value.clone() for name, value in run.tensors().items()}
    run.optimizer.param_groups[0]["lr"] = Meddler(1.0, lambda: run.optimizer.step())
    with pytest.raises(RuntimeError, match=r"inside of a step\(\)"):
        run.optimizer.step()
    assert_same_bits(run.tensors(), before)
    run.optimizer.param_groups[0]["lr"] = 0.1
    run.steps(1)


@NATIVE
def test_a_plan_goes_through_its_passes_only_when_it_began(backend):
    """What was validated earlier may be gone."""
    run = run_fused(ADAM, make_params([(5,)], device=device_of(backend)), backend).steps(1)
    (plan,) = run.optimizer._pipeline._plans.values()
    one = torch.ones((), dtype=torch.float64, device=device_of(backend))
    with pytest.raises(RuntimeError, match=r"before begin\(\)"):
        plan.reduce(one)
    with pytest.raises(RuntimeError, match=r"before begin\(\)"):
        plan.apply(torch.ones(5, dtype=torch.float64, device=device_of(backend)))


@pytest.mark.parametrize("entry", **ENTRIES)
@pytest.mark.parametrize("backend", backends())
def test_a_gradient_that_is_written_memory(entry, backend):
    """Another parameter's memory, the own one, a state's: as torch has it, whoever runs first."""
    device = device_of(backend)
    shapes = ((6,), (6,), (3,))

    def alias(params, optimizer):
        params[1].grad = params[0].data
        if optimizer.state.get(params[0]):
            name = sorted(name for name in optimizer.state[params[0]] if name != "step")[0]
            params[0].grad = optimizer.state[params[0]][name]
        params[2].grad = params[0].data[2:5]

    results = []
    for make in (entry.stock, entry.fused):
        params = make_params(shapes, device=device)
        own = entry.serial if make is entry.stock else {"backend": backend}
        optimizer = make(params, **richest(entry), **own)
        set_grads(params, 1)
        optimizer.step()
        for _ in range(3):
            alias(params, optimizer)
            optimizer.step()
        set_grads(params, 2)
        optimizer.step()
        results.append({str(i): param.detach() for i, param in enumerate(params)})
    assert_close(results[1], results[0])


@NATIVE
def test_gradients_beside_parameters_in_one_buffer_stay_native(backend):
    """A flat buffer of everything is fine as long as nothing overlaps."""
    flat = torch.arange(24.0, device=device_of(backend))
    param = torch.nn.Parameter(flat[:12])
    optimizer = make_fused(SGD, [param], backend, lr=1.0)
    param.grad = flat[12:]
    optimizer.step()
    assert optimizer.backend_of(param) == backend
    assert optimizer._pipeline._begin(optimizer._training()) == []
    optimizer._pipeline._end()
    torch.testing.assert_close(param.detach(), torch.full((12,), -12.0, device=flat.device))
    param.grad = flat[11:23]
    assert len(optimizer._pipeline._begin(optimizer._training())) == 1
    optimizer._pipeline._end()
