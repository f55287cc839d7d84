"""Blocks and whole networks: fused beside eager, activation checkpointing and torch.compile, training and inference."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fused import fuse
from resnet_fused.measure import LiveMemory, SavedActivations

from . import device
from .check import assert_no_worse, assert_same_training_step
from .operator import LAYOUTS

# recompute: fused, with activations made again in the backward, and then the wide 1x1 convolutions too. checkpoint:
# eager, every block of it under torch.utils.checkpoint, the usual way to keep less.
VARIANTS = ("eager", "fused", "recompute", "recompute convolutions", "checkpoint", "compile")
INFERENCE_VARIANTS = ("eager", "fused", "compile")
# What torch.compile is given.
_COMPILED = {"compile": "eager", "fused compile": "fused"}

# (block, channels in, planes, stride, input size), at 224x224 images: the first block of a stage and a later one.
BLOCKS = {
    "BasicBlock 64": (BasicBlock, 64, 64, 1, 56),
    "BasicBlock 128, projection": (BasicBlock, 64, 128, 2, 56),
    "Bottleneck 256": (Bottleneck, 256, 64, 1, 56),
    "Bottleneck 512, projection": (Bottleneck, 256, 128, 2, 56),
}


def block(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A torchvision block, and the (C, H, W) of its input."""
    kind, channels, planes, stride, size = BLOCKS[name]
    downsample = None
    if stride != 1 or channels != planes * kind.expansion:
        convolution = nn.Conv2d(channels, planes * kind.expansion, 1, stride, bias=False)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(planes * kind.expansion))
    # fuse() looks at the modules of a model: the block stands in one.
    return nn.Sequential(kind(channels, planes, stride, downsample)), (channels, size, size)


class Checkpointed(nn.Module):
    """A block whose activations are dropped, and whose forward is run again in the backward."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """The block's."""
        return checkpoint(self.block, x, use_reentrant=False)


def _checkpointed(model: nn.Module) -> nn.Module:
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, BasicBlock | Bottleneck)}
    for name, module in blocks.items():
        model.set_submodule(name, Checkpointed(module))
    return model


class Network:
    """A model once for each variant, from the same weights, with a batch of random input.

    With ``autocast`` the models and the images are ``dtype``, and a training step runs under it.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        layout: str = "nchw",
        dtype: torch.dtype = torch.float32,
        training: bool = True,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.memory_format = LAYOUTS[layout]
        self.training, self.dtype, self.autocast = training, dtype, autocast
        model = model.to(device.chosen(), dtype, memory_format=self.memory_format).train(training)
        images = torch.randn(shape, generator=generator)
        self.images = images.to(device.chosen(), dtype, memory_format=self.memory_format)
        self.labels = torch.randint(10, shape[:1], generator=generator).to(device.chosen())
        make = {
            "fused": fuse,
            "recompute": lambda copied: fuse(copied, recompute=True),
            "recompute convolutions": lambda copied: fuse(copied, recompute="convolutions"),
            "checkpoint": _checkpointed,
        }
        self.models = {"eager": model, **{name: made(copy.deepcopy(model)) for name, made in make.items()}}

    @classmethod
    def named(cls, name: str, batch: int, image_size: int = 224, **options) -> "Network":
        """A torchvision model."""
        torch.manual_seed(0)
        return cls(get_model(name, weights=None), (batch, 3, image_size, image_size), **options)

    def _model(self, variant: str) -> nn.Module:
        return self.models[_COMPILED.get(variant, variant)]

    def _loss(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        enabled = self.autocast is not None and images.dtype != torch.float64  # the reference, that is
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=enabled):
            return _loss(forward(images), labels)

    def call(self, variant: str, compiler: str = "inductor") -> Callable[[], object]:
        """A training step (zero_grad, forward, loss, backward, SGD), or a forward in inference."""
        model = forward = self._model(variant)
        if variant in _COMPILED:
            torch._dynamo.reset()
            forward = torch.compile(model, dynamic=False, backend=compiler)
        if not self.training:
            return lambda: _infer(forward, self.images)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            self._loss(forward, self.images, self.labels).backward()
            optimizer.step()

        return step

    def memory(self, variant: str) -> tuple[int, int | None] | None:
        """(bytes kept between forward and backward, peak of a step above what stands before it), tensors alone.

        None in inference. Of torch.compile what its partitioner keeps; its allocations are not seen, and the peak is
        None.
        """
        if not self.training:
            return None
        model = self._model(variant)
        if variant in _COMPILED:
            # Inductor's partition of the graph, without its code.
            torch._dynamo.reset()
            with SavedActivations(model) as saved:
                compiled = torch.compile(model, backend="aot_eager_decomp_partition")
                self._loss(compiled, self.images, self.labels)
            return saved.bytes, None
        with LiveMemory(*model.parameters(), *model.buffers(), self.images, self.labels) as live:
            before = live.bytes
            loss = self._loss(model, self.images, self.labels)
            kept = live.bytes - before
            loss.backward()
        model.zero_grad(set_to_none=True)
        return kept, live.peak - before

    def check(self, images: int = 2) -> None:
        """Holds the fused model against float64, on a few images; the models themselves stay as they are.

        Raises:
            AssertionError: it is further from float64 than eager, beyond what rounding explains.
        """
        x, labels = self.images[:images], self.labels[:images]
        eager, fused = (copy.deepcopy(self.models[name]) for name in ("eager", "fused"))
        reference = copy.deepcopy(eager).double()
        if not self.training:
            fused, eager, exact = (_infer(m, x.to(next(m.parameters()).dtype)) for m in (fused, eager, reference))
            # The roundings of many layers are two draws of one size, which differ by a small factor.
            assert_no_worse("output", fused, exact, exact + 4 * (eager.double() - exact), exact)
            return

        def step(model: nn.Module) -> Tensor:
            loss = self._loss(model, x.to(next(model.parameters()).dtype), labels)
            loss.backward()
            return loss

        assert_same_training_step(eager, fused, reference, step)


def _infer(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    return output.square().mean() if output.dim() == 4 else F.cross_entropy(output, labels)
