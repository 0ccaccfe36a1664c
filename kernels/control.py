"""The arithmetic between the passes, csrc/core/control.h in Triton.

From sums of squares to clip coefficients, and what the apply pass does to every gradient element
before the rule sees it. Used by the two generic kernels.
"""

import triton
import triton.language as tl

from fusedopt import _control

UNSCALE = tl.constexpr(_control.UNSCALE)
CLIP = tl.constexpr(_control.CLIP)
NORM = tl.constexpr(_control.NORM)
NONFINITE = tl.constexpr(_control.NONFINITE)
SKIP = tl.constexpr(_control.SKIP)


@triton.jit
def clip_coefficient(norm, max_norm):
    """torch.nn.utils.clip_grad_norm_'s min(1, max_norm / (norm + 1e-6)), in float64.

    NaN comes through; an infinite limit measures and never clips.
    """
    coefficient = max_norm / (norm + 1e-6)
    coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    return tl.where(max_norm == float("inf"), 1.0, coefficient)


@triton.jit
def clamp_value(x, limit):
    """X limited to [-limit, limit]; NaN comes through."""
    x = tl.where(x > limit, limit, x)
    return tl.where(x < limit * -1.0, limit * -1.0, x)


@triton.jit
def load_unscale(unscale_ptr, grad_scale_ptr):
    """What every gradient is multiplied by first, in float64: given, or 1 / loss scale, or 1."""
    if unscale_ptr is not None:
        return tl.load(unscale_ptr)
    elif grad_scale_ptr is not None:
        return 1.0 / tl.load(grad_scale_ptr).to(tl.float64)
    else:
        return tl.full((), 1.0, tl.float64)


@triton.jit
def load_found_inf(found_inf_ptr):
    """Whether a scaler reports inf or nan in the gradients."""
    if found_inf_ptr is not None:
        return tl.load(found_inf_ptr) != 0
    else:
        return tl.full((), 0, tl.int1)


@triton.jit
def store_control(control_ptr, unscale, clip, norm, nonfinite, skip):
    """Writes the control block."""
    tl.store(control_ptr + UNSCALE, unscale)
    tl.store(control_ptr + CLIP, clip)
    tl.store(control_ptr + NORM, norm)
    tl.store(control_ptr + NONFINITE, nonfinite)
    tl.store(control_ptr + SKIP, skip)
