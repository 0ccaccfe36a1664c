"""Fused drop-in replacements for torch.optim.

Unscaling, clipping, weight decay and the update are one pass over memory.
"""

from importlib.metadata import PackageNotFoundError, version

from ._from_torch import from_torch
from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .grad_scaler import GradScaler
from .lion import Lion
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD

try:
    __version__ = version("fusedopt")
except PackageNotFoundError:  # imported from its sources
    __version__ = "0+unknown"

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "GradScaler",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "__version__",
    "from_torch",
]
