"""The device that is measured, the CPU or a GPU, and how a call is timed there."""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused.measure import cpu_name, seconds

_chosen = torch.device("cpu")


def choose(name: str) -> None:
    """Makes it the device of all tensors that are made from here on."""
    global _chosen
    _chosen = torch.device(name)


def chosen() -> torch.device:
    """The device of the tensors that are measured."""
    return _chosen


def name() -> str:
    """What to call it beside a figure."""
    return torch.cuda.get_device_name(_chosen) if _chosen.type == "cuda" else cpu_name()


def has_apex() -> bool:
    """Whether apex, with its fused batch norm of the contrib part, is there to compare with."""
    return _chosen.type == "cuda" and importlib.util.find_spec("bnp") is not None


def clock() -> Callable[..., float]:
    """Seconds of one call of a function: ``clock()(function, calls)``."""
    return gpu_seconds if _chosen.type == "cuda" else seconds


@functools.cache
def _larger_than_caches(index: int | None) -> Tensor:
    size = 4 * torch.cuda.get_device_properties(index).L2_cache_size
    return torch.empty(max(size, 64 << 20), dtype=torch.uint8, device=torch.device("cuda", index))


def flush() -> None:
    """Leaves nothing in the L2 of what a call will read; nothing on a CPU, whose caches stay as they are."""
    if _chosen.type == "cuda":
        _larger_than_caches(_chosen.index).zero_()


def gpu_seconds(function: Callable[[], object], calls: int = 1) -> float:
    """By the GPU's own clock, each call with a cold L2.

    What the host takes is not in it, unless the GPU waits for the host: a small operator is timed from its first launch
    to the end of its last.
    """
    total = 0.0
    for _ in range(calls):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end) / 1e3
    return total / calls


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy much larger than the caches: what a kernel can hope for."""
    size = 1 << 30 if _chosen.type == "cuda" else 256 << 20
    source = torch.empty(size, dtype=torch.uint8, device=_chosen)
    target = torch.empty_like(source)
    times = sorted(clock()(lambda: target.copy_(source)) for _ in range(20))
    return 2 * size / times[len(times) // 2]
