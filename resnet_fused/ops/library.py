"""Finds and loads the shared objects that ``setup.py`` builds.

A package that was built with ``RESNET_FUSED_NO_EXTENSIONS=1`` has none of them, but the schemas of ``csrc/ops.cpp`` as
text. GPUs are then Triton's, and CPU tensors go to the reference.

``_cuda`` is loaded where torch has CUDA, with or without a GPU. ``RESNET_FUSED_EMULATED=file`` loads the CUDA library
that ``make emulated`` built for CPU tensors, in place of ``_cpu``; it runs under an emulator alone.
``RESNET_FUSED_CUDA_LIBRARY=file`` loads another build of ``_cuda``, to compare the two.
"""

import ctypes
import functools
import os
import pathlib

import torch

CPU_CAPABILITIES = ("default", "avx2", "avx512")
_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
EMULATED = os.environ.get("RESNET_FUSED_EMULATED") or None
_OTHER_CUDA = os.environ.get("RESNET_FUSED_CUDA_LIBRARY") or None

# The schemas as text, one a line, of a package without shared objects.
_SCHEMAS = _PACKAGE / "ops" / "schemas.txt"
_NO_EXTENSIONS = "the package was built without compiled libraries (RESNET_FUSED_NO_EXTENSIONS=1)"
_definitions: torch.library.Library | None = None

# Why there are no CUDA kernels; None where they are loaded.
_why_no_cuda: str | None = "the libraries of the package are not loaded"
# A variable of the CUDA library that is loaded.
_distributed: ctypes.c_int | None = None


def path(name: str) -> pathlib.Path:
    """Where the shared object ``name`` (``_ops``, ``_cpu`` or ``_cuda``) is, or would be."""
    if name == "_cuda" and _OTHER_CUDA:
        return pathlib.Path(_OTHER_CUDA).resolve()
    return _PACKAGE / f"{name}.abi3.so"


def load() -> None:
    """Loads the shared objects: schemas, CPU kernels, and CUDA kernels where torch can have them.

    Raises:
        ImportError: the package is not built, the emulated library was asked for and cannot run, or
            ``RESNET_FUSED_CUDA_LIBRARY`` is no file.
        ValueError: ``RESNET_FUSED_CPU_CAPABILITY`` is no instruction set.
    """
    global _why_no_cuda, _definitions, _distributed
    asked = os.environ.get("RESNET_FUSED_CPU_CAPABILITY") or "avx512"
    if asked not in CPU_CAPABILITIES:
        raise ValueError(f"RESNET_FUSED_CPU_CAPABILITY must be one of {', '.join(CPU_CAPABILITIES)}, got {asked!r}")
    if _SCHEMAS.is_file() and not path("_ops").is_file():
        _definitions = torch.library.Library("resnet_fused", "DEF")
        for schema in _SCHEMAS.read_text(encoding="utf-8").splitlines():
            _definitions.define(schema)
        _why_no_cuda = _NO_EXTENSIONS
        return
    for name in ("_ops",) if EMULATED else ("_ops", "_cpu"):
        if not path(name).is_file():
            raise ImportError(
                f"resnet_fused is not built: {path(name).name} is missing from the package. "
                "Install it with `pip install --no-build-isolation .`, or run `make setup` in a clone."
            )
        torch.ops.load_library(path(name))
    if EMULATED:
        _load_emulated(EMULATED)
        _why_no_cuda = "RESNET_FUSED_EMULATED has its CUDA kernels serve CPU tensors"
    else:
        _why_no_cuda = _load_cuda()
    if _cuda_file() and torch.distributed.is_available():
        _distributed = ctypes.c_int.in_dll(ctypes.CDLL(_cuda_file()), "resnet_fused_distributed")


def _load_emulated(file: str) -> None:
    if os.environ.get("CUDA_ON_CPU") != "1":
        raise ImportError(
            f"RESNET_FUSED_EMULATED={file} asks for CUDA kernels on the CPU, which run under the emulator alone: start "
            "the process through `cuda-on-cpu`, or unset the variable."
        )
    if not pathlib.Path(file).is_file():
        raise ImportError(f"RESNET_FUSED_EMULATED={file} is no file: `make emulated` builds it.")
    torch.ops.load_library(pathlib.Path(file).resolve())


def _load_cuda() -> str | None:
    """Loads the CUDA library; why not, where it cannot be: no reason to refuse the import, unless one is named."""
    if _OTHER_CUDA and not path("_cuda").is_file():
        raise ImportError(
            f"RESNET_FUSED_CUDA_LIBRARY={_OTHER_CUDA} is no file: `python tools/cuda_build.py` builds one."
        )
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not path("_cuda").is_file():
        return (
            "the package was built without its CUDA library: where nvcc is, `pip install --no-build-isolation .` or "
            "`make setup` builds it"
        )
    try:
        torch.ops.load_library(path("_cuda"))
    except OSError as error:
        return f"{path('_cuda').name} cannot be loaded beside torch {torch.__version__}: {error}"
    return None


def why_no_cpu() -> str | None:
    """Why there are no compiled kernels for the CPU; None where there are."""
    return None if _definitions is None else _NO_EXTENSIONS


def why_no_cuda() -> str | None:
    """Why the CUDA library is not loaded; None where it is."""
    return _why_no_cuda


def note_distributed() -> None:
    """Tells the CUDA library whether torch.distributed is initialized, for ``RESNET_FUSED_ON_CHIP=auto``."""
    if _distributed is not None:
        _distributed.value = torch.distributed.is_initialized()


def _cuda_file() -> str | None:
    """The CUDA library that is loaded, for a GPU or emulated."""
    return EMULATED if EMULATED else None if _why_no_cuda else str(path("_cuda"))


@functools.cache
def cuda_architectures() -> str:
    """What the loaded CUDA library has code for, such as ``"8.0;9.0;12.0+PTX"``; empty where none is loaded."""
    file = _cuda_file()
    return _text(file, "resnet_fused_cuda_architectures") if file else ""


@functools.cache
def cpu_capability() -> str:
    """The instruction set of the CPU kernels in use: ``"avx512"``, ``"avx2"`` or ``"default"``.

    It is the best that the machine has; ``RESNET_FUSED_CPU_CAPABILITY``, read as the package is imported, asks for a
    lower one. ``"none"`` where the emulated CUDA library serves the CPU, or nothing compiled.
    """
    return "none" if EMULATED or _definitions else _text(str(path("_cpu")), "resnet_fused_cpu_capability")


def _text(file: str, name: str) -> str:
    function = getattr(ctypes.CDLL(file), name)
    function.restype = ctypes.c_char_p
    return function().decode()
