"""Does a 1x1 convolution with BatchNorm and ReLU before it and statistics behind it pay? The twelve of ResNet-50.

Microseconds in a CUDA graph: cuDNN's convolution alone; our operator, cuDNN's convolution and our statistics; and the
Triton kernel of ``benchmarks/convolutions.py`` with both, its merge of statistics counted, by tile.
"""

import functools
import os
import subprocess
import sys

import torch

from benchmarks import device

from .step import SHORT, Step, attempt, begin, table


def measure(step: Step, shape: tuple[int, int, int], batch: int) -> list[str]:
    """A row of the table; a kernel whose result is wrong is not timed."""
    from benchmarks import convolutions

    # The interpreter has no products in bfloat16.
    dtype = torch.float16 if step.rehearse else torch.bfloat16
    tiles = (convolutions.SMALL_TILE,) if step.rehearse else convolutions.TILES
    made = convolutions.sets(shape, batch, dtype)
    name, rounds = str(made[0]), 2 if step.rehearse else 8
    cells = {}
    for label, calls in {
        "cuDNN alone": [one.convolution for one in made],
        "BN+ReLU, cuDNN, statistics": [one.separate for one in made],
    }.items():
        cells[label] = f"{device.graph_seconds(calls, rounds) * 1e6:.1f}"
    for tile in tiles:
        label = f"Triton {tile}"
        try:
            made[0].check(tile)
        except AssertionError as error:
            print(f"WRONG: {error}", flush=True)
            cells[label] = "WRONG"
            continue
        calls = [functools.partial(one.fused, tile) for one in made]
        cells[label] = f"{device.graph_seconds(calls, rounds) * 1e6:.1f}"
        plain = [functools.partial(one.product, tile, False, False) for one in made]
        step.record(name, f"{label}, product alone", "time", f"{device.graph_seconds(plain, rounds) * 1e6:.1f}", "us")
    for label, value in cells.items():
        step.record(name, label, "time", value, "us")
    step.record(name, "", "bytes", made[0].bytes, "B")
    step.record(name, "", "operations", made[0].operations)
    times = [float(value) for label, value in cells.items() if label.startswith("Triton") and value != "WRONG"]
    ratio = f"{float(cells['BN+ReLU, cuDNN, statistics']) / min(times):.2f}" if times else ""
    return [name, *cells.values(), ratio]


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a kernel is wrong or does not run."""
    given = sys.argv[1:] if arguments is None else arguments
    step = begin("convolutions", given, needs=["triton"])
    if step.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it as it is imported.
        command = [sys.executable, "-u", "-m", "gpu.convolutions", *given]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    if step.rehearse:
        import triton_interpreter

        triton_interpreter.mend()
    from benchmarks import convolutions

    device.choose(step.device.type)
    torch.backends.cudnn.benchmark = True
    todo = [(shape, batch) for batch in (256, 32) for shape in convolutions.RESNET50]
    rows, failed = [], False
    for shape, batch in convolutions.rehearsed() if step.rehearse else todo:
        if step.left() < 3:
            print(f"no time for batch {batch} from {shape} on")
            break
        row = attempt(f"{shape}, batch {batch}", functools.partial(measure, step, shape, batch))
        failed |= row is None or "WRONG" in row
        if row is not None:
            rows.append(row)
            print(*row, flush=True)
    tiles = (convolutions.SMALL_TILE,) if step.rehearse else convolutions.TILES
    headers = ["us", "cuDNN alone", "ours+cuDNN+ours", *(f"Triton {tile}" for tile in tiles), "ours+cuDNN+ours/Triton"]
    print(SHORT)
    print(table(headers, rows))
    return int(failed or not rows)


if __name__ == "__main__":
    sys.exit(main())
