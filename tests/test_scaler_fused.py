"""fusedopt.GradScaler: torch's scaler whose check for inf and nan rides in our reduce pass."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random

import cases
import pytest
import torch
from separate_passes import Trio, any_nonfinite, bad_steps, make_grads, snapshot

import fusedopt

CLIPS = {"max_grad_value": 0.6, "max_grad_norm_per_param": 0.8}
#: torch's unscale_ refuses float16 gradients.
CASES = [
    (dtype, unscale_first)
    for dtype in cases.DTYPES
    for unscale_first in (False, True)
    if not (unscale_first and dtype == torch.float16)
]
CHECK = "_amp_foreach_non_finite_check_and_unscale_"


def make_scaler(device: str, kind: type = fusedopt.GradScaler, **options) -> torch.amp.GradScaler:
    """Returns a scaler that is ready: its scale exists from the first `scale` on."""
    scaler = kind(device, **{"init_scale": 64.0, "growth_interval": 2, **options})
    scaler.scale(torch.ones((), device=device))
    return scaler


def set_grads(run: cases.Run, grads) -> None:
    """Gives a run copies of the gradients."""
    for param, grad in zip(run.params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def forbid(monkeypatch) -> None:
    """Makes torch's own pass over the gradients an error."""

    def never(*args, **kwargs):
        raise AssertionError("an extra pass over the gradients")

    monkeypatch.setattr(torch, CHECK, never)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("dtype, unscale_first", CASES, ids=str)
