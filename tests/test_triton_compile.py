"""The Triton kernels compiled ahead of time, without a GPU.

Wide accesses, correct rounding, nothing fused, nothing approximate.
"""

import os
import re
from collections import Counter

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "this process interprets; Triton decides when it is imported", allow_module_level=True
    )

import triton
import triton.language as tl
from fusedopt.kernels import launch, pieces
from fusedopt.kernels.apply import apply_kernel
from fusedopt.kernels.reduce import reduce_kernel
from kernel_costs import RULES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

F32, F64, F16, BF16 = tl.float32, tl.float64, tl.float16, tl.bfloat16
AMD = GPUTarget("hip", "gfx942", 64)
TYPES = {
    "float32": (F32, F32, F32),
    "float64": (F64, F64, F64),
    "float16": (F16, F16, F16),
    "bfloat16": (BF16, BF16, BF16),
    "float32_grad_bfloat16": (F32, BF16, F32),
    "bfloat16_state_float32": (BF16, BF16, F32),
}
WORDS = ("pieces_ptr", "spans_ptr", "tensors_ptr", "groups_ptr", "grads_ptr")
#: Of each rule the one with all states.
VARIANTS = [(rule, (1 << len(launch.load_rule(rule).VARIANTS)) - 1) for rule in RULES]


def nvidia(capability):
    """The target of an NVIDIA architecture."""
    return GPUTarget("cuda", capability, 32)


def build(kernel, pointers, constants, target, threads=pieces.THREADS):
    """Compiles a kernel; returns what each stage of the compiler made of it."""
    signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
    options = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants), target=target, options=options
    ).asm


def build_apply(rule, variant, types, target, controlled=True):
    """The apply kernel of a rule's variant: (stages, number of states)."""
    module = launch.load_rule(rule)
    states = len(launch.state_names(module, variant))
    pointers = dict.fromkeys(WORDS, "*i64")
    pointers |= {"tickets_ptr": "*i32", "control_ptr": "*fp64", "first": "i32"}
    constants = {"coefs_ptr": None, "grad_scale_ptr": None, "found_inf_ptr": None}
    if controlled:
        pointers["coefs_ptr"] = "*fp64"
        del constants["coefs_ptr"]
    constants |= {
        "CONTROLLED": controlled,
        **launch.rule_constants(module),
        "VARIANT": variant,
        "TYPES": (*types[:2], *[types[2]] * states),
        "T": F64 if types[0] == F64 else F32,
        "BLOCK": pieces.BLOCK,
        "EDGE": pieces.EDGE,
    }
    return build(apply_kernel, pointers, constants, target), states


def build_reduce(dtype, target):
    """The reduce kernel for one type of gradients."""
    pointers = dict.fromkeys(WORDS, "*i64")
    doubles = (
        "settings_ptr",
        "piece_pairs_ptr",
        "tensor_pairs_ptr",
        "coefs_ptr",
        "sums_ptr",
        "control_ptr",
    )
    pointers |= dict.fromkeys(doubles, "*fp64")
    pointers |= {"tickets_ptr": "*i32", "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32"}
    pointers |= {"first": "i32", "tensor_count": "i32", "filled_count": "i32"}
    constants = {"unscale_ptr": None, "TYPE": dtype, "T": F64 if dtype == F64 else F32}
    constants |= {"BLOCK": pieces.REDUCE_BLOCK, "EDGE": pieces.REDUCE_EDGE}
    constants |= {"MAX_PIECE": pieces.MAX_PIECE, "PAIRS": pieces.PAIRS}
    return build(reduce_kernel, pointers, constants, target, reduce_threads(dtype))


def reduce_threads(dtype):
    """Threads of the reduce kernel: 8 accesses of 16 bytes each, 16 of float64, make a block."""
    return pieces.THREADS // (2 if dtype.primitive_bitwidth == 16 else 1)


def wide(ptx, kind):
    """How many 16-byte accesses of global memory the PTX has."""
    accesses = Counter(re.findall(rf"\b{kind}\.global\.(v[\w.]+)", ptx))
    return accesses["v4.b32"] + accesses["v2.b64"]


def assert_exact(ptx, fused=frozenset()):
    """No operation is approximate, flushed or dropping NaN, and none fused but those named."""
    operations = set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][a-z0-9_.]*)", ptx, re.MULTILINE))
    floating = {name for name in operations if re.search(r"\.f(16|32|64)", name)}
    inexact = {
        name
        for name in floating
        if re.search(r"approx|full|ftz|^(fma|mad|rsqrt|rcp|ex2|lg2|min)", name)
    }
    assert inexact <= fused
    for name in floating & {
        n for n in floating if n.startswith(("add", "sub", "mul", "div", "sqrt"))
    }:
        assert ".rn." in name, name
    # The largest flag; never a parameter, gradient or state.
    assert {name for name in floating if name.startswith("max")} <= {"max.f64"}


