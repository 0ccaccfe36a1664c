"""The three trainings of a story: ours, a twin of ours elsewhere, and stock torch."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from cases import COUNTED, Entry, Run, device_of, lay_out, random
from compare import same_bits
from machine import instruction_set, instruction_sets, threads
from torch import Tensor
from torch.nn import Parameter

import fusedopt

from .judge import assert_same, bits, outside
from .story import COMPLEX, ParamSpec, Story

#: Keys of groups that torch does not know; stock torch carries them along.
OUR_KEYS = ("max_grad_norm_per_param", "max_grad_value", "decoupled_weight_decay")


def values(shape: Sequence[int], seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Returns random numbers of a real or complex type."""
    if dtype not in COMPLEX:
        return random(shape, seed, dtype, scale=scale)
    return torch.complex(*(random(shape, seed + i, scale=scale).double() for i in (0, 1))).to(dtype)


def make_param(spec: ParamSpec, device: str) -> Parameter:
    """Returns the parameter of a specification."""
    numbers = values(spec.shape, spec.seed, spec.dtype).to(device)
    return Parameter(lay_out(numbers, spec.layout))


@dataclass
class Side:
    """One training of the story."""

    name: str
    entry: Entry
    optimizer: torch.optim.Optimizer
    native: str = "torch"  # its own kernels
    threads: int = 1
    instructions: str | None = None
    scalers: dict[str, torch.amp.GradScaler] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("torch", torch.amp.GradScaler), ("fused", fusedopt.GradScaler)):
            self.scalers[name] = kind(self.device, init_scale=16.0, growth_interval=1000)
            self.scalers[name].scale(torch.ones((), device=self.device))

    @property
    def device(self) -> str:
        """Where its parameters live."""
        return device_of(self.native)

    def unscales(self, way: str) -> bool:
        """Whether torch's scaler unscales the gradients itself."""
        return way == "unscaled" or (
            way == "torch" and not getattr(self.optimizer, "_step_supports_amp_scaling", False)
        )

    @property
    def params(self) -> list[Parameter]:
        """All parameters, in the order of the groups."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def run(self) -> Run:
        """The same for the helpers of the other tests."""
        return Run(self.params, self.optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name, and the memory around it."""
        found = {
            name: value.detach()
            for name, value in self.run().tensors().items()
            if isinstance(value, Tensor) and value.device.type != "meta"
        }
        around = {
            f"memory around {name}": outside(value)
            for name, value in found.items()
            if not value.is_sparse and value.untyped_storage().nbytes() > value.nbytes
            if name.split()[0] not in COUNTED
        }
        return {**found, **around}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all that, and of the gradients."""
        grads = {
            f"gradient of param {i}": param.grad
            for i, param in enumerate(self.params)
            if param.grad is not None
        }
        return {name: value.clone() for name, value in {**self.tensors(), **grads}.items()}

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Sets the threads and instructions that this side runs on."""
        with threads(self.threads), contextlib.ExitStack() as stack:
            if self.instructions is not None:
                stack.enter_context(instruction_set(self.instructions))
            yield

    def step(self, way: str, scale: float, found_inf: float) -> None:
        """Steps in one of `steps.WAYS`; the gradients are there already."""
        optimizer, loss = self.optimizer, object()
        with self.at_home():
            if way == "plain":
                optimizer.step()
            elif way == "closure":
                assert optimizer.step(lambda: loss) is loss
            elif way in ("preset", "found_inf"):
                optimizer.grad_scale = torch.tensor(scale, device=self.device)
                optimizer.found_inf = torch.tensor(found_inf, device=self.device)
                try:
                    optimizer.step()
                finally:
                    del optimizer.grad_scale, optimizer.found_inf
            else:
                scaler = self.scalers["fused" if way == "fused" else "torch"]
                scaler.step(optimizer)
                scaler.update()


