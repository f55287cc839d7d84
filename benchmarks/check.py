"""What must hold before anything is timed: a speedup is never reported on a wrong result."""

import torch
from torch import Tensor, nn


def assert_no_worse(name: str, fused: Tensor, reference: Tensor, eager: Tensor, eager_reference: Tensor) -> None:
    """Asserts that fused is as near to float64 as eager is, but for one ulp of the dtype at the largest value.

    Args:
        name: of the value, for the message.
        fused, eager: results of the two.
        reference, eager_reference: the float64 result that belongs to each.

    Raises:
        AssertionError: it is not.
    """
    error = (fused.double() - reference).abs().max().item()
    allowed = (eager.double() - eager_reference).abs().max().item()
    allowed += torch.finfo(fused.dtype).eps * reference.abs().max().item()
    assert error <= allowed, f"{name}: the error of the fused result is {error:.3e}, allowed are {allowed:.3e}"


def assert_same_training_step(eager: nn.Module, fused: nn.Module, reference: nn.Module, step) -> None:
    """Asserts that a training step of ``fused`` is as near to float64 as one of ``eager``.

    Args:
        eager, fused, reference: the same network with the same weights, the last in float64.
        step: computes the loss of a model and its backward.

    Raises:
        AssertionError: it is not.
    """
    losses = [step(model).item() for model in (eager, fused, reference)]
    vectors = [_gradient(model) for model in (eager, fused, reference)]
    norm = vectors[2].norm().item()
    errors = [(vector - vectors[2]).norm().item() / norm for vector in vectors[:2]]
    # Through many layers the rounding of either, and pixels that cross the ReLU's corner for it, are random: two draws
    # of one size differ by a small factor. A wrong formula is off by the order of 1.
    allowed = 4 * errors[0] + 1e-5
    assert errors[1] <= allowed, f"relative error of the gradient is {errors[1]:.3e}, that of eager {errors[0]:.3e}"
    allowed = 4 * abs(losses[0] - losses[2]) + 1e-5 * max(1.0, abs(losses[2]))
    assert abs(losses[1] - losses[2]) <= allowed, f"losses of eager, fused, float64: {losses}"


def _gradient(model: nn.Module) -> Tensor:
    gradients = [parameter.grad.double().flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients)
