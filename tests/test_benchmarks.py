"""What the benchmarks do where there is no GPU to see it on."""

import importlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def test_peers_that_refuse_a_device_are_obstacles(load):
    """A fused implementation that fails at its first step is named, and is no wrong result."""
    implementations = load("implementations")
    case = load("workloads").Case.parse("Adagrad-bare-one1K-float32", "cpu")
    fused = implementations.IMPLEMENTATIONS["torch-fused"]
    assert fused.obstacle(case) is None

    def refuse(self, closure=None):
        raise RuntimeError("`fused=True` requires all the params to be on something else")

    with mock.patch.object(torch.optim.Adagrad, "step", refuse):
        assert "Adagrad(fused=True) refuses cpu: `fused=True` requires" in fused.obstacle(case)


@pytest.mark.parametrize("kib", [100, 164, 228])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_unused_shared_memory(load, kib, blocks):
    """So many blocks fit a multiprocessor, with what CUDA and the kernels take, and no more."""
    each = load("sweep").unused_bytes(blocks, kib * 1024)
    assert blocks * (each + 2048) <= kib * 1024
    assert (blocks + 1) * (each + 1024) > kib * 1024


def test_sweep(load, monkeypatch, tmp_path, capsys):
    """Each process gets its number of blocks; one that dies costs no more than its rows."""
    sweep = load("sweep")
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys\n"
        "unused = int(os.environ.get('FUSEDOPT_UNUSED_SHARED_BYTES', 0))\n"
        "for length in (None, 1024, 4096):\n"
        "    row = {'case': 'x', 'length': length, 'seconds': 1e-5 * (1 + unused / 2**20)}\n"
        "    print(json.dumps(row))\n"
        "    sys.exit('gone') if unused > 200_000 else None\n"
    )
    gpu = types.SimpleNamespace(shared_memory_per_multiprocessor=228 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(sweep, "__file__", str(child))
    monkeypatch.setattr(sweep, "device_name", lambda device: "a GPU")
    cuda = types.SimpleNamespace(unavailable=lambda: None)
    monkeypatch.setattr(sweep.fusedopt.backends, "load", lambda name: cuda)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--output", str(tmp_path)])
    sweep.main()
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["blocks"] for row in rows] == [None] * 3 + [3] * 3 + [2] * 3 + [1]
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[2].startswith("| x | as registers allow | 10.0 us | 1.000 |  | 1.000 |")
    assert lines[3].startswith("| x | 3 | 1.07")
    assert "at most 1 blocks: ended with status 1" in capsys.readouterr().err


def test_sweep_without_a_gpu(load, monkeypatch):
    """Says why there is nothing to sweep."""
    sweep = load("sweep")
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    if sweep.fusedopt.backends.load("cuda").unavailable() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="the cuda backend does not work here"):
        sweep.main()
