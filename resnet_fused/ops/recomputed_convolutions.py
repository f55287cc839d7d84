"""Recomputation one level deeper: outputs of convolutions that are cheap to run again.

A 1x1 convolution whose output is larger than its input, such as the last one of a bottleneck, has its input in the
graph anyway. Its output, which BatchNorm saves, is then made again from that: two thirds of what recomputing the
normalized activations leaves of a bottleneck. The price is that convolution again, once for the block's output and once
for its BatchNorm: of a ResNet-50's bottleneck it is a quarter of the multiplications.

The convolution is found by what it calls, so that it may be any module or function.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode

# Not those of other libraries, whose storage need not be where their values are.
_TENSORS = (Tensor, FakeTensor)


class _Convolve:
    """A convolution with its settings, in the dtype that it had: autocast may have cast its weight."""

    __slots__ = ("dtype", "settings")
    # Of a chain of block outputs each is made of one of these: held, they would be what was not to be kept.
    is_large = True

    def __init__(self, dtype: torch.dtype, settings: tuple):
        self.dtype = dtype
        self.settings = settings

    def __call__(self, operands, vectors) -> Tensor:
        input, weight, bias = (None if t is None else t.to(self.dtype) for t in (operands[0], *vectors))
        return torch.conv2d(input, weight, bias, *self.settings)


def _arguments(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return input, weight, bias, (stride, padding, dilation, groups)


class RecomputedConvolutions(TorchFunctionMode):
    """Inside, the output of a 1x1 convolution that is larger than its input is made again in the backward.

    Args:
        note: told of each: its output, input, weight and bias, and what makes the output again.
    """

    def __init__(self, note: Callable[[Tensor, Tensor, Tensor, Tensor | None, Callable], None]):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.conv2d and not torch.compiler.is_compiling():  # which may be inside
            self._note(output, *_arguments(*args, **(kwargs or {})))
        return output

    def _note(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> None:
        cheap = weight.shape[2:] == (1, 1) and output.numel() > input.numel()
        known = all(type(t) in _TENSORS and t.layout is torch.strided for t in (output, input))
        # Of an input that autocast has cast the graph has the cast, and would keep the input beside it.
        if cheap and known and output.requires_grad and output.dtype == input.dtype:
            self.note(output, input, weight, bias, _Convolve(output.dtype, settings))
