"""Microseconds, GB/s and share of a copy of every operator at the shapes of ResNet-50.

Calls are in a CUDA graph, on sets of inputs that are together larger than the L2; forward, then forward and backward,
whose difference is the backward's. GB/s are the bytes that streaming kernels move when nothing stays in cache
(``Case.bytes``), for all kernels alike: what stays on chip shows as more. A result that is not as near to float64 as
eager's is marked WRONG, has no ratio, and fails the step.
"""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks import cudnn_operator, device
from benchmarks.operator import Case, Operator, compiled_unfused
from benchmarks.shapes import Site, sites

from .backends import Kernels, kernels
from .step import SHORT, Step, attempt, begin, skip, table

# Where torch.compile is measured too: a compilation takes seconds.
COMPILED = (Site(256, 56, 56, "residual"), Site(512, 28, 28, "residual"), Site(64, 112, 112, "relu"))
# In other dtypes and layouts, and with further builds of the library.
CHOSEN = (Site(256, 56, 56, "residual"), Site(512, 7, 7, "relu"))
VARIED = (*COMPILED, Site(1024, 14, 14, "residual"), Site(512, 7, 7, "relu"), Site(256, 56, 56, "dual"))
Times = dict[str, tuple[float, float]]


def cases(step: Step) -> Iterator[Case]:
    """In the order in which they are measured."""
    if step.rehearse:
        yield from (Case(Site(8, 3, 3, kind), 2, "channels_last", torch.bfloat16) for kind in ("relu", "dual"))
        return
    known = VARIED if step.part else sorted(sites("resnet50"), reverse=True, key=lambda s: (s.kind, s.height))
    for batch in (256, 32):
        yield from (Case(site, batch, "channels_last", torch.bfloat16) for site in known)
    if not step.part:
        for site in CHOSEN:
            yield Case(site, 32, "channels_last", torch.float32)
            yield from (Case(site, 32, "nchw", dtype) for dtype in (torch.bfloat16, torch.float32))


class Measured:
    """A case: tensors, times of every variant, and what is wrong with its results."""

    def __init__(self, case: Case):
        self.case, self.times, self.wrong = case, Times(), []
        size = case.batch * case.site.channels * case.site.height * case.site.width * case.dtype.itemsize
        self.operators = [Operator(case, seed) for seed in range(device.sets_beyond_the_caches(size))]

    def check(self, by: Kernels) -> None:
        """Holds our result against float64."""
        try:
            self.operators[0].check()
        except AssertionError as error:
            self.wrong.append(f"{self} [{by}] {error}")
            print(f"WRONG: {self.wrong[-1]}", flush=True)

    def time(self, name: str, forward: Callable[[Operator], Callable[[], torch.Tensor]]) -> None:
        """Forward, and forward with backward."""
        forwards = [forward(operator) for operator in self.operators]
        both = [operator.with_backward(call) for operator, call in zip(self.operators, forwards, strict=True)]
        rounds = 3 if device.chosen().type == "cpu" else 12
        self.times[name] = device.graph_seconds(forwards, rounds), device.graph_seconds(both, rounds)

    def __str__(self) -> str:
        dtype = str(self.case.dtype).removeprefix("torch.")
        return f"{self.case} {dtype} {'NHWC' if self.case.layout == 'channels_last' else 'NCHW'}"

    def record(self, step: Step, copy: float) -> None:
        """All times as they are."""
        for name, (forward, both) in self.times.items():
            variant = name if step.part is None else f"{name}, {step.part}"
            for what, seconds in (("forward", forward), ("backward", both - forward), ("forward + backward", both)):
                step.record(str(self), variant, what, f"{seconds * 1e6:.3f}", "us")
            rate = self.case.bytes("fused", True) / both
            step.record(str(self), variant, "of streaming bytes", f"{rate / 1e9:.1f}", "GB/s")
            step.record(str(self), variant, "share of a copy", f"{rate / copy:.3f}")

    def row(self, names: list[str], copy: float) -> list[str]:
        """A line of the table."""
        cells = [str(self)]
        for name in names:
            if name not in self.times:
                cells += ["", "", ""]
                continue
            forward, both = self.times[name]
            share = self.case.bytes("fused", True) / both / copy
            cells += [f"{forward * 1e6:.1f}", f"{(both - forward) * 1e6:.1f}", f"{share:.2f}"]
        ours = [both for name, (_, both) in self.times.items() if name.startswith("compiled")]
        ratio = f"{self.times['eager'][1] / min(ours):.2f}" if ours and "eager" in self.times else ""
        return [*cells, "WRONG" if self.wrong else ratio]


