"""The apply pass for every rule.

Reads parameter, gradient and states once, writes parameter and states once.

Launched by launch.py, one program a piece. Bits do not depend on how a tensor is cut into pieces
and blocks.
"""

import triton
import triton.language as tl
from fusedopt.kernels.control import (
    CLIP,
    SKIP,
    UNSCALE,
    clamp_value,
    load_found_inf,
    load_unscale,
    store_control,
)
from fusedopt.kernels.numbers import load_raw, store_as
from fusedopt.kernels.table import (
    GROUP_WORDS,
    LAYOUT,
    MAX_GRAD_VALUE,
    OPERAND_WORDS,
    SPAN_WORDS,
    TENSOR_WORDS,
    arrive_last,
    load_group,
    load_hyper,
    load_piece,
    load_scalars,
    load_step,
    operand_offsets,
    store_scalars,
    store_step,
)


@triton.jit
def _update_elements(
    ptrs,
    offsets,
    mask,
    transform,
    constants,
    UPDATE: tl.constexpr,
    VARIANT: tl.constexpr,
    TYPES: tl.constexpr,
    T: tl.constexpr,
):
    """One step of the elements at ``offsets``: a block each for parameter, gradient and states."""
    unscale, max_value, param_clip, global_clip = transform
    param = load_raw(ptrs[0], offsets[0], mask, TYPES[0]).to(T)
    grad = load_raw(ptrs[1], offsets[1], mask, TYPES[1]).to(T)
    grad = clamp_value(grad * unscale, max_value) * param_clip * global_clip
    state = ()
    for i in tl.static_range(2, len(TYPES)):
        state = state + (load_raw(ptrs[i], offsets[i], mask, TYPES[i]).to(T),)
    param, state = UPDATE(constants, param, grad, state, VARIANT)
    store_as(ptrs[0], offsets[0], mask, param, TYPES[0])
    for i in tl.static_range(2, len(TYPES)):
        store_as(ptrs[i], offsets[i], mask, state[i - 2], TYPES[i])


@triton.jit(do_not_specialize=["first"])
def apply_kernel(
    pieces_ptr,
    spans_ptr,
    tensors_ptr,
    groups_ptr,
    grads_ptr,
    tickets_ptr,
    control_ptr,
    coefs_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    first,
    CONTROLLED: tl.constexpr,
    CONSTANTS: tl.constexpr,
    UPDATE: tl.constexpr,
    ADVANCE: tl.constexpr,
    HYPERS: tl.constexpr,
    SCALARS: tl.constexpr,
    VARIANT: tl.constexpr,
    TYPES: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Applies the rule to one of the pieces from ``first`` and advances its tensor's counter.

    CONTROLLED: the control block was written before, and ``coefs_ptr`` holds each tensor's clip
    coefficient (None: 1). Else this launch is the whole step, and its first program writes the
    control block from the scaler's two tensors. TYPES are those of parameter, gradient and states
    in memory. ADVANCE tells what becomes of the row's SCALARS; None where the rule has none. A null
    gradient, or a step to skip: nothing is written.
    """
    piece = first + tl.program_id(0)
    if CONTROLLED:
        # Backwards: the gradients that the reduce pass read last are still in the cache.
        piece = first + tl.num_programs(0) - 1 - tl.program_id(0)
    begin, length, tensor = load_piece(pieces_ptr, piece)
    if CONTROLLED:
        unscale = tl.load(control_ptr + UNSCALE)
        clip = tl.load(control_ptr + CLIP)
        skip = tl.load(control_ptr + SKIP) != 0.0
    else:
        unscale = load_unscale(None, grad_scale_ptr)
        clip = tl.full((), 1.0, tl.float64)
        skip = load_found_inf(found_inf_ptr)
        if piece == first:
            store_control(control_ptr, unscale, clip, 0.0, 0.0, skip.to(tl.float64))

    row_ptr = tensors_ptr + tensor * TENSOR_WORDS
    grad_address = tl.load(grads_ptr + tensor)
    if (grad_address != 0) & (skip == 0):
        group_ptr = groups_ptr + load_group(row_ptr) * GROUP_WORDS
        step = load_step(row_ptr)
        hyper = load_hyper(group_ptr, HYPERS)
        if SCALARS > 0:
            scalars = load_scalars(row_ptr, SCALARS)
            constants = CONSTANTS(hyper, step, scalars, T)
        else:
            constants = CONSTANTS(hyper, step, T)
        if coefs_ptr is not None:
            param_clip = tl.load(coefs_ptr + tensor)
        else:
            param_clip = tl.full((), 1.0, tl.float64)
        max_value = tl.load(group_ptr.to(tl.pointer_type(tl.float64)) + MAX_GRAD_VALUE)
        transform = (unscale.to(T), max_value.to(T), param_clip.to(T), clip.to(T))

        layout = tl.load(row_ptr + LAYOUT)
        param_address = tl.load(row_ptr)
        all_addresses = (param_address, grad_address)
        address_bits = param_address | grad_address
        for i in tl.static_range(2, len(TYPES)):
            state_address = tl.load(row_ptr + i * OPERAND_WORDS)
            all_addresses = all_addresses + (state_address,)
            address_bits = address_bits | state_address
        ptrs = ()
        aligned_ptrs = ()
        for i in tl.static_range(len(TYPES)):
            ptrs = ptrs + (all_addresses[i].to(tl.pointer_type(TYPES[i])),)
            aligned_ptrs = aligned_ptrs + (
                tl.multiple_of(all_addresses[i].to(tl.pointer_type(TYPES[i])), 16),
            )

        # Whole blocks of aligned tensors go 16 bytes a thread at a time; a mask would make every
        # access scalar.
        aligned = (layout == 0) & ((address_bits & 15) == 0)
        unmasked = tl.where(aligned, length // BLOCK * BLOCK, 0)
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        done = length * 0
        while done < unmasked:
            index = tl.multiple_of(begin + done, BLOCK) + lanes
            offsets = (index,) * len(TYPES)
            _update_elements(
                aligned_ptrs, offsets, None, transform, constants, UPDATE, VARIANT, TYPES, T
            )
            done += BLOCK
        # The rest, and all of other tensors, in blocks so small that this code does not drive up
        # the registers of the above.
        edge_lanes = tl.arange(0, EDGE).to(tl.int64)
        if layout == 0:
            while done < length:
                offsets = (begin + done + edge_lanes,) * len(TYPES)
                mask = done + edge_lanes < length
                _update_elements(
                    ptrs, offsets, mask, transform, constants, UPDATE, VARIANT, TYPES, T
                )
                done += EDGE
        else:
            while done < length:
                index = begin + done + edge_lanes
                offsets = ()
                for i in tl.static_range(len(TYPES)):
                    offsets = offsets + (operand_offsets(layout, i, index),)
                mask = done + edge_lanes < length
                _update_elements(
                    ptrs, offsets, mask, transform, constants, UPDATE, VARIANT, TYPES, T
                )
                done += EDGE

        # Every piece of the tensor reads its counter, so the last one to finish writes it.
        if arrive_last(tickets_ptr + 1 + tensor, tl.load(spans_ptr + tensor * SPAN_WORDS + 1)):
            store_step(row_ptr, step)
            if SCALARS > 0:
                store_scalars(row_ptr, ADVANCE(hyper, step, scalars), SCALARS)
