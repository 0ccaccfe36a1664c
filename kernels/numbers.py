"""Conversions between the types in memory and the type a rule computes in.

csrc/core/numbers.h in Triton, used by the two generic kernels. bfloat16 goes through integers,
because Triton's interpreter truncates it; compiled, the same integers give what ``cvt.rn.bf16.f32``
gives. The other types convert natively, to nearest even.
"""

import triton
import triton.language as tl


@triton.jit
def load_raw(ptr, offsets, mask, TYPE: tl.constexpr):
    """Values of TYPE, the halves widened to float32, which holds each of them exactly.

    Masked elements read as 0.
    """
    if mask is None:
        stored = tl.load(ptr + offsets)
    else:
        stored = tl.load(ptr + offsets, mask=mask, other=0.0)
    if TYPE == tl.bfloat16:
        return (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == tl.float16:
        return stored.to(tl.float32)
    else:
        return stored


@triton.jit
def narrow_bfloat16(x):
    """The bfloat16 nearest to a float32: ties to even, NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, (bits >> 16) | 0x40, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def store_as(ptr, offsets, mask, x, TYPE: tl.constexpr):
    """Writes x as TYPE; a double becomes a half by way of float32, as in C++."""
    if TYPE == tl.bfloat16:
        stored = narrow_bfloat16(x.to(tl.float32))
    elif TYPE == tl.float16:
        stored = x.to(tl.float32).to(tl.float16)
    else:
        stored = x.to(TYPE)
    tl.store(ptr + offsets, stored, mask=mask)
