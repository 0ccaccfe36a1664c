"""The build backend: setuptools' own, or a line that says how to get it."""

import sys
from typing import Any

try:
    from setuptools import build_meta
except ModuleNotFoundError:
    sys.exit(
        "fusedopt: setuptools cannot be imported by this build (it comes with no Python from 3.12"
        " on); run `pip install setuptools wheel`, then install fusedopt again"
    )


def __getattr__(name: str) -> Any:
    return getattr(build_meta, name)
