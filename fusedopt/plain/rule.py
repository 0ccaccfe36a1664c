"""One algorithm as the general code sees it: its kernels' name and its class in plain torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices

from .._routing import not_plain


class Training(NamedTuple):
    """What an optimizer trains: torch's three attributes of that name, and who collects it.

    Attributes:
        init_group: `_init_group` of an optimizer that has its own; None for the plain class's.
    """

    param_groups: list[dict[str, Any]]
    state: Any
    defaults: dict[str, Any]
    init_group: Any = None


@dataclass(frozen=True, eq=False)
class PlainRule:
    """An algorithm: the name of its kernels, its class in plain torch, and what to know of both.

    Attributes:
        kernel: The name in ``csrc/rules`` and ``kernels``.
        plain: Torch's class, or one in ``fusedopt.plain``.
        states: Names in ``optimizer.state[parameter]``, besides ``step``, that some variant has.
        has_step: Whether the state counts a parameter's steps.
        scalars: Names of the other numbers in a parameter's state that every step changes.
        starts_unset: The state that is no zeros before its first step but not there at all.
        lerped: States that the plain rule mixes with the gradient by `lerp_`, of the same type.
        always_decouples: Whether weight decay is decoupled without being asked for.
        views_as_real: Whether the plain rule looks at complex tensors through ``view_as_real``.
        fuses_subclasses: Whether torch's fused kernel takes tensor subclasses (DTensor), too.
        captures_on_xla: Whether the plain rule can be captured on XLA devices.
        captured: What has to be on a device that captures, in torch's words.
    """

    kernel: str
    plain: Any
    states: tuple[str, ...]
    has_step: bool = True
    scalars: tuple[str, ...] = ()
    starts_unset: str | None = None
    lerped: tuple[str, ...] = ()
    always_decouples: bool = False
    views_as_real: bool = True
    fuses_subclasses: bool = False
    captures_on_xla: bool = True
    captured: str = "params and state_steps"

    @functools.cached_property
    def counted(self) -> tuple[str, ...]:
        """The names of all that kernels advance by a step: 0-dim tensors of their own."""
        return ("step", *self.scalars)

    @functools.cached_property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of the plain class."""
        return inspect.signature(self.plain).parameters

    @property
    def decays(self) -> bool:
        """Whether the algorithm has weight decay at all."""
        return "weight_decay" in self.arguments

    def _decays_beforehand(self, group: dict[str, Any]) -> bool:
        """Whether a group asks for decoupled decay that the plain class does not know."""
        known = "decoupled_weight_decay" in self.arguments or self.always_decouples
        return self.decays and not known and bool(group.get("decoupled_weight_decay"))

    def collect(self, group: dict[str, Any], state: Any, defaults: dict[str, Any]) -> None:
        """Creates what state is missing, of the parameters in ``group`` that have a gradient.

        Raises:
            KeyError: For a parameter whose state lacks what the plain rule needs.
        """
        runner = _Runner.make(self, Training([group], state, defaults), None)
        runner._init_group(dict(group), *([] for _ in range(runner.list_count)))

    def update(self, group: dict[str, Any], grads: list[Tensor] | None, training: Training) -> None:
        """Updates the parameters of ``group`` that have a gradient.

        Args:
            group: A param group, or a part of one.
            grads: What to use instead of the parameters' own gradients; None for those.
            training: Where the group belongs.
        """
        group = dict(group)
        if "decoupled_weight_decay" in self.arguments:
            group.setdefault("decoupled_weight_decay", False)
        elif self._decays_beforehand(group):
            _shrink(group)
            group["weight_decay"] = 0
        for name, value in group.items():
            # Half of torch's operations broadcast what has one element, and then refuse to write.
            if isinstance(value, Tensor) and value.dim() != 0 and value.numel() == 1:
                group[name] = value.reshape(())
        runner = _Runner.make(self, training._replace(param_groups=[group]), grads)
        runner.plain_step(runner)

    def update_as_collected(self, training: Training, grads: dict[Tensor, Tensor]) -> None:
        """Updates all groups, as they are, of an optimizer that has its own `_init_group`.

        Args:
            training: Of that optimizer.
            grads: What it is to find as the gradient of a parameter.
        """
        given = {param: param.grad for param in grads}
        decays = list(filter(self._decays_beforehand, training.param_groups))
        rates = [group["weight_decay"] for group in decays]
        runner = _Runner.make(self, training, None)
        try:
            for group in decays:
                _shrink(group)
                group["weight_decay"] = 0
            for param, grad in grads.items():
                param.grad = grad
            runner.plain_step(runner)
        finally:
            for param, own in given.items():
                param.grad = own
            for group, rate in zip(decays, rates, strict=True):
                group["weight_decay"] = rate

    @functools.cached_property
    def filled_keys(self) -> dict[str, Any]:
        """The group keys that the plain class fills in where a checkpoint lacks them."""
        group: dict[str, Any] = {"params": []}
        empty: Any = object.__new__(_Runner.type_of(self.plain))
        empty.__setstate__({"defaults": {}, "state": {}, "param_groups": [group]})
        del group["params"]
        return group

    def check_capturable(self, param_groups: list[dict[str, Any]]) -> None:
        """Raises AssertionError, in torch's words, for what asks for capture on a wrong device."""
        for group in param_groups:
            if "capturable" not in self.arguments or not group.get("capturable", False):
                continue
            supported = _get_capturable_supported_devices(self.captures_on_xla)
            if any(param.device.type not in supported for param in group["params"]):
                raise AssertionError(
                    f"If capturable=True, {self.captured} must be on supported devices:"
                    f" {supported}."
                )

    def prepare(self, group: dict[str, Any], training: Training) -> dict[str, Any]:
        """Returns the group that the plain class is to read, after whatever it needs beforehand."""
        return group

    def needed_state(self, group: dict[str, Any], defaults: dict[str, Any]) -> set[str]:
        """Returns the names that a parameter's state must have in such a group, if it has any."""
        param = torch.nn.Parameter(torch.empty(0, device="cpu"))
        param.grad = torch.empty(0, device="cpu")
        state: dict[Tensor, Any] = {param: {}}
        flags = {"fused": None, "foreach": None, "capturable": False, "differentiable": False}
        self.collect({**group, **flags, "params": [param]}, state, defaults)
        return set(state[param])


