"""How much the results of two runs of a network may differ, and whether they do."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# The largest difference of outputs and statistics, and of gradients, in units of the largest magnitude of that tensor.
#
# Two correct forwards differ by some 10 eps a layer, and by sqrt(100) times that after 100 layers, whose errors have
# random signs: 100 eps. BatchNorms, which divide by the spread of an example's few values, make up to 1000 of each.
# float64: 100 eps * 1000 is 2e-11. A wrong eps, momentum or operand changes 1e-7 and more. That a ReLU lets a gradient
# through in one run alone takes an input as near to zero as the error: one activation in 1e10.
# float32: 100 eps is 1e-5, and 10 times that is allowed; where an example amplifies more, Tolerance.scale helps. Up to
# N * 1e-4 of N activations change sides at a ReLU, and a gradient, a sum of N terms with random signs and so of size
# sqrt(N), changes by sqrt(N * 1e-4): a relative sqrt(1e-4).
# float16, bfloat16: every layer rounds to eps, 1e-3 and 8e-3, in both runs, and 10 eps are what 100 layers make of it
# (in bfloat16 nearly anything would pass). For gradients about the square root.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-2),
    torch.float16: (1e-2, 1e-1),
    torch.bfloat16: (8e-2, 3e-1),
}
# A tensor that is zero but for rounding, such as a mean of what was normalized, has the rounding of what it was made
# of: a sum of 1e6 terms is off by sqrt(1e6) eps of the largest value in the run, some four times that.
_ROUNDING = 4096


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What may differ in a run.

    Attributes:
        dtype: that of the run.
        largest: the largest magnitude in it.
        gradients: whether this is about them.
        scale: how many times the usual difference is right for this example.
    """

    dtype: torch.dtype
    largest: float
    gradients: bool = False
    scale: float = 1.0

    def ratio(self, difference: float, size: float) -> float:
        """A difference, in units of the largest allowed one for a tensor with values up to ``size``."""
        relative = _TOLERANCES[self.dtype][self.gradients]
        allowed = max(relative * size, min(relative, _ROUNDING * _eps(self.dtype)) * self.largest)
        return difference / (allowed * self.scale)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two tensors differ by, in units of what is allowed, and in words."""

    ratio: float
    how: str


def coarsest(dtypes) -> torch.dtype:
    """That of the known floating dtypes with the largest eps; float64 where there is none."""
    return max((dtype for dtype in dtypes if dtype in _TOLERANCES), key=_eps, default=torch.float64)


def tensors_of(value) -> list[Tensor]:
    """All tensors in nested containers, dataclasses and mappings, in their order."""
    found = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_of([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += tensors_of(list(leaf.values()))
        elif isinstance(leaf, list | tuple):
            # A subclass, which pytree does not know.
            found += tensors_of(list(leaf))
    return found


def magnitude(tensor: Tensor) -> float:
    """The largest absolute value among the finite ones."""
    values = _comparable(tensor)
    largest = _largest(values)
    return largest if math.isfinite(largest) else _largest(values[values.isfinite()])


def compared(expected: Sequence[Tensor | None], actual: Sequence[Tensor | None], tolerance: Tolerance) -> Comparison:
    """The pair that differs most; infinitely where shapes, dtypes, devices or the places of NaN and infinity do."""
    if len(expected) != len(actual):
        return Comparison(math.inf, f"has {len(actual)} tensors, and had {len(expected)},")
    pairs = [_pair(*pair, tolerance) for pair in zip(expected, actual, strict=True)]
    return max(pairs, key=lambda pair: pair.ratio, default=Comparison(0.0, "agrees"))


def _pair(expected: Tensor | None, actual: Tensor | None, tolerance: Tolerance) -> Comparison:
    if expected is None or actual is None:
        same = expected is actual
        return Comparison(0.0 if same else math.inf, f"is {'there' if expected is None else 'missing'}")
    for name in ("shape", "dtype", "device"):
        before, after = getattr(expected, name), getattr(actual, name)
        if before != after:
            return Comparison(math.inf, f"has {name} {after}, and had {before},")
    exact = not (expected.is_floating_point() or expected.is_complex())
    expected, actual = _comparable(expected), _comparable(actual)
    difference = _largest(expected - actual)
    if not math.isfinite(difference):
        finite = expected.isfinite() & actual.isfinite()
        # NaN equals nothing: it is made a value as infinities are.
        if not torch.equal(expected[~finite].nan_to_num(nan=0.5), actual[~finite].nan_to_num(nan=0.5)):
            return Comparison(math.inf, "has NaN or infinity in other places")
        difference = _largest(expected[finite] - actual[finite])
    if not difference:
        return Comparison(0.0, "agrees")
    size = magnitude(expected)
    ratio = math.inf if exact else tolerance.ratio(difference, size)
    return Comparison(ratio, f"differs by {difference:.3g}, with values up to {size:.3g},")


def _largest(values: Tensor) -> float:
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item()) if low == low else math.nan


def _comparable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # Without float64, as on MPS, float32 holds what is of such devices exactly.
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