def elements_a_thread(block):
    """How many elements of a block one thread handles."""
    return block // pieces.THREADS


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_apply_moves_16_bytes_at_a_time(types):
    """The unmasked loop has as many accesses as its bytes need in every type, and no others."""
    asm, states = build_apply("adam", 0, types, nvidia(90))
    size = [dtype.primitive_bitwidth // 8 for dtype in (*types[:2], *[types[2]] * states)]
    per_operand = [elements_a_thread(pieces.BLOCK) * bytes_ // 16 for bytes_ in size]
    assert wide(asm["ptx"], "ld") == sum(per_operand)
    assert wide(asm["ptx"], "st") == sum(per_operand) - per_operand[1]
    assert_exact(asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("rule", "variant"), VARIANTS)
def test_every_rule_on_every_architecture(rule, variant, capability):
    """Every rule with all its states: wide accesses, exact arithmetic, machine code."""
    asm, states = build_apply(rule, variant, TYPES["float32"], nvidia(capability))
    ptx = asm["ptx"]
    assert wide(ptx, "ld") == 2 * (2 + states)
    assert wide(ptx, "st") == 2 * (1 + states)
    assert_exact(ptx)
    assert not re.search(r"\bmax\.", ptx)
    # What the rule takes from kernels/common.py.
    expected = {"divide": {"div.rn.f32"}, "root": {"sqrt.rn.f32"}}
    expected["power"] = {"sqrt.rn.f64", "div.rn.f64"}
    for name, instructions in expected.items():
        if hasattr(launch.load_rule(rule), name):
            assert all(instruction in ptx for instruction in instructions)
    assert "cubin" in asm


def test_the_whole_step_in_one_launch():
    """Without a norm the apply kernel writes the control block: five doubles beside a counter."""
    asm, _ = build_apply("adam", 0, TYPES["float32"], nvidia(90), controlled=False)
    assert len(re.findall(r"st\.global\.b64", asm["ptx"])) == 5 + 1


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_reduce_moves_16_bytes_at_a_time(dtype, capability):
    """One operand, read once, in every type."""
    asm = build_reduce(dtype, nvidia(capability))
    elements = pieces.REDUCE_BLOCK // reduce_threads(dtype)
    assert wide(asm["ptx"], "ld") == elements * dtype.primitive_bitwidth // 128
    # The square of a float is exact in float64, of a double it is not.
    assert_exact(asm["ptx"], set() if dtype == F64 else {"fma.rn.f64"})
    # A lane of a strip stays within a thread; only the last sums of a piece move.
    loop = asm["ttgir"].partition("scf.while")[2].partition("scf.yield")[0]
    assert "tt.reduce" in loop
    assert "convert_layout" not in loop


def test_tickets_order_what_other_programs_wrote():
    """A barrier before each ticket, acquire and release, and sums read past the first cache."""
    ptx = build_reduce(F32, nvidia(90))["ptx"]
    assert len(re.findall(r"atom\.global\.gpu\.acq_rel\.add", ptx)) == 2
    for ticket in re.split(r"atom\.global\.gpu\.acq_rel\.add", ptx)[:-1]:
        assert "bar.sync" in ticket
    assert "ld.global.cg.b64" in ptx


def test_bfloat16_rounds_through_integers():
    """Neither widening nor narrowing leaves room for a compiler's choice."""
    asm, _ = build_apply("sgd", 0, TYPES["bfloat16"], nvidia(90))
    assert "bf16" not in asm["ptx"]
    asm, _ = build_apply("sgd", 0, TYPES["float16"], nvidia(90))
    assert re.search(r"cvt\.rn\.f16(x2)?\.f32", asm["ptx"])


#: Flags of LLVM's that allow other results.
INEXACT = {"fast", "reassoc", "contract", "arcp", "afn", "nsz"}
#: Promises about operands. What breaks them is undefined; LLVM also adds those that it has proved.
PROMISES = {"nnan", "ninf"}


def flags(llir):
    """The flags of floating-point arithmetic in LLVM's code."""
    return set(re.findall(r"\w+", llir)) & (INEXACT | PROMISES)


@pytest.mark.parametrize("types", ["float32", "float64", "bfloat16"])
def test_apply_for_amd(types, monkeypatch):
    """Compiles to machine code; 16-byte accesses, IEEE division, denormals and NaN kept."""
    asm, states = build_apply("adam", 0, TYPES[types], AMD)
    code = asm["amdgcn"]
    per_operand = elements_a_thread(pieces.BLOCK) * TYPES[types][0].primitive_bitwidth // 128
    assert len(re.findall(r"global_load_dwordx4", code)) == per_operand * (2 + states)
    assert len(re.findall(r"global_store_dwordx4", code)) == per_operand * (1 + states)
    assert "v_div_fixup" in code
    assert '"denormal-fp-math-f32"="ieee"' in asm["llir"]
    assert flags(asm["llir"]) <= PROMISES
    # Before LLVM has optimised, a promise could only be Triton's, which knows nothing of NaN.
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    asm, _ = build_apply("adam", 0, TYPES[types], AMD)
    assert not flags(asm["llir"])


def test_reduce_for_amd():
    """Compiles to machine code with 16-byte loads."""
    assert "global_load_dwordx4" in build_reduce(F32, AMD)["amdgcn"]
