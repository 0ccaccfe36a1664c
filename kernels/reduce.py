"""The reduce pass: reads gradients once.

Yields each tensor's norm and clip coefficient, the sum of squares over all of them, the non-finite
flag, and on request the control block of the step.

Launched by launch.py, one program a piece; the last program of a tensor adds up its pieces, the
last of all the tensors. The order of all sums is that of csrc/core/sum_order.h: a strip is 128
consecutive elements in 8 rows of 16 lanes, a lane adds up its column, and from there on neighbours
are added up, then neighbours of those.
"""

import triton
import triton.language as tl
from fusedopt.kernels.control import (
    clamp_value,
    clip_coefficient,
    load_found_inf,
    load_unscale,
    store_control,
)
from fusedopt.kernels.numbers import load_raw
from fusedopt.kernels.table import (
    GROUP_WORDS,
    LAYOUT,
    MAX_GRAD_NORM,
    MAX_GRAD_NORM_PER_PARAM,
    MAX_GRAD_VALUE,
    SKIP_NONFINITE,
    SPAN_WORDS,
    TENSOR_WORDS,
    arrive_last,
    load_group,
    load_piece,
    operand_offsets,
)

LANES = tl.constexpr(16)
STRIP_ROWS = tl.constexpr(8)
STRIP = tl.constexpr(128)


