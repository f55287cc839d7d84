"""What the operators refuse, in the words of ``csrc/checks.h``: run by the fake kernels and before the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_DIMS = 64  # as in csrc/layout.h


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(condition, message) -> None:
    if condition is not True:  # what is symbolic, too; the call alone takes longer than most conditions
        torch._check(condition, message)


def tensor(input: Tensor, name: str) -> None:
    """``input`` has a dtype and a number of dimensions that the operators know."""
    _check(
        input.dtype in DTYPES,
        lambda: f"{name} must be float64, float32, bfloat16 or float16, got {_name(input.dtype)}",
    )
    _check(input.dim() <= MAX_DIMS, lambda: f"{name} must have at most {MAX_DIMS} dimensions, got {input.dim()}")


def input_tensor(input: Tensor, name: str = "input") -> None:
    """``input`` is (N, C, *) of a dtype that the operators know."""
    tensor(input, name)
    _check(
        input.dim() >= 2,
        lambda: f"{name} must have at least 2 dimensions (N, C, ...), got shape {list(input.shape)}",
    )


def same_shape(other: Tensor | None, name: str, input: Tensor) -> None:
    """``other`` matches ``input`` in shape, dtype and device."""
    if other is None:
        return
    _check(
        tuple(other.shape) == tuple(input.shape),
        lambda: f"{name} must have the shape of input, got {list(other.shape)} and {list(input.shape)}",
    )
    _check(
        other.dtype == input.dtype,
        lambda: f"{name} must have the dtype of input, got {_name(other.dtype)} and {_name(input.dtype)}",
    )
    same_device(other, name, input)


def same_device(other: Tensor, name: str, input: Tensor) -> None:
    """``other`` is where ``input`` is."""
    if other.device != input.device:  # not torch._check, whose message Dynamo does not trace
        raise RuntimeError(f"{name} must be on the device of input, got {other.device} and {input.device}")


def per_channel(vector: Tensor | None, name: str, input: Tensor) -> None:
    """``vector`` is (C,) and of the dtype of ``input`` or of its statistics."""
    if vector is None:
        return
    _check(
        vector.dim() == 1 and vector.shape[0] == input.shape[1],
        lambda: f"{name} must have shape [{input.shape[1]}], one value a channel of input, got {list(vector.shape)}",
    )
    statistics = layout.statistics_dtype(input.dtype)
    _check(
        vector.dtype == input.dtype or vector.dtype == statistics,
        lambda: f"{name} must be {_name(input.dtype)} or {_name(statistics)} for {_name(input.dtype)} input, "
        f"got {_name(vector.dtype)}",
    )
    same_device(vector, name, input)


def one_dtype(*vectors: Tensor | None) -> None:
    """The vectors of one normalization have one dtype, as torch wants it."""
    dtypes = [vector.dtype for vector in vectors if vector is not None]
    for dtype in dtypes[1:]:
        _check(
            dtype == dtypes[0],
            lambda: f"weight, bias and running statistics must have one dtype, got {_name(dtypes[0])} and "
            f"{_name(dtype)}",  # noqa: B023  (called at once)
        )


def running_update(running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor) -> None:
    """The running statistics are floating-point vectors as long as the batch's, and where those are."""
    _check(
        mean.dim() == 1 and mean.shape == var.shape,
        lambda: f"mean and var must be (C,) vectors, got {list(mean.shape)} and {list(var.shape)}",
    )
    same_device(var, "var", mean)
    for vector, name in ((mean, "mean"), (var, "var"), (running_mean, "running_mean"), (running_var, "running_var")):
        if vector is None:
            continue
        _check(
            vector.dtype in DTYPES,
            lambda vector=vector, name=name: (
                f"{name} must be float64, float32, bfloat16 or float16, got {_name(vector.dtype)}"
            ),
        )
        _check(
            vector.shape == mean.shape,
            lambda vector=vector, name=name: (
                f"{name} must have shape [{mean.shape[0]}], one value a channel of input, got {list(vector.shape)}"
            ),
        )
        same_device(vector, name, mean)


