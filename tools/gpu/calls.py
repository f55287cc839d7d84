"""A few calls of every operator for a tool that watches them: ``python -m gpu.calls cpu|cuda large|small``."""

import sys

import torch

from . import cases
from .cases import Kind

# Rows and planes, aligned and not; several blocks, and little enough for a tool that is a hundred times slower.
SMALL = ((2, 72, 14, 14), (2, 65, 7, 7))
# What Nsight Compute looks at.
LARGE = (("bn_add_relu", (64, 256, 56, 56)), ("dual_relu", (64, 256, 56, 56)), ("bn_relu", (64, 64, 112, 112)))
TINY = tuple((form, (2, 8, 4, 4)) for form, _ in LARGE)


def kinds(size: str) -> list[Kind]:
    """Of a size: large, small, or tiny, which is large where it is rehearsed."""
    if size == "small":
        forms = [(form, shape) for form in cases.FORMS for shape in SMALL]
        ways = [(layout, training) for layout in cases.LAYOUTS for training in (True, False)]
    else:
        forms, ways = LARGE if size == "large" else TINY, [("NHWC", True)]
    return [Kind(form, shape, torch.bfloat16, *way) for way in ways for form, shape in forms]


def main() -> int:
    """Calls each once, forward and backward."""
    device, size = torch.device(sys.argv[1]), sys.argv[2]
    for kind in kinds(size):
        cases.fused(kind, cases.make(kind, device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("calls done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
