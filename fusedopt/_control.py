"""The arithmetic between the passes in torch operations.

For parameters that torch's rules update, and for a norm over several plans. The order of the
numbers in a control tensor is that of ``StepControl`` in ``csrc/core/table.h``.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

ORDER = UNSCALE, CLIP, NORM, NONFINITE, SKIP = range(5)


def check_limit(name: str, value: Any, where: str) -> None:
    """Raises ValueError for a limit that is not a number above zero; None is no limit."""
    if value is None:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # "not >" refuses NaN; an integer may lie between the largest float and infinity.
    if not is_number or not value > 0 or sys.float_info.max < value < math.inf:
        raise ValueError(
            f"{name} is {value!r} {where}; expected a number above 0, or None for no limit"
        )


def describe(tensor: Tensor) -> str:
    """Returns what messages say of a tensor: its type, shape and device."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Returns min(1, max_norm / (norm + 1e-6)) with NaN coming through; 1 for an infinite limit."""
    if math.isinf(max_norm):
        return torch.ones_like(norm)
    # A number over a tensor would be its reciprocal times the number, rounded twice.
    return torch.clamp(torch.full_like(norm, max_norm) / (norm + 1e-6), max=1.0)


def unscale_factor(grad_scale: Any, device: torch.device) -> Tensor:
    """Returns 1 / grad_scale as a 0-dim float64 tensor on ``device``; 1 without a scale."""
    if grad_scale is None:
        return torch.ones((), dtype=torch.float64, device=device)
    return _one_number("grad_scale", grad_scale, device).reciprocal()


def check_one_number(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless a scaler handed over a number or one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of {value.numel()} elements; expected a number or a tensor of"
                " one element"
            )
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected a number or a tensor of one element")


def _one_number(name: str, value: Any, device: torch.device) -> Tensor:
    """Returns what a scaler handed over as a 0-dim float64 tensor on ``device``."""
    check_one_number(name, value)
    return torch.as_tensor(value, dtype=torch.float64, device=device).reshape(())


def nothing(device: torch.device) -> torch.Tensor:
    """Returns the control tensor of a step that neither scales, clips nor skips."""
    control = torch.zeros(len(ORDER), dtype=torch.float64, device=device)
    control[UNSCALE] = control[CLIP] = 1.0
    return control


def settle(
    totals: Iterable[Tensor],
    unscale: Tensor,
    found_inf: Any,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
) -> Tensor:
    """Returns the control tensor of a step from what the reduce passes found.

    Args:
        totals: float64[2] of every plan: sum of squares, and whether anything was not finite.
        unscale: 0-dim float64; its device is the device of the result.
        found_inf: A tensor or number, nonzero to skip; or None.
        max_grad_norm: Limit of the global norm, or None.
        skip_nonfinite: Whether a gradient that is not finite skips the step.
    """
    device = unscale.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for found in totals:
        total = total + found.to(device)
    norm = total[0].sqrt()
    nonfinite = total[1] != 0
    clip = clip_coefficient(norm, math.inf if max_grad_norm is None else max_grad_norm)
    skip = nonfinite if skip_nonfinite else torch.zeros_like(nonfinite)
    if found_inf is not None:
        skip = skip | (_one_number("found_inf", found_inf, device) != 0)
    return torch.stack([unscale, clip, norm, nonfinite.to(torch.float64), skip.to(torch.float64)])


def compute_dtype(param: Tensor) -> torch.dtype:
    """Returns the type that a parameter's rule computes in."""
    wide = param.dtype in (torch.float64, torch.complex128)
    if param.is_complex():
        return torch.complex128 if wide else torch.complex64
    return torch.float64 if wide else torch.float32


def limits(group: dict[str, Any]) -> bool:
    """Whether ``group`` limits gradients, by value or each by its own norm."""
    return (
        group.get("max_grad_value") is not None or group.get("max_grad_norm_per_param") is not None
    )


class GradTransform:
    """What happens to one parameter's gradient before torch's rule sees it.

    The steps and their order are those of ``GradTransform`` in ``csrc/core/control.h``. The
    parameter's own gradient is never written; sparse gradients are coalesced and keep their
    indices.
    """

    def __init__(self, param: Tensor, group: dict[str, Any], unscale: float) -> None:
        assert param.grad is not None
        # A wider gradient may hold finite values that the parameter's type cannot.
        self._dtype = torch.promote_types(compute_dtype(param), param.grad.dtype)
        # Torch's rules look at a conjugated view through `view_as_real`, which refuses.
        self._changes = unscale != 1.0 or limits(group) or param.grad.is_conj()
        self._unscale = unscale
        self._max_value: float | None = group.get("max_grad_value")
        self._max_norm: float | None = group.get("max_grad_norm_per_param")
        self._own_clip = 1.0
        if self._max_value is not None and self._max_value > torch.finfo(self._dtype).max:
            self._max_value = None  # to kernels, too, it is infinite
        if self._max_value is not None and param.is_complex():
            raise ValueError(
                f"max_grad_value is {self._max_value}, but a complex gradient has no order;"
                " put complex parameters into a group with max_grad_value=None"
            )

    @property
    def is_identity(self) -> bool:
        """Whether, apart from the global clip, nothing happens at all."""
        return not self._changes

    def reduce(self, grad: Tensor) -> Tensor:
        """Returns float64[2]: the squared norm after the first three steps, and any non-finite."""
        if grad.device.type == "meta":
            raise ValueError(
                "max_grad_norm, max_grad_norm_per_param and skip_nonfinite need the gradient's"
                " values, and a meta tensor has none; leave them unset"
            )
        raw = _values(grad)
        limited = torch.view_as_real(self._limited(raw)) if raw.is_complex() else self._limited(raw)
        sum_squares = limited.double().square().sum()
        if self._max_norm is not None:
            norm = sum_squares.sqrt()
            self._own_clip = clip_coefficient(norm, self._max_norm).item()
            sum_squares = (norm * self._own_clip).square()
        nonfinite = (~torch.isfinite(raw)).any()
        return torch.stack([sum_squares, nonfinite.to(torch.float64)])

    def apply(self, grad: Tensor, global_clip: float) -> Tensor:
        """Returns the gradient that the rule sees, in the type of ``grad``."""
        if self.is_identity and global_clip == 1.0:
            return grad
        values = self._limited(_values(grad)) * self._own_clip * global_clip
        values = values.to(grad.dtype).resolve_conj()
        if not grad.is_sparse:
            return values
        grad = grad.coalesce()
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True)

    def _limited(self, values: Tensor) -> Tensor:
        values = values.to(self._dtype) * self._unscale
        if self._max_value is not None:
            values = values.clamp(-self._max_value, self._max_value)
        return values


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad
