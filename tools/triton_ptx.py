"""The Triton kernels as Triton compiles them for compute capability 8.0, run on CPU tensors by the emulator of CUDA.

Every access of the compiled kernels is checked against the tensors they were given, reads of what nobody wrote and
races between programs among them.
"""

import threading

import cuda_on_cpu
import torch

_TARGET = "8.0"
# Of a pretended device: programs that share channels, and few enough to emulate.
_PROCESSORS = 2

# The emulator knows the buffers of one launch.
_one_launch = threading.Lock()

# What the emulator counted for each launch, of those who ask.
launches: list[dict] | None = None


def begin(processors: int = _PROCESSORS, **options) -> None:
    """Has the operators of CPU tensors go there; ``options`` are those of the emulator."""
    from triton.runtime.jit import JITFunction

    from resnet_fused.ops import triton_kernels
    from resnet_fused.triton import configurations, offline

    triton_kernels._why_not = lambda kind, index: None if kind == "cpu" else "only the CPU is emulated"
    triton_kernels.serve("cpu", True)
    configurations.device_of = lambda device: configurations.Device(processors)

    def launch(kernel, *positional, grid, warmup, num_warps, **arguments):
        arguments |= dict(zip(kernel.arg_names, positional, strict=False))
        grid = grid(arguments) if callable(grid) else tuple(grid)
        with _one_launch:
            counted = run(offline.Launch(kernel, grid, num_warps, arguments), **options)
        if launches is not None:
            launches.append({"name": kernel.__name__} | counted)

    # Launches of graphs come here, too.
    JITFunction.run = launch


def run(launch, **options) -> dict:
    """Runs a launch from its PTX; gives what the emulator counted."""
    from resnet_fused.triton import offline

    kernel = offline.compiled(launch, offline.TARGETS[_TARGET])
    passed = [value.detach() if isinstance(value, torch.Tensor) else value for value in launch.passed]
    counted = cuda_on_cpu.run_triton(kernel, launch.grid, passed, warn="ignore", **options)
    serious = [finding for finding in counted["warnings"] if not _is_harmless(finding)]
    assert not serious, "\n".join([launch.name, *serious])
    return counted


def _is_harmless(finding: str) -> bool:
    """Where Triton has the same value in several warps, each of them writes it when it changes places through shared
    memory. Their order does not matter; any other race, and every one in global memory, is an error.
    """
    return "shared-memory race (write-write)" in finding
