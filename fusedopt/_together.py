"""A step that several plans do together, or plans and plain rules: one norm, one skip flag."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import _control
from ._control import GradTransform
from ._counters import StepCounters
from ._settings import Settings
from .backends.interface import Plan
from .plain.rule import PlainRule, Training


def labelled(name: str, run: Callable[..., Any], *args: Any) -> Any:
    """Calls ``run`` and, for a profiler that looks on, names what it does."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return run(*args)
    with torch.profiler.record_function(f"fusedopt::{name}"):
        return run(*args)


@dataclass
class Together:
    """What takes part in one step.

    Attributes:
        rule: The algorithm.
        training: What the optimizer trains.
        settings: Of the optimizer.
        plans: Of the native backends, each begun.
        groups: The parts of the groups that take the plain rule; all have gradients, unless the
            optimizer collects them itself.
        shared: The ids of those parameters that share memory with others.
        counters: Of the applied steps.
    """

    rule: PlainRule
    training: Training
    settings: Settings
    plans: dict[torch.device, Plan]
    groups: list[dict[str, Any]]
    shared: Collection[int]
    counters: StepCounters

    def step(self) -> Tensor:
        """Runs the step; returns its control tensor."""
        settings, plans = self.settings, self.plans
        grad_scale = settings.handed.get("grad_scale")
        found_inf = settings.handed.get("found_inf")
        limit = settings.max_grad_norm
        plain = [param for group in self.groups for param in group["params"]]
        homes = (param.device for param in plain if param.device.type != "meta")
        home = next(chain(plans, homes), torch.device("cpu"))
        reduces = bool(settings.reducing(self.training.param_groups))
        transforms: dict[Tensor, GradTransform] = {}
        if grad_scale is None and found_inf is None and not reduces:
            transforms = self._transforms(False, 1.0)
            control = _control.nothing(home)
        else:
            unscale = _control.unscale_factor(grad_scale, home)
            # Plain rules take numbers of the host: with them, a step may synchronise.
            factor = unscale.item() if plain and grad_scale is not None else 1.0
            transforms = self._transforms(reduces, factor)
            totals = []
            if reduces:
                totals = [
                    labelled("reduce", plan.reduce, unscale.to(device))
                    for device, plan in plans.items()
                ]
                totals += [transform.reduce(_grad(p)) for p, transform in transforms.items()]
            control = _control.settle(totals, unscale, found_inf, limit, settings.skips)
        may_skip = found_inf is not None or settings.skips
        if plain and not (may_skip and control[_control.SKIP].item() != 0):
            clip = 1.0 if limit is None else control[_control.CLIP].item()
            self.counters.drop_unset(plain, self.training.state)
            if self.training.init_group is None:
                for group in self.groups:
                    self._update(group, transforms, clip)
            else:
                grads = {p: t.apply(_grad(p), clip) for p, t in transforms.items()}
                self.rule.update_as_collected(self.training, grads)
        for device, plan in plans.items():
            labelled(self.rule.kernel, plan.apply, control.to(device))
        return control

    def _transforms(self, reduces: bool, factor: float) -> dict[Tensor, GradTransform]:
        """What happens to the gradients before plain rules see them, where anything may."""
        return {
            param: GradTransform(param, group, factor)
            for group in self.groups
            for everything in [reduces or factor != 1.0 or _control.limits(group)]
            for param in group["params"]
            if param.grad is not None and (everything or param.grad.is_conj())
        }

    def _update(
        self, group: dict[str, Any], transforms: dict[Tensor, GradTransform], clip: float
    ) -> None:
        """Updates a group: whole, or one by one what shares memory or is transformed.

        No more than one gradient is copied at a time.
        """
        single = []
        if transforms or self.shared:
            single = [
                param
                for param in group["params"]
                if id(param) in self.shared
                or (param in transforms and not (clip == 1.0 and transforms[param].is_identity))
            ]
        alone = set(map(id, single))
        if whole := [param for param in group["params"] if id(param) not in alone]:
            self.rule.update({**group, "params": whole}, None, self.training)
        for param in single:
            grads = [transforms[param].apply(_grad(param), clip)] if param in transforms else None
            self.rule.update({**group, "params": [param]}, grads, self.training)


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
