"""The reduce pass: reads gradients once.

Yields each tensor's norm and clip coefficient, the sum of squares over all of them, the non-finite
flag, and on request the control block of the step.

Launched by launch.py, one program a piece; the last program of a tensor sums its pieces, the last
of all sums the tensors, each in a fixed order, so that the results are deterministic.
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
    FIRST_PIECE,
    GROUP,
    GROUP_WORDS,
    LAYOUT,
    MAX_GRAD_NORM,
    MAX_GRAD_NORM_PER_PARAM,
    MAX_GRAD_VALUE,
    PIECES,
    SKIP_NONFINITE,
    TENSOR_WORDS,
    arrive_last,
    load_piece,
    operand_offsets,
)


@triton.jit
def _judge_elements(ptr, offsets, mask, unscale, max_value, TYPE: tl.constexpr, T: tl.constexpr):
    """One block's (squares in float64 after unscaling and clamping, 1 where raw is inf or nan)."""
    raw = load_raw(ptr, offsets, mask, TYPE)
    nonfinite = (raw != raw) | (tl.abs(raw) == float("inf"))
    grad = clamp_value(raw.to(T) * unscale, max_value).to(tl.float64)
    return grad * grad, nonfinite.to(tl.int32)


@triton.jit
def _sum_pairs(pairs_ptr, count, BLOCK: tl.constexpr):
    """(sum, maximum) of ``count`` pairs that other programs wrote in this launch."""
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    flags = tl.zeros([BLOCK], tl.float64)
    done = count * 0
    while done < count:
        mask = done + lanes < count
        # .cg: from L2, where what another multiprocessor has just written is seen.
        total += tl.load(pairs_ptr + (done + lanes) * 2, mask=mask, other=0.0, cache_modifier=".cg")
        flag = tl.load(
            pairs_ptr + (done + lanes) * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg"
        )
        flags = tl.where(flag > flags, flag, flags)
        done += BLOCK
    return tl.sum(total, axis=0), tl.max(flags, axis=0)


@triton.jit(do_not_specialize=["first", "tensor_count"])
def reduce_kernel(
    pieces_ptr,
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
    TYPE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Judges the gradients of the piece ``first`` + program; null gradients count as zeros.

    Writes a pair (sum of squares, non-finite) for every piece and for every tensor, each tensor's
    clip coefficient, and, when the last of all ``tensor_count`` tensors is through, ``sums_ptr``:
    the pair of all. With ``control_ptr`` it also writes the control block. A plan with several
    types of gradients takes several launches; the last one sees the last tensor.
    """
    piece = first + tl.program_id(0)
    begin, length, tensor = load_piece(pieces_ptr, piece)
    row_ptr = tensors_ptr + tensor * TENSOR_WORDS
    group_ptr = groups_ptr + tl.load(row_ptr + GROUP) * GROUP_WORDS
    limits_ptr = group_ptr.to(tl.pointer_type(tl.float64))
    unscale = load_unscale(unscale_ptr, grad_scale_ptr)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    # Each thread folds the elements of one access into one: fewer registers, more accesses in
    # flight.
    FOLD: tl.constexpr = 128 // TYPE.primitive_bitwidth
    squares = tl.zeros([BLOCK // FOLD], tl.float64)
    flags = tl.zeros([BLOCK // FOLD], tl.int32)
    edge_lanes = tl.arange(0, EDGE).to(tl.int64)
    edge_squares = tl.zeros([EDGE], tl.float64)
    edge_flags = tl.zeros([EDGE], tl.int32)

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
            index = tl.multiple_of(begin + done, BLOCK) + lanes
            square, flag = _judge_elements(
                aligned_ptr, index, None, unscale.to(T), max_value, TYPE, T
            )
            squares += tl.sum(tl.reshape(square, [BLOCK // FOLD, FOLD]), axis=1)
            flags |= tl.max(tl.reshape(flag, [BLOCK // FOLD, FOLD]), axis=1)
            done += BLOCK
        while done < length:
            mask = done + edge_lanes < length
            offsets = begin + done + edge_lanes
            if layout != 0:
                offsets = operand_offsets(layout, 1, offsets)
            square, flag = _judge_elements(ptr, offsets, mask, unscale.to(T), max_value, TYPE, T)
            # A masked zero times an infinite multiplier would be NaN.
            edge_squares += tl.where(mask, square, 0.0)
            edge_flags |= flag
            done += EDGE

    found = tl.max(flags, axis=0) | tl.max(edge_flags, axis=0)
    tl.store(piece_pairs_ptr + piece * 2, tl.sum(squares, axis=0) + tl.sum(edge_squares, axis=0))
    tl.store(piece_pairs_ptr + piece * 2 + 1, found.to(tl.float64))
    pieces = tl.load(row_ptr + PIECES)
    if arrive_last(tickets_ptr + 1 + tensor, pieces):
        sum_squares, nonfinite = _sum_pairs(
            piece_pairs_ptr + tl.load(row_ptr + FIRST_PIECE) * 2, pieces, EDGE
        )
        norm = tl.sqrt(sum_squares)
        max_norm = tl.load(limits_ptr + MAX_GRAD_NORM_PER_PARAM)
        coef = clip_coefficient(norm, max_norm)
        # Without a limit the sum stays as it is; the square of its root would differ in the last
        # bit.
        sum_squares = tl.where(max_norm == float("inf"), sum_squares, (norm * coef) * (norm * coef))
        tl.store(coefs_ptr + tensor, coef)
        tl.store(tensor_pairs_ptr + tensor * 2, sum_squares)
        tl.store(tensor_pairs_ptr + tensor * 2 + 1, nonfinite)

        if arrive_last(tickets_ptr, tensor_count):
            sum_squares, nonfinite = _sum_pairs(tensor_pairs_ptr, tensor_count, EDGE)
            tl.store(sums_ptr, sum_squares)
            tl.store(sums_ptr + 1, nonfinite)
            if control_ptr is not None:
                norm = tl.sqrt(sum_squares)
                clip = clip_coefficient(norm, tl.load(settings_ptr + MAX_GRAD_NORM))
                skip_nonfinite = tl.load(settings_ptr + SKIP_NONFINITE) != 0.0
                skip = load_found_inf(found_inf_ptr) | (skip_nonfinite & (nonfinite != 0.0))
                store_control(control_ptr, unscale, clip, norm, nonfinite, skip.to(tl.float64))