def measure(case: Case, by: list[Kernels], step: Step, copy: float) -> Measured:
    """Eager, all our kernels, torch.compile."""
    found = Measured(case)
    if step.part is None:
        found.time("eager", lambda operator: operator.eager)
    for choice in by:
        with choice.chosen():
            found.check(choice)
            found.time(str(choice), lambda operator: operator.fused)
    is_chosen = step.rehearse or (case.site in COMPILED and case.layout == "channels_last")
    if is_chosen and step.part is None:
        function = compiled_unfused(step.compiler)
        attempt(f"torch.compile {found}", lambda: found.time("torch.compile", lambda op: op.compiled(function)))
    if step.part is None and has_cudnn(step) and cudnn_operator.suits(*_kind(case)):
        attempt(f"cuDNN {found}", lambda: time_cudnn(found))
    found.record(step, copy)
    found.operators.clear()
    return found


def has_cudnn(step: Step) -> bool:
    """Whether cuDNN's own operator can be measured."""
    return step.device.type == "cuda" and importlib.util.find_spec("cudnn") is not None


def _kind(case: Case) -> tuple[str, torch.dtype, str, bool]:
    return case.site.kind, case.dtype, case.layout, case.training


def time_cudnn(found: Measured) -> None:
    """cuDNN's fused operator, which reads and writes the same tensors but for a mask of a byte an element.

    Raises:
        AssertionError: its result is not as near to float64 as eager's; it is not timed then, and ours is not at fault.
    """
    found.operators[0].check(variant="cudnn")
    found.time("cuDNN", lambda operator: operator.forward("cudnn"))


def prepare(step: Step) -> None:
    """Has the code of torch.compile and of Triton's kernels in their caches before anything is timed."""
    device.choose(step.device.type)
    for batch in () if step.rehearse else (256, 32):
        for site in COMPILED:
            if step.left() > 10:
                Operator(Case(site, batch, "channels_last", torch.bfloat16)).call("compile", True)()
    triton = [choice for choice in kernels(step.device) if choice.backend == "triton"]
    for case in cases(step) if triton else ():
        if step.left() > 10:
            with triton[0].chosen():
                Operator(case).call("fused", True)()


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a result is wrong, or a case cannot be measured."""
    step = begin("bandwidth", arguments, needs=[] if "--rehearse" in (arguments or sys.argv) else ["torchvision"])
    device.choose(step.device.type)
    by = kernels(step.device)
    if not by:
        skip("no fused kernels serve this device")
    if step.part is not None:
        by = [choice for choice in by if choice.backend == "compiled"]
        if not by:
            print(f"FAILED: {step.part} does not serve")
            return 1
    copy = device.copy_bandwidth(1 << 22 if step.rehearse else None)
    print(f"a copy moves {copy / 1e9:.0f} GB/s", flush=True)
    if not has_cudnn(step):
        print("cuDNN's own BatchNorm + add + ReLU is not measured: no GPU, or nvidia-cudnn-frontend is not installed")
    reserve = 15 * len(step.variants)
    measured: list[Measured] = []
    failed: list[str] = []
    for case in cases(step):
        if step.left() < 5 + reserve:
            print("no time for the other cases")
            break
        one = attempt(str(case), functools.partial(measure, case, by, step, copy))
        if one is None:
            failed.append(str(case))
        else:
            measured.append(one)
        if step.device.type == "cuda":
            torch.cuda.empty_cache()
    print(short(measured, copy, step), flush=True)
    codes = [variant(step, file, 1 / (len(step.variants) - n)) for n, file in enumerate(step.variants)]
    wrong = [line for one in measured for line in one.wrong]
    print("\n".join([*wrong[:5], *(f"FAILED: {name}" for name in failed)]))
    return int(bool(wrong or failed or any(codes)) or not measured)


def short(measured: list[Measured], copy: float, step: Step) -> str:
    """The tables: a copy's rate, then three columns for each kind of kernels."""
    names = list(dict.fromkeys(name for one in measured for name in one.times))
    abbreviations = [name.replace("compiled, on ", "").replace("torch.", "") for name in names]
    headers = [cell for name in abbreviations for cell in (f"{name}: f us", "b us", "of copy")]
    heading = "" if step.part is None else f" library {step.part}:"
    lines = [f"{SHORT}\n" if step.part is None else "", f"{heading} copy {copy / 1e9:.0f} GB/s\n"]
    rows = [one.row(names, copy) for one in measured]
    return "".join(lines) + table(("training", *headers, "eager/ours"), rows)


def variant(step: Step, file: str, share: float) -> int:
    """The same with another build of the CUDA library, in a process that loads it."""
    environment = {**os.environ, "RESNET_FUSED_CUDA_LIBRARY": file}
    command = [sys.executable, "-u", "-m", "gpu.bandwidth", *step.arguments(pathlib.Path(file).name, share)]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
