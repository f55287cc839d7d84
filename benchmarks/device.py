"""The device that is measured, the CPU or a GPU, and how a call is timed there."""

import functools
import importlib.util
import statistics
from collections.abc import Callable, Sequence

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


def graph_seconds(functions: Sequence[Callable[[], object]], rounds: int = 12) -> float:
    """The median time of a call where the host has no part in it: all functions in one CUDA graph, which is replayed.

    The functions do the same on tensors of their own; what they touch together should be larger than the L2. On a CPU
    they are called one after another.
    """

    def work() -> None:
        for function in functions:
            function()

    if _chosen.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # whatever is made once is made now
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        work = graph.replay
    work()
    times = []
    for _ in range(rounds):
        if _chosen.type != "cuda":
            times.append(seconds(work))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(functions)


def sets_beyond_the_caches(size: int) -> int:
    """How many sets of tensors of ``size`` bytes are together larger than the L2, twice over; one on a CPU."""
    if _chosen.type != "cuda":
        return 1
    return max(1, min(16, 1 + 2 * torch.cuda.get_device_properties(_chosen).L2_cache_size // max(size, 1)))


def copy_bandwidth(size: int | None = None) -> float:
    """Bytes a second, read and written, of a copy much larger than the caches: what a kernel can hope for."""
    size = size or (1 << 30 if _chosen.type == "cuda" else 256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=_chosen)
    target = torch.empty_like(source)
    times = sorted(clock()(lambda: target.copy_(source)) for _ in range(20))
    return 2 * size / times[len(times) // 2]
