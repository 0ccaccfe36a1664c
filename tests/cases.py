"""The optimizers that every test goes through, and the helpers that the tests share.

Adding an optimizer to the tests is one `Entry` in `TABLE`. Plain torch (`make_stock`)
says what is right, plain torch on float64 copies (`oracle`) says how wrong it may be.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import assert_accurate as assert_accurate
from compare import assert_close as assert_close
from compare import assert_same_bits as assert_same_bits
from compare import same_bits as same_bits
from torch import Tensor

import fusedopt
from fusedopt import backends as library_backends
from fusedopt.plain.rule import PlainRule

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Shapes that between them have vector bodies, tails, several dimensions, one element and none.
SHAPES = ((37,), (4, 5), (2, 3, 2, 2), (), (0,), (1, 17), (3, 0, 2))
#: How a tensor may lie in memory; see `lay_out`.
LAYOUTS = ("contiguous", "misaligned", "transposed", "channels_last", "every_second")


@dataclass(frozen=True)
class Entry:
    """One optimizer.

    Attributes:
        name: Of torch's class and of ours.
        states: Names in `optimizer.state[parameter]`, apart from `step` and scalars, that some
            variant has.
        variants: Keyword arguments worth testing, by a name for the test report.
        has_step: Whether the state has torch's `step`.
        sparse: Whether torch takes sparse gradients.
        starts: What states start from, where that is not zero: a number, or its group key.
        scalars: Names of what is in the state beside `step` and, like it, a number.
    """

    name: str
    states: tuple[str, ...]
    variants: dict[str, dict[str, Any]]
    has_step: bool = True
    sparse: bool = False
    starts: Mapping[str, str | float] = field(default_factory=dict)
    scalars: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether torch's class has this keyword argument."""
        return name in inspect.signature(self.stock).parameters

    def known(self, **options: Any) -> dict[str, Any]:
        """Returns the options, without those of weight decay for an algorithm that has none."""
        if self.takes("weight_decay"):
            return options
        return {k: v for k, v in options.items() if not k.endswith("weight_decay")}

    def is_fresh(self, name: str, value: Tensor, groups: Iterable[dict[str, Any]]) -> bool:
        """Whether a state, named as by `Run.tensors`, is what a group has it start from."""
        start = self.starts.get(name.partition(" ")[0], 0.0)
        starts = [float(group[start]) if isinstance(start, str) else start for group in groups]
        parts = torch.view_as_real(value) if value.is_complex() else value
        return any(torch.equal(parts, torch.full_like(parts, start)) for start in starts)

    @property
    def in_torch(self) -> bool:
        """Whether the plain class is torch's."""
        return self.stock.__module__.startswith("torch.optim.")

    @property
    def serial(self) -> dict[str, Any]:
        """What has the plain class take one parameter after the other."""
        return {"foreach": False} if self.takes("foreach") else {}

    @property
    def rule(self) -> PlainRule:
        """What binds our class to its kernels and to the plain class."""
        return self.fused._rule

    @property
    def decouples(self) -> bool:
        """Whether the plain class knows decoupled weight decay."""
        return self.always_decouples or self.takes("decoupled_weight_decay")

    @property
    def always_decouples(self) -> bool:
        """Whether weight decay cannot be other than decoupled."""
        return self.rule.always_decouples

    @property
    def stock(self) -> type[torch.optim.Optimizer]:
        """The plain class: torch's, or ours of what torch lacks."""
        return self.rule.plain

    @property
    def fused(self) -> Any:
        """Our class."""
        return getattr(fusedopt, self.name)


_DECAYS = {
    "weight_decay": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.01},
}
_BETAS = {"betas": {"betas": (0.3, 0.7), "eps": 1e-3}}
_ADAM = {
    "amsgrad": {"amsgrad": True},
    **_BETAS,
    "amsgrad_decay": {"amsgrad": True, "weight_decay": 0.1, "lr": 0.1},
}

