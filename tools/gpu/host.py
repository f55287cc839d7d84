"""What the host does for a call: unsynchronised wall clock of tiny operators and of whole networks, and CUDA graphs.

The GPU is waited for after each stretch of calls, outside the time of issuing them. Where the GPU is slower than the
host its queue fills up, and the time is the GPU's: ``done`` is the time until the GPU has done all.
"""

import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import device
from benchmarks.operator import Case, Operator
from benchmarks.shapes import KINDS, Site

from .backends import kernels
from .step import SHORT, Step, attempt, begin, skip, synchronize, table

Call = Callable[[], object]


def issued_and_done(step: Step, call: Call, calls: int) -> tuple[float, float]:
    """Microseconds a call: until the host has issued it, and until the GPU has done it; medians."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(2 if step.rehearse else 7):
        synchronize(step.device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        issued = time.perf_counter()
        synchronize(step.device)
        samples.append((1e6 * (issued - began) / calls, 1e6 * (time.perf_counter() - began) / calls))
    return statistics.median(s[0] for s in samples), statistics.median(s[1] for s in samples)


def operators(step: Step) -> list[list[object]]:
    """On tensors so small that only the host counts."""
    rows = []
    choices = [(str(choice), choice.chosen, "fused") for choice in kernels(step.device)]
    for kind in KINDS:
        for training in (True, False):
            operator = Operator(Case(Site(8, 2, 2, kind), 2, "channels_last", torch.float32, training))
            times = {}
            with torch.set_grad_enabled(training):
                call = operator.call("eager", training)
                times["eager"] = issued_and_done(step, call, 5 if step.rehearse else 100)[0]
                for name, chosen, variant in choices:
                    with chosen():
                        call = operator.call(variant, training)
                        times[name] = issued_and_done(step, call, 5 if step.rehearse else 100)[0]
            what = f"{kind}, {'forward + backward' if training else 'evaluation'}"
            for name, value in times.items():
                step.record(f"operator {what}", name, "issued", f"{value:.2f}", "us")
            rows.append([what, *(f"{value:.1f}" for value in times.values())])
    return [["us issued", "eager", *(name.replace("compiled, on ", "") for name, _, _ in choices)], *rows]


def graphed(step: Step, call: Call) -> Call:
    """The call as a CUDA graph; on a CPU the call."""
    if step.device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def inference(model: nn.Module, x: Tensor) -> Call:
    """A forward with running statistics."""
    model.eval()

    def call() -> None:
        with torch.no_grad():
            model(x)

    return call


def training(model: nn.Module, x: Tensor) -> Call:
    """A forward and a backward; gradients are made anew."""
    model.train()

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    return call


def network(step: Step, made: Callable[[nn.Module, Tensor], Call], model: nn.Module, batch: int) -> dict[str, float]:
    """Times of one of a model's calls, plain and as a graph."""
    size = 32 if step.rehearse else 224
    x = torch.randn(batch, 3, size, size, device=step.device).contiguous(memory_format=torch.channels_last)
    call = made(model, x)
    times = {}
    times["issued"], times["done"] = issued_and_done(step, call, 1 if step.rehearse else 5)
    times["as a graph"] = issued_and_done(step, graphed(step, call), 1 if step.rehearse else 5)[1]
    return times


def networks(step: Step) -> list[list[object]]:
    """ResNet-50 where the host is in the way: small batches."""
    from torchvision.models import get_model

    import resnet_fused

    name = "resnet18" if step.rehearse else "resnet50"
    eager = get_model(name, weights=None).to(step.device, memory_format=torch.channels_last)
    models = {"eager": eager, "fused": resnet_fused.fuse(copy.deepcopy(eager))}
    rows: list[list[object]] = []
    for what, made, batch in (("inference", inference, 1), ("inference", inference, 8), ("training", training, 8)):
        if step.left() < 3:
            print(f"no time for {what}, batch {batch}")
            break
        batch = min(batch, 2) if step.rehearse else batch
        label = f"{name} {what}, batch {batch}"
        times = {}
        for variant, model in models.items():
            found = attempt(f"{label} {variant}", functools.partial(network, step, made, model, batch))
            times[variant] = found or {}
            for measure, value in times[variant].items():
                step.record(label, variant, measure, f"{value:.1f}", "us")
        columns = ("issued", "done", "as a graph")
        cells = [f"{times[v].get(c, float('nan')):.0f}" for c in columns for v in models]
        rows.append([label, *cells])
    return [["us", *(f"{v} {c}" for c in ("issued", "done", "as a graph") for v in models)], *rows]


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where something cannot be measured."""
    step = begin("host", arguments, needs=["torchvision"])
    device.choose(step.device.type)
    if not kernels(step.device):
        skip("no fused kernels serve this device")
    tables = [attempt("operators", lambda: operators(step)), attempt("networks", lambda: networks(step))]
    print(SHORT)
    for rows in filter(None, tables):
        print(table(rows[0], rows[1:]) + "\n")
    return int(None in tables or any("nan" in cell for rows in tables for row in rows for cell in map(str, row)))


if __name__ == "__main__":
    sys.exit(main())
