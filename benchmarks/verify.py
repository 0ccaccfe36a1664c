"""Three steps of every runner against a float64 reference, before anything is timed.

The runner steps the very tensors that are measured afterwards. The reference is torch's plain rule
on a float64 slice of them; rules work element by element, so only the gradient norm has to be taken
over everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from implementations import Runner
from torch import Tensor
from workloads import LOSS_SCALE, Case, plain_class

STEPS = 3
#: Of the gradients in the three steps: the second is clipped, the first and third are not. A rule
#: that is blind to the scale of its gradients, as Adam is, would hide a missing clip or unscaling.
MULTIPLIERS = (1.0, 4.0, 0.25)

#: torch sums the squares of a norm in float32; over the tens of millions of elements of GPT-2's
#: embedding that is a few thousandths off on a CPU. Ours are held to the rounding of the dtype.
_TORCH_NORM_EPS = 1e-3

_MOST_OF_ONE = 4 * 2**20
_MOST_OF_ALL = 8 * 2**20


class WrongResultError(AssertionError):
    """An implementation does not do what its torch class does; its time would mean nothing."""


def slices(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yields both ends of every tensor, at most 4 Mi elements of it, in float64 on the CPU."""
    per_tensor = min(_MOST_OF_ONE, max(64, _MOST_OF_ALL // len(tensors)))
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.numel() > per_tensor:
            half = per_tensor // 2
            flat = torch.cat([flat[:half], flat[-half:]])
        yield flat.to("cpu", torch.float64, copy=True)


def total_norm(tensors: list[Tensor]) -> float:
    """Returns the L2 norm of all elements, from sums of squares in float64."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64).item() for tensor in tensors]
    return torch.tensor(norms, dtype=torch.float64).norm().item()


class Reference:
    """What three steps have to do to the parameters of a case."""

    def __init__(self, case: Case, params: list[Tensor], limit: float) -> None:
        """Takes the parameters as they are before the first step."""
        self.case = case
        self._limit = limit
        self._start = list(slices(params))
        self._params = [torch.nn.Parameter(start.clone()) for start in self._start]
        plain = plain_class(case.algorithm)
        self.optimizer = plain(case.groups(self._params), **case.options())
        for group in self.optimizer.param_groups:
            group["foreach"] = False

    def step(self, grads: list[Tensor]) -> None:
        """Takes a step with the case's full gradients."""
        factor = 1 / LOSS_SCALE if self.case.scaled else 1.0
        if self.case.needs_norm:
            factor *= min(1.0, self._limit / (total_norm(grads) * factor + 1e-6))
        for param, grad in zip(self._params, slices(grads), strict=True):
            param.grad = grad.mul_(factor)
        self.optimizer.step()

    @property
    def states(self) -> int:
        """How many states of a parameter's shape the rule keeps."""
        entries = self.optimizer.state[self._params[0]].items()
        return sum(name != "step" for name, value in entries if isinstance(value, Tensor))

    def check(self, runner: Runner) -> float:
        """Compares the runner's parameters, and states of the same names, after its three steps.

        The error of our kernels may be one unit in the last place of the result, and sixteen of
        the change that three steps made. torch's rules, which round to a half type after every
        operation, may be four times as far off.

        Returns:
            The largest error found, in units of what is allowed.

        Raises:
            WrongResultError: If it is above 1, or not a number.
        """
        eps = torch.finfo(runner.case.torch_dtype).eps
        if runner.case.needs_norm and not runner.implementation.is_native:
            eps = max(eps, _TORCH_NORM_EPS)
        slack = 1 if runner.implementation.is_native else 4
        pairs = {"parameters": (list(slices(runner.params)), self._params, self._start)}
        for name in self.optimizer.state[self._params[0]] if runner.keeps_torch_state else ():
            if name != "step":
                found = [runner.optimizer.state[p][name] for p in runner.params]
                truth = [self.optimizer.state[param][name] for param in self._params]
                start = [torch.zeros(()) for _ in truth]
                pairs[name] = (list(slices(found)), truth, start)
        worst = 0.0
        for name, (found, truth, start) in pairs.items():
            error = _norm(a - b.detach() for a, b in zip(found, truth, strict=True))
            change = _norm(a.detach() - b for a, b in zip(truth, start, strict=True))
            size = _norm(truth)
            allowed = slack * eps * (size + 16 * change)
            ratio = error / allowed
            if not ratio <= 1:
                raise WrongResultError(
                    f"{runner.implementation.name} is wrong in {runner.case.id}: {name} differ by"
                    f" {error:.3g} from the float64 reference after {STEPS} steps that changed them"
                    f" by {change:.3g}; at most {allowed:.3g} is allowed"
                )
            worst = max(worst, ratio)
        return worst


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(torch.linalg.vector_norm(tensor).item() ** 2 for tensor in tensors) ** 0.5