def test_steps_equal_separate_passes(entry, backend, dtype, unscale_first):
    """With clips, inf first, midway and last, late gradients, and after the user's unscale_."""
    device = cases.device_of(backend)
    params = cases.make_params(dtype=dtype, device=device)
    options = cases.gentle(entry)
    trio = Trio(entry, backend, params, [CLIPS, {}], options, max_grad_norm=0.9)
    scaler = make_scaler(device, growth_interval=3)
    for step in range(7):
        scale = scaler.get_scale()
        poison = math.inf if step in bad_steps(7) else None
        grads = make_grads(params, step, scale, [0, 5] if step < 2 else [], poison)
        set_grads(trio.ours, grads)
        if unscale_first:
            scaler.unscale_(trio.ours.optimizer)
        before = snapshot(trio.ours)
        scaler.step(trio.ours.optimizer)
        scaler.update()
        trio.follow(grads, scale, any_nonfinite(grads), before)
    trio.check()
    assert trio.ours.optimizer.skip_nonfinite is False


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("interval, growth, backoff", ((1, 2.0, 0.5), (3, 1.7, 0.3), (4, 3.0, 0.9)))
def test_growth_and_backoff_are_torchs_to_the_bit(backend, interval, growth, backoff):
    """Scale, tracker and parameters over hundreds of steps with random overflows."""
    device = cases.device_of(backend)
    chance = random.Random(interval)
    params = cases.make_params(((3,), (2, 2)), device=device)
    entry = cases.TABLE["SGD"]
    runs = [cases.run_fused(entry, params, backend, momentum=0.9) for _ in range(2)]
    scalers = [
        make_scaler(
            device, kind, growth_interval=interval, growth_factor=growth, backoff_factor=backoff
        )
        for kind in (fusedopt.GradScaler, torch.amp.GradScaler)
    ]
    for step in range(25 if cases.INTERPRETED else 400):
        poison = chance.choice((math.inf, math.nan)) if chance.random() < 0.25 else None
        grads = make_grads(params, step, poison=poison)
        for run, scaler in zip(runs, scalers, strict=True):
            set_grads(run, grads)
            scaler.step(run.optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale(), step
        assert scalers[0]._get_growth_tracker() == scalers[1]._get_growth_tracker(), step
    cases.assert_same_bits(runs[0].tensors(), runs[1].tensors())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_no_pass_of_its_own(entry, backend, monkeypatch):
    """Torch's check is never called for ours, good step or bad, and gradients are never written."""
    device = cases.device_of(backend)
    run = cases.run_fused(entry, cases.make_params(device=device), backend)
    scaler = make_scaler(device)
    forbid(monkeypatch)
    for poison in (math.inf, None, math.nan):
        set_grads(run, make_grads(run.params, 1, 64.0, poison=poison))
        versions = [param.grad._version for param in run.params]
        scaler.step(run.optimizer)
        scaler.update()
        assert [param.grad._version for param in run.params] == versions
        assert bool(run.optimizer.last_step_skipped) == (poison is not None)
    with pytest.raises(AssertionError, match="extra pass"):
        scaler.unscale_(run.optimizer)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("bad", [*itertools.product((False, True), repeat=3)], ids=str)
def test_several_optimizers_under_one_scaler(backend, bad):
    """Each of two of ours and a stock one skips for itself, and any backs the scale off."""
    device = cases.device_of(backend)
    params = cases.make_params(((4,), (3, 2)), device=device)
    scales, tensors = [], []
    for kind in (fusedopt.GradScaler, torch.amp.GradScaler):
        sgd = {"momentum": 0.9, "dampening": 0.5, "fused": True}
        runs = [
            cases.run_fused(cases.TABLE["SGD"], params, backend, **sgd),
            cases.run_stock(cases.TABLE["Adam"], params),
            cases.run_fused(cases.TABLE["RMSprop"], params, backend, max_grad_norm=1.0, fused=True),
        ]
        scaler = make_scaler(device, kind)
        for pattern in (bad, (False,) * 3, bad):
            scale = scaler.get_scale()
            for i, (run, poisoned) in enumerate(zip(runs, pattern, strict=True)):
                poison = math.inf if poisoned else None
                set_grads(run, make_grads(params, i, scale, poison=poison))
            for run in runs:
                scaler.step(run.optimizer)
            scaler.update()
            for run, poisoned in zip(runs[::2], pattern[::2], strict=True):
                assert bool(run.optimizer.last_step_skipped) == poisoned
            scales.append(scaler.get_scale())
        tensors.append([run.tensors() for run in runs])
    assert scales[:3] == scales[3:]
    for ours, torchs in zip(*tensors, strict=True):
        cases.assert_same_bits(ours, torchs)


@pytest.mark.parametrize(
    "kinds", [*itertools.product((fusedopt.GradScaler, torch.amp.GradScaler), repeat=2)]
)
def test_state_dict_interchanges(kinds):
    """In the middle of a run, both ways; and pickled or copied scalers go on."""
    run = cases.run_fused(cases.TABLE["SGD"], cases.make_params(((3,),)), "auto")
    first = make_scaler("cpu", kinds[0], growth_interval=4)
    for step in range(6):
        set_grads(run, make_grads(run.params, step, poison=math.inf if step == 2 else None))
        first.step(run.optimizer)
        first.update()
    second = make_scaler("cpu", kinds[1], init_scale=3.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = pickle.loads(pickle.dumps(first))
    third.scale(torch.ones(()))
    assert second.state_dict() == first.state_dict() == third.state_dict()
    for step in range(6):
        for scaler in (first, second, third):
            set_grads(run, make_grads(run.params, step, poison=math.inf if step == 4 else None))
            scaler.step(run.optimizer)
            scaler.update()
        assert second.state_dict() == first.state_dict() == third.state_dict()


@pytest.mark.parametrize("backend", cases.backends())
def test_disabled(backend, monkeypatch):
    """A disabled scaler is transparent: no scale, no skip, closures allowed, no check."""
    device = cases.device_of(backend)
    forbid(monkeypatch)
    run = cases.run_fused(cases.TABLE["SGD"], cases.make_params(((3,),), device=device), backend)
    scaler = fusedopt.GradScaler(device, enabled=False)
    loss = torch.ones((), device=device)
    assert scaler.scale(loss) is loss
    set_grads(run, make_grads(run.params, 1, poison=math.nan))
    assert scaler.step(run.optimizer, closure=lambda: 5) == 5
    scaler.unscale_(run.optimizer)
    scaler.update()
    assert not run.optimizer.last_step_skipped
    assert bool(run.params[0].isnan().any())
    assert scaler.state_dict() == {}
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("backend", cases.backends())
def test_errors_are_torchs(backend):
    """For a closure, two steps, unscale_ twice or late, no step, no gradients, no scale yet."""
    device = cases.device_of(backend)
    run = cases.run_fused(cases.TABLE["Adam"], cases.make_params(device=device), backend)
    with pytest.raises(AssertionError, match="_scale is None"):
        fusedopt.GradScaler(device).step(run.optimizer)
    scaler = make_scaler(device)
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler.step(run.optimizer)
    cases.set_grads(run.params, 1)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(run.optimizer, closure=lambda: None)
    scaler.step(run.optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(run.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(run.optimizer)
    scaler.update()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()
    scaler.unscale_(run.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    assert run.optimizer.state[run.params[0]]["step"] == 2


@pytest.mark.parametrize("backend", cases.backends())
def test_an_error_in_the_step_leaves_optimizer_and_scaler_usable(backend):
    """A gradient that does not fit, then the corrected one under the same scaler."""
    device = cases.device_of(backend)
    run = cases.run_fused(cases.TABLE["Adam"], cases.make_params(((4,),), device=device), backend)
    scaler = make_scaler(device)
    calls = []
    hook = run.optimizer.register_step_pre_hook(lambda *args: calls.append(1) or 1 / 0)
    cases.set_grads(run.params, 1)
    with pytest.raises(ZeroDivisionError):
        scaler.step(run.optimizer)
    hook.remove()
    assert not hasattr(run.optimizer, "grad_scale")
    assert run.optimizer.skip_nonfinite is False
    scaler.step(run.optimizer)
    scaler.update()
    assert run.optimizer.state[run.params[0]]["step"] == 1
    assert scaler.get_scale() == 64.0


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_preset_grad_scale_is_multiplied_in(entry, backend):
    """As under torch's scaler, to the bit, for the first step and a bad one."""
    device = cases.device_of(backend)
    params = cases.make_params(device=device)
    finished = []
    for kind in (fusedopt.GradScaler, torch.amp.GradScaler):
        run = cases.run_fused(entry, params, backend, max_grad_norm=0.9, fused=True)
        scaler = make_scaler(device, kind)
        for step in range(4):
            poison = math.inf if step == 2 else None
            set_grads(run, make_grads(params, step, 256.0, poison=poison))
            run.optimizer.grad_scale = torch.tensor(4.0, device=device)
            scaler.step(run.optimizer)
            assert not hasattr(run.optimizer, "grad_scale")
            scaler.update()
        finished.append(run.tensors())
    cases.assert_same_bits(*finished)


@pytest.mark.parametrize("backend", cases.backends())
def test_step_wrapped_by_scheduler_and_hooks(backend):
    """A scheduler's wrapper counts the call, hooks fire once, `step`'s value comes back."""
    device = cases.device_of(backend)
    run = cases.run_fused(cases.TABLE["SGD"], cases.make_params(((3,),), device=device), backend)
    schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    scaler = make_scaler(device)
    fired = []
    run.optimizer.register_step_pre_hook(lambda *args: fired.append("before"))
    run.optimizer.register_step_post_hook(lambda *args: fired.append("after"))
    cases.set_grads(run.params, 1)
    assert scaler.step(run.optimizer) is None
    schedule.step()
    assert fired == ["before", "after"]
    assert run.optimizer._opt_called


@pytest.mark.parametrize("backend", cases.backends())
def test_resume_in_the_middle(backend):
    """Through state_dict after a skipped step: the bits of an uninterrupted run."""
    device = cases.device_of(backend)
    params = cases.make_params(device=device)
    finished = []
    for interrupted in (False, True):
        run = cases.run_fused(cases.TABLE["Adam"], params, backend, max_grad_norm=0.5)
        scaler = make_scaler(device)
        for step in range(8):
            if interrupted and step in (1, 5):
                own = cases.copies(run.params)
                optimizer = cases.make_fused(cases.TABLE["Adam"], own, backend, max_grad_norm=0.5)
                optimizer.load_state_dict(run.optimizer.state_dict())
                run = cases.Run(own, optimizer)
                saved, scaler = scaler.state_dict(), make_scaler(device, init_scale=2.0)
                scaler.load_state_dict(saved)
            poison = math.inf if step in (0, 4) else None
            set_grads(run, make_grads(params, step, scaler.get_scale(), poison=poison))
            scaler.step(run.optimizer)
            scaler.update()
        finished.append(run.tensors() | {"scale": torch.tensor(scaler.get_scale())})
    cases.assert_same_bits(*finished)


@pytest.mark.parametrize("backend", cases.backends())
def test_bad_gradients_hidden_by_a_clamp_are_found(backend):
    """max_grad_value turns inf into a number, but the scaler must still back off."""
    device = cases.device_of(backend)
    params = cases.make_params(((5,), (40,)), device=device)
    run = cases.run_fused(cases.TABLE["SGD"], params, backend, max_grad_value=1.0)
    scaler = make_scaler(device)
    set_grads(run, make_grads(params, 1, poison=-math.inf))
    scaler.step(run.optimizer)
    scaler.update()
    assert run.optimizer.last_step_skipped
    assert scaler.get_scale() == 32.0
    for param in run.params:
        param.grad = torch.full_like(param, 1e30)
    scaler.step(run.optimizer)
    scaler.update()
    assert not run.optimizer.last_step_skipped
    assert scaler.get_scale() == 32.0
