"""Every operator against float64 on the device: output, running statistics, every gradient, and the same bits twice.

The rule is that of ``tests/oracle.py``: our error is at most torch's own on the same input plus one unit in the last
place of the largest element, or of the largest term where terms cancel. Memory that calls are given is full of NaN.
A process for each dtype; tensors too large for all of them at once are one process's at a time.
"""

import collections
import dataclasses
import fcntl
import importlib.util
import itertools
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

import torch
from torch import Tensor

from resnet_fused.ops.triton_kernels import is_interpreted

from . import cases
from .backends import Kernels, kernels
from .cases import FORMS, LAYOUTS, Kind, oracle
from .step import ROOT, SKIPPED, Step, begin, skip, table

# (C, H) of ResNet-50, and two whose channels and planes are no multiple of anything.
SHAPES = (
    (64, 112),
    (256, 56),
    (512, 28),
    (1024, 14),
    (2048, 7),
    (64, 56),
    (128, 28),
    (256, 14),
    (512, 7),
    (65, 7),
    (24, 9),
)
BATCHES = (32, 2, 256)
# Elements from which on a tensor is one process's at a time; the largest case takes some 25 GB.
GIANT = 40_000_000
DTYPES = {oracle.dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64)}
_LOCK = pathlib.Path(tempfile.gettempdir()) / f"resnet_fused-values-{os.getuid()}.lock"


