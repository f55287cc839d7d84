"""Finds and loads the shared objects that ``setup.py`` builds."""

import ctypes
import functools
import os
import pathlib

import torch

CPU_CAPABILITIES = ("default", "avx2", "avx512")
_PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def path(name: str) -> pathlib.Path:
    """Where the shared object ``name`` (``_ops`` or ``_cpu``) is, or would be."""
    return _PACKAGE / f"{name}.abi3.so"


def load() -> None:
    """Loads the shared objects.

    Raises:
        ImportError: the package is not built.
        ValueError: ``RESNET_FUSED_CPU_CAPABILITY`` is no instruction set.
    """
    asked = os.environ.get("RESNET_FUSED_CPU_CAPABILITY") or "avx512"
    if asked not in CPU_CAPABILITIES:
        raise ValueError(f"RESNET_FUSED_CPU_CAPABILITY must be one of {', '.join(CPU_CAPABILITIES)}, got {asked!r}")
    for name in ("_ops", "_cpu"):
        if not path(name).is_file():
            raise ImportError(
                f"resnet_fused is not built: {path(name).name} is missing from the package. "
                "Install it with `pip install --no-build-isolation .`, or run `make setup` in a clone."
            )
        torch.ops.load_library(path(name))


@functools.cache
def cpu_capability() -> str:
    """The instruction set of the CPU kernels in use: ``"avx512"``, ``"avx2"`` or ``"default"``.

    It is the best that the machine has; ``RESNET_FUSED_CPU_CAPABILITY``, read as the package is imported, asks for a
    lower one.
    """
    function = ctypes.CDLL(str(path("_cpu"))).resnet_fused_cpu_capability
    function.restype = ctypes.c_char_p
    return function().decode()
