"""The training that `demo.py` compares: the digits, the network, and runs in lockstep.

Every run starts from the same weights and sees the same batches, and a batch goes through all runs
before the next one is taken, so a busy moment of the machine hits all of them alike.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from _common import synchronize
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import fusedopt

RECIPES: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 4e-3},
    "AdamW": {"lr": 4e-3, "weight_decay": 0.05},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 1e-2},
    "Adadelta": {"lr": 1.0},
}
BATCH = 64

TORCH, TORCH_FUSED, NUDGED, OURS = "torch", "torch fused", "torch nudged", "fusedopt"


class Digits:
    """The 1797 digits of scikit-learn, 8 x 8 pixels each; every fifth is kept for the test."""

    def __init__(self, seed: int, device: torch.device) -> None:
        pixels, numbers = load_digits(return_X_y=True)
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
        images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
        labels = torch.as_tensor(numbers)[order]
        split = len(numbers) * 4 // 5
        self.train_images, self.test_images = images.to(device).tensor_split([split])
        self.train_labels, self.test_labels = labels.to(device).tensor_split([split])

    def batches_per_epoch(self) -> int:
        return -(-len(self.train_labels) // BATCH)

    def batches(self, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train_labels), generator=generator)
            for indices in order.to(self.train_labels.device).split(BATCH):
                yield self.train_images[indices], self.train_labels[indices]


class Residual(nn.Module):
    """x + conv(gelu(conv(gelu(x)))): smooth on purpose, kinks would amplify every rounding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.gelu(self.first(functional.gelu(x))))


def build_model(seed: int) -> nn.Module:
    """Returns the network, 30 tensors with 75 thousand numbers, with the weights of `seed`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.AvgPool2d(2),
        *(Residual(16) for _ in range(3)),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        *(Residual(32) for _ in range(3)),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@dataclass
class Run:
    """One network with its optimizer, and what is recorded while it trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        """Does one training step; only `optimizer.step()` is timed."""
        loss = functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.losses.append(loss.detach())
        synchronize(images.device)
        start = time.perf_counter()
        self.optimizer.step()
        synchronize(images.device)
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        guesses = self.model(digits.test_images).argmax(dim=1)
        return (guesses == digits.test_labels).double().mean().item()


@torch.no_grad()
def nudge(model: nn.Module, seed: int) -> None:
    """Moves every weight by about one float32 rounding, half of them up and half down."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        sign = torch.randint(0, 2, weight.shape, generator=generator).to(weight.device) * 2 - 1
        weight.mul_(1 + sign * torch.finfo(weight.dtype).eps)


def torch_has_fused(name: str, device: torch.device) -> bool:
    """Tells whether torch's own optimizer takes `fused=True` on this device."""
    stock = getattr(torch.optim, name)
    if "fused" not in inspect.signature(stock).parameters:
        return False
    probe = torch.zeros(1, device=device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        stock([probe], fused=True).step()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def make_runs(name: str, seed: int, device: torch.device, backend: str) -> dict[str, Run]:
    """Returns the runs to compare for the optimizer `name`, by label, none of them trained yet."""

    def run(make: Callable[..., torch.optim.Optimizer], **extras: Any) -> Run:
        model = build_model(seed).to(device)
        return Run(model, make(model.parameters(), **RECIPES[name], **extras))

    stock, ours = getattr(torch.optim, name), getattr(fusedopt, name)
    runs = {TORCH: run(stock)}
    if torch_has_fused(name, device):
        runs[TORCH_FUSED] = run(stock, fused=True)
    runs[NUDGED] = run(stock)
    nudge(runs[NUDGED].model, seed)
    runs[OURS] = run(ours, backend=backend)
    return runs
