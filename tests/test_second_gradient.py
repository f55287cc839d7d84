"""Backward operators that take the gradient of their output in two parts, and add them as they read them.

``grad_output2`` must give the bits of one gradient that torch added: every element is rounded to its dtype before
anything is made of it.
"""

import oracle
import pytest
import torch
from oracle import OPS

SHAPES = ((2, 17), (2, 65, 7, 7), (8, 17, 1, 1), (3, 8, 16, 16), (2, 7, 33), (0, 3, 4, 4))


def backward(case, *gradients):
    """All gradients of the case from its backward operator, given one gradient of the output or two."""
    a, b = case.branches[0], case.branches[-1]
    _, *results = oracle.operator_results(case)
    mask = results[-1] if case.relu and (case.residual is not None or len(case.branches) == 2) else None
    kind = "train" if case.training else "eval"
    mean, spread = (results[0], results[2]) if case.training else (a.running_mean, a.running_var)
    if len(case.branches) == 1:
        eps = () if case.training else (a.eps,)
        op = getattr(OPS, f"batch_norm_add_relu_{kind}_backward")
        needs = (True, case.residual is not None, True, True)
        arguments = (a.input, a.weight, a.bias, mean, spread, mask, *eps, case.relu, *needs)
    else:
        eps = () if case.training else (a.eps, b.eps)
        op = getattr(OPS, f"dual_batch_norm_add_relu_{kind}_backward")
        mean2, spread2 = (results[3], results[5]) if case.training else (b.running_mean, b.running_var)
        arguments = (a.input, a.weight, mean, spread, b.input, b.weight, mean2, spread2)
        arguments += (mask, *eps, case.relu, *[True] * 6)
    return op(gradients[0], *arguments, *gradients[1:])


def second_of(case, like):
    generator = torch.Generator().manual_seed(11)
    return torch.randn(case.grad_output.shape, generator=generator, dtype=torch.float64).to(like)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_gradients_give_the_bits_of_their_sum(shape, dtype, form, training, layout, device):
    case = oracle.make_case(shape, dtype, device, form, training, layout)
    second = second_of(case, case.grad_output)
    ours = backward(case, case.grad_output, second)
    theirs = backward(case, case.grad_output + second)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)


def test_a_large_tensor(device, backend_name):
    """Pieces of planes and rows that threads share, stores past the caches."""
    shape = (2, 8, 192, 200) if backend_name == "compiled" else (2, 8, 40, 48)
    for layout in ("contiguous", "channels_last"):
        case = oracle.make_case(shape, torch.float32, device, "dual_relu", layout=layout)
        second = second_of(case, case.grad_output)
        results = zip(backward(case, case.grad_output, second), backward(case, case.grad_output + second), strict=True)
        assert all(torch.equal(mine, its) for mine, its in results)


@pytest.mark.parametrize("layout", sorted(oracle.LAYOUTS))
def test_layouts_of_the_second_gradient(layout, device):
    case = oracle.make_case((2, 17, 5, 3), torch.float32, device)
    second = oracle.LAYOUTS[layout](second_of(case, case.grad_output))
    for mine, its in zip(
        backward(case, case.grad_output, second), backward(case, case.grad_output + second), strict=True
    ):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("dtype", oracle.HALVES, ids=oracle.dtype_name)
def test_the_sum_is_rounded(dtype, device):
    """1 + 2^-12 is 1 in 16 bits: a sum that stays in float32 would show in the residual's gradient of the next add."""
    case = oracle.make_case((2, 8, 4, 4), dtype, device, "bn_add")
    ones = torch.ones_like(case.grad_output)
    _, grad_residual, _, grad_bias = backward(case, ones, ones * 2**-12)
    assert torch.equal(grad_residual, ones)
    assert torch.equal(grad_bias, torch.full_like(grad_bias, 32))


def test_infinities_and_nan(device):
    case = oracle.make_case((2, 8, 4, 4), torch.float32, device, "bn_add")
    first, second = case.grad_output.clone(), second_of(case, case.grad_output)
    first[0, 0, 0, 0], second[0, 0, 0, 0] = float("inf"), -float("inf")
    first[1, 3, 2, 2], second[0, 5, 1, 1] = float("nan"), float("inf")
    for mine, its in zip(backward(case, first, second), backward(case, first + second), strict=True):
        assert torch.equal(mine.isnan(), its.isnan())
        assert torch.equal(mine.nan_to_num(), its.nan_to_num())


@pytest.mark.parametrize("form", ["bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_opcheck(training, form, device):
    case = oracle.make_case((2, 9, 3, 5), torch.float32, device, form, training)
    second = second_of(case, case.grad_output)
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "resnet_fused" and func._opname.endswith("_backward"):
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        backward(case, case.grad_output, second)
    ((op, arguments),) = seen
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_differentiable_in_both(relu, device):
    case = oracle.make_case((2, 3, 2, 2), torch.float64, device, "bn_add_relu" if relu else "bn_add")
    first = case.grad_output.clone().requires_grad_()
    second = second_of(case, case.grad_output).requires_grad_()
    assert torch.autograd.gradcheck(lambda *gradients: backward(case, *gradients), [first, second])


@pytest.mark.parametrize("form", ["bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("fake", [False, True], ids=["kernel", "fake"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_refusals(training, fake, form, device):
    case = oracle.make_case((2, 3, 4, 4), torch.float32, device, form, training)
    if fake:
        case = oracle.like(case, lambda tensor: tensor.to("meta"))
    for wrong in (case.grad_output[:1], case.grad_output.double(), case.grad_output[..., :2]):
        with pytest.raises(RuntimeError, match="grad_output2"):
            backward(case, case.grad_output, wrong)
