"""CUDA graphs: a captured step does at every replay what an ordinary step does."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    Run,
    assert_same_bits,
    copies,
    make_fused,
    make_params,
    random,
    richest,
)
from gpu_tools import GPU_BACKENDS, snapshot

if not torch.cuda.is_available():
    pytest.skip("this torch sees no GPU here", allow_module_level=True)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", GPU_BACKENDS)
SHAPES = ((40_003,), (5, 7), (1,), (129, 130))
CLIPS = {
    "bare": {},
    "global": {"max_grad_norm": 0.9},
    "all": {"max_grad_norm": 0.9, "max_grad_norm_per_param": 0.5, "max_grad_value": 0.4},
}

pytestmark = pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")


def capturable(entry, backend, start, **options):
    """Returns a run with static gradients and a learning rate on the device."""
    if entry.takes("capturable"):
        options["capturable"] = True
    params = copies(start)
    for param in params:
        param.grad = torch.zeros_like(param)
    rate = torch.tensor(0.01, device="cuda")
    options = {**richest(entry), **options, "lr": rate}
    return Run(params, make_fused(entry, params, backend, **options)), rate


def fill_grads(run, seed, bad=None):
    """Writes new numbers into the gradients in place; `bad` into one element of the last."""
    for i, param in enumerate(run.params):
        param.grad.copy_(random(param.shape, 1000 * seed + i))
    if bad is not None:
        run.params[-1].grad.view(-1)[77] = bad


def capture(optimizer):
    """Captures one step in a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def warm_up(run):
    """Steps once on a stream of its own, as torch's documentation of graphs advises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run.optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


def captured_and_eager(entry, backend, **options):
    """Returns (graph, captured run, its rate, eager run, its rate), both after one step."""
    start = make_params(SHAPES, device="cuda")
    run, rate = capturable(entry, backend, start, **options)
    eager, eager_rate = capturable(entry, backend, start, **options)
    for each in (run, eager):
        fill_grads(each, 1)
    warm_up(run)
    eager.optimizer.step()
    before = snapshot(run)
    graph = capture(run.optimizer)
    torch.cuda.synchronize()
    assert_same_bits(run.tensors(), before)
    return graph, run, rate, eager, eager_rate


@OURS
@BACKENDS
@pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)
def test_replays_follow_the_learning_rate(entry, backend, clips):
    """A rate that a scheduler writes on the device, and new gradients at the same places."""
    graph, run, rate, eager, eager_rate = captured_and_eager(entry, backend, **clips)
    for seed, value in enumerate((0.02, 0.5, 0.0, 1e-4, 0.1, 0.03), start=2):
        rate.fill_(value)
        eager_rate.fill_(value)
        for each in (run, eager):
            fill_grads(each, seed)
        graph.replay()
        eager.optimizer.step()
        assert_same_bits(run.tensors(), eager.tensors())
        if "max_grad_norm" in clips:
            norm = run.optimizer.last_grad_norm
            assert norm.item() == eager.optimizer.last_grad_norm.item() > 0


@OURS
@BACKENDS
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
def test_replays_skip(entry, backend, bad):
    """A replay with inf or nan changes nothing, and the next one goes on from there."""
    options = {"skip_nonfinite": True, "max_grad_norm": 1.0}
    graph, run, _, eager, _ = captured_and_eager(entry, backend, **options)
    for seed, value in ((2, None), (3, bad), (4, None), (5, bad), (6, None)):
        for each in (run, eager):
            fill_grads(each, seed, value)
        before = snapshot(run)
        graph.replay()
        eager.optimizer.step()
        assert run.optimizer.last_step_skipped.item() is (value is not None)
        if value is not None:
            assert_same_bits(run.tensors(), before)
        assert_same_bits(run.tensors(), eager.tensors())


@OURS
@BACKENDS
def test_first_step_skipped_then_captured(entry, backend):
    """After a skipped warm-up only the device knows that no step was applied yet."""
    start = make_params(SHAPES, device="cuda")
    runs = [capturable(entry, backend, start, skip_nonfinite=True)[0] for _ in range(2)]
    run, fresh = runs
    fill_grads(run, 1, math.inf)
    warm_up(run)
    graph = capture(run.optimizer)
    for each in runs:
        fill_grads(each, 2)
    graph.replay()
    fresh.optimizer.step()
    assert_same_bits(run.tensors(), fresh.tensors())


@OURS
@BACKENDS
def test_capture_and_ordinary_steps_alternate(entry, backend):
    """Steps outside of the graph, with gradients elsewhere, leave the graph as it was captured."""
    graph, run, _, eager, _ = captured_and_eager(entry, backend, max_grad_norm=1.0)
    static = [param.grad for param in run.params]
    for seed in (2, 4, 6):
        for param, grad in zip(run.params, static, strict=True):
            param.grad = grad
        for each in (run, eager):
            fill_grads(each, seed)
        graph.replay()
        eager.optimizer.step()
        for param in run.params:
            param.grad = torch.empty_like(param)
        for each in (run, eager):
            fill_grads(each, seed + 1)
            each.optimizer.step()
    assert_same_bits(run.tensors(), eager.tensors())


@OURS
@BACKENDS
def test_capture_without_warm_up(entry, backend):
    """State and tables cannot be made inside of a graph: the message says what to do."""
    run, _ = capturable(entry, backend, make_params(SHAPES, device="cuda"))
    fill_grads(run, 1)
    before = snapshot(run)
    with pytest.raises(RuntimeError, match="warm-up"):
        capture(run.optimizer)
    torch.cuda.synchronize()
    assert_same_bits(run.tensors(), before)
    run.optimizer.step()


@BACKENDS
def test_capture_without_capturable(backend):
    """As with torch's Adam, the flag has to be set."""
    params = make_params(SHAPES, device="cuda")
    run = Run(params, make_fused(TABLE["Adam"], params, backend)).steps(1)
    with pytest.raises(RuntimeError, match="capturable is False"):
        capture(run.optimizer)
