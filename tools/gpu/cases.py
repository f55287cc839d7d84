"""The operators' cases of ``tests/oracle.py``, made on the device, and their results in float64 there."""

import dataclasses

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import functional

FORMS = ("bn_add_relu", "bn_relu", "dual_relu", "bn", "bn_add", "add_relu")
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a case is called, and made from."""

    form: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str
    training: bool

    def __str__(self) -> str:
        size, dtype = "x".join(map(str, self.shape)), oracle.dtype_name(self.dtype)
        return f"{self.form} {dtype} {self.layout} {size} {'train' if self.training else 'eval'}"

    @property
    def elements(self) -> int:
        """Of one tensor."""
        return torch.Size(self.shape).numel()


def make(kind: Kind, device: torch.device, seed: int = 0) -> oracle.Case:
    """A case of normal input with means and deviations that differ from channel to channel."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if kind.dtype == torch.float64 else torch.float32
    channels = kind.shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=wide, device=device)

    def full(values: Tensor) -> Tensor:
        return values.to(kind.dtype).contiguous(memory_format=LAYOUTS[kind.layout])

    def branch(eps: float, momentum: float) -> oracle.Branch:
        column = (1, channels, 1, 1)
        x = full(normal(*kind.shape) * (0.5 + normal(*column).abs()) + normal(*column))
        affine = 1 + 0.5 * normal(channels), normal(channels)
        return oracle.Branch(x, *affine, normal(channels), 0.5 + normal(channels).abs(), momentum, eps)

    branches = [branch(1e-5, 0.1), *([branch(1e-3, 0.3)] if "dual" in kind.form else [])]
    residual = full(normal(*kind.shape)) if "add" in kind.form else None
    grad_output = full(normal(*kind.shape))
    if kind.form == "add_relu":
        branches = [oracle.Branch(branches[0].input, None, None, None, None)]
    return oracle.Case(branches, residual, grad_output, kind.training, "relu" in kind.form)


def fused(kind: Kind, case: oracle.Case) -> dict[str, Tensor]:
    """Our output, running statistics and gradients."""
    case = oracle.owned(case)
    return oracle.collect(case, _fused_output(kind, case))


def _fused_output(kind: Kind, case: oracle.Case) -> Tensor:
    if kind.form == "add_relu":
        return functional.add_relu(case.branches[0].input, case.residual)
    return oracle.functional_output(case)


def unfused(kind: Kind, case: oracle.Case) -> dict[str, Tensor]:
    """torch's."""
    case = oracle.owned(case)
    output = linear(kind, case)
    return oracle.collect(case, F.relu(output) if case.relu else output)


def linear(kind: Kind, case: oracle.Case) -> Tensor:
    """torch's output before the ReLU."""
    if kind.form == "add_relu":
        return case.branches[0].input + case.residual
    return oracle.unfused_output(case)


def wide(case: oracle.Case) -> oracle.Case:
    """The case in float64."""
    return oracle.like(case, Tensor.double)


def scales(kind: Kind, case: oracle.Case) -> dict[str, float]:
    """The largest terms that results are added up from, as :func:`oracle.scales` derives them.

    That is for a reference of more digits than float64 has. Here float64 is judged by float64, which is as far off.
    """
    if kind.form == "add_relu":
        return {"output": max(float(t.abs().max()) for t in (case.branches[0].input, case.residual))}
    factor = 2 if kind.dtype == torch.float64 else 1
    return {name: factor * scale for name, scale in oracle.scales(case).items()}