def poison(kind: Kind, device: torch.device) -> None:
    """Frees blocks full of NaN, of the sizes that a call will ask for."""
    size = kind.elements * kind.dtype.itemsize
    sizes = [size] * 4 + [max(kind.elements // 8, 1)] * 3 + [1 << 20] * 4 + [1 << 16] * 8 + [512] * 32
    blocks = [torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device) for nbytes in sizes]
    del blocks


def away_from_the_kink(kind: Kind, case: oracle.Case, exact: Tensor, scale: float) -> oracle.Case:
    """As :func:`oracle.away_from_the_kink`, on the device."""
    if not case.relu:
        return case
    with torch.no_grad():
        theirs = cases.linear(kind, oracle.owned(case))
    near = exact.abs() <= allowed(theirs, exact, scale)
    return dataclasses.replace(case, grad_output=case.grad_output.masked_fill(near, 0))


def allowed(theirs: Tensor, exact: Tensor, scale: float) -> float:
    """torch's own error plus one unit in the last place."""
    return error(theirs, exact) + oracle.ulp(theirs.dtype, max(scale, float(exact.abs().max())))


def error(result: Tensor, exact: Tensor) -> float:
    """The largest of any element; infinite where one is not finite."""
    worst = float((result.double() - exact).abs().max())
    return worst if math.isfinite(worst) else math.inf


@dataclasses.dataclass
class Verdict:
    """What became of all cases so far."""

    step: Step
    cases: int = 0
    worst: dict[str, float] = dataclasses.field(default_factory=dict)
    bad: list[str] = dataclasses.field(default_factory=list)

    def judge(self, kind: Kind, by: Kernels, name: str, mine: float, limit: float) -> None:
        """Notes one result."""
        ratio = mine / limit if mine else 0.0
        self.worst[str(by)] = max(self.worst.get(str(by), 0.0), ratio)
        self.step.record(str(kind), str(by), f"error of {name} / allowed", f"{ratio:.4f}")
        if not ratio <= 1:
            self.complain(kind, by, f"{name}: error {mine:.3e}, allowed {limit:.3e}")

    def complain(self, kind: Kind, by: Kernels, what: str) -> None:
        """Notes what is wrong; the first few are told at once."""
        self.bad.append(f"{kind} [{by}] {what}")
        if len(self.bad) <= 10:
            print(f"WRONG: {self.bad[-1]}", flush=True)


def check(kind: Kind, by: list[Kernels], verdict: Verdict) -> None:
    """One case with all kernels."""
    device = verdict.step.device
    case = cases.make(kind, device, seed=verdict.cases)
    scales = cases.scales(kind, case)
    with torch.no_grad():
        before_relu = cases.linear(kind, cases.wide(oracle.owned(case)))
    case = away_from_the_kink(kind, case, before_relu, scales.get("output", 0.0))
    del before_relu
    exact = {name: value.detach() for name, value in cases.unfused(kind, cases.wide(case)).items()}
    limits = {
        name: allowed(value.detach(), exact[name], scales.get(name, 0.0))
        for name, value in cases.unfused(kind, case).items()
    }
    for choice in by:
        try:
            compare(kind, case, choice, exact, limits, verdict)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            verdict.complain(kind, choice, f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
    verdict.cases += 1


def compare(
    kind: Kind, case: oracle.Case, by: Kernels, exact: dict[str, Tensor], limits: dict[str, float], verdict: Verdict
) -> None:
    """Our results, twice, in memory full of NaN."""
    with by.chosen():
        poison(kind, verdict.step.device)
        ours = cases.fused(kind, case)
        poison(kind, verdict.step.device)
        again = cases.fused(kind, case)
    if ours.keys() != exact.keys():
        verdict.complain(kind, by, f"results are {', '.join(ours)}")
        return
    for name, value in ours.items():
        if value.shape != exact[name].shape or value.dtype != _dtype_of(name, case):
            verdict.complain(kind, by, f"{name}: {value.dtype} of shape {list(value.shape)}")
            continue
        verdict.judge(kind, by, name, error(value, exact[name]), limits[name])
        if not torch.equal(value.contiguous().view(torch.uint8), again[name].contiguous().view(torch.uint8)):
            verdict.complain(kind, by, f"{name}: other bits the second time")


def _dtype_of(name: str, case: oracle.Case) -> torch.dtype:
    vectors = ("weight", "bias", "running")
    return case.branches[0].weight.dtype if any(part in name for part in vectors) else case.dtype


def kinds(dtypes: list[torch.dtype], rehearse: bool) -> list[Kind]:
    """The cases in the order in which they are run: all forms of a shape, large and small shapes in turn."""
    shapes = (((8, 3),) if is_interpreted() else ((65, 7), (8, 3))) if rehearse else SHAPES
    batches = (2,) if rehearse else BATCHES
    order = itertools.product(batches, shapes, dtypes, LAYOUTS, FORMS, (True, False))
    return [Kind(form, (n, c, h, h), d, layout, training) for n, (c, h), d, layout, form, training in order]


def part(step: Step) -> int:
    """The backend and the dtypes of one process, such as "triton:float32+float64"; 1 where something is wrong."""
    backend, _, dtypes = step.part.partition(":")
    if is_interpreted():
        import triton_interpreter

        triton_interpreter.mend()
    if step.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    by = [choice for choice in kernels(step.device) if choice.backend == backend]
    if not by:
        skip(f"no {backend} kernels serve this device")
    todo = collections.deque(kinds([DTYPES[name] for name in dtypes.split("+")], step.rehearse))
    verdict, total = Verdict(step), len(todo)
    with _LOCK.open("w") as lock:
        while todo and step.left() > 2 and len(verdict.bad) < 20:
            kind = todo.popleft()
            giant = step.device.type == "cuda" and kind.elements >= GIANT
            if giant and not alone(lock):
                todo.append(kind)  # the others' turn
                time.sleep(0.01)
                continue
            try:
                check(kind, by, verdict)
            except torch.OutOfMemoryError:
                print(f"no memory for {kind}", flush=True)
            except Exception as problem:  # of torch's own operations, or of a GPU that is lost
                verdict.bad.append(f"{kind}: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
                print(f"WRONG: {verdict.bad[-1]}", flush=True)
            if giant:
                torch.cuda.empty_cache()
                fcntl.flock(lock, fcntl.LOCK_UN)
    print("\n".join(verdict.bad[:10]))
    print(f"{step.part}: {verdict.cases} of {total} cases, {len(verdict.bad)} wrong")
    rows = [(name, f"{ratio:.3f}") for name, ratio in verdict.worst.items()]
    print(table((step.part, "worst error / allowed"), rows), flush=True)
    return int(bool(verdict.bad) or not verdict.cases)


def alone(lock: IO) -> bool:
    """Whether no other process has a giant now, and none will have until the lock is given back."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a result is wrong; what, is told."""
    step = begin("values", arguments, needs=["numpy"])
    if step.part is not None:
        return part(step)
    parts = [f"compiled:{name}" for name in DTYPES] + ["triton:bfloat16+float32", "triton:float16+float64"]
    if step.rehearse or len(os.sched_getaffinity(0)) < 8:
        parts = [f"{backend}:{'+'.join(DTYPES)}" for backend in ("compiled", "triton")[: 1 if step.rehearse else 2]]
    command = [sys.executable, "-u", "-m", "gpu.values"]
    started = [subprocess.Popen([*command, *step.arguments(part)]) for part in parts]
    for backend, prefix, extra in rehearsed_otherwise() if step.rehearse else ():
        slow = [*prefix, *command, *step.arguments(f"{backend}:bfloat16+float32")]
        started.append(subprocess.Popen(slow, env={**os.environ, **extra}))
    codes = [process.wait() for process in started]
    return max(codes, key=lambda code: (code not in (0, SKIPPED), code == 0))


def rehearsed_otherwise() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """How kernels for GPUs run on a CPU: backend, prefix and environment of a command; why not, where they cannot."""
    if importlib.util.find_spec("triton") is None:
        print("Triton's kernels are not rehearsed: Triton is not installed", flush=True)
    else:
        yield "triton", [], {"TRITON_INTERPRET": "1"}
    emulator = pathlib.Path(os.environ.get("EMULATOR", ROOT.parent / "shared" / "cuda_on_cpu" / "cuda-on-cpu"))
    emulated = ROOT / "build" / "emulated" / "_cuda.abi3.so"
    if not emulator.is_file():
        print("the CUDA kernels are not rehearsed: the emulator (EMULATOR in the Makefile) is not there", flush=True)
    elif not emulated.is_file():
        print("the CUDA kernels are not rehearsed: `make emulated` has not built the emulated library", flush=True)
    else:
        yield "compiled", [str(emulator)], {"RESNET_FUSED_EMULATED": str(emulated)}


if __name__ == "__main__":
    sys.exit(main())