TABLE = {
    entry.name: entry
    for entry in (
        Entry(
            "Adam",
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            {"plain": {"lr": 1e-2}, **_ADAM, **_DECAYS},
        ),
        Entry(
            "AdamW",
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            {
                "plain": {"lr": 1e-2},
                **_ADAM,
                "no_decay": {"weight_decay": 0.0},
                "maximize": {"maximize": True, "lr": 0.05},
            },
        ),
        Entry(
            "SGD",
            ("momentum_buffer",),
            {
                "plain": {"lr": 1e-2},
                "momentum": {"lr": 1e-2, "momentum": 0.9},
                "dampening": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5},
                "nesterov": {"lr": 1e-2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
                **_DECAYS,
                "momentum_decoupled": {"momentum": 0.9, **_DECAYS["decoupled"]},
            },
            has_step=False,
            sparse=True,
        ),
        Entry(
            "RMSprop",
            ("square_avg", "momentum_buffer", "grad_avg"),
            {
                "plain": {"lr": 1e-2},
                "momentum": {"momentum": 0.9},
                "centered": {"centered": True, "eps": 1e-3},
                "all": {
                    "centered": True,
                    "momentum": 0.5,
                    "weight_decay": 0.1,
                    "alpha": 0.8,
                    "eps": 1e-3,
                },
                **_DECAYS,
            },
        ),
        Entry(
            "Adagrad",
            ("sum",),
            {
                "plain": {"lr": 1e-2},
                "lr_decay": {"lr": 0.1, "lr_decay": 0.1},
                "initial": {"initial_accumulator_value": 0.5, "eps": 1e-4},
                **_DECAYS,
            },
            sparse=True,
            starts={"sum": "initial_accumulator_value"},
        ),
        Entry(
            "Adadelta",
            ("square_avg", "acc_delta"),
            {"plain": {"lr": 1.0}, "rho": {"rho": 0.5, "lr": 0.3, "eps": 1e-4}, **_DECAYS},
        ),
        Entry(
            "Adamax",
            ("exp_avg", "exp_inf"),
            {"plain": {"lr": 1e-2}, **_BETAS, **_DECAYS},
        ),
        Entry(
            "RAdam",
            ("exp_avg", "exp_avg_sq"),
            {
                "plain": {"lr": 1e-2},
                "betas": {"betas": (0.3, 0.9), "eps": 1e-3},
                "own_decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.3, "lr": 0.1},
                **_DECAYS,
            },
        ),
        Entry(
            "NAdam",
            ("exp_avg", "exp_avg_sq"),
            {
                "plain": {"lr": 1e-2},
                "momentum": {"momentum_decay": 0.3, "betas": (0.3, 0.7), "eps": 1e-3},
                **_DECAYS,
            },
            scalars=("mu_product",),
            starts={"mu_product": 1.0},
        ),
        Entry(
            "Rprop",
            ("prev", "step_size"),
            {
                "plain": {"lr": 1e-2},
                "etas": {"etas": (0.3, 1.7), "step_sizes": (4e-3, 2e-2)},
                "maximize": {"maximize": True},
            },
            starts={"step_size": "lr"},
        ),
        Entry(
            "Lion",
            ("exp_avg",),
            {
                "plain": {"lr": 1e-3},
                "betas": {"betas": (0.3, 0.7), "lr": 1e-2},
                "decay": {"weight_decay": 0.1},
                "maximize": {"maximize": True, "weight_decay": 0.01},
            },
            has_step=False,
        ),
    )
}

NAMES = tuple(TABLE)
#: What is in a state beside `step` and, like it, a number.
SCALARS = {name for entry in TABLE.values() for name in entry.scalars}
#: The same with `step`.
COUNTED = SCALARS | {"step"}
#: (entry, keyword arguments), for `@pytest.mark.parametrize("entry, options", **CASES)`.
CASES = {
    "argvalues": [(e, options) for e in TABLE.values() for options in e.variants.values()],
    "ids": [f"{e.name}-{variant}" for e in TABLE.values() for variant in e.variants],
}


def entries(chosen: Iterable[Entry] = TABLE.values()) -> dict[str, Any]:
    """Returns the same for one argument called `entry`."""
    chosen = list(chosen)
    return {"argvalues": chosen, "ids": [entry.name for entry in chosen]}


ENTRIES = entries()
#: Those whose plain class is torch's.
IN_TORCH = entries(entry for entry in TABLE.values() if entry.in_torch)
#: Those that torch can capture in a graph only where it is told so.
CAPTURABLE = entries(entry for entry in TABLE.values() if entry.takes("capturable"))
#: Those with torch's `step` in their state.
COUNTING = entries(entry for entry in TABLE.values() if entry.has_step)
#: Those with further scalars.
SCALED = entries(entry for entry in TABLE.values() if entry.scalars)


