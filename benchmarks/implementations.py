"""Who is measured: fusedopt's backends, the ways that torch.optim can run, and other libraries.

An implementation builds an optimizer as its documentation says, with the settings that suit it
best. What cannot run a case says why, and is reported as skipped with that reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from workloads import LOSS_SCALE, Case, plain_class

import fusedopt

Build = Callable[[Case, list[dict[str, Any]]], torch.optim.Optimizer]

_COMPILING = ("torch-compiled", "fusedopt-triton", "optimi", "torchao", "flashoptim")


@dataclass(frozen=True)
class Implementation:
    """One side of the comparison.

    Attributes:
        name: In records and tables.
        build: Makes the optimizer of a case for param groups.
        obstacle: Says why a case cannot be run here; None when it can.
        covers: Whether a case is any business of it.
        package: Distribution whose version is recorded, besides torch and fusedopt.
        fused_pipeline: Whether the clip and the unscaling happen inside ``step()``.
        clips: False measures a case that clips without its clip.
    """

    name: str
    build: Build
    obstacle: Callable[[Case], str | None]
    covers: Callable[[Case], bool] = lambda case: True
    package: str | None = None
    fused_pipeline: bool = False
    clips: bool = True

    @property
    def is_native(self) -> bool:
        """Whether our own kernels do the arithmetic."""
        return self.fused_pipeline and self.name != "fusedopt-torch"

    @property
    def compiles(self) -> bool:
        """Whether the first step compiles, where the device has something to compile for."""
        return self.name in _COMPILING

    def work(self, case: Case) -> Case:
        """Returns the case that this implementation is judged by."""
        return case if self.clips else replace(case, workload="bare")


class Runner:
    """An optimizer over the parameters of a case, and the call that is timed."""

    def __init__(
        self, implementation: Implementation, case: Case, params: list[Tensor], limit: float
    ) -> None:
        """Builds the optimizer.

        Args:
            implementation: Who.
            case: What.
            params: The case's parameters.
            limit: Of the global gradient norm.
        """
        self.implementation = implementation
        self.case = implementation.work(case)
        self.params = params
        self.limit = limit
        self.optimizer = implementation.build(self.case, self.case.groups(params))
        if implementation.fused_pipeline and self.case.needs_norm:
            self.optimizer.max_grad_norm = limit  # type: ignore[attr-defined]
        self.scaler: torch.amp.GradScaler | None = None
        if self.case.scaled:
            kind = fusedopt.GradScaler if implementation.fused_pipeline else torch.amp.GradScaler
            self.scaler = kind(case.device, init_scale=LOSS_SCALE, growth_interval=2**30)
            self.scaler.scale(torch.ones((), device=case.device))
        self.step = self._choose_step()

    def _choose_step(self) -> Callable[[], Any]:
        optimizer, scaler, params, limit = self.optimizer, self.scaler, self.params, self.limit
        inside = self.implementation.fused_pipeline or not self.case.needs_norm
        if inside and scaler is None:
            return optimizer.step
        if inside:
            return lambda: scaler.step(optimizer)
        clip = torch.nn.utils.clip_grad_norm_

        def clip_and_step() -> None:
            if scaler is None:
                clip(params, limit)
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                clip(params, limit)
                scaler.step(optimizer)

        return clip_and_step

    @property
    def keeps_torch_state(self) -> bool:
        """Whether states of torch's names have torch's meaning; other libraries' need not."""
        return self.implementation.name.startswith(("fusedopt-", "torch-"))

    def settle(self) -> None:
        """Does what a loop does between two steps and every implementation alike: never timed."""
        if self.scaler is not None:
            self.scaler.update()


# -- fusedopt ------------------------------------------------------------------------------------


