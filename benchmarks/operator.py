"""The operator at one site: its inputs, fused and unfused, their check, and the bytes that a call must move."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.functional import batch_norm_add_relu, dual_batch_norm_add_relu

from . import apex_operator, cudnn_operator, device
from .check import assert_no_worse
from .shapes import Site

EPS, MOMENTUM = 1e-5, 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
VARIANTS = ("eager", "fused", "compile")

# Passes over the tensor (a read or a write of all its elements) that a call makes when nothing stays in cache, as
# (forward, backward). Eager: batch_norm reads x twice and writes y; add_ reads two and writes one; relu_ reads and
# writes. In its backward, threshold reads two and writes one; batch_norm reads two for the sums, then two again, and
# writes one. Fused: x for the statistics; x, residual, y; then grad and x for the sums; both again and the gradients.
PASSES = {
    "eager": {"relu": (5, 8), "residual": (8, 8), "dual": (11, 13)},
    "fused": {"relu": (3, 5), "residual": (4, 6), "dual": (5, 8)},
}
# With running statistics there is no pass for the batch's.
PASSES_EVAL = {
    "eager": {"relu": (4, 0), "residual": (7, 0), "dual": (9, 0)},
    "fused": {"relu": (2, 0), "residual": (3, 0), "dual": (3, 0)},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One site at a batch size, in a layout and a dtype, training or not."""

    site: Site
    batch: int
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    training: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.batch, self.site.channels, self.site.height, self.site.width

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.site.kind}"

    def bytes(self, variant: str, backward: bool) -> int | None:
        """Bytes that one call moves when nothing stays in cache; None for generated code, which is not counted here."""
        if variant not in PASSES:
            return None
        forward_passes, backward_passes = (PASSES if self.training else PASSES_EVAL)[variant][self.site.kind]
        elements = self.batch * self.site.channels * self.site.height * self.site.width
        total = (forward_passes + (backward_passes if backward else 0)) * elements * self.dtype.itemsize
        if variant == "fused" and backward and self.site.kind != "relu":
            # One bit an element for the ReLU, written once and read in both passes of the backward.
            total += 3 * elements // 8
        return total


