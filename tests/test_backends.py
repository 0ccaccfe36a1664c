"""Which backend serves a device, and what is said where one cannot."""

import sys
import types
import warnings

import pytest
import torch
from cases import make_params, set_grads

import fusedopt
from fusedopt import backends
from fusedopt.backends import cuda, extension, triton

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    """Every test starts as a process does, with nothing looked up and nobody warned."""
    monkeypatch.setattr(backends, "_warned", set())
    caches = (extension._find, cuda._why_not, cuda._why_not_on)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def build(monkeypatch):
    """Pretends that setup.py noted something else."""

    def pretend(built, wanted=("cpu", "cuda"), native=None, **left_out):
        info = {"TORCH_VERSION": torch.__version__, "BACKENDS": built, "WANTED": wanted}
        module = types.SimpleNamespace(**info, LEFT_OUT=left_out, CUDA_CODES=())
        monkeypatch.setitem(sys.modules, "fusedopt._build_info", module)
        if native is not None:
            monkeypatch.setitem(sys.modules, "fusedopt._C", types.SimpleNamespace(**native))

    return pretend


def answer(general="", by_device=None):
    """What the extension says of CUDA: in general, and of each device."""
    return {
        "cuda_unavailable": lambda *index: (
            (by_device or {}).get(*index, general) if index else general
        )
    }


@pytest.fixture
def cuda_torch(monkeypatch):
    """Pretends that torch is a CUDA build; it sees a GPU if told so."""

    def pretend(sees_a_gpu):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_a_gpu)
        monkeypatch.setattr(triton, "unavailable", lambda device=None: None)
        monkeypatch.setattr(triton, "serves", lambda device: device.type == "cuda")

    return pretend


def test_gpu_without_code_for_it(build, cuda_torch):
    """Under "auto" that GPU, and no other, goes on with Triton, after one warning for each."""
    build(("cpu", "cuda"), native=answer(by_device={0: "no code for 7.5", 2: "nor for 7.0"}))
    cuda_torch(sees_a_gpu=True)
    for index in (0, 2):
        with pytest.warns(UserWarning, match=r"goes on without its cuda backend: no"):
            assert backends.for_device("auto", torch.device("cuda", index)) is triton
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.for_device("auto", GPU) is triton
        assert backends.for_device("auto", torch.device("cuda", 1)) is cuda
        assert backends.for_device("cuda", torch.device("cuda", 1)) is cuda
    assert backends.check("cuda") == "cuda"
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve.*cuda:0: no code for 7\.5"):
        backends.for_device("cuda", GPU)


def test_cuda_torch_without_a_driver(build, cuda_torch):
    """The driver is what is missing, not a CUDA build of torch."""
    build(("cpu", "cuda"), native=answer("no NVIDIA driver was found; install one"))
    cuda_torch(sees_a_gpu=False)
    assert cuda.unavailable() == "no NVIDIA driver was found; install one"
    assert cuda.unavailable(GPU) == cuda.unavailable()


def test_driver_that_torch_cannot_use(build, cuda_torch):
    """The reason names torch and where to ask."""
    build(("cpu", "cuda"), native=answer())
    cuda_torch(sees_a_gpu=False)
    assert "torch.cuda.init() says why" in cuda.unavailable()


def test_cpu_torch(build, monkeypatch):
    """A torch for the CPU needs another torch."""
    build(("cpu", "cuda"), native=answer())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build of torch" in cuda.unavailable()


def step():
    """Takes the first step of an optimizer with parameters on the CPU."""
    params = make_params()
    set_grads(params, 1)
    fusedopt.SGD(params, lr=0.1).step()


def test_build_that_lacks_kernels_by_accident(build, monkeypatch):
    """A machine without a compiler gets a pure-Python package, and is told at the first step."""
    monkeypatch.setattr(triton, "serves", lambda device: False)
    reason = "cmake not found (pip install cmake)"
    build((), cpu=reason, cuda=reason)
    with pytest.warns(UserWarning, match=r"cpu backend: .*pip install cmake.*reinstall"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


@pytest.mark.parametrize("wanted", [(), ("cuda",)])
def test_build_that_lacks_kernels_by_choice(build, monkeypatch, wanted):
    """Who chose FUSEDOPT_BUILD=none knows."""
    monkeypatch.setattr(triton, "serves", lambda device: False)
    build((), wanted, cpu="FUSEDOPT_BUILD=none", cuda="FUSEDOPT_BUILD=none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
