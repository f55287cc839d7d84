"""What the demo and the benchmarks measure with: time of alternatives in turn, and bytes kept for the backward."""

import contextlib
import dataclasses
import gc
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .ops.torch_private import TorchDispatchMode


class SavedActivations:
    """Bytes that autograd keeps for the backward of what runs inside the context.

    Every storage counts once, however many operators save it or a view of it, and with its whole size, for that is
    what stays allocated. The storages of ``model``'s parameters and buffers do not count; a saved input batch does.

    Example:
        >>> with SavedActivations(model) as saved:
        ...     loss = model(images).sum()
        >>> saved.bytes
    """

    def __init__(self, model: nn.Module | None = None):
        self._excluded = set()
        if model is not None:
            tensors = (*model.parameters(), *model.buffers())
            self._excluded = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:  # not by the address of its data, which a fake tensor does not have
            # The storage itself is held, lest its address be given out again before all is counted.
            self._storages[storage._cdata] = storage
        return tensor.detach()  # a node that saves its own output would keep itself

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)
        self.bytes = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors alive, followed operator by operator: those of ``held`` and all that is made inside.

    Every storage counts once, from the operator that made it until it is freed. What an operator takes and gives back
    while it runs, the workspace of a convolution say, is not seen. Works with fake tensors too.

    Attributes:
        peak: the most that there was.
        curve: how many there were after each operator that made or freed something.

    Example:
        >>> with LiveMemory(*model.parameters(), *model.buffers()) as memory:
        ...     model(images).sum().backward()
        >>> memory.peak
    """

    def __init__(self, *held: Tensor):
        super().__init__()
        self.peak = 0
        self.curve: list[int] = []
        self._alive = 0
        self._storages: dict[int, tuple[weakref.ref, int]] = {}
        for tensor in held:
            self._add(tensor)

    @property
    def bytes(self) -> int:
        """Alive now."""
        # Asked of each storage, not told by it: an interrupt that comes in a callback of a weak reference is lost.
        for key in [key for key, (storage, _) in self._storages.items() if storage() is None]:
            self._alive -= self._storages.pop(key)[1]
        return self._alive

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        now = self.bytes  # without what was freed until here, whose addresses may be given out again
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                now = self._add(value)
        if not self.curve or self.curve[-1] != now:
            self.curve.append(now)
        return result

    def _add(self, tensor: Tensor) -> int:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._storages and size:
                self._storages[key] = weakref.ref(storage), size
                self._alive += size
                self.peak = max(self.peak, self._alive)
        return self._alive


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keeps Python's garbage collector from running inside a measurement."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    """Wall-clock seconds of one call of ``function``, over ``calls`` calls one after another."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def in_turn(
    functions: Sequence[Callable[[], object]],
    budget: float = 4.0,
    minimum_rounds: int = 10,
    rounds: int | None = None,
    calls: int = 1,
    clock: Callable[..., float] = seconds,
) -> list[list[float]]:
    """Seconds per call of each function, measured in turn (A, B, A, B, ...): noise disturbs all alike.

    Args:
        functions: the alternatives; each is called twice for warm-up.
        budget: seconds for all rounds together; there are as many as fit, but no fewer than ``minimum_rounds``.
        rounds: their exact number, in place of the budget.
        calls: calls in each timed stretch, for functions too short to time alone.
        clock: seconds per call of a function over so many calls, such as :func:`seconds`.
    """
    for function in functions:
        function()
    one_round = sum(clock(function, calls) * calls for function in functions)
    if rounds is None:
        rounds = max(minimum_rounds, min(1000, int(budget / one_round)))
    samples: list[list[float]] = [[] for _ in functions]
    with without_garbage_collection():
        for _ in range(rounds):
            for function, times in zip(functions, samples, strict=True):
                times.append(clock(function, calls))
    return samples


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The ratio of two medians: how many times faster the denominator was."""
    return statistics.median(numerator) / statistics.median(denominator)


def cpu_name() -> str:
    """The processor's name, as the kernel tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step takes, in bytes.

    Attributes:
        before: parameters, buffers, the optimizer's momentum and the batch, which stand before the step.
        saved: what the forward keeps for its backward.
        peak: the most at any moment.
        curve: the bytes alive, after each operator that changed them.
        forward: how many entries of the curve belong to the forward.
    """

    before: int
    saved: int
    peak: int
    curve: tuple[int, ...]
    forward: int
