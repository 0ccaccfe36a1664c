"""What a user may set on an optimizer besides torch's hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Group keys of ours. They stand in a group, after torch's own keys, only where they are set.
GROUP_KEYS = ("max_grad_norm_per_param", "max_grad_value", "decoupled_weight_decay")
#: Settings of the optimizer as a whole: pickled with it, never in a group or a checkpoint.
SETTINGS = ("max_grad_norm", "skip_nonfinite", "backend")

EXTRAS_DOC = """\
        max_grad_norm (float | None): Limit of the global L2 norm of all gradients of this
            optimizer, over all groups and devices of this process, after unscaling: they are
            multiplied by min(1, max_grad_norm / (norm + 1e-6)). ``float("inf")`` measures without
            clipping. Default: None, no global norm.
        max_grad_norm_per_param (float | None): The same limit for each parameter's own gradient;
            may differ per group.
            Default: None.
        max_grad_value (float | None): Limits every gradient element to [-max_grad_value,
            max_grad_value]; may differ per group. Combined, the order is: unscale, value, per
            parameter, global. Default: None.
        skip_nonfinite (bool): Leaves parameters, state and counters untouched in a step whose
            gradients hold inf or nan: to kernels in the type that they compute in, so that a
            float64 gradient beyond float32's range counts for a float32 parameter; to torch's rules
            in their own. Default: False.
        decoupled_weight_decay (bool): Shrinks the parameter by ``1 - lr * weight_decay`` instead of
            adding ``weight_decay * parameter`` to the gradient; may differ per group.
        backend (str): "auto", "cuda", "triton", "cpu" or "torch". Default: "auto", the fastest that
            serves the device.
        fused (bool | None): True means, as in torch, that :class:`torch.amp.GradScaler` leaves
            unscaling and skipping to the step, without waiting for the device. False means
            ``backend="torch"``. Default: None.

    Gradients are read, never written: ``parameter.grad`` keeps the scaled and unclipped values
    after a step.

    Attributes:
        last_grad_norm: 0-dim float32 tensor, the norm that ``max_grad_norm`` was compared with;
            None before the first step or without that limit.
        last_step_skipped: 0-dim bool tensor; None before the first step.

    Raises:
        ValueError: For whatever torch's class refuses (with torch's text), a limit that is not
            above zero, a flag that is no bool, an unknown backend, a setting of the whole optimizer
            inside a group.
        RuntimeError: For a backend that does not work here."""


@dataclass
class Settings:
    """The values behind the attributes of an optimizer that are ours.

    Attributes:
        max_grad_norm: Limit of the global norm, or None.
        skip_nonfinite: Whether inf or nan in a gradient skips the step.
        backend: What was asked for.
        fused: What the constructor was given.
        handed: `grad_scale` and `found_inf`, while a scaler has set them.
        checks_for_scaler: Whether `fusedopt.GradScaler` has the running step look for inf and nan.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    backend: str = "auto"
    fused: bool | None = None
    handed: dict[str, Any] = field(default_factory=dict)
    checks_for_scaler: bool = False

    @property
    def skips(self) -> bool:
        """Whether inf or nan in a gradient skips the step, whoever wants that."""
        return self.skip_nonfinite or self.checks_for_scaler

    def reducing(self, param_groups: list[dict[str, Any]]) -> list[str]:
        """Returns the names of what needs to know all gradients before the first update."""
        per_param = "max_grad_norm_per_param"
        wanted = {
            "max_grad_norm": self.max_grad_norm is not None,
            per_param: any(group.get(per_param) is not None for group in param_groups),
            "skip_nonfinite": self.skip_nonfinite,
            "fusedopt.GradScaler": self.checks_for_scaler,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]


def check_flag(name: str, value: Any, where: str) -> bool:
    """Returns a flag as a bool; None counts as False, as in torch. Raises ValueError for others."""
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"{name} is {value!r} {where}; expected True or False")


def read_backend(backend: Any, fused: Any) -> str:
    """Returns the backend that the constructor's two arguments ask for together."""
    if fused is not None and not isinstance(fused, bool):
        raise ValueError(f"fused is {fused!r} for the optimizer; expected True, False or None")
    if fused is not False:
        return backend
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"fused=False means backend='torch', but backend is {backend!r}; pass one of them"
        )
    return "torch"
