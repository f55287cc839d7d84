"""Whose kernels run: the compiled library's, on chip or streaming, or Triton's."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch

from resnet_fused.ops import backend, library
from resnet_fused.ops.triton_kernels import is_interpreted


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A backend, and whether it may keep tensors on chip."""

    backend: str
    on_chip: str | None = None

    def __str__(self) -> str:
        return self.backend if self.on_chip is None else f"{self.backend}, on chip {self.on_chip}"

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Has the calls inside run them; the variable is read anew with each call."""
        if self.on_chip is not None:
            os.environ["RESNET_FUSED_ON_CHIP"] = self.on_chip
        try:
            with backend.backend(self.backend):
                yield
        finally:
            os.environ.pop("RESNET_FUSED_ON_CHIP", None)


def kernels(device: torch.device) -> list[Kernels]:
    """All that serve the device; of the CPU's own library there is one kind."""
    found, reason = [], None
    if not is_interpreted():  # there the interpreter is what is rehearsed
        reason = backend.serving(device, "compiled")[1]
    if reason is None and not is_interpreted():
        on_chip = ("1", "0") if device.type == "cuda" or library.EMULATED else (None,)
        found += [Kernels("compiled", choice) for choice in on_chip]
    if device.type == "cuda" or is_interpreted():
        served_by, reason_triton = backend.serving(device, "triton")
        found += [Kernels("triton")] if served_by == "triton" else []
        reason = reason or reason_triton
    if reason is not None:
        print(f"not all kernels serve {device.type} tensors: {reason}")
    return found
