"""CUDA graphs, captured and replayed, and two streams at once: each must give the bits of a plain call."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import cases
from .backends import Kernels, kernels
from .cases import FORMS, Kind
from .step import SHORT, Step, begin, skip, table

# One of each: few blocks, many, one channel block and many rows.
SHAPES = ((4, 64, 28, 28), (32, 512, 7, 7), (16, 256, 56, 56))
ROUNDS = 8


@contextlib.contextmanager
def side_stream() -> Iterator[torch.cuda.Stream]:
    """A stream that begins after the current one's work, and that the current one waits for in the end."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield side
    torch.cuda.current_stream().wait_stream(side)


def different(results: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of the results that have other bits."""
    return [name for name, value in results.items() if not torch.equal(value, expected[name])]


def graph(kind: Kind, device: torch.device) -> list[str]:
    """Captured on one batch, replayed on another, whose bits it must give."""
    first, second = (cases.make(kind, device, seed) for seed in (1, 2))
    expected = cases.fused(kind, second)
    if device.type != "cuda":
        return different(cases.fused(kind, second), expected)
    with side_stream():
        cases.fused(kind, first)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        captured = cases.fused(kind, first)
    for result in captured.values():
        result.fill_(float("nan"))
    for target, source in zip(tensors(first), tensors(second), strict=True):
        target.copy_(source)
    recorded.replay()
    torch.cuda.synchronize()
    return different(captured, expected)


def tensors(case: cases.oracle.Case) -> list[Tensor]:
    """All that a case is made of."""
    found: list[Tensor] = []
    cases.oracle.like(case, lambda tensor: found.append(tensor) or tensor)
    return found


def two_streams(kind: Kind, device: torch.device) -> list[str]:
    """Two batches on two streams, in turn and together: nothing that one call uses is another's."""
    batches = [cases.make(kind, device, seed) for seed in (1, 2)]
    expected = [cases.fused(kind, batch) for batch in batches]
    if device.type != "cuda":
        return []
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    results = []
    for _ in range(ROUNDS):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((number, cases.fused(kind, batches[number])))
    torch.cuda.synchronize()
    return sorted({name for number, result in results for name in different(result, expected[number])})


CHECKS: dict[str, Callable[[Kind, torch.device], list[str]]] = {"graph": graph, "two streams": two_streams}


def check(step: Step, by: Kernels, bad: list[str]) -> int:
    """All forms; returns the number of cases."""
    count = 0
    shapes = ((2, 8, 3, 3),) if step.rehearse else SHAPES
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for layout in cases.LAYOUTS:
                for form in FORMS:
                    for training in (True, False):
                        kind = Kind(form, shape, dtype, layout, training)
                        for name, function in CHECKS.items():
                            if step.left() < 2:
                                return count
                            with by.chosen():
                                wrong = function(kind, step.device)
                            step.record(str(kind), str(by), name, "differs" if wrong else "same bits")
                            count += 1
                            if wrong:
                                bad.append(f"{kind} [{by}] {name}: other bits in {', '.join(wrong)}")
                                print(f"WRONG: {bad[-1]}", flush=True)
    return count


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where bits differ."""
    step = begin("streams", arguments, needs=["numpy"])
    by = kernels(step.device)
    if not by:
        skip("no fused kernels serve this device")
    bad: list[str] = []
    rows = []
    for choice in by:
        before = len(bad)
        rows.append((choice, check(step, choice, bad), len(bad) - before))
    print(SHORT)
    print(table(("graphs and streams", "cases", "wrong"), rows))
    print("\n".join(bad[:10]))
    return int(bool(bad) or not any(count for _, count, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
