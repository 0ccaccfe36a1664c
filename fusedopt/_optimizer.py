"""What the six optimizers share: our ``step()`` and our settings on top of torch's classes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import (
    _get_capturable_supported_devices,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from . import backends
from ._control import NONFINITE, NORM, SKIP, check_limit
from ._pipeline import Pipeline

#: Group keys of ours, after torch's own, with their defaults.
GROUP_DEFAULTS = {
    "max_grad_norm_per_param": None,
    "max_grad_value": None,
    "decoupled_weight_decay": False,
}
#: Settings of the optimizer as a whole: attributes, pickled with it, never in a group or a
#: checkpoint.
SETTINGS = ("max_grad_norm", "skip_nonfinite", "backend")

EXTRAS_DOC = """\
        max_grad_norm (float | None): Limit of the global L2 norm of all gradients of this
            optimizer, over all groups and devices, after unscaling: they are multiplied by min(1,
            max_grad_norm / (norm + 1e-6)). ``float("inf")`` measures without clipping. Default:
            None, no global norm.
        max_grad_norm_per_param (float | None): The same limit for each parameter's own gradient;
            may differ per group.
            Default: None.
        max_grad_value (float | None): Limits every gradient element to [-max_grad_value,
            max_grad_value]; may differ per group. Combined, the order is: unscale, value, per
            parameter, global. Default: None.
        skip_nonfinite (bool): Leaves parameters, state and counters untouched in a step whose
            gradients hold inf or nan.
            Default: False.
        decoupled_weight_decay (bool): Shrinks the parameter by ``1 - lr * weight_decay`` instead of
            adding ``weight_decay * parameter`` to the gradient; may differ per group.
        backend (str): "auto", "cuda", "triton", "cpu" or "torch". Default: "auto", the fastest that
            serves the device.
        fused (bool | None): False means ``backend="torch"``. Default: None.

    Gradients are read, never written: ``parameter.grad`` keeps the scaled and unclipped values
    after a step.

    Attributes:
        last_grad_norm: 0-dim float32 tensor, the norm that ``max_grad_norm`` was compared with;
            None before the first step or without that limit.
        last_step_skipped: 0-dim bool tensor; None before the first step.

    Raises:
        ValueError: For whatever torch's class refuses (with torch's text), a limit that is not
            above zero, an unknown backend, a setting of the whole optimizer inside a group.
        RuntimeError: For a backend that does not work here."""


class FusedOptimizer(torch.optim.Optimizer):
    """The mixin before torch's class: ``class Adam(FusedOptimizer, torch.optim.Adam)``."""

    #: The name of the rule in ``csrc/rules`` and ``kernels``.
    _rule: ClassVar[str]
    #: Whether the state counts a parameter's steps.
    _has_step: ClassVar[bool] = True
    #: Whether torch's own rule knows decoupled weight decay.
    _torch_decouples: ClassVar[bool] = False
    #: Whether torch's own rule can be captured on XLA devices.
    _captures_on_xla: ClassVar[bool] = True

    _step_supports_amp_scaling = True

    skip_nonfinite: bool = False

    # Class attributes, so that an unpickled optimizer of an older version has them.
    _max_grad_norm: float | None = None
    _backend: str = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_rule" not in cls.__dict__:
            return
        cls.__doc__ = (cls.__doc__ or "").replace("        {extras}", EXTRAS_DOC)
        cls.__signature__ = _joint_signature(cls)  # type: ignore[attr-defined]

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | None = None,
        max_grad_norm_per_param: float | None = None,
        max_grad_value: float | None = None,
        skip_nonfinite: bool = False,
        decoupled_weight_decay: bool | None = None,
        backend: str = "auto",
        fused: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self._pipeline = Pipeline(self)
        self.max_grad_norm = max_grad_norm
        if fused is False:
            if backend not in ("auto", "torch"):
                raise ValueError(
                    f"fused=False means backend='torch', but backend is {backend!r}; pass one of"
                    " them"
                )
            backend = "torch"
        self.backend = backend
        self.skip_nonfinite = bool(skip_nonfinite)
        check_limit("max_grad_norm_per_param", max_grad_norm_per_param, "for the optimizer")
        check_limit("max_grad_value", max_grad_value, "for the optimizer")
        always = self._always_decoupled()
        if always and decoupled_weight_decay is False:
            raise ValueError(
                f"decoupled_weight_decay is False, but {type(self).__name__} always decouples it;"
                " use fusedopt.Adam for L2 weight decay"
            )
        self._group_defaults = {
            "max_grad_norm_per_param": max_grad_norm_per_param,
            "max_grad_value": max_grad_value,
            "decoupled_weight_decay": always or bool(decoupled_weight_decay),
        }
        accepted = inspect.signature(_torch_class(type(self))).parameters
        if "fused" in accepted:
            kwargs["fused"] = fused
        if "decoupled_weight_decay" in accepted:
            kwargs["decoupled_weight_decay"] = bool(decoupled_weight_decay)
        super().__init__(*args, **kwargs)

    @classmethod
    def _always_decoupled(cls) -> bool:
        return issubclass(cls, torch.optim.AdamW)

    @property
    def max_grad_norm(self) -> float | None:
        """Limit of the global gradient norm; see the class."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        check_limit("max_grad_norm", value, "for the optimizer")
        self._max_grad_norm = value

    @property
    def backend(self) -> str:
        """Where the step runs; see the class."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._backend = backends.check(value)
        self._pipeline.reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does, after checking our keys in it.

        Args:
            param_group: ``params`` and whatever should differ from the defaults.

        Raises:
            ValueError: For a limit that is not above zero, a setting of the whole optimizer, or
                ``decoupled_weight_decay=False`` in AdamW.
        """
        for name, default in self._group_defaults.items():
            self.defaults.setdefault(name, default)
        if isinstance(param_group, dict):
            self._check_group({**self._group_defaults, **param_group})
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        where = f"in param group {len(getattr(self, 'param_groups', []))}"
        for name in SETTINGS:
            if name in group:
                raise ValueError(
                    f"{name} is set {where}, but it belongs to the optimizer as a whole; pass it to"
                    f" {type(self).__name__}() or set optimizer.{name}"
                )
        for name in ("max_grad_norm_per_param", "max_grad_value"):
            check_limit(name, group[name], where)
        if self._always_decoupled() and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"decoupled_weight_decay is {group['decoupled_weight_decay']!r} {where}, but"
                f" {type(self).__name__} always decouples it; use fusedopt.Adam for L2 weight decay"
            )

    @torch._disable_dynamo
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Performs one optimization step.

        Args:
            *args: ``closure``, if any: re-evaluates the model and returns the loss; called once,
                with gradients enabled.
            **kwargs: The same by name.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: For a gradient whose shape, device or type does not fit its parameter.
                Nothing has been changed then.
        """
        # A subclass's own step, which called this one, has torch's wrapper around it already.
        if self._step_is_watched() and not getattr(type(self).step, "hooked", False):
            return _watched_step(self, *args, **kwargs)
        return self._unwatched_step(*args, **kwargs)

    def _patch_step_function(self) -> None:
        """Leaves out the wrapper that torch puts around a step, which ``step`` uses when needed.

        It costs more than the step of a small model, also without hooks and profiler.
        """
        if type(self).step is not FusedOptimizer.step:
            super()._patch_step_function()
            return
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    def _step_is_watched(self) -> bool:
        """Whether hooks or a profiler wait for the step."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )

    def _unwatched_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if "capturable" in self.defaults:
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._pipeline.step(self.skip_nonfinite)
        return loss

    step.__signature__ = inspect.signature(_unwatched_step)  # type: ignore[attr-defined]

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The global gradient norm of the last step, as a 0-dim float32 tensor; see the class."""
        control = self._pipeline.control
        if control is None or self.max_grad_norm is None:
            return None
        return control[NORM].to(torch.float32)

    @property
    def last_step_skipped(self) -> Tensor | None:
        """Whether the last step was skipped, as a 0-dim bool tensor; None before the first."""
        control = self._pipeline.control
        return None if control is None else control[SKIP] != 0

    def _step_for_scaler(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Runs ``step``, as wrapped by schedulers and hooks; inf or nan in a gradient skips it.

        Returns:
            What ``step`` returned, and a new 0-dim float32 tensor: nonzero when inf or nan was
            found.
        """
        setting = self.skip_nonfinite
        self.skip_nonfinite = True
        try:
            result = self.step(*args, **kwargs)
        finally:
            self.skip_nonfinite = setting
        assert self._pipeline.control is not None
        return result, self._pipeline.control[NONFINITE].to(torch.float32)

    def _apply_torch_rule(self, group: dict[str, Any], grads: list[Tensor] | None) -> None:
        """Lets torch's rule update the parameters of ``group`` that have a gradient.

        Args:
            group: A param group, or a part of one.
            grads: What to use instead of the parameters' own gradients; None for those.
        """
        if group["decoupled_weight_decay"] and not self._torch_decouples:
            shrink = 1 - group["lr"] * group["weight_decay"]
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(shrink)
            group = {**group, "weight_decay": 0}
        self._update_with_torch(group, grads)

    def _update_with_torch(self, group: dict[str, Any], grads: list[Tensor] | None) -> None:
        raise NotImplementedError

    def _create_state(self, group: dict[str, Any]) -> None:
        """Creates the state of the parameters in ``group`` that have a gradient, as torch does."""
        self._collect(group)

    def _collect(self, group: dict[str, Any]) -> tuple[list[list[Any]], Any]:
        """Returns torch's lists for ``group`` (parameters, gradients, states) and its flags."""
        torch_class: Any = self
        lists: list[list[Any]] = [[] for _ in range(_list_count(torch_class.__class__))]
        return lists, torch_class._init_group(group, *lists)

    def _check_for_torch(self, group: dict[str, Any]) -> None:
        """Raises torch's error for what its rule will refuse, before anything is updated."""
        self._collect(group)

    def _check_capturable(self) -> None:
        for group in self.param_groups:
            if not group.get("capturable", False):
                continue
            supported = _get_capturable_supported_devices(self._captures_on_xla)
            if any(param.device.type not in supported for param in group["params"]):
                raise AssertionError(
                    "If capturable=True, params and state_steps must be on supported devices:"
                    f" {supported}."
                )

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch does, without momentum buffers that no step has set yet."""
        live = self.state
        self.state = self._settled_state()
        try:
            return super().state_dict()
        finally:
            self.state = live

    def _settled_state(self) -> Any:
        """Returns ``self.state`` as stock torch would have it; itself if that is what it is."""
        counters = self._pipeline.counters
        unset = counters.unset_buffers(self.state)
        by_device: dict[torch.device, list[Tensor]] = {}
        for group in self.param_groups:
            if group.get("capturable") or group.get("fused"):
                continue
            for param in group["params"]:
                if param.device.type != "cpu":
                    by_device.setdefault(param.device, []).append(param)
        if not unset and not by_device:
            return self.state
        settled = self.state.copy()
        for params in by_device.values():
            for param, step in counters.host_steps(self.state, params).items():
                settled[param] = {**self.state[param], "step": step}
        for param in unset:
            entries = {k: v for k, v in settled[param].items() if k != "momentum_buffer"}
            if entries:
                settled[param] = entries
            else:
                del settled[param]
        return settled

    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickle and deepcopy keep: torch's entries and our settings."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {**super().__getstate__(), "state": self._settled_state(), **settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a pickle's or checkpoint's content; keys that a group lacks keep their live value.

        Args:
            state: ``state`` and ``param_groups``, and in a pickle everything else.
        """
        live = getattr(self, "param_groups", [])
        for i, group in enumerate(state["param_groups"]):
            kept = live[i] if i < len(live) else GROUP_DEFAULTS
            for name, value in kept.items():
                group.setdefault(name, value)
        self.__dict__.setdefault("_warned_capturable_if_run_uncaptured", True)
        settings = {name: state[name] for name in SETTINGS if name in state}
        super().__setstate__({k: v for k, v in state.items() if k not in settings})
        self._group_defaults = {
            name: self.defaults.setdefault(name, default)
            for name, default in GROUP_DEFAULTS.items()
        }
        self._pipeline = Pipeline(self)
        for name, value in settings.items():
            setattr(self, name, value)


# torch's own wrapper: hooks, in their order, and the profiler's label.
_watched_step: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(
    FusedOptimizer._unwatched_step
)


def _torch_class(cls: type) -> type:
    """Returns torch's own class behind one of ours."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))


@functools.cache
def _list_count(cls: Any) -> int:
    """Returns how many lists torch's `_init_group` fills, besides reading the group."""
    return len(inspect.signature(cls._init_group).parameters) - 2


def _joint_signature(cls: type) -> inspect.Signature:
    """Returns the signature of torch's constructor with our keyword arguments after its own."""
    own = dict(inspect.signature(_torch_class(cls)).parameters)
    ours = inspect.signature(FusedOptimizer.__init__).parameters
    for name, parameter in ours.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            own.setdefault(name, parameter)
    return inspect.Signature(list(own.values()))
