"""Finds and loads the shared objects that ``setup.py`` builds."""

import pathlib

import torch

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def path(name: str) -> pathlib.Path:
    """Where the shared object ``name`` (``_ops`` or ``_cpu``) is, or would be."""
    return _PACKAGE / f"{name}.abi3.so"


def load() -> None:
    for name in ("_ops", "_cpu") if path("_cpu").is_file() else ("_ops",):
        if not path(name).is_file():
            raise ImportError(
                f"resnet_fused is not built: {path(name).name} is missing from the package. "
                "Install it with `pip install --no-build-isolation .`, or run `make setup` in a clone."
            )
        torch.ops.load_library(path(name))
