"""The Triton kernels, interpreted on the CPU, against the C++ rules compiled from csrc.

Equal to the last bit.

Run by test_triton_interpreted.py, or by hand with TRITON_INTERPRET=1.
"""

import ctypes
import math
import os
import shutil
import subprocess

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process with TRITON_INTERPRET=1; test_triton_interpreted.py starts one",
        allow_module_level=True,
    )

import triton_tools
from fusedopt.kernels import launch
from fusedopt.kernels.host_plan import layout_words
from fusedopt.kernels.pieces import BLOCK, EDGE
from fusedopt.kernels.rows import MAX_STATES, GroupRow, Row
from kernel_costs import CSRC, RULES

# Inputs hold inf, nan and numbers that overflow on purpose; masked lanes compute on zeros.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VARIANTS = [(rule, v) for rule in RULES for v in range(1 << len(launch.load_rule(rule).VARIANTS))]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Parameter, gradient, states.
TYPES = {
    "float32": (F32, F32, F32),
    "float64": (F64, F64, F64),
    "float16": (F16, F16, F16),
    "bfloat16": (BF16, BF16, BF16),
    "float32_grad_bfloat16": (F32, BF16, F32),
    "float32_grad_float16": (F32, F16, F32),
    "bfloat16_state_float32": (BF16, BF16, F32),
    "float16_state_float32": (F16, F16, F32),
}
SIZES = (1, EDGE + 1, BLOCK, 2 * BLOCK + 3)
HYPER = {
    "lr": (0.01, 0.3),
    "weight_decay": (0.1, 0.02),
    "decoupled_weight_decay": (0.0, 1.0),
    "maximize": (1.0, 0.0),
    "betas.0": (0.9, 0.3),
    "betas.1": (0.999, 0.95),
    "eps": (1e-8, 1e-3),
    "momentum": (0.9, 0.5),
    "dampening": (0.1, 0.0),
    "nesterov": (0.0, 1.0),
    "alpha": (0.99, 0.4),
    "lr_decay": (0.01, 0.0),
    "rho": (0.9, 0.5),
    "etas.0": (0.5, 0.3),
    "etas.1": (1.2, 1.7),
    "step_sizes.0": (1e-6, 4e-3),
    "step_sizes.1": (50.0, 0.5),
    "momentum_decay": (0.004, 0.3),
}

HARNESS = """
#include <algorithm>
#include <cstring>
%s
#include "core/control.h"
#include "core/scalars.h"
using namespace fusedopt;
template <typename Rule, int kVariant, typename T>
void run(const double* hyper, double step, const double* factors, int64_t n, T* param,
         const T* grad, T** states, double* scalars) {
  typename Rule::Hyper h;
  memcpy(&h, hyper, sizeof(h));
  constexpr int kScalars = rules::kScalarCount<Rule>;
  rules::Scalars<kScalars> kept{};
  if constexpr (kScalars > 0) {
    for (int k = 0; k < kScalars; ++k) kept[k] = {scalars[k], true};
  }
  const auto constants = make_constants<Rule, T>(h, step, kept);
  if constexpr (kScalars > 0) {
    Rule::advance(h, step, kept);
    for (int k = 0; k < kScalars; ++k) scalars[k] = kept[k].value;
  }
  const GradTransform<T> transform{T(factors[0]), T(factors[1]), T(factors[2]), T(factors[3])};
  constexpr int kCount = rules::count_states<Rule>(kVariant);
  for (int64_t i = 0; i < n; ++i) {
    T state[std::max(kCount, 1)] = {};
    for (int k = 0; k < kCount; ++k) state[k] = states[k][i];
    Rule::template update<kVariant>(constants, param[i], transform(grad[i]), state);
    for (int k = 0; k < kCount; ++k) states[k][i] = state[k];
  }
}
"""
ENTRY = """
extern "C" void {rule}_{variant}_{T}(const double* hyper, double step, const double* factors,
                                     int64_t n, {T}* param, const {T}* grad, {T}** states,
                                     double* scalars) {{
  run<rules::{rule}, {variant}, {T}>(hyper, step, factors, n, param, grad, states, scalars);
}}
"""


@pytest.fixture(scope="session")
def cpp_rules(tmp_path_factory):
    """The rules of csrc/rules as functions over arrays, by name."""
    if shutil.which("g++") is None:
        pytest.skip(
            "g++ is not installed; it compiles the C++ rules that the kernels are compared with"
        )
    source = HARNESS % "\n".join(f'#include "rules/{rule}.h"' for rule in RULES)
    source += "".join(
        ENTRY.format(rule=r, variant=v, T=t) for r, v in VARIANTS for t in ("float", "double")
    )
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules.cpp").write_text(source)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, "rules.cpp", "-o", "rules.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "rules.so"))


