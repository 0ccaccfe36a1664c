"""What the oldest supported torch lacks, taken away from the one that is there."""

import contextlib
from unittest import mock

import pytest
import torch
from cases import TABLE, assert_same_bits, make_params, run_fused

from fusedopt import _pipeline


def refuse(*args, **kwargs):
    """Stands where our code must not go."""
    raise AssertionError("called in spite of an old torch")


@contextlib.contextmanager
def oldest_adagrad():
    """An Adagrad that finds its state or fails, and knows no fused kernel."""

    def init_group(self, group, params, grads, sums, steps):
        if group["fused"]:
            refuse()
        members = [param for param in group["params"] if param.grad is not None]
        params += members
        grads += [param.grad for param in members]
        sums += [self.state[param]["sum"] for param in members]
        steps += [self.state[param]["step"] for param in members]
        return False, False

    with mock.patch.object(torch.optim.Adagrad, "_init_group", init_group):
        yield


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_adagrad_makes_its_state(backend, fused):
    """A group added later, and one whose state was cleared, start as torch's newest would."""
    entry, start = TABLE["Adagrad"], make_params()
    options = {"initial_accumulator_value": 0.5, "fused": fused}
    runs = []
    for old in (contextlib.nullcontext, oldest_adagrad):
        run = run_fused(entry, start, backend, **options)
        late = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        run.optimizer.add_param_group({"params": [late], "lr": 0.1})
        run.params.append(late)
        run.optimizer.state.clear()
        with old():
            run.steps(2)
        runs.append(run)
    assert_same_bits(runs[1].tensors(), runs[0].tensors())


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_capture_without_a_warm_up_is_refused(kind):
    """The question goes to the device's own module, and only where it has parameters."""
    with (
        mock.patch.object(torch, "accelerator", None),
        mock.patch.object(getattr(torch, kind), "is_current_stream_capturing", lambda: True),
    ):
        _pipeline._refuse_while_capturing({"cpu"})
        with pytest.raises(RuntimeError, match="run one warm-up step outside of the capture"):
            _pipeline._refuse_while_capturing({"cpu", kind})
