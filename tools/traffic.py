"""Counts the bytes that each CUDA operator moves, under the emulator, and prints one JSON object a line.

    make traffic            python tools/traffic.py [--quick] [--on-chip 0|1|auto] [--dtype bfloat16] [--layout NCHW]

E is one pass over the tensor: the different bytes that each launch reads and writes, added up over the launches and
divided by the bytes of the tensor. That is what memory has to deliver where nothing survives in a cache from one launch
to the next. ``formula`` is what the kernels' passes add up to, and ``vectors`` what vectors of one value a channel
may add. ``full_sectors`` is the share of the moved bytes' 32-byte sectors that was asked for, ``wide`` the share of
bytes in 16-byte accesses, ``wide_stores`` that of stored bytes. The counts are those of a copy of the library that
ptx_parameters.py made.
"""

import argparse
import atexit
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# The BatchNorm shapes of ResNet-50, at batch sizes that the emulator walks through in a second or two.
SHAPES = (
    (4, 64, 112, 112),
    (8, 64, 56, 56),
    (16, 256, 56, 56),
    (8, 512, 28, 28),
    (32, 256, 14, 14),
    (16, 1024, 14, 14),
    (32, 2048, 7, 7),
)
QUICK_SHAPES = ((16, 256, 56, 56),)
# Tensors of that many elements move 2 % more than the formula at most. The sums that blocks hand to each other are as
# many as the GPU holds blocks, and weigh more in proportion where the tensor is smaller.
LARGE = 12_000_000
# The least share of its sectors that a call may ask for. Blocks own few channels of a small tensor: their mask in words
# of 4 bytes, each a sector of its own, is 8/32 E in float32 in place of 1/32 E, of stores of 1.03 E.
FULL_SECTORS, FULL_SECTORS_OF_SMALL = 0.95, 0.82
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
FORMS = ("bn_relu", "bn_add_relu", "dual_relu")

