"""ResNet-50 in training: img/s, peak memory and our kernels' share of a step.

AMP in bfloat16, channels_last, cudnn.benchmark, SGD; eager, fused, with recomputation, under torch.compile, and with
the residual's gradient handed over (RESNET_FUSED_HANDOVER=1). The fused network is held against float64 first.
"""

import functools
import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks import device

from .step import SHORT, Step, attempt, begin, synchronize, table

VARIANTS = ("eager", "fused", "recompute", "recompute convolutions", "compile", "fused compile")
BATCHES = {256: VARIANTS, 128: ("eager", "fused", "compile")}
HANDOVER = "handover"
HEADERS = ("", "img/s", "of eager", "ms", "least ms", "most ms", "peak GiB", "ours, % of GPU time")


def network(step: Step, batch: int):
    """The network and its input."""
    from benchmarks.networks import Network

    name, size = ("resnet18", 32) if step.rehearse else ("resnet50", 224)
    return Network.named(name, batch, size, layout="channels_last", autocast=torch.bfloat16)


def measure(step: Step, made, variant: str) -> dict[str, object]:
    """Times and memory of a variant's training step."""
    call = made.call(variant, step.compiler)
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
    for _ in range(1 if step.rehearse else 4):  # cudnn.benchmark and torch.compile take their time
        call()
    synchronize(step.device)
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, times = (1, []) if step.rehearse else (4, [])
    for _ in range(2 if step.rehearse else 5):
        began = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize(step.device)
        times.append((time.perf_counter() - began) / steps)
    peak = torch.cuda.max_memory_allocated() if step.device.type == "cuda" else 0
    # A profiler that does not work here leaves the times alone.
    return {"times": times, "peak": peak / 2**30, "share": attempt("profile", lambda: share(step, call))}


def share(step: Step, call) -> float | None:
    """Of the time on the GPU that our kernels take; the largest kernels are told."""
    if step.device.type != "cuda":
        call()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    ours = sum(event.self_device_time_total for event in events if "resnet_fused::" in event.key)
    for event in events[:12]:
        print(f"    {event.self_device_time_total / 1e3:8.2f} ms {event.count:4}x {event.key[:110]}")
    return ours / total if total else None


def row(step: Step, batch: int, variant: str, found: dict[str, object], eager: float) -> list[str]:
    """A line of the table, and of the numbers."""
    times = found["times"]
    median = statistics.median(times)
    cells = {
        "img/s": f"{batch / median:.0f}",
        "of eager": f"{eager / median:.3f}",
        "ms": f"{median * 1e3:.1f}",
        "least ms": f"{min(times) * 1e3:.1f}",
        "most ms": f"{max(times) * 1e3:.1f}",
        "peak GiB": f"{found['peak']:.2f}",
        "ours, % of GPU time": "" if found["share"] is None else f"{100 * found['share']:.1f}",
    }
    for measure_, value in cells.items():
        step.record(f"training, batch {batch}", variant, measure_, value)
    return [f"{batch} {variant}", *cells.values()]


def batches(step: Step) -> dict[int, tuple[str, ...]]:
    """What is measured at which batch size."""
    if step.part == HANDOVER:
        return {2 if step.rehearse else 256: ("eager", "fused")}
    return {2: VARIANTS} if step.rehearse else BATCHES


def prepare(step: Step) -> None:
    """Has torch.compile's code in its cache before anything is timed."""
    device.choose(step.device.type)
    for variant in ("compile", "fused compile")[: 1 if step.rehearse else 2]:
        if step.left() > 15:
            network(step, 2 if step.rehearse else 256).call(variant, step.compiler)()


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where the fused network is wrong, or a variant cannot be measured."""
    step = begin("networks", arguments, needs=["torchvision"])
    device.choose(step.device.type)
    torch.backends.cudnn.benchmark = True
    rows, failed = [], []
    for batch, variants in batches(step).items():
        made = network(step, batch)
        if step.part is None and not rows:
            made.check(images=min(8, batch))
            print("the fused network's step is as near to float64 as eager's", flush=True)
        eager = None
        for variant in variants:
            if step.left() < (25 if step.part is None else 5):  # handover has yet to run
                print(f"no time for {batch} {variant}")
                continue
            label = variant if step.part is None else f"{variant}, {step.part}"
            print(f"{batch} {label}", flush=True)
            found = attempt(label, functools.partial(measure, step, made, variant))
            if found is None:
                failed.append(label)
                continue
            eager = eager or statistics.median(found["times"])
            rows.append(row(step, batch, label, found, eager))
        del made
        if step.device.type == "cuda":
            torch.cuda.empty_cache()
    if step.part is None:
        print(SHORT, flush=True)
    print(table(HEADERS, rows), flush=True)
    print("\n".join(f"FAILED: {label}" for label in failed), flush=True)
    code = 0
    if step.part is None:
        environment = {**os.environ, "RESNET_FUSED_HANDOVER": "1"}
        command = [sys.executable, "-u", "-m", "gpu.networks", *step.arguments(HANDOVER)]
        code = subprocess.run(command, env=environment, check=False).returncode
    return int(bool(failed or code) or not rows)


if __name__ == "__main__":
    sys.exit(main())