def more_than_one_value(input: Tensor) -> None:
    """torch makes no statistics of one value a channel, nor, with a weight, of no channels."""
    _check(
        input.numel() != input.shape[1],
        lambda: f"Expected more than 1 value per channel when training, got input size {list(input.shape)}",
    )


def mask(mask: Tensor | None, shape: tuple[int, int]) -> None:
    """``mask`` is packed bits of that shape, or none."""
    if mask is None:
        return
    _check(
        mask.dtype == torch.uint8 and tuple(mask.shape) == tuple(shape),
        lambda: f"mask must be uint8 of shape {list(shape)}, got {_name(mask.dtype)} of shape {list(mask.shape)}",
    )


def batch_norm(input, weight=None, bias=None, residual=None) -> None:
    """Everything that the operators ask of one normalized branch."""
    input_tensor(input)
    per_channel(weight, "weight", input)
    per_channel(bias, "bias", input)
    same_shape(residual, "residual", input)


def promotes(other: Tensor, name: str, input: Tensor, relu: bool) -> None:
    """``other``, of another dtype than ``input``, can be added to it, and the ReLU of the sum taken."""
    try:
        dtype = torch.promote_types(input.dtype, other.dtype)
    except RuntimeError as error:
        raise RuntimeError(f"{name} cannot be added to input: {error}") from None
    if relu and dtype.is_complex and not input.is_complex():
        raise NotImplementedError(f"{name} is {_name(other.dtype)}, and there is no ReLU of a complex number")


def unfused_batch_norm(input, running_mean, running_var, weight, bias, suffix: str = "") -> None:
    """Refuses, by name, what ``F.batch_norm`` refuses namelessly or after it wrote running statistics.

    What passes here torch may still refuse, before it writes.
    """
    if not isinstance(input, Tensor) or input.dim() < 2:
        return
    on_cpu = input.device.type == "cpu"
    if on_cpu and input.dtype not in DTYPES:
        raise NotImplementedError(
            f"input{suffix} must be float64, float32, bfloat16 or float16, got {_name(input.dtype)}"
        )
    allowed = (input.dtype,) if input.dtype == torch.float64 else (input.dtype, torch.float32)
    first = None
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            continue
        same_device(vector, name + suffix, input)
        if vector.requires_grad and name.startswith("running") and torch.is_grad_enabled():
            raise RuntimeError(f"{name}{suffix} must not require a gradient: batch_norm is not differentiable in it")
        if vector.numel() != input.shape[1]:
            raise RuntimeError(
                f"{name}{suffix} must have shape [{input.shape[1]}], one value a channel of input{suffix}, "
                f"got {list(vector.shape)}"
            )
        if not on_cpu:
            continue  # which dtypes go together is each device's own affair
        if vector.dtype not in allowed:
            raise RuntimeError(
                f"{name}{suffix} must be {' or '.join(dict.fromkeys(map(_name, allowed)))} for "
                f"{_name(input.dtype)} input{suffix}, got {_name(vector.dtype)}"
            )
        if first is None:
            first = name, vector.dtype
        elif vector.dtype != first[1]:
            raise RuntimeError(
                f"{name}{suffix} must have the dtype of {first[0]}{suffix}, "
                f"got {_name(vector.dtype)} and {_name(first[1])}"
            )


def unfused_batch_norm_options(running_mean, running_var, weight, bias, training, momentum, eps) -> None:
    """Has torch refuse what does not hang on the data, on a batch of its own: nothing of the caller's is written."""

    def one_channel(vector):
        return torch.ones(1) if isinstance(vector, Tensor) else vector

    vectors = map(one_channel, (running_mean, running_var, weight, bias))
    F.batch_norm(torch.zeros(2, 1), *vectors, training, momentum, eps)
