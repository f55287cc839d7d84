"""Kernels compiled for GPUs that are not there, from the launches that operators make.

``intercepted(function)`` has every launch of the operators inside go to ``function`` instead of a GPU; ``compiled``
makes its machine code. Together they let tools read registers and accesses of each kernel, and run its PTX elsewhere.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import configurations, launchers

TARGETS = {
    "8.0": GPUTarget("cuda", 80, 32),
    "9.0": GPUTarget("cuda", 90, 32),
    "10.0": GPUTarget("cuda", 100, 32),
    "12.0": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of an operator: the kernel, where it was to run and with what."""

    kernel: object
    grid: tuple[int, ...]
    warps: int
    arguments: dict

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__

    @property
    def passed(self) -> list:
        """The arguments that compiled code still has, in order."""
        return [self.arguments[name] for name, kind in self._signature().items() if kind != "constexpr"]

    def _signature(self) -> dict[str, str]:
        return {p.name: _type(self.arguments[p.name], p.annotation_type, p.is_constexpr) for p in self.kernel.params}

    def source(self) -> ASTSource:
        """What Triton compiles: types, constants, and what 16 divides."""
        signature = self._signature()
        constants = {(i,): self.arguments[name] for i, name in enumerate(signature) if signature[name] == "constexpr"}
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind != "constexpr" and _divisible(self.arguments[name])
        }
        return ASTSource(self.kernel, signature, constants, attributes)


def _type(value, annotated: str, constant: bool) -> str:
    if constant or value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if annotated:
        return annotated
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divisible(value) -> bool:
    # The allocator of a GPU gives no less; of a fake tensor only the offset is known. Numbers are not specialized.
    return isinstance(value, torch.Tensor) and value.storage_offset() * value.dtype.itemsize % 16 == 0


@contextlib.contextmanager
def intercepted(function: Callable[[Launch], None], device: configurations.Device):
    """Launches inside go to ``function``, with plans for ``device``."""
    before = launchers._launch, configurations.device_of
    launchers._launch = lambda kernel, grid, warps, arguments: function(Launch(kernel, tuple(grid), warps, arguments))
    configurations.device_of = lambda _: device
    try:
        yield
    finally:
        launchers._launch, configurations.device_of = before


_compiled: dict[tuple, object] = {}


def compiled(launch: Launch, target: GPUTarget):
    """The kernel as Triton compiles it for ``target``: ``asm`` has PTX and cubin, or AMD's assembly."""
    source = launch.source()
    key = (launch.name, launch.warps, str(target), str(source.signature), str(source.constants), str(source.attrs))
    if key not in _compiled:
        _compiled[key] = triton.compile(source, target=target, options={"num_warps": launch.warps})
    return _compiled[key]