def richest(entry: Entry) -> dict[str, Any]:
    """Returns the variant with the most state, the one to try when only one is tried."""
    names = {"SGD": "momentum", "RMSprop": "all", "Adam": "amsgrad", "AdamW": "amsgrad"}
    return entry.variants[names.get(entry.name, "plain")]


def gentle(entry: Entry) -> dict[str, Any]:
    """Returns the same, with a large eps where there is one: no quotient of two tiny numbers."""
    return richest(entry) | ({"eps": 1e-3} if entry.takes("eps") else {})


def _triton_interprets() -> bool:
    return (
        os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    )


#: Whether Triton's interpreter takes part: 20 ms for every parameter of every step, so tests that
#: take many of them take fewer.
INTERPRETED = _triton_interprets()


@functools.cache
def backends() -> tuple[str, ...]:
    """Returns the backends that work in this process, for parametrisation."""
    native = [name for name in ("cpu", "cuda") if _works(name)]
    if _triton_interprets() or (torch.cuda.is_available() and _works("triton")):
        native.append("triton")
    return ("torch", *native)


def _works(name: str) -> bool:
    if importlib.util.find_spec(f"fusedopt.backends.{name}") is None:
        return False
    return library_backends.load(name).unavailable() is None


def native_backends() -> tuple[str, ...]:
    """Returns the backends with kernels of their own that work in this process."""
    return tuple(name for name in backends() if name != "torch")


def device_of(backend: str) -> str:
    """Returns where the parameters of a test of `backend` live."""
    if backend == "cuda" or (backend == "triton" and not _triton_interprets()):
        return "cuda"
    return "cpu"


def random(
    shape: Sequence[int],
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float = 1.0,
) -> Tensor:
    """Returns normally distributed numbers: the same for the same seed, on every device."""
    return (_normal(tuple(shape), seed) * scale).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=2000)
