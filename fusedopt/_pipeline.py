"""One optimizer's step: validate everything, reduce, settle the step control, apply.

The pipeline owns the plans of the native backends and the parameters that take torch's rules. It is
built anew whenever the structure of the optimizer changes, and is no part of a pickle or
checkpoint.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _control, _routing, backends
from ._control import GradTransform
from ._counters import StepCounters

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer


class Pipeline:
    """The step of one optimizer over all its plans."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        # Weak, or a cycle would keep parameters and state alive until the collector runs.
        self._reference = weakref.ref(optimizer)
        self._plans: dict[torch.device, Any] | None = None
        # The plan of all parameters, where there is just one and nothing else to ask.
        self._only_plan: Any = None
        # A graph may have captured a plan that is gone, and writes to its control tensor.
        self._captured: list[Tensor] = []
        self._torch_params: list[Tensor] = []
        self._group_of: dict[Tensor, int] = {}
        self._order: dict[Tensor, int] = {}
        self._listed_twice = False
        self._sharded: Tensor | None = None
        self.counters = StepCounters()
        #: float64[5] in the order of ``StepControl``: what the last step left; None before the
        #: first.
        self.control: Tensor | None = None

    @property
    def _optimizer(self) -> FusedOptimizer:
        optimizer = self._reference()
        assert optimizer is not None
        return optimizer

    def reset(self) -> None:
        """Makes the next step build its plans anew."""
        for device, plan in (self._plans or {}).items():
            if device.type != "cpu":
                self._captured.append(plan.control)
        self._plans = self._only_plan = None

    def step(self, skip_nonfinite: bool) -> None:
        """Runs one step; raises before anything is changed when something does not fit."""
        optimizer = self._optimizer
        plan = self._only_plan
        if plan is not None:
            attention = plan.begin(optimizer.param_groups, optimizer.state)
            if attention is None:
                self._step_alone(plan, skip_nonfinite)
                return
            if attention[0]:
                self.reset()
        plans, foreign = self._validate()
        if self._sharded is not None and self._reduces(skip_nonfinite):
            raise NotImplementedError(
                "max_grad_norm, max_grad_norm_per_param and skip_nonfinite over a"
                f" {type(self._sharded).__name__} would see only this process's shard; leave them"
                " unset and clip with torch.nn.utils.clip_grad_norm_ (DTensor) or"
                " FSDP.clip_grad_norm_ before the step"
            )
        if len(plans) == 1 and not foreign:
            (plan,) = plans.values()
            self._step_alone(plan, skip_nonfinite)
        else:
            self._step_together(plans, foreign, skip_nonfinite)

    def _step_alone(self, plan: Any, skip_nonfinite: bool) -> None:
        """Runs a step that one plan does alone."""
        optimizer = self._optimizer
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        plan.step(grad_scale, found_inf, optimizer.max_grad_norm, skip_nonfinite)
        self.control = plan.control

    def _reduces(self, skip_nonfinite: bool) -> bool:
        """Whether a step needs to know all gradients before the first update."""
        optimizer = self._optimizer
        return (
            optimizer.max_grad_norm is not None
            or skip_nonfinite
            or any(g.get("max_grad_norm_per_param") is not None for g in optimizer.param_groups)
        )

    def backend_of(self, param: Tensor) -> str:
        """Returns the name of the backend that updates ``param``."""
        plans, _ = self._validate()
        by_torch = any(param is other for other in self._torch_params)
        if by_torch or param.device not in plans:
            return "torch"
        backend = backends.for_device(self._optimizer.backend, param.device)
        return "torch" if backend is None else backend.NAME

    def _validate(self) -> tuple[dict[torch.device, Any], list[Tensor]]:
        """Returns plans that hold for this step, and the parameters for torch's rules."""
        # A first look may find a plan outdated, a second state missing.
        for _ in range(3):
            if self._plans is not None and self._structure_changed():
                self.reset()
            if self._plans is None:
                self._plans = self._build()
            rebuild, missing, foreign = self._begin(self._plans)
            if not rebuild and not missing:
                break
            if missing:
                self._create_state(missing)
            self.reset()
        else:
            raise RuntimeError(
                "param_groups or state change while a step is being prepared; do not write to them"
                " from another thread, and keep tensors under torch's names in optimizer.state"
            )
        assert self._plans is not None
        if len(self._plans) == 1 and not self._torch_params and self._sharded is None:
            (self._only_plan,) = self._plans.values()
        foreign += [param for param in self._torch_params if param.grad is not None]
        foreign.sort(key=lambda param: self._order[param])
        for param in foreign:
            self._check_values(param)
            self._optimizer._check_for_torch(self._subgroup([param]))
        return self._plans, foreign

    def _check_values(self, param: Tensor) -> None:
        """Raises ValueError for what torch's rule would take wrongly or refuse too late."""
        index = self._group_of[param]
        for name in ("max_grad_norm_per_param", "max_grad_value"):
            group = self._optimizer.param_groups[index]
            _control.check_limit(name, group.get(name), f"in param group {index}")
        grad = _grad(param)
        fits = grad.is_complex() if param.is_complex() else grad.is_floating_point()
        if fits and grad.shape == param.shape and grad.device == param.device:
            return
        members = self._optimizer.param_groups[index]["params"]
        position = next(i for i, member in enumerate(members) if member is param)
        raise ValueError(
            f"the gradient of parameter {position} of param group {index} is {_describe(grad)};"
            " expected a floating-point tensor shaped like the parameter,"
            f" {_describe(param)}. Set parameter.grad = None and run backward again"
        )

    def _begin(self, plans: dict[torch.device, Any]) -> tuple[bool, list[Tensor], list[Tensor]]:
        optimizer = self._optimizer
        rebuild, missing, foreign = False, [], []
        for plan in plans.values():
            attention = plan.begin(optimizer.param_groups, optimizer.state)
            if attention is not None:
                rebuild |= attention[0]
                missing += attention[1]
                foreign += attention[2]
        return rebuild, missing, foreign

    def _structure_changed(self) -> bool:
        """Whether groups changed where no plan looks: among parameters for torch's rules."""
        if not self._torch_params:
            return False
        current = self._entries()
        return len(current) != len(self._order) or any(
            self._order.get(param) != i or self._group_of[param] != index
            for i, (index, param) in enumerate(current)
        )

    def _entries(self) -> list[tuple[int, Tensor]]:
        """Returns every parameter with the index of its group, in order."""
        return [
            (index, param)
            for index, group in enumerate(self._optimizer.param_groups)
            for param in group["params"]
        ]

    def _build(self) -> dict[torch.device, Any]:
        optimizer = self._optimizer
        entries = self._entries()
        _refuse_while_capturing({param.device.type for _, param in entries})
        optimizer._check_capturable()
        self._order = {param: i for i, (_, param) in enumerate(entries)}
        self._group_of = {param: index for index, param in entries}
        self._sharded = _routing.sharded(self._order)
        self._listed_twice = len(self._order) != len(entries)
        if self._listed_twice:
            # torch updates a parameter that is listed twice twice, and has warned about it.
            self._torch_params = [param for _, param in entries]
            return {}
        by_device, self._torch_params = self._route(entries)
        plans = {}
        for device, members in by_device.items():
            backend = backends.for_device(optimizer.backend, device)
            assert backend is not None
            self.counters.adopt([param for _, param in members], optimizer.state, device)
            slots = [(index, param, self.counters.view(param)) for index, param in members]
            plans[device] = backend.make_plan(
                optimizer._rule, device, slots, optimizer.param_groups, optimizer.state
            )
        return plans

    def _route(
        self, entries: list[tuple[int, Tensor]]
    ) -> tuple[dict[torch.device, list[tuple[int, Tensor]]], list[Tensor]]:
        optimizer = self._optimizer
        native = []
        torch_params = []
        for index, param in entries:
            group = optimizer.param_groups[index]
            odd = _routing.not_plain(param)
            if odd is not None and optimizer.backend not in ("auto", "torch"):
                raise ValueError(
                    f"parameter {self._order[param]} is {odd}, which backend={optimizer.backend!r}"
                    " cannot read; use backend='auto' or 'torch'"
                )
            if odd is not None or _routing.needs_torch_rule(
                param, group, optimizer.state.get(param, {})
            ):
                torch_params.append(param)
            elif backends.for_device(optimizer.backend, param.device) is None:
                torch_params.append(param)
            else:
                native.append((index, param))
        shared = _routing.sharing_memory(
            (param, [param, *self._state_tensors(param)]) for _, param in native
        )
        by_device = defaultdict(list)
        for index, param in native:
            if param in shared:
                torch_params.append(param)
            else:
                by_device[param.device].append((index, param))
        return dict(by_device), torch_params

    def _state_tensors(self, param: Tensor) -> list[Tensor]:
        entries = self._optimizer.state.get(param, {})
        return [
            value for key, value in entries.items() if isinstance(value, Tensor) and key != "step"
        ]

    def _create_state(self, params: list[Tensor]) -> None:
        by_group = defaultdict(list)
        for param in params:
            by_group[self._group_of[param]].append(param)
        for index, members in by_group.items():
            group = self._optimizer.param_groups[index]
            self._optimizer._create_state({**group, "params": members})

    def _step_together(
        self,
        plans: dict[torch.device, Any],
        foreign: list[Tensor],
        skip_nonfinite: bool,
    ) -> None:
        """Runs a step over several plans or with torch's rules, under one norm and skip flag."""
        optimizer = self._optimizer
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        limit = optimizer.max_grad_norm
        places = [*plans, *(param.device for param in foreign if param.device.type != "meta")]
        home = places[0] if places else torch.device("cpu")
        unscale = _control.unscale_factor(grad_scale, home)
        # Torch's rules take numbers of the host: with them, a step may synchronise.
        factor = unscale.item() if foreign and grad_scale is not None else 1.0
        transforms = {
            param: GradTransform(param, optimizer.param_groups[self._group_of[param]], factor)
            for param in foreign
        }
        totals = []
        if self._reduces(skip_nonfinite):
            totals = [plan.reduce(unscale.to(device)) for device, plan in plans.items()]
            totals += [transforms[param].reduce(_grad(param)) for param in foreign]
        self.control = _control.settle(totals, unscale, found_inf, limit, skip_nonfinite)
        may_skip = found_inf is not None or skip_nonfinite
        if foreign and not (may_skip and self.control[_control.SKIP].item() != 0):
            clip = 1.0 if limit is None else self.control[_control.CLIP].item()
            self._apply_torch_rules(foreign, transforms, clip)
        for device, plan in plans.items():
            plan.apply(self.control.to(device))

    def _apply_torch_rules(
        self, foreign: list[Tensor], transforms: dict[Tensor, GradTransform], clip: float
    ) -> None:
        optimizer = self._optimizer
        plain = clip == 1.0 and all(transform.is_identity for transform in transforms.values())
        if plain and not self._plans:
            by_group = defaultdict(list)
            for param in foreign:
                by_group[self._group_of[param]].append(param)
            for members in by_group.values():
                optimizer._apply_torch_rule(self._subgroup(members), None)
            return
        for param in foreign:
            grad = transforms[param].apply(_grad(param), clip)
            optimizer._apply_torch_rule(self._subgroup([param]), [grad])

    def _subgroup(self, params: list[Tensor]) -> dict[str, Any]:
        group = self._optimizer.param_groups[self._group_of[params[0]]]
        return {**group, "params": params}


def _refuse_while_capturing(device_types: set[str]) -> None:
    """Raises RuntimeError under graph capture: state and tables are made outside of it."""
    # Not torch.accelerator.current_stream(), which in torch 2.11 cannot say it.
    graphs = device_types & {"cuda", "xpu"}
    if any(getattr(torch, kind).is_current_stream_capturing() for kind in graphs):
        raise RuntimeError(
            "step() is captured in a graph before its state and tables exist, or after the"
            " parameters or groups changed; run one warm-up step outside of the capture"
        )


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