def narrow(x, dtype):
    """To the type in memory, to nearest even; halves by way of float32."""
    return x.to(F32).to(dtype) if dtype in (F16, BF16) else x.to(dtype)


class Problem:
    """One parameter with all that belongs to it, and sentinels on both sides of each in memory."""

    def __init__(self, rule, variant, numel, types, *, group=0, offset=0, wild=True, step=0.0):
        names = launch.state_names(launch.load_rule(rule), variant)
        self.rule, self.variant, self.group, self.wild = rule, variant, group, wild
        dtypes = (types[0], types[1], *(types[2] for _ in names))
        self.memory = [torch.full((numel + 64,), 7.0, dtype=dtype) for dtype in dtypes]
        self.operands = [memory[32 + offset : 32 + offset + numel] for memory in self.memory]
        for index, operand in enumerate(self.operands):
            operand.copy_(numbers(numel, wild and index < 2, positive=index >= 2))
        self.param, self.grad, self.states = self.operands[0], self.operands[1], self.operands[2:]
        self.counter = torch.tensor(step)
        self.scalars = [torch.tensor(0.5) for _ in launch.scalar_names(launch.load_rule(rule))]
        self.layout = ()

    def row(self):
        """How the plan would describe this parameter."""
        unused = MAX_STATES - len(self.states) - len(self.scalars)
        return Row(
            self.param.data_ptr(),
            (
                *(state.data_ptr() for state in self.states),
                *(0,) * unused,
                *(scalar.data_ptr() for scalar in self.scalars),
            ),
            self.counter.data_ptr(),
            self.counter.dtype,
            0,
            self.param.numel(),
            self.group,
            (
                *(operand.dtype for operand in self.operands),
                *(self.param.dtype,) * unused,
                *(scalar.dtype for scalar in self.scalars),
            ),
        )

    def expect(self, cpp_rules, hyper, factors):
        """What the C++ rule makes of param, states and scalars as they are now."""
        T = F64 if self.param.dtype == F64 else F32
        step = float(self.counter + 1)
        values = [operand.to(T).contiguous().clone() for operand in self.operands]
        states = (ctypes.c_void_p * 4)(*(value.data_ptr() for value in values[2:]))
        run = getattr(cpp_rules, f"{self.rule}_{self.variant}_{'double' if T == F64 else 'float'}")
        doubles = [torch.tensor(each, dtype=F64) for each in (hyper, factors, self.scalars)]
        run(
            ctypes.c_void_p(doubles[0].data_ptr()),
            ctypes.c_double(step),
            ctypes.c_void_p(doubles[1].data_ptr()),
            ctypes.c_int64(values[0].numel()),
            ctypes.c_void_p(values[0].data_ptr()),
            ctypes.c_void_p(values[1].data_ptr()),
            states,
            ctypes.c_void_p(doubles[2].data_ptr()),
        )
        return [
            narrow(value, operand.dtype)
            for value, operand in zip(
                [*values, *doubles[2]], [*self.operands, *self.scalars], strict=True
            )
        ]


def numbers(count, wild, positive=False):
    """Random values of many magnitudes, with special ones among them if wild."""
    x = torch.randn(count, dtype=F64) * 10.0 ** torch.randint(-3, 3, (count,))
    if wild and count > 16:
        special = [0.0, -0.0, 1e-40, -1e-42, 6e4, 1e30, -3e38, math.inf, -math.inf, math.nan]
        x[torch.randint(count, (len(special),))] = torch.tensor(special, dtype=F64)
    return x.abs() if positive else x


def assert_same_bits(got, expected, what=""):
    """Equal to the last bit, the sign of zero included; NaN equals NaN."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    same = (got.contiguous().view(integer) == expected.contiguous().view(integer)) | (
        got.isnan() & expected.isnan()
    )
    assert same.all(), (
        f"{what}: {(~same).sum()} differ, first {got[~same][0]!r} for {expected[~same][0]!r}"
    )


def hyper_of(rule, group):
    """The hyperparameters of one of two groups, in the rule's order."""
    return tuple(HYPER[name][group] for name in launch.load_rule(rule).HYPER)


