"""Counts the bytes that each operator's Triton kernels move, as Triton compiles them, and prints JSON, one call a line.

    make triton-traffic     python tools/triton_traffic.py [--quick] [--dtype bfloat16] [--layout NHWC]

Cases, columns and formulas are those of traffic.py, which counts the CUDA kernels; the grids are an H100's. A call may
move three hundredths more than the formula of the CUDA kernels, and its vectors, and take three launches.
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterator

import torch
import traffic
import triton_ptx

PROCESSORS = 132
_SHARE = 1.03


class TritonTraffic(traffic.Traffic):
    """What one call moved."""

    def faults(self) -> list[str]:
        """How it differs from what the kernels promise, in sentences."""
        found = []
        if not 1 <= self.launches <= 3:
            found.append(f"takes {self.launches} launches")
        most = _SHARE * self.formula + self.vectors
        if torch.Size(self.shape).numel() >= traffic.LARGE and self.passes > most:
            found.append(f"moves {self.passes:.4f} E, more than {most:.4f} E")
        if self.passes < self.formula:
            found.append(f"moves {self.passes:.4f} E, less than its passes over the tensor: {self.formula:.4f} E")
        # The share of 16-byte accesses is printed and not judged: of a program it includes the channels' vectors, which
        # small tiles read often. That tensors are read and written so is what triton_checks.py sees in machine code.
        return found


def count(form: str, direction: str, shape, dtype: torch.dtype, layout: str) -> TritonTraffic:
    """What one call of an operator moves."""
    call = traffic.cases(form, direction, shape, dtype, layout)
    triton_ptx.launches = launches = []
    call()
    triton_ptx.launches = None
    size = torch.Size(shape).numel() * dtype.itemsize

    def total(*names: str) -> int:
        return sum(launch[name] for launch in launches for name in names)

    bytes_of = (total("read_bytes"), total("read_sectors")), (total("write_bytes"), total("write_sectors"))
    branches = 2 if form == "dual_relu" else 0 if form == "add_relu" else 1
    return TritonTraffic(
        form,
        direction,
        str(dtype).removeprefix("torch."),
        layout,
        tuple(shape),
        False,
        len(launches),
        round(total("unique_read_bytes", "unique_write_bytes") / size, 4),
        round(traffic.formula(form, direction, dtype, False), 4),
        round(branches * traffic.VECTORS * 4 * shape[1] / size, 4),
        round(min([1.0, *(asked / (32 * sectors) for asked, sectors in bytes_of if sectors)]), 4),
        round(total("read16_bytes", "write16_bytes") / total("read_bytes", "write_bytes"), 4),
        round(total("write16_bytes") / max(1, bytes_of[1][0]), 4),
        tuple(launch["name"] for launch in launches),
    )


def everything(shapes, dtypes, layouts, operator: str | None = None) -> Iterator[TritonTraffic]:
    """Every operator and direction, or those of one operator."""
    triton_ptx.begin(PROCESSORS, check_races=False, global_races=False)
    for shape in shapes:
        for dtype in dtypes:
            for layout in layouts:
                for form, direction in traffic.PASSES:
                    if operator in (None, form):
                        yield count(form, direction, shape, traffic.DTYPES[dtype], layout)


def main() -> int:
    """Returns 1 where a count is not at its formula."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape only")
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), help="one shape only: N,C,H,W")
    parser.add_argument("--operator", choices=sorted({form for form, _ in traffic.PASSES}), help="one operator only")
    parser.add_argument("--dtype", choices=traffic.DTYPES, nargs="+", default=list(traffic.DTYPES))
    parser.add_argument("--layout", choices=traffic.LAYOUTS, nargs="+", default=list(traffic.LAYOUTS))
    options = parser.parse_args()
    for module in ("triton", "cuda_on_cpu"):
        if importlib.util.find_spec(module) is None:
            print(f"nothing can be counted without {module}: see `make triton-traffic`", file=sys.stderr)
            return 1
    status = 0
    shapes = (options.shape,) if options.shape else traffic.QUICK_SHAPES if options.quick else traffic.SHAPES
    for counted in everything(shapes, options.dtype, options.layout, options.operator):
        print(counted, flush=True)
        for fault in counted.faults():
            print(f"  {counted.operator} {counted.direction} {counted.shape} {fault}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
