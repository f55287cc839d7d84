"""How a pass over a tensor is cut into tiles and programs: by its shape alone, without a search.

``RESNET_FUSED_TRITON_AUTOTUNE=1`` has candidates timed at the first call of each kind, shape, dtype and GPU instead.
What was found is kept in ``RESNET_FUSED_TRITON_CACHE``, by default ``~/.cache/resnet_fused/triton``, one file a GPU.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

AUTOTUNE = os.environ.get("RESNET_FUSED_TRITON_AUTOTUNE") == "1"


class Device(NamedTuple):
    """What a plan has to know of a device: processors (streaming multiprocessors, compute units or the like), and lanes
    of a warp.
    """

    processors: int
    lanes: int = 32


# What the interpreter pretends to be: enough programs for several to share a channel.
INTERPRETED = Device(1)


class Problem(NamedTuple):
    """A tensor as kernels see it: ``batch`` rows of ``channels`` values, or ``batch`` planes of each channel."""

    rows: bool
    batch: int
    channels: int
    positions: int  # 1 in rows
    itemsize: int

    @property
    def count(self) -> int:
        """Values of a channel."""
        return self.batch * self.positions


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What may differ from one launch to another of the same pass.

    Attributes:
        warps: of a program, of 32 lanes; half as many of 64.
        accesses: of 16 bytes that a thread makes for a tile of one tensor.
        resident: programs that a processor is given.
    """

    warps: int
    accesses: int
    resident: int


# A thousand threads a processor: half of what it can hold.
DEFAULTS = {
    "statistics": Candidate(8, 1, 4),
    "reduce": Candidate(8, 1, 4),
    "forward": Candidate(4, 1, 8),
    "backward": Candidate(4, 1, 8),
}
SEARCHED = tuple(Candidate(w, a, r) for w, r in ((4, 8), (8, 4), (16, 2)) for a in (1, 2))

# Tiles of a sum that are read before any is used: more would be in flight, and registers would not do for them.
UNROLL = 2

