"""Random histories: which gradients are there, which are bad, who scales, which clips.

Against torch's separate passes.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from separate_passes import Trio, any_nonfinite, make_grads, snapshot

import fusedopt

#: A limit of a group or the optimizer: none, one that bites, one that hardly does, measuring only.
LIMITS = st.sampled_from((None, 0.3, 3.0, math.inf))
GROUPS = st.lists(
    st.fixed_dictionaries(
        {
            "max_grad_value": LIMITS,
            "max_grad_norm_per_param": LIMITS,
            "lr": st.sampled_from((0.01, 0.1)),
            "weight_decay": st.sampled_from((0.0, 0.1)),
            "maximize": st.booleans(),
        }
    ),
    min_size=1,
    max_size=3,
)
SHAPES = ((7,), (2, 3), (0,), (), (33,))
#: One step: parameters without a gradient, what overflows, how it is scaled, another limit from now
#: on, a fresh start.
STEPS = st.lists(
    st.fixed_dictionaries(
        {
            "missing": st.sets(st.integers(0, len(SHAPES) - 1)),
            "poison": st.sampled_from((None, None, None, math.inf, -math.inf, math.nan)),
            "scaler": st.sampled_from(
                ("none", "preset", "found_inf", "torch", "unscaled", "fused")
            ),
            "limit": st.one_of(st.just("keep"), LIMITS),
            "reload": st.sampled_from((False, False, True)),
        }
    ),
    min_size=1,
    max_size=8,
)
DTYPES = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))


class History:
    """Plays steps on three twins: ours and the two references."""

    def __init__(self, entry, backend, dtype, groups, options) -> None:
        device = cases.device_of(backend)
        params = cases.make_params(SHAPES, dtype, device)
        self.entry, self.backend, self.groups, self.options = entry, backend, groups, options
        self.trio = Trio(entry, backend, params, groups, options, skip_nonfinite=True, fused=True)
        self.scalers = {
            name: kind(device, init_scale=16.0, growth_interval=1000)
            for name, kind in (("torch", torch.amp.GradScaler), ("fused", fusedopt.GradScaler))
        }
        for scaler in self.scalers.values():
            scaler.scale(torch.ones((), device=device))

    def reload(self) -> None:
        """Goes on in a new optimizer from a checkpoint."""
        old = self.trio.ours
        own = cases.copies(old.params)
        groups = [{"params": own[i :: len(self.groups)]} for i in range(len(self.groups))]
        fresh = cases.make_fused(
            self.entry,
            groups,
            self.backend,
            skip_nonfinite=True,
            fused=True,
            max_grad_norm=old.optimizer.max_grad_norm,
        )
        fresh.load_state_dict(old.optimizer.state_dict())
        self.trio.ours = cases.Run(own, fresh)

    def play(self, seed: int, step) -> None:
        """One step with everything compared that can be at once."""
        trio = self.trio
        if step["reload"]:
            self.reload()
        optimizer = trio.ours.optimizer
        if step["limit"] != "keep":
            optimizer.max_grad_norm = step["limit"]
        missing = set(step["missing"])
        if step["poison"] is not None or step["scaler"] in ("torch", "unscaled", "fused"):
            missing.discard(0)
        how = step["scaler"]
        scaler = self.scalers["fused" if how == "fused" else "torch"]
        scale = {"none": 1.0, "preset": 8.0, "found_inf": 8.0}.get(how) or scaler.get_scale()
        poison = step["poison"]
        if how == "unscaled" and poison is not None:
            poison = math.nan
        grads = make_grads(trio.ours.params, seed, scale, sorted(missing), poison)
        if how in ("none", "preset", "found_inf"):
            trio.step(grads, None if how == "none" else scale, 2.0 if how == "found_inf" else 0.0)
            return
        for param, grad in zip(trio.ours.params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        if how == "unscaled":
            scaler.unscale_(optimizer)
        before = snapshot(trio.ours)
        scaler.step(optimizer)
        scaler.update()
        bad = any_nonfinite(grads)
        assert scaler.get_scale() == (scale / 2 if bad else scale)
        trio.follow(grads, scale, bad, before)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@settings(
    max_examples=2 if cases.INTERPRETED else 15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_history_equals_separate_passes(entry, backend, data):
    """Any pattern of gradients, overflows, scalers and clips, with checkpoints in between."""
    dampening = {"dampening": 0.5} if entry.takes("dampening") else {}
    options = cases.gentle(entry) | dampening
    dtype = data.draw(DTYPES)
    groups = [entry.known(**group) for group in data.draw(GROUPS)]
    history = History(entry, backend, dtype, groups, options)
    for seed, step in enumerate(data.draw(STEPS)):
        history.play(seed, step)
    history.trio.check()
