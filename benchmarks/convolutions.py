"""A 1x1 convolution in Triton, with BatchNorm and ReLU before it and the statistics of its output behind it.

Whether that beats cuDNN's convolution between our own two operators is the question. A channels_last tensor is a matrix
of pixels by channels: the convolution is a product with the weight, whose reads of the input normalize it on the way
(``prologue``) and whose rounded output is added up while it is still in registers (``epilogue``).
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .check import assert_no_worse

OPS = torch.ops.resnet_fused
EPS = 1e-5
# (channels in, channels out, height and width) of ResNet-50's 1x1 convolutions of stride 1, and how often each occurs.
RESNET50 = {
    (64, 64, 56): 1,
    (64, 256, 56): 4,
    (256, 64, 56): 2,
    (256, 128, 56): 1,
    (128, 512, 28): 4,
    (512, 128, 28): 3,
    (512, 256, 28): 1,
    (256, 1024, 14): 6,
    (1024, 256, 14): 5,
    (1024, 512, 14): 1,
    (512, 2048, 7): 3,
    (2048, 512, 7): 2,
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """Pixels, channels out and channels in of a step of a program; its warps, and loads that are under way."""

    pixels: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.pixels}x{self.outputs}x{self.inputs}"


TILES = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4), Tile(256, 64, 64, 8, 3))
# What the interpreter can do in a second.
SMALL_TILE = Tile(32, 32, 16, 4, 1)


@triton.jit
def conv1x1_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    bias_ptr,
    sums_ptr,
    squares_ptr,
    pixels,
    N,
    K,
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of y (pixels, N) = relu((x - mean) scale + bias) weight^T.

    Programs that read the same pixels of x follow each other, so that the L2 has them.
    """
    column, row = tl.program_id(0), tl.program_id(1)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside = m < pixels
    x_row = x_ptr + m[:, None].to(tl.int64) * K
    weight_row = weight_ptr + n[None, :] * K
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        channel = first + k
        a = tl.load(x_row + channel[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(weight_row + channel[:, None])
        if PROLOGUE:
            mean = tl.load(mean_ptr + channel)[None, :]
            scale = tl.load(scale_ptr + channel)[None, :]
            bias = tl.load(bias_ptr + channel)[None, :]
            value = tl.maximum((a.to(tl.float32) - mean) * scale + bias, 0.0)
            a = tl.where(inside[:, None], value, 0.0).to(x_ptr.dtype.element_ty)
        total = tl.dot(a, w, total)
    rounded = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], rounded, mask=inside[:, None])
    if EPILOGUE:
        # Of what was rounded, as a batch_norm would read it, and about the tile's own mean: nothing cancels.
        values = rounded.to(tl.float32)
        count = tl.minimum(pixels - row * BM, BM).to(tl.float32)
        sums = tl.sum(values, 0)
        centered = tl.where(inside[:, None], values - (sums / count)[None, :], 0.0)
        tl.store(sums_ptr + row * N + n, sums)
        tl.store(squares_ptr + row * N + n, tl.sum(centered * centered, 0))