def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Returns a copy of `values` that lies in memory as `layout` says.

    "misaligned" starts one element past an aligned address, "every_second" is a view
    with gaps. A layout that a tensor of this many dimensions cannot have gives "contiguous".
    """
    shape = values.shape
    if layout == "misaligned":
        place = values.new_empty(values.numel() + 1)[1:].view(shape)
    elif layout == "every_second":
        place = values.new_empty((*shape, 2))[..., 0]
    elif layout == "transposed":
        place = values.new_empty(shape[::-1]).permute(tuple(reversed(range(values.dim()))))
    elif layout == "channels_last" and values.dim() == 4:
        place = torch.empty_like(values, memory_format=torch.channels_last)
    elif layout in LAYOUTS:
        place = torch.empty_like(values, memory_format=torch.contiguous_format)
    else:
        raise ValueError(f"layout is {layout!r}; expected one of {LAYOUTS}")
    return place.copy_(values)


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    """Returns one parameter for every shape."""
    return [
        torch.nn.Parameter(lay_out(random(shape, seed + i, dtype, device), layout))
        for i, shape in enumerate(shapes)
    ]


def copies(params: Iterable[Tensor], dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    """Returns parameters of their own memory with the same values, shapes and layouts."""
    made = []
    for param in params:
        copy = torch.empty_strided(
            param.shape, param.stride(), dtype=dtype or param.dtype, device=param.device
        )
        made.append(torch.nn.Parameter(copy.copy_(param.detach())))
    return made


def set_grads(
    params: Iterable[Tensor],
    seed: int,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    scale: float = 1.0,
) -> None:
    """Gives every parameter a gradient: the same numbers for the same seed, rounded.

    Args:
        params: Where to set `.grad`.
        seed: Another one for every step.
        dtype: Of the gradients; None for the parameters' own.
        layout: See `lay_out`; None for the parameter's own strides where it is dense.
        scale: Standard deviation.
    """
    for i, param in enumerate(params):
        kind = dtype or param.dtype
        grad = random(param.shape, 1000 * seed + i, kind, str(param.device), scale)
        if layout is None:
            grad = torch.empty_like(param, dtype=kind).copy_(grad)
        else:
            grad = lay_out(grad, layout)
        if kind != param.dtype and hasattr(param, "grad_dtype"):
            param.grad_dtype = kind
        param.grad = grad


def make_stock(entry: Entry, params: Any, **options: Any) -> torch.optim.Optimizer:
    """Returns torch's plain optimizer, with our decoupled decay where torch has none."""
    options = {**entry.serial, **options}
    decoupled = options.get("decoupled_weight_decay") and not entry.decouples
    decay = 0.0
    if decoupled:
        del options["decoupled_weight_decay"]
        decay = options.pop("weight_decay")
    optimizer = entry.stock(params, **options)
    optimizer.register_step_pre_hook(make_missing_state)
    if not decoupled:
        return optimizer

    def shrink(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.mul_(1 - group["lr"] * decay)

    optimizer.register_step_pre_hook(shrink)
    return optimizer


#: In torch 2.11 only its constructor does.
ADAGRAD_MAKES_STATE = "full_like" in inspect.getsource(torch.optim.Adagrad._init_group)


def make_missing_state(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Does before a step of old torch's Adagrad what newer torch does in it; also as a hook."""
    if ADAGRAD_MAKES_STATE or type(optimizer) is not torch.optim.Adagrad:
        return
    initial = optimizer.defaults["initial_accumulator_value"]
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and not optimizer.state[param]:
                new = torch.optim.Adagrad([param], initial_accumulator_value=initial)
                optimizer.state[param] = new.state[param]


def make_fused(entry: Entry, params: Any, backend: str, **options: Any) -> torch.optim.Optimizer:
    """Returns our optimizer on a backend."""
    return entry.fused(params, backend=backend, **options)


def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Returns the state tensors of every parameter, in the order of the groups."""
    result = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            entries = dict(optimizer.state.get(param, {}))
            if "step" in entries:
                entries["step"] = torch.as_tensor(entries["step"], dtype=torch.float64).cpu()
            for name in SCALARS & entries.keys():
                entries[name] = entries[name].cpu()
            result.append(
                {name: entries[name] for name in sorted(entries) if entries[name] is not None}
            )
    return result


@dataclass
class Run:
    """Parameters with the optimizer that trains them."""

    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    def steps(self, count: int, first: int = 1, **grad_options: Any) -> Run:
        """Runs steps with the gradients of seeds first, first + 1 ...; returns itself."""
        for seed in range(first, first + count):
            set_grads(self.params, seed, **grad_options)
            self.optimizer.step()
        return self

    def advance(self, step: float = 10.0) -> Run:
        """Sets the counters, where there are any, past what rules do in their first steps only."""
        for entries in self.optimizer.state.values():
            if "step" in entries:
                entries["step"].fill_(step)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything that training changes, by name."""
        found = {f"param {i}": param.detach() for i, param in enumerate(self.params)}
        for i, entries in enumerate(states(self.optimizer)):
            found |= {f"{name} of param {i}": value for name, value in entries.items()}
        return found


def run_stock(entry: Entry, params: Sequence[Tensor], **options: Any) -> Run:
    """Returns torch's plain optimizer over copies of `params`."""
    own = copies(params)
    return Run(own, make_stock(entry, own, **options))


def run_fused(entry: Entry, params: Sequence[Tensor], backend: str, **options: Any) -> Run:
    """Returns our optimizer over copies of `params`."""
    own = copies(params)
    return Run(own, make_fused(entry, own, backend, **options))


def oracle(entry: Entry, like: Sequence[Tensor], **options: Any) -> Run:
    """Returns torch's plain optimizer over float64 copies, to be stepped with `oracle_steps`."""
    own = copies(like, torch.float64)
    return Run(own, make_stock(entry, own, **options))


def oracle_steps(
    run: Run, like: Sequence[Tensor], count: int, first: int = 1, **grad_options: Any
) -> Run:
    """Steps an oracle with the gradients that `like` would get: rounded to their type, widened."""
    shadows = copies(like)
    for seed in range(first, first + count):
        set_grads(shadows, seed, **grad_options)
        for param, shadow in zip(run.params, shadows, strict=True):
            param.grad = shadow.grad.double()
        run.optimizer.step()
    return run