class World:
    """The three sides of a story.

    Args:
        story: What is trained.
        backend: Ours.
        shakes: How often a step is repeated in float64 with other inputs: how sensitive is it?
    """

    def __init__(self, story: Story, backend: str, shakes: int = 0) -> None:
        self.story = story
        self.entry = story.entry
        self.settings = dict(story.settings)
        self.native = backend
        self.shakes = shakes
        #: Of parameters and states that were replaced or taken away; nobody may keep them alive.
        self.gone: list[weakref.ref[Tensor]] = []
        #: What happened, for the report.
        self.log: list[str] = []
        #: Checkpoints of every side, and the shapes that they are for.
        self.remembered: tuple[list[dict[str, Any]], list[list[torch.Size]]] | None = None
        optimizer = self.make_ours(self._groups(device_of(backend)), backend)
        self.ours = Side("ours", self.entry, optimizer, backend)
        self.stock = Side("stock", self.entry, self.make_stock(self._groups("cpu")))
        self.twins = []
        if backend != "torch":
            sets = instruction_sets()
            # Torch's own sums, where its rules take a norm, depend on the threads.
            same = any(event.name == "other_backend" for event in story.events)
            twin = Side(
                "the twin",
                self.entry,
                self.make_ours(self._groups("cpu"), "cpu"),
                "cpu",
                1 if same else story.threads,
                sets[story.instructions % len(sets)],
            )
            self.twins.append(twin)

    @property
    def sides(self) -> list[Side]:
        """All of them, ours first."""
        return [self.ours, *self.twins, self.stock]

    def _groups(self, device: str) -> list[dict[str, Any]]:
        return [
            {"params": [make_param(spec, device) for spec in specs], **group}
            for group, specs in zip(self.story.groups, self.story.params, strict=True)
        ]

    def make_ours(self, groups: list[dict[str, Any]], backend: str) -> torch.optim.Optimizer:
        """Returns one of ours with the settings of this moment; its group keys may be missing."""
        # Torch's rules have other bits with foreach, which they take on GPUs by themselves.
        options = {**self.entry.serial, **self.story.options, **self.settings}
        optimizer = self.entry.fused(groups, backend=backend, **options)
        return leave_scaling_to_step(optimizer) if self.story.fused else optimizer

    def make_stock(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Returns torch's, whose groups carry our keys along."""
        options = {**self.entry.serial, **self.story.options}
        always = options.get("decoupled_weight_decay", self.entry.always_decouples)
        if not self.entry.decouples:
            options.pop("decoupled_weight_decay", None)
        plain = {"fused": None} if self.entry.takes("fused") else {}
        groups = [{"decoupled_weight_decay": always, **group, **plain} for group in groups]
        return self.entry.stock(groups, **options)

    def agree(self) -> None:
        """Ours, its twin and stock torch have the same structure and the same bits."""
        ours = self.ours.run().tensors()
        for twin in self.twins:
            assert_same(ours, twin.run().tensors())
        for side in (self.ours, *self.twins):
            for name, value in self.settings.items():
                assert getattr(side.optimizer, name) == value, f"{name} of {side.name} was lost"
        stock = self.stock.run().tensors()
        assert not stock.keys() - ours.keys(), f"lost: {sorted(stock.keys() - ours.keys())}"
        for name in ours.keys() - stock.keys():
            assert self._untouched(name, ours[name]), f"{name} is set, but torch has none"
        for name, value in stock.items():
            own = ours[name].detach()
            if name.split()[0] not in COUNTED and own.dtype != value.dtype:
                own = own.to(value.dtype)  # put into another type by hand
            assert same_bits(bits(own), bits(value)), f"{name} is not torch's:\n{own}\n{value}"
        for group, theirs in zip(
            self.ours.optimizer.param_groups, self.stock.optimizer.param_groups, strict=True
        ):
            missing = theirs.keys() - group.keys() - set(OUR_KEYS)
            assert not missing, f"groups lack {sorted(missing)}"

    def let_go(self) -> None:
        """The optimizers live on, and nothing keeps what was taken out of them."""
        if any(reference() is not None for reference in self.gone):
            gc.collect()
        alive = [tuple(ref().shape) for ref in self.gone if ref() is not None]
        self.gone.clear()
        assert not alive, f"still alive: what was removed, of shapes {alive}"

    def _untouched(self, name: str, value: Tensor) -> bool:
        """Whether a state is as made: stock torch makes it later, in the first applied step."""
        found = set(bits(value).double().flatten().tolist())
        # From what it started, its group may say no more.
        return found <= {0.0} or (len(found) == 1 and name.split()[0] in self.entry.starts)


def pick(world: World, rng: Random) -> int:
    """Returns the number of a parameter."""
    return rng.randrange(len(world.ours.params))


def pick_group(world: World, rng: Random) -> list[dict[str, Any]]:
    """Returns the same group of every side."""
    index = rng.randrange(len(world.ours.optimizer.param_groups))
    return [side.optimizer.param_groups[index] for side in world.sides]


def leave_scaling_to_step(optimizer: Any) -> Any:
    """Has torch's scaler leave unscaling and skipping to the step, also with complex parameters."""
    optimizer._pipeline.settings.fused = True
    return optimizer
