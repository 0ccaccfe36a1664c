"""What `last_grad_norm` and `last_step_skipped` mean.

And that the norm's bits depend on nothing but the gradients.
"""

from __future__ import annotations

import contextlib
import math

import cases
import pytest
import torch
from separate_passes import make_grads

ADAM = cases.TABLE["Adam"]


@contextlib.contextmanager
def threads(count: int):
    """Runs with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(name: str):
    """Runs the cpu backend with one of its instruction sets."""
    extension = pytest.importorskip("fusedopt._C")
    before = extension.instruction_set()
    extension.use_instruction_set(name)
    try:
        yield
    finally:
        extension.use_instruction_set(before)


def instruction_sets() -> list[str]:
    """Returns those that this machine runs; none without the extension."""
    if "cpu" not in cases.backends():
        return []
    import fusedopt._C

    return fusedopt._C.instruction_sets()


@pytest.mark.parametrize("backend", cases.backends())
def test_none_before_the_first_step_and_without_a_limit(backend):
    """The norm needs a limit, the flag only a step."""
    params = cases.make_params(device=cases.device_of(backend))
    limited = cases.run_fused(ADAM, params, backend, max_grad_norm=1.0)
    plain = cases.run_fused(ADAM, params, backend, skip_nonfinite=True, max_grad_norm_per_param=1.0)
    for run in (limited, plain):
        assert run.optimizer.last_grad_norm is None
        assert run.optimizer.last_step_skipped is None
        run.steps(1)
        assert run.optimizer.last_step_skipped.item() is False
    assert plain.optimizer.last_grad_norm is None
    norm = limited.optimizer.last_grad_norm
    assert (norm.dtype, norm.shape, norm.device) == (torch.float32, (), params[0].device)
    skipped = limited.optimizer.last_step_skipped
    assert (skipped.dtype, skipped.shape, skipped.device) == (torch.bool, (), params[0].device)
    limited.optimizer.max_grad_norm = None
    limited.steps(1)
    assert limited.optimizer.last_grad_norm is None


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("shapes", ((), ((3,), (0,))), ids=("none", "missing"))
def test_zero_without_gradients(backend, shapes):
    """No gradient at all, and then only an empty one."""
    params = cases.make_params(shapes or ((4,),), device=cases.device_of(backend))
    optimizer = cases.make_fused(ADAM, params, backend, max_grad_norm=1.0, skip_nonfinite=True)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert optimizer.last_grad_norm.item() == 0.0
    assert optimizer.last_step_skipped.item() is False
    if shapes:
        params[1].grad = torch.empty_like(params[1])
        optimizer.step()
        assert optimizer.last_grad_norm.item() == 0.0
        assert optimizer.state[params[1]]["step"] == 1
    assert all(cases.same_bits(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("poison", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("skip", (False, True))
def test_inf_or_nan_on_a_bad_step(backend, poison, skip):
    """Inf gives inf and nan gives nan, skipped or not; the next good step gives its own norm."""
    params = cases.make_params(device=cases.device_of(backend))
    run = cases.run_fused(ADAM, params, backend, max_grad_norm=1.0, skip_nonfinite=skip)
    for param, grad in zip(run.params, make_grads(params, 1, poison=poison), strict=True):
        param.grad = grad
    run.optimizer.step()
    norm = run.optimizer.last_grad_norm
    assert bool(norm.isnan() if math.isnan(poison) else norm == math.inf)
    run.steps(1)
    expected = torch.cat([p.grad.double().flatten() for p in run.params]).norm().float()
    torch.testing.assert_close(run.optimizer.last_grad_norm, expected, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("backend", cases.backends())
def test_what_was_returned_never_changes(backend):
    """Norm and flag share memory with nothing inside, so writing to them does nothing."""
    params = cases.make_params(device=cases.device_of(backend))
    run = cases.run_fused(ADAM, params, backend, max_grad_norm=1.0, skip_nonfinite=True).steps(1)
    norm, skipped = run.optimizer.last_grad_norm, run.optimizer.last_step_skipped
    kept = norm.item()
    for param in run.params:
        param.grad.mul_(3).fill_(math.inf)
    run.optimizer.step()
    assert (norm.item(), skipped.item()) == (kept, False)
    assert (run.optimizer.last_grad_norm.item(), run.optimizer.last_step_skipped.item()) == (
        math.inf,
        True,
    )
    run.optimizer.last_grad_norm.fill_(7.0)
    run.optimizer.last_step_skipped.fill_(False)
    assert run.optimizer.last_grad_norm == math.inf
    assert run.optimizer.last_step_skipped


@pytest.mark.parametrize("backend", cases.backends())
def test_the_norm_is_after_value_and_per_parameter_clips(backend):
    """[30, 40] / 10 is clamped to [3, 3.5], its norm 4.61 clipped to 2; with [1] / 10: 2.0025."""
    device = cases.device_of(backend)
    params = [
        torch.nn.Parameter(torch.zeros(2, device=device)),
        torch.nn.Parameter(torch.zeros(1, device=device)),
    ]
    optimizer = cases.make_fused(
        cases.TABLE["SGD"],
        params,
        backend,
        lr=1.0,
        max_grad_norm=1.0,
        max_grad_norm_per_param=2.0,
        max_grad_value=3.5,
    )
    params[0].grad = torch.tensor([30.0, 40.0], device=device)
    params[1].grad = torch.tensor([1.0], device=device)
    optimizer.grad_scale = torch.tensor(10.0, device=device)
    optimizer.step()
    own = 2 / (math.hypot(3, 3.5) + 1e-6)
    norm = math.hypot(3 * own, 3.5 * own, 0.1)
    assert optimizer.last_grad_norm.item() == pytest.approx(norm, rel=3e-7)
    clip = 1 / (norm + 1e-6)
    expected = [-3 * own * clip, -3.5 * own * clip, -0.1 * clip]
    assert torch.cat([p.detach() for p in params]).tolist() == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_norm_is_summed_in_float64(backend, dtype):
    """A float32 sum of many equal gradients and a large one would be off by many roundings."""
    count = 10_001 if cases.INTERPRETED else 100_001
    param = torch.nn.Parameter(torch.zeros(count, dtype=dtype, device=cases.device_of(backend)))
    optimizer = cases.make_fused(cases.TABLE["SGD"], [param], backend, max_grad_norm=1.0)
    param.grad = torch.full_like(param, 0.001)
    param.grad[5] = 60000.0 if dtype == torch.float16 else 1e6
    optimizer.step()
    assert cases.same_bits(optimizer.last_grad_norm.cpu(), param.grad.double().norm().float().cpu())
    param.grad[5] = 0.001
    optimizer.step()
    # Sums of 1e5 numbers in float64 err by less than 1e-11, so only a tie could round otherwise.
    assert cases.same_bits(optimizer.last_grad_norm.cpu(), param.grad.double().norm().float().cpu())


def steps_with_everything(backend: str, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns what three clipped steps over many sizes leave, a skipped one among them."""
    shapes = ((40_000,), (1,), (0,), (129, 257), (17,), (3, 5, 7), *((64,),) * 50)
    params = cases.make_params(shapes, dtype, cases.device_of(backend), layout)
    run = cases.run_fused(
        ADAM,
        params,
        backend,
        max_grad_norm=1.0,
        max_grad_norm_per_param=2.0,
        max_grad_value=2.0,
        skip_nonfinite=True,
    )
    norms = {}
    for seed in range(3):
        cases.set_grads(run.params, seed)
        if seed == 1:
            run.params[3].grad[128, 256] = math.inf
        run.optimizer.step()
        norms[f"norm {seed}"] = run.optimizer.last_grad_norm
        norms[f"flag {seed}"] = run.optimizer.last_step_skipped
    return norms | run.tensors()