class _Runner:
    """The part of a class derived from the plain one that has its step run as we need it."""

    rule: PlainRule
    training: Training
    grads: list[Tensor] | None
    list_count: int
    plain_step: Any

    @staticmethod
    @functools.cache
    def type_of(plain: Any) -> Any:
        """Returns the derived class, which no user's hooks or wrappers around a step reach."""
        names = {
            "list_count": len(inspect.signature(plain._init_group).parameters) - 2,
            "plain_step": staticmethod(inspect.unwrap(plain.step)),
        }
        return type(plain.__name__, (_Runner, plain), names)

    @staticmethod
    def make(rule: PlainRule, training: Training, grads: list[Tensor] | None) -> Any:
        runner = object.__new__(_Runner.type_of(rule.plain))
        runner.__dict__.update(training._asdict(), rule=rule, training=training, grads=grads)
        return runner

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        if self.training.init_group is not None:
            return self.training.init_group(group, *lists)
        prepared = self.rule.prepare(group, self.training)
        flags = super()._init_group(prepared, *lists)  # type: ignore[misc]
        if self.grads is not None:
            lists[1][:] = self.grads
        if group.get("fused"):
            group["fused"] = _fuses(self.rule, lists) or None
        return flags

    def _patch_step_function(self) -> None:
        """Leaves torch's class as it is, which would be wrapped once and for all."""

    def _accelerator_graph_capture_health_check(self) -> None:
        """Leaves it to the optimizer whose groups these are."""


def _shrink(group: dict[str, Any]) -> None:
    """Decays the parameters of ``group`` that have a gradient, decoupled from it."""
    shrink = 1 - group["lr"] * group["weight_decay"]
    if isinstance(shrink, Tensor):
        shrink = shrink.reshape(())
    for param in group["params"]:
        if param.grad is not None:
            param.mul_(shrink)


def _fuses(rule: PlainRule, lists: tuple[list[Any], ...]) -> bool:
    """Whether torch's fused kernels are right for these parameters, gradients and states.

    They take tensors for dense and of one type and layout, and momentum buffers for there or not
    there all together; SGD's on the CPU is wrong in half types from 16 elements on (torch 2.13).
    """
    params, *others = filter(None, lists)
    if any(len({value is None for value in values}) > 1 for values in others):
        return False
    for param, *values in zip(params, *others, strict=True):
        if not rule.fuses_subclasses and not_plain(param) is not None:
            return False
        for value in (param, *values):
            if value is None or (value.dim() == 0 and param.dim() != 0):
                continue
            if (
                value.layout != torch.strided
                or not value.is_contiguous()
                or not value.is_floating_point()
                or (value.element_size() == 2 and value.device.type == "cpu")
                or value.dtype != param.dtype
            ):
                return False
    return True