# Passes over tensors of the full shape, and over the mask of one bit an element, of a call: streaming, where statistics
# and normalization are two walks through memory, and on chip, where they are one.
PASSES = {
    ("bn_relu", "forward"): ((3, 0), (2, 0)),
    ("bn_relu", "backward"): ((5, 0), (3, 0)),
    ("bn_add_relu", "forward"): ((4, 1), (3, 1)),
    ("bn_add_relu", "backward"): ((6, 2), (4, 1)),
    ("dual_relu", "forward"): ((5, 1), (3, 1)),
    ("dual_relu", "backward"): ((8, 2), (5, 1)),
    # Of a gradient in two parts: each walk reads one pass more, where an addition of its own would take three.
    ("bn_relu", "backward of two"): ((7, 0), (4, 0)),
    ("bn_add_relu", "backward of two"): ((8, 2), (5, 1)),
    ("dual_relu", "backward of two"): ((10, 2), (6, 1)),
    ("bn_relu", "eval"): ((2, 0), (2, 0)),
    ("bn_add_relu", "eval"): ((3, 0), (3, 0)),
    ("dual_relu", "eval"): ((3, 0), (3, 0)),
    ("add_relu", "forward"): ((3, 1), (3, 1)),
    ("add_relu", "backward"): ((2, 1), (2, 1)),
}
# Vectors of one float a channel that a branch's launches read and write: weight, bias, running statistics before and
# after, mean, var, invstd, in either launch, and sums for the gradient.
VECTORS = 16


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one call moved."""

    operator: str
    direction: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    on_chip: bool
    launches: int
    passes: float
    formula: float
    vectors: float
    full_sectors: float
    wide: float
    wide_stores: float
    kernels: tuple[str, ...]

    @property
    def vectorizable(self) -> bool:
        """Whether 16 bytes divide a row or a plane."""
        _, channels, *positions = self.shape
        inner = torch.Size(positions).numel() if self.layout == "NCHW" else channels
        return inner * DTYPES[self.dtype].itemsize % 16 == 0

    def faults(self) -> list[str]:
        """How it differs from what the kernels promise, in sentences."""
        found: list[str] = []
        if not 1 <= self.launches <= 2:
            found.append(f"takes {self.launches} launches")
        numel = torch.Size(self.shape).numel()
        more = 0.02 * max(1, LARGE / numel)
        most = (1 + more) * math.ceil(100 * self.formula) / 100 + self.vectors
        if most < self.passes:
            found.append(f"moves {self.passes:.4f} E, more than {most:.4f} E")
        if self.formula > self.passes:
            found.append(f"moves {self.passes:.4f} E, less than its passes over the tensor: {self.formula:.4f} E")
        least = FULL_SECTORS if numel >= LARGE else FULL_SECTORS_OF_SMALL
        if self.full_sectors < least and self.vectorizable:
            found.append(f"only {self.full_sectors:.1%} of its sectors' bytes are asked for")
        return found

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        return json.dumps({"E" if name == "passes" else name: value for name, value in fields.items()})


def formula(form: str, direction: str, dtype: torch.dtype, on_chip: bool) -> float:
    """The passes of a call, in E."""
    tensors, masks = PASSES[form, direction][on_chip]
    return tensors + masks / (8 * dtype.itemsize)


def cases(form: str, direction: str, shape, dtype: torch.dtype, layout: str) -> Callable[[], object]:
    """The call, with what it needs made before."""
    ops = torch.ops.resnet_fused
    generator = torch.Generator().manual_seed(0)

    def full() -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype, memory_format=LAYOUTS[layout])

    def vectors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight, bias, mean = (torch.randn(shape[1], generator=generator) for _ in range(3))
        return weight, bias, mean, torch.rand(shape[1], generator=generator) + 0.5

    x, other, grad = full(), full(), full()
    second = (full(),) if direction == "backward of two" else ()
    weight, bias, mean, var = vectors()
    weight2, bias2, mean2, var2 = vectors()
    if form == "add_relu":
        if direction == "forward":
            return lambda: ops.add_relu(x, other, True)
        mask = ops.add_relu(x, other, True)[1]
        return lambda: ops.add_relu_backward(grad, mask)
    if form == "dual_relu":
        branches = (x, weight, bias), (other, weight2, bias2)
        if direction == "eval":
            first, second = (*branches[0], mean, var), (*branches[1], mean2, var2)
            return lambda: ops.dual_batch_norm_add_relu_eval(*first, *second, 1e-5, 1e-5, True, False)

        def forward():
            first, second = (*branches[0], mean, var), (*branches[1], mean2, var2)
            update = ops.dual_batch_norm_add_relu_train_with_update
            return update(*first, *second, 0.1, 0.1, 1e-5, 1e-5, True, True)

        if direction == "forward":
            return forward
        _, saved, invstd, saved2, invstd2, mask = forward()
        arguments = (grad, x, weight, saved, invstd, other, weight2, saved2, invstd2, mask, True, *[True] * 6, *second)
        return lambda: ops.dual_batch_norm_add_relu_train_backward(*arguments)
    residual = other if form == "bn_add_relu" else None
    if direction == "eval":
        return lambda: ops.batch_norm_add_relu_eval(x, weight, bias, residual, mean, var, 1e-5, True, False)

    def forward():
        update = ops.batch_norm_add_relu_train_with_update
        return update(x, weight, bias, residual, mean, var, 0.1, 1e-5, True, True)

    if direction == "forward":
        return forward
    _, saved, invstd, _, mask = forward()
    needs = (True, residual is not None, True, True)
    arguments = (grad, x, weight, bias, saved, invstd, mask if residual is not None else None, True, *needs, *second)
    return lambda: ops.batch_norm_add_relu_train_backward(*arguments)


def count(form: str, direction: str, shape, dtype: torch.dtype, layout: str) -> Traffic:
    """What one call of an operator moves."""
    import cuda_on_cpu

    # The checks are the tests' business; counting is exact without. Among so many bits of masks there would be words
    # that look like memory that was never written, too.
    with cuda_on_cpu.settings(race=0, shared_race=0, init=0):
        call = cases(form, direction, shape, dtype, layout)
        with cuda_on_cpu.trace() as launches:
            call()
    size = torch.Size(shape).numel() * dtype.itemsize
    # One launch that keeps what it read is the variant on chip; evaluation and add_relu have one launch anyway.
    two_passes = direction != "eval" and form != "add_relu"
    on_chip = two_passes and len(launches) == 1
    moved = sum(launch.unique_read_bytes + launch.unique_write_bytes for launch in launches)
    asked = sum(launch.read_bytes + launch.write_bytes for launch in launches)
    stored = sum(launch.write_bytes for launch in launches)
    wide = sum(launch.read16_bytes + launch.write16_bytes for launch in launches)
    branches = 2 if form == "dual_relu" else 0 if form == "add_relu" else 1
    return Traffic(
        form,
        direction,
        str(dtype).removeprefix("torch."),
        layout,
        tuple(shape),
        on_chip,
        len(launches),
        round(moved / size, 4),
        round(formula(form, direction, dtype, on_chip), 4),
        round(branches * VECTORS * 4 * shape[1] / size, 4),
        round(_full_sectors(launches, on_chip), 4),
        round(wide / asked if asked else 0.0, 4),
        round(sum(launch.write16_bytes for launch in launches) / max(1, stored), 4),
        tuple(launch.name for launch in launches),
    )


def _full_sectors(launches, on_chip: bool) -> float:
    """The share of the sectors' bytes that was asked for, of reads or of writes, whichever is less.

    On chip, blocks that wait for each other read a flag again and again. There the reads of 16 bytes stand for all
    reads, and are taken to be whole, as the same reads of the streaming kernels are.
    """
    stored, sectors = (sum(getattr(launch, name) for launch in launches) for name in ("write_bytes", "write_sectors"))
    if on_chip:
        wide = sum(launch.read16_bytes for launch in launches)
        return min(1.0, (stored + wide) / max(1, 32 * sectors + wide))
    read, read_sectors = (sum(getattr(launch, name) for launch in launches) for name in ("read_bytes", "read_sectors"))
    return min(1.0, stored / max(1, 32 * sectors), read / max(1, 32 * read_sectors)) if launches else 1.0


def everything(shapes, dtypes, layouts, operator: str | None = None) -> Iterator[Traffic]:
    """Every operator and direction, or those of one operator."""
    for shape in shapes:
        for dtype in dtypes:
            for layout in layouts:
                for form, direction in PASSES:
                    if operator not in (None, form):
                        continue
                    yield count(form, direction, shape, DTYPES[dtype], layout)


def _countable(library: pathlib.Path) -> pathlib.Path:
    """The copy of the library whose reads of parameters are not taken for traffic."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import ptx_parameters

    copy = library.with_name(f"counted.{os.getpid()}.so")
    ptx_parameters.copy(library, copy)
    atexit.register(copy.unlink)
    return copy