def make_tables(problems, groups=None, grads=None):
    """Tables over the problems, whose groups clip nothing unless given."""
    rule = problems[0].rule
    groups = groups or [GroupRow(hyper_of(rule, group), math.inf, math.inf) for group in range(2)]
    groups = [group._replace(variant=problems[0].variant) for group in groups]
    addresses = grads or [p.grad.data_ptr() for p in problems]
    rows, layouts = [p.row() for p in problems], [p.layout for p in problems]
    return triton_tools.make_tables(rule, rows, groups, addresses, layouts)


def step_and_compare(
    problems, cpp_rules, tables, control, factors=(1.0, math.inf, 1.0, 1.0), **scaler
):
    """Applies a step and compares every operand and the counter with the C++ rule's."""
    expected = [p.expect(cpp_rules, hyper_of(p.rule, p.group), factors) for p in problems]
    counts = [float(p.counter) for p in problems]
    tables.apply(control, controlled=not scaler, **scaler)
    for p, values, count in zip(problems, expected, counts, strict=True):
        for index, (operand, value) in enumerate(
            zip([*p.operands, *p.scalars], values, strict=True)
        ):
            assert_same_bits(
                operand, value, f"{p.rule} {p.variant} operand {index} of {operand.numel()}"
            )
        assert float(p.counter) == count + 1
    assert not tables._tickets.any()


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("rule", "variant"), VARIANTS)
def test_rule_has_the_bits_of_cpp(cpp_rules, rule, variant, types):
    """Over early and late steps, groups and sizes around the block; nothing outside is written."""
    torch.manual_seed(variant)
    problems = [
        Problem(rule, variant, n, types, group=i % 2, step=10.0 * (i // 2))
        for i, n in enumerate(SIZES)
    ]
    groups = [GroupRow(hyper_of(rule, group), 30.0, math.inf) for group in range(2)]
    tables = make_tables(problems, groups)
    control = torch.tensor([0.7, 0.3, 0.0, 0.0, 0.0], dtype=F64)
    for _ in range(2):
        step_and_compare(problems, cpp_rules, tables, control, (0.7, 30.0, 1.0, 0.3))
        for p in problems:
            p.grad.copy_(numbers(p.grad.numel(), True))
    for p in problems:
        for memory in p.memory:
            assert (memory[:32] == 7).all()
            assert (memory[32 + p.param.numel() :] == 7).all()


@pytest.mark.parametrize("types", ["float32", "float64", "bfloat16", "float32_grad_float16"])
def test_misaligned_and_strided_rows(cpp_rules, types):
    """Views that start anywhere, and operands of different layouts, beside aligned rows."""
    torch.manual_seed(1)
    problems = [
        Problem("adam", 0, 2 * BLOCK + 5, TYPES[types], offset=offset) for offset in (0, 1, 3)
    ]
    strided = Problem("adam", 0, 0, TYPES[types])
    shape = (3, 5, 80)
    for index, dtype in enumerate(operand.dtype for operand in list(strided.operands)):
        # A slice of something wider, its dimensions in another order for each operand.
        order = [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)][index]
        wide = torch.full([shape[dim] + 2 for dim in order], 7.0, dtype=dtype)
        strided.memory[index] = wide
        view = wide.permute([order.index(dim) for dim in range(3)])[1:-1, 1:-1, 1:-1]
        view.copy_(numbers(math.prod(shape), False, positive=index > 1).view(shape))
        strided.operands[index] = view
    strided.param, strided.grad, *strided.states = strided.operands
    strided.layout = layout_words(shape, [operand.stride() for operand in strided.operands])
    problems.append(strided)
    tables = make_tables(problems)
    for _ in range(2):
        step_and_compare(problems, cpp_rules, tables, torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64))
    inner = torch.zeros_like(strided.memory[0], dtype=torch.bool)
    inner[1:-1, 1:-1, 1:-1] = True
    assert (strided.memory[0][~inner] == 7).all()


def test_long_pieces_of_several_blocks(cpp_rules, monkeypatch):
    """They run the unmasked loop and then the tail, several under one counter."""
    monkeypatch.setattr(launch, "piece_length", lambda numel, processors: 3 * BLOCK)
    problems = [Problem("sgd", 1, n * BLOCK + 9, TYPES["float32"], wild=False) for n in (2, 3, 7)]
    tables = make_tables(problems)
    assert [launch_.count for launch_, _ in tables._apply_launches] == [1 + 2 + 3]
    for _ in range(2):
        step_and_compare(problems, cpp_rules, tables, torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64))


