"""What every rule shares, csrc/rules/common.h in Triton.

The opening, the moving average, and the few operations whose bits must be the same in every
compiler. Used by the rules only.
"""

import triton
import triton.language as tl


@triton.jit
def power(base, exponent):
    """base^exponent for a base in [0, 1] and an exponent from 0 up, infinity and NaN included.

    By repeated squaring, and for a fraction by repeated roots, in float64, with the operations of
    C++ in their order.
    """
    # A power so high is 0, or 1.
    endless = (exponent >= 2.0**62) | (exponent != exponent)
    whole = tl.where(endless, 2.0**62, exponent).to(tl.int64)
    fraction = tl.where(endless, 0.0, exponent - whole.to(tl.float64))
    result = base * 0.0 + 1.0
    part = tl.sqrt(base)
    while fraction > 0.0:
        fraction = fraction * 2.0
        result = tl.where(fraction >= 1.0, result * part, result)
        fraction = tl.where(fraction >= 1.0, fraction - 1.0, fraction)
        part = tl.sqrt(part)
    n = whole
    while n > 0:
        result = tl.where((n & 1) != 0, result * base, result)
        base = base * base
        n = n >> 1
    return tl.where(exponent != exponent, exponent, result)


@triton.jit
def multiply(a, b):
    """The product of two numbers to twice float64's precision, each a (high, low).

    By Dekker 1971 (Numerische Mathematik 18): without fused operations, and exact but for the last
    bits of low.
    """
    a_high, a_low = a
    b_high, b_low = b
    a_scaled = 134217729.0 * a_high
    b_scaled = 134217729.0 * b_high
    a_upper = a_scaled - (a_scaled - a_high)
    b_upper = b_scaled - (b_scaled - b_high)
    a_lower = a_high - a_upper
    b_lower = b_high - b_upper
    product = a_high * b_high
    rest = a_upper * b_upper - product + a_upper * b_lower + a_lower * b_upper
    rest = rest + a_lower * b_lower + (a_high * b_low + a_low * b_high)
    high = product + rest
    return high, rest - (high - product)


@triton.jit
def precise_power(base, exponent):
    """The same as power, rounded once where the exponent is a whole number.

    As C libraries have it, for what is left after a cancellation.
    """
    # No counter reaches more.
    counts = exponent < 2.0**52
    whole = tl.where(counts, exponent, 0.0).to(tl.int64)
    high, low = base * 0.0 + 1.0, base * 0.0
    factor, factor_low = base, base * 0.0
    n = whole
    while n > 0:
        longer, longer_low = multiply((high, low), (factor, factor_low))
        high = tl.where((n & 1) != 0, longer, high)
        low = tl.where((n & 1) != 0, longer_low, low)
        factor, factor_low = multiply((factor, factor_low), (factor, factor_low))
        n = n >> 1
    return high * power(base, exponent - whole.to(tl.float64))


@triton.jit
def kept(scalar, x):
    """What is left of a number when it is kept in a scalar: (value, whether it is in float32)."""
    return tl.where(scalar[1], x.to(tl.float32).to(tl.float64), x)


@triton.jit
def divide(a, b):
    """The quotient a / b, correctly rounded.

    Triton's plain division is approximate for float32 and exact for float64.
    """
    if a.dtype.primitive_bitwidth == 64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """The square root, correctly rounded.

    Triton's plain one is approximate for float32 and exact for float64.
    """
    if x.dtype.primitive_bitwidth == 64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def maximum(a, b):
    """The larger of the two; NaN in either comes through (compiled, tl.maximum would drop it)."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def sign_of(x):
    """1, -1 or 0; as torch.sign has it, 0 for NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def lerp_weights(w, T: tl.constexpr):
    """An exponential moving average's weights as torch.lerp forms them: (weight, complement)."""
    return w.to(T), (1.0 - w).to(T)


@triton.jit
def lerp(weights, start, end):
    """The moving average of start and end; the side with the smaller weight is the correction."""
    weight, complement = weights
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * complement)


@triton.jit
def opening_constants(hyper, T: tl.constexpr):
    """(shrink, l2, sign) from the hyperparameters that open a rule's row."""
    lr, weight_decay, decoupled_weight_decay, maximize = hyper[0], hyper[1], hyper[2], hyper[3]
    shrink = tl.where(decoupled_weight_decay != 0.0, 1.0 - lr * weight_decay, 1.0).to(T)
    l2 = tl.where(decoupled_weight_decay != 0.0, 0.0, weight_decay).to(T)
    sign = tl.where(maximize != 0.0, -1.0, 1.0).to(T)
    return shrink, l2, sign


@triton.jit
def opening(constants, param, grad):
    """The opening of every rule; returns (param, grad).

    g <- -g to maximize; then either p <- p (1 - lr wd) (decoupled, Loshchilov & Hutter 2019,
    arXiv:1711.05101) or g <- g + wd p (L2).
    """
    shrink, l2, sign = constants
    # Not by Triton's unary minus, which is 0 - g and loses the sign of zero.
    grad = sign * grad
    grad = tl.where(l2 != 0.0, grad + l2 * param, grad)
    return param * shrink, grad