# The most that partial sums may move, written and read, in passes over the tensor.
_PARTIAL_PASSES = 0.08
# Of each tile this share may lie outside the tensor.
_WASTE = 0.2
# The narrowest piece of a row that a program owns, in bytes: two sectors.
_NARROWEST = 64
_BLOCKS_MOST = 65535  # of the second axis of a grid


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tile of a program, how many chunks of tiles there are, and how many programs share a group of channels."""

    channels: int
    others: int
    warps: int
    groups: int
    chunks: int
    programs: int


def group_of(itemsize: int) -> int:
    """Tiles whose terms are added up before float64 takes over."""
    return 8 if itemsize == 2 else 4


def unit_of(size: int) -> int:
    """The largest power of two, up to 16, that divides ``size``."""
    return min(size & -size, 16) if size else 16


def plan(kind: str, problem: Problem, device: Device, sums: int = 0, candidate: Candidate | None = None) -> Plan:
    """How the pass ``kind`` goes over a tensor; ``sums`` is how many sums a channel it writes."""
    candidate = candidate or DEFAULTS[kind]
    vector = 16 // problem.itemsize
    elements = candidate.warps * 32 * vector * candidate.accesses
    group = group_of(problem.itemsize) if sums else 1
    if problem.rows:
        inner = _inner(problem.channels, min(elements, 32 * vector))
        channels, others = inner, min(elements // inner, _at_least(problem.batch))
    else:
        inner = _inner(problem.positions, elements)
        channels, others = min(elements // inner, _at_least(problem.channels)), inner
    wanted = device.processors * candidate.resident
    while True:
        chunks, groups = _chunks(problem, others), divided(problem.channels, channels)
        programs = min(max(wanted // max(groups, 1), 1), max(divided(chunks, group), 1), _BLOCKS_MOST)
        if sums:
            most = _PARTIAL_PASSES * problem.count * problem.itemsize / (16 * sums)
            programs = max(min(programs, int(most)), 1)
        narrower = channels // 2
        # Fewer channels a program, where there are not enough programs for the device.
        if groups * programs >= device.processors or narrower < (_NARROWEST // problem.itemsize if problem.rows else 1):
            break
        channels = narrower
        if problem.rows:
            others = min(elements // channels, _at_least(problem.batch))
    warps = min(max(channels * others // (device.lanes * vector), 1), max(candidate.warps * 32 // device.lanes, 1))
    return Plan(channels, others, warps, groups, chunks, programs)


_planned = functools.lru_cache(maxsize=4096)(plan)


def _at_least(size: int) -> int:
    return triton.next_power_of_2(max(size, 1))


def divided(a: int, b: int) -> int:
    """a / b, rounded up: what triton.cdiv says, which takes ten times as long."""
    return -(-a // b)


def _chunks(problem: Problem, others: int) -> int:
    if problem.rows:
        return divided(problem.batch, others)
    return problem.batch * divided(problem.positions, others)


def _inner(size: int, most: int) -> int:
    """The width of a tile: a power of two that wastes little of it, and no less than a byte of the mask."""
    width = max(min(_at_least(size), most), 8)
    best = width
    while width > 8 and _waste(size, best) > _WASTE:
        width //= 2
        if _waste(size, width) < _waste(size, best):
            best = width
    return best


def _waste(size: int, width: int) -> float:
    whole = divided(size, width) * width
    return (whole - size) / max(whole, 1)


@functools.cache
def device_of(device: torch.device) -> Device:
    """What it says of itself."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))
    if device.type == "xpu":
        return Device(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return INTERPRETED


def choose(kind: str, problem: Problem, device: torch.device, sums: int, attempt: Callable[[Plan], object]) -> Plan:
    """The plan of a pass; with autotuning the fastest, where ``attempt`` makes the pass and changes nothing."""
    of_device = device_of(device)
    if not AUTOTUNE or not problem.count:
        return _planned(kind, problem, of_device, sums)
    cache = Cache.of(device)
    key = f"{kind} {problem} {sums}"
    found = cache.get(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _planned(kind, problem, of_device, sums)  # nothing can be timed then
        times = {c: _time(attempt, _planned(kind, problem, of_device, sums, c)) for c in SEARCHED}
        found = min(times, key=times.get)
        cache.put(key, found)
    return _planned(kind, problem, of_device, sums, found)


def _time(attempt: Callable[[Plan], object], chosen: Plan) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: attempt(chosen), warmup=5, rep=20)
    except OutOfResources:
        return math.inf  # the device does not hold so many warps


class Cache:
    """What autotuning found on one kind of device, in memory and in a file."""

    _open: dict[str, "Cache"] = {}  # noqa: RUF012

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._found = self._read()

    def _read(self) -> dict[str, Candidate]:
        """What is in the file, and is one of those that are searched."""
        try:
            read = json.loads(self.path.read_text(encoding="utf-8"))
            found = {key: Candidate(**value) for key, value in read.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # none yet, or one of another version: it is written anew
        return {key: candidate for key, candidate in found.items() if candidate in SEARCHED}

    @classmethod
    def of(cls, device: torch.device) -> "Cache":
        """The cache of devices of this name under these versions of Triton and of the kernels."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        name = re.sub(r"\W+", "-", f"{name} triton {triton.__version__} kernels {_kernels_version()}")
        if name not in cls._open:
            cls._open[name] = cls(_directory() / f"{name}.json")
        return cls._open[name]

    def get(self, key: str) -> Candidate | None:
        """What was found for ``key``."""
        return self._found.get(key)

    def put(self, key: str, candidate: Candidate) -> None:
        """Keeps it, and what other processes have found in the meantime. None ever reads half of a file."""
        self._found = self._read() | self._found | {key: candidate}
        text = json.dumps({k: dataclasses.asdict(v) for k, v in self._found.items()}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.chmod(file.name, 0o644)  # a folder may be shared
            os.replace(file.name, self.path)
        except OSError:
            return  # A home that cannot be written to: the search is made again by the next process.


@functools.cache
def _kernels_version() -> str:
    """Of the source: what was fastest may not be after a change."""
    return hashlib.sha256(pathlib.Path(__file__).with_name("kernels.py").read_bytes()).hexdigest()[:12]


def _directory() -> pathlib.Path:
    default = pathlib.Path("~/.cache/resnet_fused/triton")
    return pathlib.Path(os.environ.get("RESNET_FUSED_TRITON_CACHE") or default).expanduser()
