"""The table that describes one optimizer's step to the kernels, as csrc/core/table.h has it.

Its structs are read here as int64 words of device memory; rows.py packs them. Gradient pointers
stand in a column of their own, because they are what changes from step to step.
"""

import triton
import triton.language as tl
from fusedopt.kernels import rows

# TensorRow: the operands (param, grad, states; the last of these are the rule's scalars), each an
# address and a word with its number type in the lowest byte; the counter, the layout, and a word
# with the group's index in its lower half and the counter's number type in the byte above.
OPERAND_WORDS = tl.constexpr(2)
OPERANDS = tl.constexpr(rows.OPERANDS)
STEP = tl.constexpr(OPERAND_WORDS.value * rows.OPERANDS)
LAYOUT = tl.constexpr(STEP.value + 1)
GROUP_AND_TYPE = tl.constexpr(STEP.value + 3)
TENSOR_WORDS = tl.constexpr(rows.TENSOR.size // 8)

# GroupRow: the hyperparameters, the limits (infinity: none), the address of a learning rate on the
# device (0: it is the first hyperparameter), and a word with its number type in the lowest byte.
MAX_GRAD_VALUE = tl.constexpr(rows.MAX_HYPER)
MAX_GRAD_NORM_PER_PARAM = tl.constexpr(rows.MAX_HYPER + 1)
LR = tl.constexpr(rows.MAX_HYPER + 2)
LR_TYPE = tl.constexpr(rows.MAX_HYPER + 3)
GROUP_WORDS = tl.constexpr(rows.GROUP.size // 8)

# Piece: begin, then length and tensor, half a word each. An empty tensor has one empty piece, so
# that its counter advances.
PIECE_WORDS = tl.constexpr(rows.PIECE.size // 8)

# Of the pieces of each tensor: the index of the first, and how many there are.
SPAN_WORDS = tl.constexpr(2)

# The settings of the step: the limit of the global norm (infinity: none), and 1 to skip steps with
# non-finite gradients.
MAX_GRAD_NORM = tl.constexpr(0)
SKIP_NONFINITE = tl.constexpr(1)
SETTINGS_WORDS = tl.constexpr(2)


@triton.jit
def load_piece(pieces_ptr, index):
    """(begin, length, tensor) of a piece."""
    ptr = pieces_ptr + index.to(tl.int64) * PIECE_WORDS
    halves = tl.load(ptr + 1)
    return tl.load(ptr), halves & 0xFFFFFFFF, halves >> 32


@triton.jit
def load_group(row_ptr):
    """The index of a row's group."""
    return tl.load(row_ptr + GROUP_AND_TYPE) & 0xFFFFFFFF


@triton.jit
def _counts_in_float64(row_ptr):
    return (tl.load(row_ptr + GROUP_AND_TYPE) >> 32) & 0xFF == 1


@triton.jit
def load_step(row_ptr):
    """The number of the step under way: the counter plus 1, added in the counter's own type."""
    address = tl.load(row_ptr + STEP)
    if _counts_in_float64(row_ptr):
        step = tl.load(address.to(tl.pointer_type(tl.float64))) + 1.0
    else:
        step = (tl.load(address.to(tl.pointer_type(tl.float32))) + 1.0).to(tl.float64)
    return step


@triton.jit
def store_step(row_ptr, step):
    """Sets the counter to what ``load_step`` gave."""
    address = tl.load(row_ptr + STEP)
    if _counts_in_float64(row_ptr):
        tl.store(address.to(tl.pointer_type(tl.float64)), step)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)), step.to(tl.float32))


@triton.jit
def load_scalars(row_ptr, COUNT: tl.constexpr):
    """A row's scalars as rules take them: each a float64 and whether it is kept in float32."""
    scalars = ()
    for i in tl.static_range(COUNT):
        home_ptr = row_ptr + (OPERANDS - COUNT + i) * OPERAND_WORDS
        address = tl.load(home_ptr)
        narrow = tl.load(home_ptr + 1) & 0xFF == 0
        if narrow:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
        else:
            value = tl.load(address.to(tl.pointer_type(tl.float64)))
        scalars = scalars + ((value, narrow),)
    return scalars


@triton.jit
def store_scalars(row_ptr, values, COUNT: tl.constexpr):
    """Sets a row's scalars."""
    for i in tl.static_range(COUNT):
        home_ptr = row_ptr + (OPERANDS - COUNT + i) * OPERAND_WORDS
        address = tl.load(home_ptr)
        if tl.load(home_ptr + 1) & 0xFF == 0:
            tl.store(address.to(tl.pointer_type(tl.float32)), values[i].to(tl.float32))
        else:
            tl.store(address.to(tl.pointer_type(tl.float64)), values[i])


@triton.jit
def load_hyper(group_ptr, HYPERS: tl.constexpr):
    """A group's hyperparameters in the rule's order, as float64.

    The learning rate is read from the device where it lives there.
    """
    doubles_ptr = group_ptr.to(tl.pointer_type(tl.float64))
    lr = tl.load(doubles_ptr)
    address = tl.load(group_ptr + LR)
    if address != 0:
        lr_type = tl.load(group_ptr + LR_TYPE) & 0xFF
        if lr_type == 0:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
        elif lr_type == 1:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        elif lr_type == 2:
            lr = tl.load(address.to(tl.pointer_type(tl.float16))).to(tl.float32).to(tl.float64)
        else:
            bits = tl.load(address.to(tl.pointer_type(tl.uint16))).to(tl.uint32) << 16
            lr = bits.to(tl.float32, bitcast=True).to(tl.float64)
    hyper = (lr,)
    for i in tl.static_range(1, HYPERS):
        hyper = hyper + (tl.load(doubles_ptr + i),)
    return hyper


@triton.jit
def operand_offsets(layout, OPERAND: tl.constexpr, index):
    """Where the elements numbered ``index`` of a row with a layout stand in an operand.

    A layout is the address of ndim, ndim sizes, and for each operand (param, grad, states) ndim
    strides; elements are numbered in row-major order of the sizes.
    """
    ndim_ptr = layout.to(tl.pointer_type(tl.int64))
    ndim = tl.load(ndim_ptr)
    sizes_ptr = ndim_ptr + 1
    strides_ptr = sizes_ptr + ndim * (1 + OPERAND)
    offsets = index * 0
    dim = ndim - 1
    while dim >= 0:
        size = tl.load(sizes_ptr + dim)
        offsets += index % size * tl.load(strides_ptr + dim)
        index = index // size
        dim -= 1
    return offsets


@triton.jit
def arrive_last(ticket_ptr, expected):
    """Whether this program is the last of ``expected`` to arrive here.

    The last one resets the ticket for the next launch.

    What the others read and wrote before arriving is done by then. The barrier makes that true of
    all threads of a program, since one of them draws the ticket.
    """
    tl.debug_barrier()
    last = expected == 1
    if expected > 1:
        last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == expected - 1
        if last:
            tl.store(ticket_ptr, 0)
    return last
