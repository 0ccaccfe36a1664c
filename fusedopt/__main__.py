"""``python -m fusedopt``: which backends work here, which do not and why, and what they run on."""

from __future__ import annotations

import importlib
import platform

import torch

import fusedopt

from . import backends
from .backends import extension, triton


def _installed(name: str) -> str:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return "not installed"


def main() -> None:
    """Prints the report."""
    print(f"fusedopt {fusedopt.__version__}")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, triton"
        f" {_installed('triton')}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {gpu.name}, sm_{gpu.major}{gpu.minor}")
    else:
        print("GPU: none that this torch sees")

    print("\nbackends")
    for name in backends.NATIVE:
        reason = backends.load(name).unavailable()
        print(f"  {name:8}{'works' if reason is None else f'does not work: {reason}'}")
    print(f"  {'torch':8}works")
    if extension.unavailable() is None:
        native = extension.module()
        print(
            f"  cpu kernels use {native.instruction_set()} (this CPU runs"
            f" {', '.join(native.instruction_sets())}), {torch.get_num_threads()} threads"
        )
        if codes := extension.build_info().CUDA_CODES:  # type: ignore[union-attr]
            print(f"  cuda kernels hold code for {', '.join(codes)}")
    if triton.unavailable() is None:
        print(f"  triton steps are prepared by {triton.host_path()}")

    print("\nbackend='auto' means")
    for device in (*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"):
        chosen = backends.for_device("auto", torch.device(device))
        print(f"  parameters on {device}: {'torch' if chosen is None else chosen.NAME}")


if __name__ == "__main__":
    main()