@pytest.mark.parametrize("backend", cases.native_backends())
@pytest.mark.parametrize("layout", ("contiguous", "misaligned", "every_second"))
def test_same_bits_for_any_number_of_threads(backend, layout):
    """One, two and five threads, and the same again."""
    if backend == "triton":
        pytest.skip("no kernel of Triton's runs in threads of the CPU")
    with threads(1):
        expected = steps_with_everything(backend, layout, torch.float32)
    for count in (1, 2, 5):
        with threads(count):
            found = steps_with_everything(backend, layout, torch.float32)
            cases.assert_same_bits(found, expected)


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_same_bits_for_every_instruction_set(name, dtype):
    """The best one against each other one, contiguous and with gaps."""
    for layout in ("contiguous", "misaligned"):
        expected = steps_with_everything("cpu", layout, dtype)
        with instruction_set(name):
            cases.assert_same_bits(steps_with_everything("cpu", layout, dtype), expected)


@pytest.mark.parametrize("backend", cases.native_backends())
def test_the_norm_does_not_depend_on_what_else_was_measured(backend):
    """A gradient that is missing, or came back, changes nothing in the others' sums."""
    params = cases.make_params(((50,), (60,), (70,)), device=cases.device_of(backend))
    fresh = cases.run_fused(ADAM, params, backend, max_grad_norm=1.0)
    used = cases.run_fused(ADAM, params, backend, max_grad_norm=1.0).steps(2, scale=100.0)
    for run in (fresh, used):
        for param, grad in zip(run.params, make_grads(params, 9, missing=[1]), strict=True):
            param.grad = grad
        run.optimizer.step()
    assert cases.same_bits(fresh.optimizer.last_grad_norm, used.optimizer.last_grad_norm)
    expected = torch.cat([fresh.params[0].grad, fresh.params[2].grad])
    torch.testing.assert_close(
        fresh.optimizer.last_grad_norm, expected.double().norm().float(), rtol=1.2e-7, atol=0
    )


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
def test_gradients_keep_their_bits(entry, backend):
    """After scaling, clamp and two clips `.grad` is the same object, with its bits and version."""
    params = cases.make_params(device=cases.device_of(backend))
    run = cases.run_fused(
        entry, params, backend, max_grad_norm=0.1, max_grad_norm_per_param=0.1, max_grad_value=0.1
    )
    grads = make_grads(params, 1, 50.0)
    for param, grad in zip(run.params, grads, strict=True):
        param.grad = grad
    held = [param.grad for param in run.params]
    copies = [grad.clone() for grad in held]
    versions = [grad._version for grad in held]
    run.optimizer.grad_scale = torch.tensor(8.0, device=params[0].device)
    for _ in range(2):
        run.optimizer.step()
    for param, grad, copy, version in zip(run.params, held, copies, versions, strict=True):
        assert param.grad is grad
        assert cases.same_bits(grad, copy)
        assert grad._version == version


@pytest.mark.parametrize("backend", cases.backends())
def test_a_limit_set_later_knows_no_norm_yet(backend):
    """What a step without a limit left is no norm."""
    run = cases.run_fused(ADAM, cases.make_params(device=cases.device_of(backend)), backend)
    run.steps(1)
    run.optimizer.max_grad_norm = math.inf
    assert run.optimizer.last_grad_norm is None
    run.steps(1)
    assert run.optimizer.last_grad_norm > 0