class Operator:
    """The tensors of a case, made once, and what runs on them."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        generator = torch.Generator(device.chosen()).manual_seed(seed)
        channels = case.site.channels
        parameters = torch.float64 if case.dtype == torch.float64 else torch.float32

        def full() -> Tensor:
            values = torch.randn(case.shape, generator=generator, device=device.chosen())
            return values.to(case.dtype, memory_format=LAYOUTS[case.layout])

        def vector(fill: Callable[..., Tensor], **options) -> Tensor:
            return fill(channels, dtype=parameters, device=device.chosen(), **options)

        def branch() -> tuple[Tensor, ...]:
            x = full().requires_grad_(case.training)
            affine = vector(torch.rand, generator=generator) + 0.5, vector(torch.randn, generator=generator)
            running = vector(torch.zeros), vector(torch.ones)
            return x, *running, *(v.requires_grad_(case.training) for v in affine)

        self.main = branch()
        self.shortcut = branch() if case.site.kind == "dual" else None
        self.residual = full().requires_grad_(case.training) if case.site.kind == "residual" else None
        self.grad_output = full()

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """What gradients are asked for: x, weight, bias, and the residual or the same three of the shortcut."""
        x, _, _, *affine = self.main
        tensors = (x, *affine)
        if self.shortcut is not None:
            x2, _, _, *affine2 = self.shortcut
            tensors += (x2, *affine2)
        return tensors if self.residual is None else (*tensors, self.residual)

    def fused(self) -> Tensor:
        """The operator of this package."""
        if self.shortcut is not None:
            return dual_batch_norm_add_relu(
                *self.main, *self.shortcut, self.case.training, MOMENTUM, EPS, MOMENTUM, EPS, relu=True
            )
        return batch_norm_add_relu(*self.main, self.residual, self.case.training, MOMENTUM, EPS, relu=True)

    def eager(self) -> Tensor:
        """torch's operators, in place where torchvision's blocks are."""
        return unfused(self.main, self.shortcut, self.residual, self.case.training)

    def compiled(self, function: Callable[..., Tensor] | None = None) -> Callable[[], Tensor]:
        """The same under ``torch.compile``; ``function`` is what :func:`compiled_unfused` gave for this case."""
        function = function or compiled_unfused()
        return lambda: function(self.main, self.shortcut, self.residual, self.case.training)

    def forward(self, variant: str) -> Callable[[], Tensor]:
        """The forward of a variant, ready to be called."""
        if variant == "apex":
            return apex_operator.forward(self.main, self.residual)
        if variant == "cudnn":
            return cudnn_operator.forward(self.main, self.residual, MOMENTUM, EPS)
        return {"eager": lambda: self.eager, "fused": lambda: self.fused, "compile": self.compiled}[variant]()

    def call(self, variant: str, backward: bool) -> Callable[[], object]:
        """Forward, or forward and backward with a given gradient; nothing is allocated but the results."""
        forward = self.forward(variant)
        return self.with_backward(forward) if backward else forward

    def with_backward(self, forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """A forward of this case, and the gradients of all its tensors."""

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), self.differentiable, self.grad_output)

        return both

    def check(self, backward: bool = True, variant: str = "fused") -> None:
        """Holds the result of a variant and its gradients against float64.

        Raises:
            AssertionError: an error is larger than that of eager on the same input and one ulp of the dtype.
        """
        eager, found = (self._result_and_errors(name, backward) for name in ("eager", variant))
        for name in found:
            assert_no_worse(name, *found[name], *eager[name])

    def _result_and_errors(self, variant: str, backward: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """The output and the gradients of a variant, each with the float64 result that belongs to it."""
        main, shortcut, residual = self._float64()
        exact = unfused(main, shortcut, residual, self.case.training, relu=False)
        output = self.forward(variant)()
        assert output.dtype == self.case.dtype, f"{variant} returned {output.dtype}"
        results = {"output": (output.detach(), exact.detach().relu())}
        if backward:
            leaves = [main[0], *main[3:], *((shortcut[0], *shortcut[3:]) if shortcut else ())]
            leaves += [] if residual is None else [residual]
            # A rounded zero may stand on either side of the ReLU's corner: each is held to the gradient behind its own.
            expected = torch.autograd.grad(exact, leaves, self.grad_output.double() * (output > 0))
            got = torch.autograd.grad(output, self.differentiable, self.grad_output)
            names = ("x", "weight", "bias", *(("x2", "weight2", "bias2") if shortcut else ("residual",)))
            for name, *pair in zip(names, got, expected, strict=False):
                results[f"gradient of {name}"] = tuple(pair)
        return results

    def _float64(self) -> tuple:
        def copied(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            if tensors is None:
                return None
            return tuple(t.detach().double().clone().requires_grad_(t.requires_grad) for t in tensors)

        residual = copied((self.residual,))[0] if self.residual is not None else None
        return copied(self.main), copied(self.shortcut), residual


def compiled_unfused(compiler: str = "inductor") -> Callable[..., Tensor]:
    """:func:`unfused` under ``torch.compile``, for one case: the shapes of another would make it dynamic."""
    torch._dynamo.reset()
    return torch.compile(unfused, dynamic=False, fullgraph=True, backend=compiler)


def unfused(
    main: tuple[Tensor, ...],
    shortcut: tuple[Tensor, ...] | None,
    residual: Tensor | None,
    training: bool,
    relu: bool = True,
) -> Tensor:
    """BatchNorm, add and ReLU as torchvision's blocks call them."""
    output = F.batch_norm(*main, training, MOMENTUM, EPS)
    if shortcut is not None:
        residual = F.batch_norm(*shortcut, training, MOMENTUM, EPS)
    if residual is not None:
        output += residual
    return F.relu_(output) if relu else output