@triton.jit
def _add_neighbours(values):
    """The sum of a power of two of values: of neighbours, then of neighbours of those."""
    for _ in tl.static_range(16):
        if values.shape[0] > 2:
            values = tl.sum(tl.reshape(values, [values.shape[0] // 2, 2]), axis=1)
    return tl.sum(values, axis=0)


@triton.jit
def _magnitude_bits(x):
    """The bits of a float without its sign: those of inf and nan are the largest."""
    if x.dtype.primitive_bitwidth == 64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _add_row(sums, largest, ptr, offsets, mask, unscale, max_value, TYPE: tl.constexpr):
    """Adds one row of several strips: (sums, largest magnitude bits of the raw elements).

    What is wider than the arithmetic is rounded to it first.
    """
    raw = load_raw(ptr, offsets, mask, TYPE)
    if raw.dtype.primitive_bitwidth > unscale.dtype.primitive_bitwidth:
        raw = raw.to(unscale.dtype)
    bits = _magnitude_bits(raw)
    largest = tl.where(bits > largest, bits, largest)
    x = clamp_value(raw.to(unscale.dtype) * unscale, max_value)
    if mask is not None:
        # A masked zero times an infinite multiplier would be NaN.
        x = tl.where(mask, x, 0.0)
    if unscale.dtype == tl.float64:
        sums += x * x
    else:
        # The square is exact in float64, so that fusing changes no bit.
        wide = x.to(tl.float64)
        sums = tl.fma(wide, wide, sums)
    return sums, largest


@triton.jit
def _add_pairs(pairs_ptr, count, BLOCK: tl.constexpr):
    """(sum, maximum) of ``count`` pairs that other programs wrote in this launch.

    Every BLOCK of them becomes one, in their place, until one is left.
    """
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    flags = tl.zeros([BLOCK], tl.float64)
    total = tl.full((), 0.0, tl.float64)
    more = count > 0
    while more:
        done = count * 0
        while done < count:
            mask = done + lanes < count
            ptrs = pairs_ptr + (done + lanes) * 2
            # .cg: from L2, where what another multiprocessor has just written is seen.
            values = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
            flag = tl.load(ptrs + 1, mask=mask, other=0.0, cache_modifier=".cg")
            flags = tl.where(flag > flags, flag, flags)
            total = _add_neighbours(values)
            if count > BLOCK:
                tl.store(pairs_ptr + done // BLOCK * 2, total)
            done += BLOCK
        tl.debug_barrier()
        more = count > BLOCK
        count = (count + BLOCK - 1) // BLOCK
    return total, tl.max(flags, axis=0)


@triton.jit(do_not_specialize=["first", "tensor_count", "filled_count"])
def reduce_kernel(
    pieces_ptr,
    spans_ptr,
    tensors_ptr,
    groups_ptr,
    grads_ptr,
    settings_ptr,
    tickets_ptr,
    piece_pairs_ptr,
    tensor_pairs_ptr,
    coefs_ptr,
    sums_ptr,
    control_ptr,
    unscale_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    first,
    tensor_count,
    filled_count,
    TYPE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    MAX_PIECE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Judges the gradients of the piece ``first`` + program; null gradients count as zeros.

    Writes a pair (sum of squares, non-finite) for every piece and for every tensor, each tensor's
    clip coefficient, and, when the last of the ``filled_count`` tensors with pieces is through,
    ``sums_ptr``: the pair of all ``tensor_count``. With ``control_ptr`` it also writes the control
    block. A plan with several types of gradients takes several launches; the last one sees the last
    tensor.
    """
    piece = first + tl.program_id(0)
    begin, length, tensor = load_piece(pieces_ptr, piece)
    row_ptr = tensors_ptr + tensor * TENSOR_WORDS
    group_ptr = groups_ptr + load_group(row_ptr) * GROUP_WORDS
    limits_ptr = group_ptr.to(tl.pointer_type(tl.float64))
    unscale = load_unscale(unscale_ptr, grad_scale_ptr)
    STRIPS: tl.constexpr = BLOCK // STRIP
    EDGE_STRIPS: tl.constexpr = EDGE // STRIP
    lanes = tl.arange(0, LANES)[None, :].to(tl.int64)
    strips = tl.arange(0, STRIPS)[:, None].to(tl.int64)
    edge_strips = tl.arange(0, EDGE_STRIPS)[:, None].to(tl.int64)
    JUDGED: tl.constexpr = T if TYPE == tl.float64 else TYPE
    BITS: tl.constexpr = tl.int64 if JUDGED == tl.float64 else tl.int32
    INFINITY: tl.constexpr = 0x7FF0000000000000 if JUDGED == tl.float64 else 0x7F800000
    largest = tl.zeros([STRIPS, LANES], BITS)
    edge_largest = tl.zeros([EDGE_STRIPS, LANES], BITS)
    # The sums of the piece's blocks, each in the place of its first EDGE elements.
    places = tl.arange(0, MAX_PIECE // EDGE)
    nodes = tl.zeros([MAX_PIECE // EDGE], tl.float64)

    address = tl.load(grads_ptr + tensor)
    if address != 0:
        ptr = address.to(tl.pointer_type(TYPE))
        aligned_ptr = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)
        layout = tl.load(row_ptr + LAYOUT)
        max_value = tl.load(limits_ptr + MAX_GRAD_VALUE).to(T)
        aligned = (layout == 0) & ((address & 15) == 0)
        unmasked = tl.where(aligned, length // BLOCK * BLOCK, 0)
        done = length * 0
        while done < unmasked:
            sums = tl.zeros([STRIPS, LANES], tl.float64)
            index = tl.multiple_of(begin + done, BLOCK) + strips * STRIP + lanes
            for row in tl.static_range(STRIP_ROWS):
                sums, largest = _add_row(
                    sums,
                    largest,
                    aligned_ptr,
                    index + row * LANES,
                    None,
                    unscale.to(T),
                    max_value,
                    TYPE,
                )
            node = _add_neighbours(tl.reshape(sums, [STRIPS * LANES]))
            nodes = tl.where(places == done // EDGE, node, nodes)
            done += BLOCK
        # The rest, and all of other tensors, in blocks so small that this code does not drive up
        # the registers of the above.
        while done < length:
            sums = tl.zeros([EDGE_STRIPS, LANES], tl.float64)
            # Of less than a strip not all rows have elements.
            end = tl.minimum(length - done, STRIP)
            row = done * 0
            while row < end:
                places_in_piece = done + edge_strips * STRIP + row + lanes
                mask = places_in_piece < length
                offsets = begin + places_in_piece
                if layout != 0:
                    offsets = operand_offsets(layout, 1, offsets)
                sums, edge_largest = _add_row(
                    sums, edge_largest, ptr, offsets, mask, unscale.to(T), max_value, TYPE
                )
                row += LANES
            node = _add_neighbours(tl.reshape(sums, [EDGE_STRIPS * LANES]))
            nodes = tl.where(places == done // EDGE, node, nodes)
            done += EDGE

    found = (tl.max(tl.max(largest, axis=1), axis=0) >= INFINITY) | (
        tl.max(tl.max(edge_largest, axis=1), axis=0) >= INFINITY
    )
    tl.store(piece_pairs_ptr + piece * 2, _add_neighbours(nodes))
    tl.store(piece_pairs_ptr + piece * 2 + 1, found.to(tl.float64))
    first_piece = tl.load(spans_ptr + tensor * SPAN_WORDS)
    pieces = tl.load(spans_ptr + tensor * SPAN_WORDS + 1)
    if arrive_last(tickets_ptr + 1 + tensor, pieces):
        sum_squares, nonfinite = _add_pairs(piece_pairs_ptr + first_piece * 2, pieces, PAIRS)
        norm = tl.sqrt(sum_squares)
        max_norm = tl.load(limits_ptr + MAX_GRAD_NORM_PER_PARAM)
        coef = clip_coefficient(norm, max_norm)
        # Without a limit the sum stays as it is; the square of its root would differ in the last
        # bit.
        sum_squares = tl.where(max_norm == float("inf"), sum_squares, (norm * coef) * (norm * coef))
        tl.store(coefs_ptr + tensor, coef)
        tl.store(tensor_pairs_ptr + tensor * 2, sum_squares)
        tl.store(tensor_pairs_ptr + tensor * 2 + 1, nonfinite)

        if arrive_last(tickets_ptr, filled_count):
            sum_squares, nonfinite = _add_pairs(tensor_pairs_ptr, tensor_count, PAIRS)
            tl.store(sums_ptr, sum_squares)
            tl.store(sums_ptr + 1, nonfinite)
            if control_ptr is not None:
                norm = tl.sqrt(sum_squares)
                clip = clip_coefficient(norm, tl.load(settings_ptr + MAX_GRAD_NORM))
                skip_nonfinite = tl.load(settings_ptr + SKIP_NONFINITE) != 0.0
                skip = load_found_inf(found_inf_ptr) | (skip_nonfinite & (nonfinite != 0.0))
                store_control(control_ptr, unscale, clip, norm, nonfinite, skip.to(tl.float64))