def _ours(backend: str) -> Build:
    def build(case: Case, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return getattr(fusedopt, case.algorithm)(groups, backend=backend, **case.options())

    return build


def _our_obstacle(backend: str) -> Callable[[Case], str | None]:
    def obstacle(case: Case) -> str | None:
        try:
            fusedopt.backends.check(backend)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return None

    return obstacle


def _fusedopt(backend: str, device: str) -> list[Implementation]:
    def covers(case: Case) -> bool:
        return case.device == device

    def covers_clip(case: Case) -> bool:
        return covers(case) and case.workload == "clip"

    shared = {"build": _ours(backend), "obstacle": _our_obstacle(backend), "fused_pipeline": True}
    name = f"fusedopt-{backend}"
    return [
        Implementation(name, covers=covers, **shared),
        # What a clip costs is read off the same rounds.
        Implementation(f"{name}-unclipped", covers=covers_clip, clips=False, **shared),
    ]


# -- torch.optim ---------------------------------------------------------------------------------


def _stock(**flags: bool) -> Build:
    def build(case: Case, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kind = plain_class(case.algorithm)
        # To do without what it does not have needs no word.
        known = inspect.signature(kind).parameters
        given = {name: value for name, value in flags.items() if value or name in known}
        return kind(groups, **given, **case.options())

    return build


def _stock_obstacle(flag: str) -> Callable[[Case], str | None]:
    def obstacle(case: Case) -> str | None:
        kind = plain_class(case.algorithm)
        if flag not in inspect.signature(kind.__init__).parameters:
            return f"plain {case.algorithm} has no {flag} implementation"
        # Some take the flag and refuse the device at the first step: the fused Adagrad of torch
        # 2.11 does so on GPUs.
        param = torch.nn.Parameter(torch.ones(1, dtype=case.torch_dtype, device=case.device))
        param.grad = torch.ones_like(param)
        try:
            kind([param], **({} if flag == "params" else {flag: True}), **case.options()).step()
        except RuntimeError as error:
            return f"plain {case.algorithm}({flag}=True) refuses {case.device}: {error}"
        return None

    return obstacle


def _compiled(case: Case, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    torch._dynamo.reset()
    optimizer = _stock()(case, groups)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


# -- other libraries -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Peer:
    """How another library is called.

    Attributes:
        module: Where its classes are.
        distribution: Its name on PyPI.
        classes: For each of our algorithms, its class and extra keyword arguments.
        devices: Where it runs.
        dtypes: What it updates without keeping other numbers than torch does.
    """

    module: str
    distribution: str
    classes: dict[str, tuple[str, dict[str, Any]]]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)

    def build(self, case: Case, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        name, extras = self.classes[case.algorithm]
        kind = getattr(importlib.import_module(self.module), name)
        return kind(groups, **{**extras, **case.options()})

    def covers(self, case: Case) -> bool:
        return (
            case.algorithm in self.classes
            and case.device in self.devices
            and case.dtype in self.dtypes
        )

    def obstacle(self, case: Case) -> str | None:
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return f"{self.distribution} is not installed; see benchmarks/requirements-peers.txt"
        try:
            importlib.import_module(self.module)
        except (
            Exception
        ) as error:  # A broken installation of a peer is a reason, whatever it raises.
            return f"{self.distribution} cannot be imported: {error}"
        return None


_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_PEERS = {
    "deepspeed-cpu": _Peer(
        "deepspeed.ops.adam",
        "deepspeed",
        {
            "Adam": ("DeepSpeedCPUAdam", {"adamw_mode": False}),
            "AdamW": ("DeepSpeedCPUAdam", {"adamw_mode": True, "weight_decay": 0.01}),
        },
        ("cpu",),
    ),
    "deepspeed-fused": _Peer(
        "deepspeed.ops.adam",
        "deepspeed",
        {
            "Adam": ("FusedAdam", {"adam_w_mode": False}),
            "AdamW": ("FusedAdam", {"adam_w_mode": True, "weight_decay": 0.01}),
        },
        ("cuda",),
    ),
    "apex": _Peer(
        "apex.optimizers",
        "apex",
        {
            "Adam": ("FusedAdam", {"adam_w_mode": False}),
            "AdamW": ("FusedAdam", {"adam_w_mode": True, "weight_decay": 0.01}),
            "SGD": ("FusedSGD", {"lr": 1e-3}),
        },
        ("cuda",),
    ),
    "bitsandbytes": _Peer(
        "bitsandbytes.optim",
        "bitsandbytes",
        {
            "Adam": ("Adam32bit", {}),
            "AdamW": ("AdamW32bit", {}),
            "SGD": ("SGD32bit", {"lr": 1e-3}),
            "RMSprop": ("RMSprop32bit", {}),
        },
        ("cuda",),
    ),
    "optimi": _Peer(
        "optimi",
        "torch-optimi",
        {
            "Adam": ("Adam", {"lr": 1e-3, **_ADAM}),
            "AdamW": ("AdamW", {"lr": 1e-3, "weight_decay": 0.01, **_ADAM}),
            "SGD": ("SGD", {"lr": 1e-3, "torch_init": True}),
        },
        ("cpu", "cuda"),
    ),
    "torchao": _Peer("torchao.optim", "torchao", {"AdamW": ("_AdamW", {})}, ("cpu", "cuda")),
    "flashoptim": _Peer(
        "flashoptim",
        "flashoptim",
        {
            "Adam": ("FlashAdam", {"quantize": False}),
            "AdamW": ("FlashAdamW", {"quantize": False}),
            "SGD": ("FlashSGD", {"lr": 1e-3, "quantize": False}),
        },
        ("cuda",),
    ),
}


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        *_fusedopt("cpu", "cpu"),
        *_fusedopt("cuda", "cuda"),
        *_fusedopt("triton", "cuda"),
        Implementation(
            "fusedopt-torch", _ours("torch"), _our_obstacle("torch"), fused_pipeline=True
        ),
        Implementation("torch-forloop", _stock(foreach=False), _stock_obstacle("params")),
        Implementation("torch-foreach", _stock(foreach=True), _stock_obstacle("foreach")),
        Implementation("torch-fused", _stock(fused=True), _stock_obstacle("fused")),
        Implementation("torch-compiled", _compiled, _stock_obstacle("params")),
        *(
            Implementation(
                name, peer.build, peer.obstacle, covers=peer.covers, package=peer.distribution
            )
            for name, peer in _PEERS.items()
        ),
    )
}


def names_for(case: Case, full: bool) -> list[str]:
    """Returns the implementations that belong in a case, whether or not they are installed.

    Args:
        case: What is measured.
        full: Also what takes minutes to compile.
    """
    return [
        name
        for name, implementation in IMPLEMENTATIONS.items()
        if implementation.covers(case) and (full or name != "torch-compiled")
    ]


def versions(implementation: Implementation) -> dict[str, str]:
    """Returns the versions that decide what an implementation does."""
    found = {"torch": torch.__version__, "fusedopt": fusedopt.__version__}
    packages = [implementation.package]
    if implementation.compiles:
        packages.append("triton")
    for package in packages:
        if package is not None:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = "unknown"
    return found