def main() -> int:
    """Returns 1 where a count is not at its formula, 2 where nothing can be counted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape only")
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), help="one shape only: N,C,H,W")
    parser.add_argument("--operator", choices=sorted({form for form, _ in PASSES}), help="one operator only")
    parser.add_argument("--on-chip", choices=("0", "1", "auto"), help="RESNET_FUSED_ON_CHIP for this run")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    options = parser.parse_args()
    if options.on_chip:
        os.environ["RESNET_FUSED_ON_CHIP"] = options.on_chip
    if os.environ.get("CUDA_ON_CPU") != "1":
        print("traffic is counted under the emulator of CUDA, which is not there: see `make traffic`", file=sys.stderr)
        return 1 if os.environ.get("RESNET_FUSED_REQUIRE_EMULATION") == "1" else 0
    if not os.environ.get("RESNET_FUSED_EMULATED"):
        print("RESNET_FUSED_EMULATED names no library: see `make traffic`", file=sys.stderr)
        return 2
    os.environ["RESNET_FUSED_EMULATED"] = str(_countable(pathlib.Path(os.environ["RESNET_FUSED_EMULATED"])))
    import resnet_fused  # noqa: F401  (loads the operators)

    status = 0
    shapes = (options.shape,) if options.shape else QUICK_SHAPES if options.quick else SHAPES
    for traffic in everything(shapes, options.dtype, options.layout, options.operator):
        print(traffic, flush=True)
        for fault in traffic.faults():
            print(f"  {traffic.operator} {traffic.direction} {traffic.shape} {fault}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
