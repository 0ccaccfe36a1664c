"""Puts a GPU that is the CPU into this process: the emulated extension and torch's CUDA functions.

The extension (tests/cpp/emulation) holds the CUDA backend's host code as it is, its kernels
compiled for the CPU, and operations for tensors on "cuda". A process either has it from the start
or not at all: conftest.py calls `install` where FUSEDOPT_EMULATED_CUDA names the library.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import types

import torch

#: The environment variable with the path of the library.
VARIABLE = "FUSEDOPT_EMULATED_CUDA"
#: Whether this process has the emulated GPU.
EMULATED = VARIABLE in os.environ

_PROPERTIES = types.SimpleNamespace(
    name="emulated", major=9, minor=0, multi_processor_count=4, warp_size=32, total_memory=2**34
)


def _load(name: str) -> types.ModuleType:
    path = os.environ[VARIABLE]
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    sys.modules[name] = module
    return module


class Stream(torch.Stream):
    """`torch.cuda.Stream`."""

    def __new__(cls, device=None, **_):
        """A new stream of the device."""
        return super().__new__(cls, device=torch.device("cuda", _index(device)))

    @property
    def cuda_stream(self):
        """Its handle."""
        return self.stream_id


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def replay(self):
        """Enqueues everything that was captured."""
        emulation.replay(self.nodes, emulation.current_stream(_index(None)))


@contextlib.contextmanager
def _stream(stream):
    if stream is None:
        yield
        return
    previous = emulation.exchange_stream(stream.device_index, stream.stream_id)
    try:
        with Device(stream.device_index):
            yield
    finally:
        emulation.exchange_stream(stream.device_index, previous)


@contextlib.contextmanager
def _graph(graph):
    stream = Stream()
    emulation.synchronize()
    with _stream(stream):
        emulation.begin_capture(stream.stream_id)
        try:
            yield
        finally:
            graph.nodes = emulation.end_capture(stream.stream_id)


class Device:
    """`torch.cuda.device`."""

    def __init__(self, device):
        self.index = _index(device)

    def __enter__(self):
        self.previous = emulation.exchange_device(self.index)

    def __exit__(self, *_):
        emulation.exchange_device(self.previous)


def _index(device) -> int:
    if device is None:
        return emulation.current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return emulation.current_device() if index is None else index


def _current_stream(device=None):
    index = _index(device)
    handle = emulation.current_stream(index)
    return torch.Stream.__new__(Stream, stream_id=handle, device_index=index, device_type=1)


def _capturing():
    return emulation.is_capturing(emulation.current_stream(_index(None)))


def _new_storage(cls, *arguments, device=None, **options):
    """`UntypedStorage.__new__`, which knows no CUDA in a torch built without it."""
    if device is None or torch.device(device).type != "cuda":
        return torch._C.StorageBase.__new__(cls, *arguments, device=device, **options)
    return torch.empty(*arguments, dtype=torch.uint8, device=device).untyped_storage()


def seen_by_runtime(step):
    """Runs a step; returns kernels, copies and all calls of the runtime that it made."""
    emulation.listen()
    step()
    calls = emulation.take_calls()
    kernels = [name for name in calls if name == "cudaLaunchKernel"]
    return kernels, [name for name in calls if name.startswith("cudaMemcpy")], calls


def install() -> None:
    """Puts everything in place, before fusedopt is imported."""
    global emulation
    import fusedopt._build_info as info

    import fusedopt
    from fusedopt.backends import triton

    assert "fusedopt._C" not in sys.modules, "the extension is loaded already"
    fusedopt._C = _load("fusedopt._C")
    emulation = _load("_emulation")
    emulation.set_deferred(True)
    emulation.set_strict(True)
    info.BACKENDS = ("cpu", "cuda")

    replacements = {
        torch.cuda: {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: emulation.DEVICES,
            "current_device": lambda: emulation.current_device(),
            "set_device": lambda device: emulation.exchange_device(_index(device)),
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": lambda device=None: _PROPERTIES,
            "device": Device,
            "synchronize": lambda device=None: emulation.synchronize(),
            "is_current_stream_capturing": _capturing,
            "Stream": Stream,
            "stream": _stream,
            "current_stream": _current_stream,
            "set_sync_debug_mode": lambda mode: None,
            "mem_get_info": lambda device=None: (0, 0),
            "_sleep": lambda cycles: None,
            "CUDAGraph": Graph,
            "graph": _graph,
        },
        torch._C: {"_cuda_getCurrentRawStream": lambda device: emulation.current_stream(device)},
        torch.accelerator: {
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "current_stream": lambda device=None: types.SimpleNamespace(is_capturing=_capturing),
        },
        torch.version: {"cuda": "13.0"},
        triton: {"unavailable": lambda: "Triton's kernels cannot run on an emulated GPU"},
        torch.UntypedStorage: {"__new__": staticmethod(_new_storage)},
    }
    for place, functions in replacements.items():
        for name, function in functions.items():
            setattr(place, name, function)
