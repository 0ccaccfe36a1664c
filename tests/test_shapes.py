"""Every size, alignment and memory layout gives the same numbers and touches no other memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    ENTRIES,
    INTERPRETED,
    LAYOUTS,
    Run,
    assert_accurate,
    assert_close,
    assert_same_bits,
    backends,
    device_of,
    lay_out,
    make_fused,
    make_params,
    make_stock,
    oracle,
    oracle_steps,
    random,
    richest,
    run_fused,
    run_stock,
    same_bits,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
DTYPES = (torch.float32, torch.bfloat16)
#: Around the 16 lanes and 512 staged elements of the CPU loops, and the 16 bytes of a GPU's load.
SIZES = (*range(67), 127, 128, 129, 511, 512, 513, 1023, 1025)
if INTERPRETED:
    SIZES = (0, 1, 2, 3, 4, 7, 8, 17, 33, 64, 129, 513, 1025)
SENTINEL = 12345.0


def guarded(values: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (a view that holds `values`, the memory around it, filled with sentinels)."""
    memory = values.new_full((offset + values.numel() + 16,), SENTINEL)
    view = memory[offset : offset + values.numel()].view(values.shape)
    return view.copy_(values), memory


def intact(memory: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether the sentinels on both sides of a guarded view are still there."""
    start = view.storage_offset()
    outside = torch.cat([memory[:start], memory[start + view.numel() :]])
    return bool((outside == SENTINEL).all())


@OURS
@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [16, 17, 19])
def test_every_size_between_sentinels(entry, backend, dtype, offset):
    """Parameter, gradient and state of every size, aligned or not; nothing is written past them."""
    options = richest(entry)
    start = make_params([(size,) for size in SIZES], dtype, device_of(backend))
    fences = [guarded(param.detach(), offset) for param in start]
    own = [torch.nn.Parameter(view) for view, _ in fences]
    ours = Run(own, make_fused(entry, own, backend, **options)).steps(1)
    for param in own:
        entries = ours.optimizer.state[param]
        for name in entry.states:
            if name in entries:
                entries[name], memory = guarded(entries[name], offset)
                fences.append((entries[name], memory))
    set_grads(own, 2)
    for param in own:
        param.grad, memory = guarded(param.grad, offset)
        fences.append((param.grad, memory))
    ours.optimizer.step()
    stock = run_stock(entry, start, **options).steps(2)
    truth = oracle_steps(oracle(entry, start, **options), start, 2)
    assert_accurate(ours.tensors(), stock.tensors(), truth.tensors())
    assert all(intact(memory, view) for view, memory in fences)


@OURS
@BACKENDS
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (6, 7), (9,)], ids=str)
def test_layouts_of_parameter_gradient_and_state_differ(entry, backend, shape):
    """Elements are paired by index, in all combinations of three layouts: the same bits."""
    options = richest(entry)
    device = device_of(backend)
    expected = run_fused(entry, make_params([shape], device=device), backend, **options).steps(3)
    combinations = list(itertools.product(LAYOUTS, LAYOUTS, LAYOUTS))
    if INTERPRETED:  # a Latin square: all pairs
        combinations = [c for c in combinations if sum(map(LAYOUTS.index, c)) % len(LAYOUTS) == 0]
    params = [
        torch.nn.Parameter(lay_out(expected_start.detach(), layout))
        for layout, _, _ in combinations
        for expected_start in make_params([shape], device=device)
    ]
    ours = Run(params, make_fused(entry, params, backend, **options))
    for seed in (1, 2, 3):
        grad = random(shape, 1000 * seed, device=device)
        for param, (_, layout, _) in zip(params, combinations, strict=True):
            param.grad = lay_out(grad, layout)
        ours.optimizer.step()
        if seed > 1:
            continue
        for param, (_, _, layout) in zip(params, combinations, strict=True):
            entries = ours.optimizer.state[param]
            for name in entry.states:
                if name in entries:
                    entries[name] = lay_out(entries[name], layout)
    tensors = ours.tensors()
    for i in range(len(combinations)):
        own = {name[: -len(str(i))] + "0": tensors[name] for name in names_of(tensors, i)}
        assert_close(own, expected.tensors())
        if backend != "torch":
            assert_same_bits(own, expected.tensors())


def names_of(tensors: dict, index: int) -> list[str]:
    """Returns the names that belong to one parameter."""
    return [name for name in tensors if name.endswith(f" {index}")]


@OURS
@BACKENDS
def test_view_with_gaps_leaves_its_neighbours_alone(entry, backend):
    """Stock fused kernels overwrite what lies between the elements of a non-dense parameter."""
    options = richest(entry)
    device = device_of(backend)
    for cut in (
        lambda memory: memory[:, 1:5],
        lambda memory: memory[::2, ::3],
        lambda memory: memory.t()[2:4],
        lambda memory: memory[3],
    ):
        memory = torch.full((8, 9), SENTINEL, device=device)
        inside = torch.zeros_like(memory, dtype=torch.bool)
        cut(inside)[...] = True
        view = cut(memory)
        view.copy_(random(view.shape, 5))
        param = torch.nn.Parameter(view)
        assert param.data_ptr() == view.data_ptr()
        stock = run_stock(entry, [view.clone()], **options).steps(3)
        ours = Run([param], make_fused(entry, [param], backend, **options)).steps(3)
        assert_close(ours.tensors(), stock.tensors())
        assert (memory[~inside] == SENTINEL).all()


@OURS
@BACKENDS
@pytest.mark.parametrize("empty_at", [(0,), (2,), (3,), (0, 1, 2, 3), (1, 3)], ids=str)
def test_tensors_without_elements(entry, backend, empty_at):
    """They are ordinary in every place, also the last, and keep counting steps."""
    options = richest(entry)
    shapes = [(0, 3) if i in empty_at else (4 + i,) for i in range(4)]
    start = make_params(shapes, device=device_of(backend))
    stock = run_stock(entry, start, **options).steps(3)
    ours = run_fused(entry, start, backend, **options).steps(3)
    assert_close(ours.tensors(), stock.tensors())


@OURS
@BACKENDS
def test_zero_dimensions(entry, backend):
    """A scalar parameter keeps scalar states."""
    options = richest(entry)
    start = make_params([()], device=device_of(backend))
    stock = run_stock(entry, start, **options).steps(3)
    ours = run_fused(entry, start, backend, **options).steps(3)
    assert_close(ours.tensors(), stock.tensors())
    assert all(value.dim() == 0 for value in ours.tensors().values())


@OURS
@BACKENDS
def test_expanded_gradient(entry, backend):
    """What sum().backward() leaves: one element in memory, read for all."""
    options = richest(entry)
    start = make_params([(5, 7), (30,)], device=device_of(backend))
    ours, stock = run_fused(entry, start, backend, **options), run_stock(entry, start, **options)
    for run in (ours, stock):
        for param in run.params:
            param.grad = torch.full((), 0.5, device=param.device).expand(param.shape)
        run.optimizer.step()
        run.optimizer.step()
    assert_close(ours.tensors(), stock.tensors())


@OURS
@BACKENDS
def test_expanded_parameter_is_refused_as_by_torch(entry, backend):
    """Several elements in one place cannot be updated each by its own gradient."""
    options = richest(entry)
    for shape in ((4,), (3, 2)):
        memory = torch.ones((), device=device_of(backend))
        texts = []
        for make in (make_stock, lambda *args, **kw: make_fused(*args, backend, **kw)):
            param = memory.clone().expand(shape).requires_grad_()
            with pytest.raises(RuntimeError) as caught:
                optimizer = make(entry, [param], **options)
                param.grad = torch.ones(shape, device=param.device)
                optimizer.step()
            texts.append(str(caught.value))
        assert texts[1].startswith(texts[0])


@OURS
@BACKENDS
@pytest.mark.parametrize("overlap", ["same", "half", "interleaved", "reversed_order"])
def test_parameters_that_share_memory(entry, backend, overlap):
    """They are updated one after the other, as torch does."""
    options = richest(entry)
    cuts = {
        "same": lambda m: (m[:6], m[:6]),
        "half": lambda m: (m[:8], m[4:]),
        "interleaved": lambda m: (m[::2], m[1::2]),
        "reversed_order": lambda m: (m[6:], m[:8]),
    }
    runs = []
    for make in (make_stock, lambda *args, **kw: make_fused(*args, backend, **kw)):
        memory = random((12,), 3, device=device_of(backend))
        params = [torch.nn.Parameter(cut) for cut in cuts[overlap](memory)]
        params += make_params([(5,)], device=device_of(backend), seed=9)
        runs.append(Run(params, make(entry, params, **options)).steps(4))
    assert_close(runs[1].tensors(), runs[0].tensors())
    # Small tensors would not race: this says that large ones cannot.
    used = [runs[1].optimizer.backend_of(param) for param in runs[1].params]
    assert used[2] == backend
    assert overlap == "interleaved" or used[:2] == ["torch", "torch"]


@OURS
@BACKENDS
@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_parameter_listed_twice(entry, backend):
    """Torch warns and updates it twice in every step; so do we."""
    options = richest(entry)
    runs = []
    for make in (make_stock, lambda *args, **kw: make_fused(*args, backend, **kw)):
        params = make_params([(6,), (3,)], device=device_of(backend))
        params.insert(1, params[0])
        runs.append(Run(params, make(entry, params, **options)).steps(3).tensors())
    assert_close(runs[1], runs[0])


@OURS
@BACKENDS
def test_memory_becomes_shared_later(entry, backend):
    """`parameter.data = other.data` between two steps is noticed."""
    options = richest(entry)
    start = make_params([(6,), (6,)], device=device_of(backend))
    runs = []
    for run in (run_stock(entry, start, **options), run_fused(entry, start, backend, **options)):
        run.steps(2)
        run.params[1].data = run.params[0].data
        runs.append(run.steps(2, first=3).tensors())
    assert_close(runs[1], runs[0])


@OURS
@BACKENDS
def test_negated_and_zero_gradients(entry, backend):
    """Gradients that torch keeps lazily (a negative view, an expanded zero) are read by value."""
    options = richest(entry)
    start = make_params([(6,), (3, 4)], device=device_of(backend))
    runs = []
    for run in (run_stock(entry, start, **options), run_fused(entry, start, backend, **options)):
        for seed in (1, 2):
            set_grads(run.params, seed)
            run.params[0].grad = torch._neg_view(run.params[0].grad)
            run.optimizer.step()
        runs.append(run.tensors())
    assert_close(runs[1], runs[0])


@OURS
@BACKENDS
def test_many_dimensions(entry, backend):
    """Twenty dimensions, one of them not of size one, transposed."""
    start = lay_out(random((2,) * 3 + (1,) * 16 + (3,), 1), "transposed")
    own = [start.to(device_of(backend)).requires_grad_()]
    stock = run_stock(entry, own, **richest(entry)).steps(2, layout="contiguous")
    ours = run_fused(entry, own, backend, **richest(entry)).steps(2, layout="contiguous")
    assert_close(ours.tensors(), stock.tensors())


def test_same_bits_can_fail():
    """The comparison that the files beside rely on tells zeros apart and takes NaN as equal."""
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, -nan * torch.tensor([1.0, -1.0]))
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.ones(1), torch.ones(1, dtype=torch.float64))