class Convolution:
    """A 1x1 convolution at a batch size, its input and what normalizes that."""

    def __init__(self, shape: tuple[int, int, int], batch: int, dtype: torch.dtype, seed: int = 0):
        self.channels, self.outputs, size = shape
        self.shape, self.batch = shape, batch
        generator = torch.Generator(device.chosen()).manual_seed(seed)

        def normal(*dimensions: int) -> Tensor:
            return torch.randn(dimensions, generator=generator, device=device.chosen())

        x = normal(batch, self.channels, size, size) + normal(1, self.channels, 1, 1)
        self.x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        weight = normal(self.outputs, self.channels, 1, 1) / math.sqrt(self.channels)
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.gamma, self.beta = 1 + 0.5 * normal(self.channels), 0.5 * normal(self.channels)
        var, self.mean = torch.var_mean(self.x.float(), (0, 2, 3), correction=0)
        self.invstd = (var + EPS).rsqrt()
        self.scale = self.invstd * self.gamma

    def __str__(self) -> str:
        size = self.shape[2]
        return f"{self.batch}x{size}x{size} {self.channels}->{self.outputs}"

    @property
    def bytes(self) -> int:
        """Input, weight and output, once each."""
        pixels = self.x.numel() // self.channels
        return (self.x.numel() + self.weight.numel() + pixels * self.outputs) * self.x.element_size()

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.x.numel() * self.outputs

    def convolution(self) -> Tensor:
        """cuDNN's, of the input as it is."""
        return F.conv2d(self.x, self.weight)

    def normalized(self) -> Tensor:
        """Our operator before it."""
        arguments = (self.x, self.gamma, self.beta, None, self.mean, self.invstd, True, False)
        return OPS.batch_norm_add_relu_apply(*arguments)[0]

    def separate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Our operator, cuDNN's convolution, our statistics: (output, mean, var)."""
        y = F.conv2d(self.normalized(), self.weight)
        return y, *OPS.batch_norm_statistics(y)

    def product(self, tile: Tile, prologue: bool = True, epilogue: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel: (output, sums of each tile, squared deviations from each tile's mean)."""
        pixels = self.x.numel() // self.channels
        outputs = min(tile.outputs, self.outputs)
        rows = triton.cdiv(pixels, tile.pixels)
        shape = (self.batch, self.outputs, *self.x.shape[2:])
        y = torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)
        sums, squares = torch.empty((2, rows, self.outputs), device=self.x.device).unbind()
        conv1x1_kernel[self.outputs // outputs, rows](
            self.x,
            self.weight,
            y,
            self.mean,
            self.scale,
            self.beta,
            sums,
            squares,
            pixels,
            self.outputs,
            self.channels,
            prologue,
            epilogue,
            tile.pixels,
            outputs,
            tile.inputs,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return y, sums, squares

    def merged(self, tile: Tile, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance from those of the tiles (Chan, Golub, LeVeque, 1979)."""
        pixels = self.x.numel() // self.channels
        counts = torch.full((sums.shape[0], 1), float(tile.pixels), device=sums.device)
        counts[-1] = pixels - (sums.shape[0] - 1) * tile.pixels
        mean = sums.sum(0) / pixels
        between = (counts * (sums / counts - mean).square()).sum(0)
        return mean, (squares.sum(0) + between) / pixels

    def fused(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel and the merge: (output, mean, var)."""
        y, sums, squares = self.product(tile)
        return y, *self.merged(tile, sums, squares)

    def check(self, tile: Tile) -> None:
        """Holds output and statistics of the kernel against float64.

        Raises:
            AssertionError: the output is further off than that of the separate operators and one ulp; or a statistic is
                further from that of the output than float32 sums over a tile are: log2(pixels) additions one behind
                another, and as many again over the tiles, each off by half an ulp of the largest sum of terms.
        """
        y, mean, var = self.fused(tile)
        exact = self._exact()
        assert_no_worse(f"{self}, {tile}", y, exact, self.separate()[0], exact)
        wide = y.double()
        exact_var, exact_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        additions = math.log2(tile.pixels) + math.log2(self.x.numel() // self.channels) + 4
        unit = torch.finfo(torch.float32).eps * additions
        for name, mine, theirs, scale in (
            ("mean", mean, exact_mean, wide.abs().mean((0, 2, 3)).max()),
            ("var", var, exact_var, (exact_var + exact_mean.square()).max()),
        ):
            error, allowed = float((mine.double() - theirs).abs().max()), unit * float(scale)
            assert error <= allowed, f"{self}, {tile}: {name} is off by {error:.3e}, allowed are {allowed:.3e}"

    def _exact(self) -> Tensor:
        """In float64, as a product: cuDNN's convolutions are slow there."""
        column = (1, -1, 1, 1)
        vectors = (self.mean, self.invstd, self.gamma, self.beta)
        mean, invstd, gamma, beta = (vector.double().reshape(column) for vector in vectors)
        normalized = F.relu((self.x.double() - mean) * (invstd * gamma) + beta)
        return (normalized.movedim(1, -1) @ self.weight.double().flatten(1).T).movedim(-1, 1)


def rehearsed() -> Iterator[tuple[tuple[int, int, int], int]]:
    """What the interpreter can do: with a row of tiles that is not full."""
    yield (32, 64, 5), 2


def sets(shape: tuple[int, int, int], batch: int, dtype: torch.dtype) -> list[Convolution]:
    """As many of the same shape as do not fit the L2."""
    first = Convolution(shape, batch, dtype)
    return [first, *(Convolution(shape, batch, dtype, n) for n in range(1, device.sets_beyond_the_caches(first.bytes)))]
