"""torch's own GradScaler around our optimizers.

Once unscaled, skipped on inf, never synchronised by us: with fused=True, as in torch, where the
scaler leaves all that to the step. What it does without is in test_wrappers.py.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch
from separate_passes import (
    Trio,
    any_nonfinite,
    assert_untouched,
    bad_steps,
    make_grads,
    snapshot,
)

CLIPS = {"max_grad_value": 0.6, "max_grad_norm_per_param": 0.8}


def make_scaler(device: str, **options) -> torch.amp.GradScaler:
    """Returns torch's scaler, ready: its scale exists from the first `scale` on."""
    options = {"init_scale": 64.0, "growth_interval": 2, **options}
    scaler = torch.amp.GradScaler(device, **options)
    scaler.scale(torch.ones((), device=device))
    return scaler


def scaled_step(trio: Trio, scaler, grads, unscale_first: bool) -> None:
    """One step of ours under the scaler, then of the references, by the scale before `update`."""
    for param, grad in zip(trio.ours.params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    scale = scaler.get_scale()
    if unscale_first:
        scaler.unscale_(trio.ours.optimizer)
    before = snapshot(trio.ours)
    scaler.step(trio.ours.optimizer)
    scaler.update()
    trio.follow(grads, scale, any_nonfinite(grads), before)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("unscale_first", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_scaler_with_clips(entry, backend, unscale_first, dtype):
    """With and without unscale_; inf first, midway and last, late gradients, growth in between."""
    device = cases.device_of(backend)
    params = cases.make_params(dtype=dtype, device=device)
    trio = Trio(
        entry, backend, params, [CLIPS, {}], cases.richest(entry), max_grad_norm=0.9, fused=True
    )
    scaler = make_scaler(device)
    for step in range(7):
        poison = math.inf if step in bad_steps(7) else None
        missing = [0, 5] if step < 2 else []
        grads = make_grads(params, step, scaler.get_scale(), missing, poison)
        scaled_step(trio, scaler, grads, unscale_first)
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_half_gradients_under_the_scaler(entry, backend):
    """Torch's unscale_ refuses float16, its step with us does not: judged by the oracle."""
    device = cases.device_of(backend)
    params = cases.make_params(dtype=torch.float16, device=device)
    options = cases.gentle(entry) | {"lr": 0.1}
    trio = Trio(entry, backend, params, [{}], options, max_grad_norm=0.9, fused=True)
    scaler = make_scaler(device, init_scale=512.0)
    for step in range(5):
        poison = math.nan if step in bad_steps(5) else None
        scaled_step(trio, scaler, make_grads(params, step, 512.0, poison=poison), False)
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_prior_unscale_gives_the_same_bits(entry, backend):
    """Dividing by a power of two beforehand or in our pass is the same, and never done twice."""
    device = cases.device_of(backend)
    params = cases.make_params(device=device)
    finished = []
    for unscale_first in (False, True):
        scaler = make_scaler(device, growth_interval=1000)
        run = cases.run_fused(entry, params, backend, max_grad_norm=0.9, fused=True)
        for step in range(4):
            for param, grad in zip(run.params, make_grads(params, step, 64.0), strict=True):
                param.grad = grad
            if unscale_first:
                scaler.unscale_(run.optimizer)
            scaler.step(run.optimizer)
            scaler.update()
        finished.append(run.tensors())
    cases.assert_same_bits(*finished)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("unscale_first", (False, True))
def test_clipping_by_hand_between_unscale_and_step(entry, backend, unscale_first):
    """The loop as trainers write it has torch's result to a few roundings."""
    device = cases.device_of(backend)
    params = cases.make_params(device=device)
    ours, stock = cases.run_fused(entry, params, backend), cases.run_stock(entry, params)
    for run in (ours, stock):
        scaler = make_scaler(device)
        for step in range(5):
            scale = scaler.get_scale()
            poison = math.inf if step in bad_steps(5) else None
            for param, grad in zip(
                run.params, make_grads(params, step, scale, poison=poison), strict=True
            ):
                param.grad = grad
            if unscale_first:
                scaler.unscale_(run.optimizer)
                torch.nn.utils.clip_grad_norm_(run.params, 1.0)
            scaler.step(run.optimizer)
            scaler.update()
    cases.assert_close(
        {name: ours.tensors()[name] for name in stock.tensors()}, stock.tensors(), 4.0
    )


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("unscale_first", (False, True))
def test_preset_grad_scale_is_multiplied_in(entry, backend, unscale_first):
    """A user's factor joins the scaler's, alone after unscale_; both are gone afterwards."""
    device = cases.device_of(backend)
    params = cases.make_params(device=device)
    trio = Trio(
        entry, backend, params, [CLIPS], cases.richest(entry), max_grad_norm=0.9, fused=True
    )
    scaler = make_scaler(device, growth_interval=1000)
    optimizer = trio.ours.optimizer
    for step in range(5):
        poison = -math.inf if step in bad_steps(5) else None
        scale = scaler.get_scale()
        grads = make_grads(params, step, 4.0 * scale, poison=poison)
        for param, grad in zip(trio.ours.params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.grad_scale = torch.tensor(4.0, device=device)
        if unscale_first:
            scaler.unscale_(optimizer)
        before = snapshot(trio.ours)
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        trio.follow(grads, 4.0 * scale, poison is not None, before)
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
def test_errors_are_torchs(backend):
    """unscale_ twice, unscale_ after step, step twice, a closure, no gradients at update."""
    device = cases.device_of(backend)
    run = cases.run_fused(cases.TABLE["Adam"], cases.make_params(device=device), backend)
    scaler = make_scaler(device)
    cases.set_grads(run.params, 1)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(run.optimizer, closure=lambda: None)
    scaler.unscale_(run.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(run.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(run.optimizer)
    scaler.update()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()
    assert run.optimizer.state[run.params[0]]["step"] == 1


@pytest.mark.parametrize("backend", cases.backends())
def test_disabled_scaler_is_transparent(backend):
    """Everything passes through, a closure too, and inf is nobody's business."""
    device = cases.device_of(backend)
    params = cases.make_params(device=device)
    run, plain = (cases.run_fused(cases.TABLE["Adam"], params, backend) for _ in range(2))
    scaler = torch.amp.GradScaler(device, enabled=False)
    for seed in (1, 2):
        for one in (run, plain):
            cases.set_grads(one.params, seed)
        assert scaler.step(run.optimizer, closure=lambda: 5) == 5
        scaler.update()
        plain.optimizer.step()
    cases.assert_same_bits(run.tensors(), plain.tensors())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_ours_and_stock_under_one_scaler(entry, backend):
    """Each is skipped by its own gradients; the scale backs off when either is bad."""
    device = cases.device_of(backend)
    params = cases.make_params(((4,), (3, 2)), device=device)
    ours = cases.run_fused(entry, params, backend, fused=True, **cases.richest(entry))
    stock = cases.run_stock(entry, params, **cases.richest(entry))
    scaler = make_scaler(device, growth_interval=1000)
    for step, bad in enumerate(("ours", "", "stock", "both", "")):
        scale = scaler.get_scale()
        befores = []
        for name, run in (("ours", ours), ("stock", stock)):
            poison = math.nan if bad in (name, "both") else None
            grads = make_grads(params, step, scale, poison=poison)
            for param, grad in zip(run.params, grads, strict=True):
                param.grad = grad
            befores.append(snapshot(run))
        for run in (stock, ours):
            scaler.step(run.optimizer)
        skipped = [bad in (name, "both") for name in ("ours", "stock")]
        for run, before, skip in zip((ours, stock), befores, skipped, strict=True):
            if skip:
                weights = {name: value for name, value in before.items() if "gradient" not in name}
                assert_untouched(run, weights)
        assert bool(ours.optimizer.last_step_skipped) == skipped[0]
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if bad else scale)


@pytest.mark.parametrize("backend", cases.backends())
def test_real_loss_with_schedule_and_accumulation(backend):
    """bfloat16 autocast, two micro-batches a step and OneCycleLR around `step`, against torch."""
    device = cases.device_of(backend)
    finished = []
    for entry_class in ("fused", "stock"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ).to(device)
        entry = cases.TABLE["AdamW"]
        extras = {"max_grad_norm": 0.1, "backend": backend} if entry_class == "fused" else {}
        optimizer = getattr(entry, entry_class)(model.parameters(), lr=1e-2, **extras)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12)
        scaler = make_scaler(device)
        for step in range(12):
            for micro in range(2):
                x = cases.random((32, 8), 100 * step + micro, device=device)
                with torch.autocast(device, torch.bfloat16):
                    loss = (model(x) - x.sum(1, keepdim=True)).square().mean() / 2
                if step == 4:
                    loss = loss * math.inf
                scaler.scale(loss).backward()
            if entry_class == "stock":
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
        finished.append([param.detach() for param in model.parameters()])
    for ours, stock in zip(*finished, strict=True):
        # bfloat16 forward passes turn last bits into 2^-8 of a gradient; Adam's steps of 0.05 at
        # most follow.
        torch.testing.assert_close(ours, stock, rtol=1e-2, atol=1e-2)
