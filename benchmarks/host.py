"""Blocks and networks whose operators are small, fused and eager in turn: what fusing costs and saves the host.

python -m benchmarks.compare --host
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock

from resnet_fused import FusedResidualBlock, fuse
from resnet_fused.measure import in_turn, median_ratio

from . import device
from .operator import DTYPES, LAYOUTS

BLOCKS = 16
# Images and their size; the last in training too.
IMAGES = ((1, 32), (1, 224), (16, 32))

HEADERS = ("", "eager ms", "fused ms", "fused/eager", "rounds")
FORMATS = ("", ".3f", ".3f", ".2f", "")


def cases() -> Iterator[tuple[str, nn.Module, nn.Module, tuple[int, ...], bool]]:
    """Name, eager and fused model, shape of the input, and whether it trains."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(BasicBlock(4, 4) for _ in range(BLOCKS)))
    own = nn.Sequential(*(FusedResidualBlock(4, 4) for _ in range(BLOCKS)))
    for training in (False, True):
        yield f"{BLOCKS} BasicBlocks", blocks, fuse(copy.deepcopy(blocks)), (2, 4, 2, 2), training
        yield f"{BLOCKS} FusedResidualBlocks", blocks, own, (2, 4, 2, 2), training
    for name in ("resnet18", "resnet50"):
        model = get_model(name, weights=None)
        fused = fuse(copy.deepcopy(model))
        for batch, size in IMAGES:
            yield name, model, fused, (batch, 3, size, size), False
        yield name, model, fused, (batch, 3, size, size), True


def call(model: nn.Module, images: Tensor, training: bool) -> Callable[[], None]:
    """A forward without gradients, or a forward and a backward."""
    model.to(images.device, images.dtype).train(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            output = model(images)
        if training:
            output.sum().backward()

    return run


def rows(options: argparse.Namespace) -> Iterator[list]:
    """A line of the table for each case."""
    for name, eager, fused, shape, training in cases():
        images = torch.randn(shape).to(device.chosen(), DTYPES[options.dtype], memory_format=LAYOUTS[options.layout])
        calls = [call(model, images, training) for model in (eager, fused)]
        samples = in_turn(calls, options.seconds, options.minimum_rounds, options.rounds, clock=device.clock())
        label = f"{name}, {'x'.join(map(str, shape))}, {'training' if training else 'inference'}"
        medians = [1e3 * statistics.median(times) for times in samples]
        yield [label, *medians, median_ratio(samples[1], samples[0]), len(samples[0])]
