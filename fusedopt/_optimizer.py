"""What all optimizers share: our ``step()`` and our settings on top of plain classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import _checkpoint
from ._attributes import WithSettings
from ._control import NONFINITE, check_limit
from ._pipeline import Pipeline
from ._settings import EXTRAS_DOC, GROUP_KEYS, SETTINGS, check_flag, read_backend
from .plain.rule import PlainRule, Training

#: Settings by their names in pickles; older versions had some under another.
_PICKLED = {
    **{name: name for name in (*SETTINGS, "fused")},
    "_max_grad_norm": "max_grad_norm",
    "_backend": "backend",
}


#: Our class of each plain one.
TWINS: dict[type, type[FusedOptimizer]] = {}


class FusedOptimizer(WithSettings, torch.optim.Optimizer):
    """The mixin before a plain class: ``class Adam(FusedOptimizer, torch.optim.Adam)``."""

    _rule: ClassVar[PlainRule]
    _init_group: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_rule" not in cls.__dict__:
            return
        TWINS[cls._rule.plain] = cls
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
        arguments = self._rule.arguments
        for name in kwargs.keys() - arguments.keys():
            known = [*arguments, *GROUP_KEYS, *SETTINGS]
            hints = [f"did you mean {near!r}?" for near in get_close_matches(name, known, 1)]
            if name == "weight_decay":
                hints = [f"{type(self).__name__} has no weight decay"]
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument {name!r}"
                + "".join(f"; {hint}" for hint in hints)
            )
        self._pipeline = Pipeline(self._rule)
        self.max_grad_norm = max_grad_norm
        self.backend = read_backend(backend, fused)
        self.skip_nonfinite = skip_nonfinite
        self._pipeline.settings.fused = fused
        values = (max_grad_norm_per_param, max_grad_value, decoupled_weight_decay)
        given = {k: v for k, v in zip(GROUP_KEYS, values, strict=True) if v is not None}
        self._check_group_keys(given, "for the optimizer")
        given = {name: value for name, value in given.items() if value is not False}
        if "fused" in arguments:
            kwargs["fused"] = fused
        if "decoupled_weight_decay" in arguments and "decoupled_weight_decay" in given:
            kwargs["decoupled_weight_decay"] = given.pop("decoupled_weight_decay")
        super().__init__(*args, **kwargs)
        for group in (self.defaults, *self.param_groups):
            for name, value in given.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does, after checking our keys in it.

        Args:
            param_group: ``params`` and whatever should differ from the defaults.

        Raises:
            ValueError: For a limit that is not above zero, a setting of the whole optimizer,
                ``decoupled_weight_decay=False`` in AdamW, or weight decay in Rprop.
        """
        if isinstance(param_group, dict):
            where = f"in param group {len(getattr(self, 'param_groups', []))}"
            for name in SETTINGS:
                if name in param_group:
                    raise ValueError(
                        f"{name} is {param_group[name]!r} {where}, but it belongs to the optimizer"
                        f" as a whole; {self._way_out(name)}"
                    )
            for name in param_group.keys() - self.defaults.keys() - set(GROUP_KEYS):
                if near := get_close_matches(str(name), GROUP_KEYS, 1, 0.9):
                    raise ValueError(
                        f"{name!r} is set {where}, but nothing reads it; did you mean {near[0]!r}?"
                    )
            self._check_group_keys(param_group, where)
        super().add_param_group(param_group)

    def _way_out(self, name: str) -> str:
        """Says what to do with a setting of the whole optimizer that came in a group."""
        text = f"pass it to {type(self).__name__}() itself, or set optimizer.{name}"
        if name == "backend":
            return text
        instead = (
            "clip all parameters with torch.nn.utils.clip_grad_norm_ before the step"
            if name == "max_grad_norm"
            else "leave it out"
        )
        return (
            f"{text}. A wrapper that gives each process a part of the parameters, such as"
            " ZeroRedundancyOptimizer, cannot have it, for it would see that part's gradients only;"
            f" there, {instead}"
        )

    def _check_group_keys(self, values: dict[str, Any], where: str) -> None:
        for name in ("max_grad_norm_per_param", "max_grad_value"):
            check_limit(name, values.get(name), where)
        decoupled = values.get("decoupled_weight_decay")
        check_flag("decoupled_weight_decay", decoupled, where)
        for name in () if self._rule.decays else ("weight_decay", "decoupled_weight_decay"):
            value = values.get(name)
            if value is not None and (isinstance(value, Tensor) or value != 0):
                raise ValueError(
                    f"{name} is {value!r} {where}, but {type(self).__name__} has no weight decay;"
                    " leave it out"
                )
        if self._rule.always_decouples and not values.get("decoupled_weight_decay", True):
            raise ValueError(
                f"decoupled_weight_decay is {decoupled!r} {where}, but"
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
            self._pipeline.step(self._training())
        return loss

    # What a TypeError calls it.
    _unwatched_step.__qualname__ = "FusedOptimizer.step"

    step.__signature__ = inspect.signature(_unwatched_step)  # type: ignore[attr-defined]

    def _step_for_scaler(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """Runs ``step``, as wrapped by schedulers and hooks; inf or nan in a gradient skips it.

        Returns:
            What ``step`` returned, and a new 0-dim float32 tensor: nonzero when inf or nan was
            found; None when a ``step`` of a subclass did not call ours.
        """
        pipeline = self._pipeline
        before, pipeline.control = pipeline.control, None
        pipeline.settings.checks_for_scaler = True
        try:
            result = self.step(*args, **kwargs)
        finally:
            pipeline.settings.checks_for_scaler = False
            control = pipeline.control
            if control is None:
                pipeline.control = before
        return result, None if control is None else control[NONFINITE].to(torch.float32)

    def backend_of(self, param: Tensor) -> str:
        """Returns which backend updates a parameter in the next step.

        Args:
            param: One of this optimizer's.

        Returns:
            "cuda", "triton", "cpu", or "torch" for the plain algorithm.

        Raises:
            ValueError: If the parameter is not in ``param_groups``.
            RuntimeError: If the next step would raise it.
        """
        return self._pipeline.backend_of(param, self._training())

    def _training(self) -> Training:
        own = self._init_group if self._collects_itself() else None
        return Training(self.param_groups, self.state, self.defaults, own)

    def _collects_itself(self) -> bool:
        """Whether a subclass collects states and gradients in its own way, which kernels do not."""
        return type(self)._init_group is not self._rule.plain._init_group or (
            "_init_group" in self.__dict__
        )

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch does, without momentum buffers that no step has set yet."""

        # Before the hooks of users: they see what they would see of torch's class.
        def settle(optimizer: Any, packed: dict[str, Any]) -> None:
            counters = optimizer._pipeline.counters
            _checkpoint.settle(self._rule, counters, optimizer._training(), packed)

        handle = self.register_state_dict_post_hook(settle, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a checkpoint of ours or of torch's class, as torch does, or leaves all as it was.

        Group keys of ours that it lacks keep their values.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            KeyError: For a group or a parameter's state that lacks what the rule needs.
            TypeError: For what is no dict, list or tensor where one belongs.
            ValueError: For other numbers of groups or parameters, or tensors of another shape.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict is a {type(state_dict).__name__}; expected the dict that"
                " optimizer.state_dict() returned"
            )

        final: dict[str, Any] = {}

        # After the hooks of users: they may make a checkpoint fit.
        def check(optimizer: Any, checkpoint: dict[str, Any]) -> None:
            _checkpoint.check(self._rule, optimizer._training(), checkpoint)
            final.update(checkpoint)

        # Before them: they see what has been loaded.
        def keep_scalars(optimizer: Any) -> None:
            _checkpoint.keep_scalars(self._rule, optimizer._training(), final)

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(keep_scalars, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickle and deepcopy keep: torch's entries and our settings."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings["fused"] = self._pipeline.settings.fused
        counters = self._pipeline.counters
        state = _checkpoint.settled_state(self._rule, counters, self._training())
        return {**super().__getstate__(), "state": state, **settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a pickle's or checkpoint's content; group keys of ours that it lacks stay.

        Args:
            state: ``state``, ``param_groups``, and in a pickle everything else.
        """
        live_groups = getattr(self, "param_groups", [])
        for i, group in enumerate(state.get("param_groups", [])):
            live = live_groups[i] if i < len(live_groups) else {}
            for name in GROUP_KEYS:
                if name not in self._rule.arguments and name in live:
                    group.setdefault(name, live[name])
        self.__dict__.setdefault("_warned_capturable_if_run_uncaptured", True)
        settings = {name: state[key] for key, name in _PICKLED.items() if key in state}
        super().__setstate__({k: v for k, v in state.items() if k not in _PICKLED})
        if "_pipeline" not in self.__dict__:
            self._pipeline = Pipeline(self._rule)
        # A graph may have captured what the pipeline holds, so it stays the same.
        self._pipeline.reset()
        self._pipeline.settings.fused = settings.pop("fused", self._pipeline.settings.fused)
        for name, value in settings.items():
            setattr(self, name, value)


# torch's own wrapper: hooks, in their order, and the profiler's label.
_watched_step: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(
    FusedOptimizer._unwatched_step
)


def _joint_signature(cls: type[FusedOptimizer]) -> inspect.Signature:
    """Returns the signature of the plain constructor with our keyword arguments after its own."""
    own = dict(cls._rule.arguments)
    ours = inspect.signature(FusedOptimizer.__init__).parameters
    for name, parameter in ours.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            own.setdefault(name, parameter)
    return inspect.Signature(list(own.values()))
