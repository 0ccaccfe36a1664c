"""The Triton kernels: one rule a file and two generic kernels, installed as ``fusedopt.kernels``.

Nothing here imports Triton until a submodule is imported, which the Triton backend does on first
use.
"""

if __name__ != "fusedopt.kernels":
    raise ImportError(
        f"this folder is the package 'fusedopt.kernels' and was imported as {__name__!r}; "
        "install fusedopt (pip install --no-build-isolation .) and import fusedopt.kernels"
    )
