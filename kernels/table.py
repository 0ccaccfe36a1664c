"""The table that describes one optimizer's step to the kernels: int64 words in device memory.

csrc/core/table.h in Triton, written by launch.py, read by both kernels. Numbers that are not
integers are float64 stored by their bits. Gradient pointers stand in a column of their own, because
they are what changes from step to step.
"""

import torch
import triton
import triton.language as tl

MAX_STATES = 4
MAX_HYPER = 12

# A tensor row: the parameter, MAX_STATES states, the counter, the layout (0: every operand is dense
# in the same order), the group's index, the number of pieces, the index of the first, and the type
# of the counter, as in NUMBER_TYPES.
PARAM = tl.constexpr(0)
STATE = tl.constexpr(1)
STEP = tl.constexpr(5)
LAYOUT = tl.constexpr(6)
GROUP = tl.constexpr(7)
PIECES = tl.constexpr(8)
FIRST_PIECE = tl.constexpr(9)
STEP_TYPE = tl.constexpr(10)
TENSOR_WORDS = tl.constexpr(11)

# A group row: MAX_HYPER hyperparameters, the limits (infinity: none), the address of a learning
# rate on the device (0: it is the first hyperparameter) and its type, as in NUMBER_TYPES.
MAX_GRAD_VALUE = tl.constexpr(12)
MAX_GRAD_NORM_PER_PARAM = tl.constexpr(13)
LR = tl.constexpr(14)
LR_TYPE = tl.constexpr(15)
GROUP_WORDS = tl.constexpr(16)
NUMBER_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# A piece: a run of consecutive elements of one tensor, what one program works on. An empty tensor
# has one empty piece, so that its counter advances.
BEGIN = tl.constexpr(0)
LENGTH = tl.constexpr(1)
TENSOR = tl.constexpr(2)
PIECE_WORDS = tl.constexpr(3)

# The settings of the step: the limit of the global norm (infinity: none), and 1 to skip steps with
# non-finite gradients.
MAX_GRAD_NORM = tl.constexpr(0)
SKIP_NONFINITE = tl.constexpr(1)
SETTINGS_WORDS = tl.constexpr(2)


@triton.jit
def load_piece(pieces_ptr, index):
    """(begin, length, tensor) of a piece."""
    ptr = pieces_ptr + index.to(tl.int64) * PIECE_WORDS
    return tl.load(ptr + BEGIN), tl.load(ptr + LENGTH), tl.load(ptr + TENSOR)


@triton.jit
def load_step(row_ptr):
    """The number of the step under way: the counter plus 1, added in the counter's own type."""
    address = tl.load(row_ptr + STEP)
    if tl.load(row_ptr + STEP_TYPE) == 1:
        step = tl.load(address.to(tl.pointer_type(tl.float64))) + 1.0
    else:
        step = (tl.load(address.to(tl.pointer_type(tl.float32))) + 1.0).to(tl.float64)
    return step


@triton.jit
def store_step(row_ptr, step):
    """Sets the counter to what ``load_step`` gave."""
    address = tl.load(row_ptr + STEP)
    if tl.load(row_ptr + STEP_TYPE) == 1:
        tl.store(address.to(tl.pointer_type(tl.float64)), step)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)), step.to(tl.float32))


@triton.jit
def load_hyper(group_ptr, HYPERS: tl.constexpr):
    """A group's hyperparameters in the rule's order, as float64.

    The learning rate is read from the device where it lives there.
    """
    doubles_ptr = group_ptr.to(tl.pointer_type(tl.float64))
    lr = tl.load(doubles_ptr)
    address = tl.load(group_ptr + LR)
    if address != 0:
        lr_type = tl.load(group_ptr + LR_TYPE)
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
