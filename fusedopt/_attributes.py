"""The attributes of an optimizer that are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from ._control import NORM, SKIP, check_limit
from ._pipeline import Pipeline
from ._settings import check_flag


class _Handed:
    """An attribute that is there while a scaler has set it, kept with the other settings."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        try:
            return optimizer._pipeline.settings.handed[self._name]
        except KeyError:
            raise self._missing(optimizer) from None

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer._pipeline.settings.handed[self._name] = value

    def __delete__(self, optimizer: Any) -> None:
        try:
            del optimizer._pipeline.settings.handed[self._name]
        except KeyError:
            raise self._missing(optimizer) from None

    def _missing(self, optimizer: Any) -> AttributeError:
        return AttributeError(f"{type(optimizer).__name__!r} object has no attribute {self._name}")


class WithSettings:
    """Makes the settings of a pipeline, and what its last step left, attributes of an optimizer.

    They live on its pipeline and nowhere else, neither in the instance nor as defaults of the
    class: trainers wrap optimizers in classes that inherit from the optimizer's and pass on only
    what is not found there, so that anything found would hide the wrapped optimizer's own.
    """

    _pipeline: Pipeline

    #: What torch's `GradScaler` hands over for one step.
    grad_scale: Any = _Handed()
    found_inf: Any = _Handed()

    @property
    def max_grad_norm(self) -> float | None:
        """Limit of the global gradient norm; see the class."""
        return self._pipeline.settings.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        check_limit("max_grad_norm", value, "for the optimizer")
        self._pipeline.settings.max_grad_norm = value

    @property
    def skip_nonfinite(self) -> bool:
        """Whether inf or nan in a gradient skips the step; see the class."""
        return self._pipeline.settings.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool | None) -> None:
        flag = check_flag("skip_nonfinite", value, "for the optimizer")
        self._pipeline.settings.skip_nonfinite = flag

    @property
    def backend(self) -> str:
        """Where the step runs; see the class."""
        return self._pipeline.settings.backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._pipeline.settings.backend = backends.check(value)
        self._pipeline.reset()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's `GradScaler` leaves unscaling and skipping to the step.

        As in torch with `fused=True` only. Otherwise it unscales the gradients itself and does not
        call a step that it skips, which trainers that clip, or ask whether the step was skipped,
        rely on.
        """
        return self._pipeline.settings.fused is True

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Torch's constructors set it for `fused=True`, which says the same."""

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The global gradient norm of the last step, as a 0-dim float32 tensor; see the class."""
        control = self._pipeline.control
        if control is None or self.max_grad_norm is None or not self._pipeline.measured:
            return None
        return control[NORM].to(torch.float32)

    @property
    def last_step_skipped(self) -> Tensor | None:
        """Whether the last step was skipped, as a 0-dim bool tensor; None before the first."""
        control = self._pipeline.control
        return None if control is None else control[SKIP] != 0