@pytest.mark.parametrize("step", [0.0, 1.0, 6.0, 999.0, 123456.0, 16777216.0])
@pytest.mark.parametrize("rule", ["adam", "radam"])
def test_power_of_large_steps(cpp_rules, rule, step):
    """In one precision or in two; a counter beyond 2^24 stays where it is, as in float32."""
    p = Problem(rule, 0, 33, TYPES["float64"], step=step, wild=False)
    tables = make_tables([p])
    expected = p.expect(cpp_rules, hyper_of(rule, 0), (1.0, math.inf, 1.0, 1.0))
    tables.apply(torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64), controlled=True)
    assert_same_bits(p.param, expected[0])
    assert float(p.counter) == float(torch.tensor(step) + 1)


def test_rows_without_gradient_and_empty_rows_are_left_alone(cpp_rules):
    """Without a gradient not even the counter is written; an empty tensor advances its own."""
    problems = [Problem("adam", 1, n, TYPES["float32"], wild=False) for n in (50, 2 * BLOCK, 0)]
    before = [memory.clone() for memory in problems[1].memory]
    addresses = [problems[0].grad.data_ptr(), 0, problems[2].counter.data_ptr()]
    tables = make_tables(problems, grads=addresses)
    expected = problems[0].expect(cpp_rules, hyper_of("adam", 0), (1.0, math.inf, 1.0, 1.0))
    tables.apply(torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64), controlled=True)
    assert_same_bits(problems[0].param, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(problems[1].memory, before, strict=True))
    assert [float(p.counter) for p in problems] == [1.0, 0.0, 1.0]


def test_sgd_first_step_ignores_the_buffer(cpp_rules):
    """The buffer becomes the gradient whatever memory it holds."""
    p = Problem("sgd", 1, 40, TYPES["float32"], wild=False)
    p.states[0].fill_(math.nan)
    step_and_compare([p], cpp_rules, make_tables([p]), torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64))
    assert p.states[0].isfinite().all()


@pytest.mark.parametrize("given", ["control", "found_inf"])
def test_a_skipped_step_writes_nothing(given):
    """Neither parameter, state nor counter."""
    p = Problem("adam", 0, BLOCK + 5, TYPES["float32"], wild=False)
    before = [memory.clone() for memory in p.memory]
    tables = make_tables([p])
    if given == "control":
        tables.apply(torch.tensor([1.0, 1.0, 0, 0, 1.0], dtype=F64), controlled=True)
    else:
        tables.apply(tables.control, controlled=False, found_inf=torch.tensor(2.0))
        assert tables.control.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(p.memory, before, strict=True))
    assert float(p.counter) == 0.0


def test_the_scaler_without_a_norm_takes_one_launch(cpp_rules):
    """Unscaled by the scaler's own tensor, and the control block says so."""
    p = Problem("adam", 0, BLOCK + 5, TYPES["float32"], wild=False)
    tables = make_tables([p])
    step_and_compare(
        [p],
        cpp_rules,
        tables,
        tables.control,
        (1.0 / 3.0, math.inf, 1.0, 1.0),
        grad_scale=torch.tensor(3.0),
        found_inf=torch.tensor(0.0),
    )
    assert tables.control.tolist() == [1.0 / 3.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_learning_rate_on_the_device(cpp_rules, dtype):
    """Read in its own type, anew in every step."""
    lr = torch.tensor(0.013, dtype=dtype)
    p = Problem("sgd", 0, 20, TYPES["float32"], wild=False)
    hyper = hyper_of("sgd", 0)
    tables = make_tables(
        [p], [GroupRow((0.0, *hyper[1:]), math.inf, math.inf, (lr.data_ptr(), lr.dtype))]
    )
    for value in (0.013, 0.5):
        lr.fill_(value)
        expected = p.expect(cpp_rules, (float(lr), *hyper[1:]), (1.0, math.inf, 1.0, 1.0))
        tables.apply(torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64), controlled=True)
        assert_same_bits(p.param, expected[0])


def test_every_rounding_to_bfloat16():
    """All upper halves of a float32, with the lower halves that decide how it rounds."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    grads = (upper + lower).flatten().to(torch.int32).view(F32)
    # The parameter is 0 and lr is -1, so sgd writes the gradient itself; zeros lose their sign in 0
    # - (-1)(-0).
    param = torch.zeros(len(grads), dtype=BF16)
    counter = torch.zeros(())
    row = Row(param.data_ptr(), (), counter.data_ptr(), F32, 0, len(grads), 0, (BF16, F32))
    group = GroupRow((-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), math.inf, math.inf)
    tables = triton_tools.make_tables("sgd", [row], [group], [grads.data_ptr()])
    tables.apply(tables.control, controlled=False)
    assert_same_bits(param, (0.0 + grads).to(BF16))
