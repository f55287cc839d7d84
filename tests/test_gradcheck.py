"""Numerical derivatives, first and second, of every operator in float64."""

import dataclasses
import functools

import oracle
import pytest
import torch
from oracle import OPS
from torch.autograd import gradcheck, gradgradcheck

from resnet_fused import functional

# Two values a channel would make the gradient vanish; three channels of six keep the finite differences cheap.
SHAPE = (2, 3, 3, 1)
LAYOUTS = ("contiguous", "channels_last")


def _leaves(device, layout, affine=True, residual=False, branches=1):
    """Input, weight, bias of each branch and the residual, as leaves."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    leaves = []
    for _ in range(branches):
        leaves.append(oracle.LAYOUTS[layout](normal(*SHAPE)))
        leaves += [normal(SHAPE[1]) + 1, normal(SHAPE[1])] if affine else [None, None]
    if residual:
        leaves.append(oracle.LAYOUTS[layout](normal(*SHAPE)))
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves]


def _away_from_the_kink(function, leaves):
    """The function without the elements whose finite difference could cross the ReLU's kink."""
    with torch.no_grad():
        output = function(*leaves)
    # The perturbation is 1e-6, and no derivative here comes near 1e3. An element that is zero is taken to be far
    # below the kink: one that is not makes the check fail.
    counted = (output >= 1e-3) | (output <= 0)

    def selected(*arguments):
        return function(*arguments)[counted]

    return selected


def _check(function, leaves):
    """gradcheck and gradgradcheck over the leaves that are there."""
    present = [i for i, leaf in enumerate(leaves) if leaf is not None]

    def of_present(*given):
        arguments = list(leaves)
        for i, leaf in zip(present, given, strict=True):
            arguments[i] = leaf
        return function(*arguments)

    given = [leaves[i] for i in present]
    checked = _away_from_the_kink(of_present, given)
    assert gradcheck(checked, given)
    assert gradgradcheck(checked, given)


def _running(device):
    return torch.tensor([0.1, -0.2, 0.3], device=device).double(), torch.tensor([0.5, 1.0, 2.0], device=device).double()


@pytest.mark.parametrize("route", ["functional", "operator"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_add_relu(training, affine, residual, relu, layout, route, device):
    mean, var = _running(device)

    def function(input, weight, bias, *rest):
        added = rest[0] if rest else None
        if route == "functional":
            statistics = (None, None) if training else (mean, var)
            return functional.batch_norm_add_relu(input, *statistics, weight, bias, added, training, relu=relu)
        if training:
            return OPS.batch_norm_add_relu_train(input, weight, bias, added, 1e-5, relu, True)[0]
        return OPS.batch_norm_add_relu_eval(input, weight, bias, added, mean, var, 1e-5, relu, True)[0]

    _check(function, _leaves(device, layout, affine, residual))


@pytest.mark.parametrize("route", ["functional", "operator"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dual_batch_norm_add_relu(training, affine, relu, layout, route, device):
    mean, var = _running(device)

    def function(input, weight, bias, input2, weight2, bias2):
        first, second = (input, weight, bias), (input2, weight2, bias2)
        if route == "functional":
            a, b = ((None, None), (None, None)) if training else ((mean, var), (var, var))
            return functional.dual_batch_norm_add_relu(
                input, *a, weight, bias, input2, *b, weight2, bias2, training, relu=relu
            )
        if training:
            return OPS.dual_batch_norm_add_relu_train(*first, *second, 1e-5, 1e-5, relu, True)[0]
        return OPS.dual_batch_norm_add_relu_eval(*first, mean, var, *second, var, var, 1e-5, 1e-5, relu, True)[0]

    _check(function, _leaves(device, layout, affine, branches=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_relu(layout, device):
    input, _, _, residual = _leaves(device, layout, False, True)
    for op in (functional.add_relu, lambda a, b: OPS.add_relu(a, b, True)[0]):
        _check(op, [input, residual])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_apply(affine, residual, relu, layout, device):
    """Statistics are inputs here, and have gradients."""
    mean, var = _running(device)
    leaves = _leaves(device, layout, affine, residual)
    statistics = [mean.requires_grad_(), var.requires_grad_()]

    def function(mean, invstd, input, weight, bias, *rest):
        return OPS.batch_norm_add_relu_apply(input, weight, bias, rest[0] if rest else None, mean, invstd, relu, True)[
            0
        ]

    _check(function, statistics + leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics(layout, device):
    (input, _, _) = _leaves(device, layout, affine=False)
    assert gradcheck(OPS.batch_norm_statistics, [input])
    assert gradgradcheck(OPS.batch_norm_statistics, [input])


def test_statistics_and_apply_make_the_training_operator(device):
    """Through the pieces the gradient follows from the chain rule; the operator's own formula gives the same."""
    input, weight, bias, residual = _leaves(device, "contiguous", True, True)
    grad_output = torch.randn_like(residual)
    mean, var = OPS.batch_norm_statistics(input)
    pieces = OPS.batch_norm_add_relu_apply(input, weight, bias, residual, mean, (var + 1e-5).rsqrt(), True, True)[0]
    whole = OPS.batch_norm_add_relu_train(input, weight, bias, residual, 1e-5, True, True)[0]
    leaves = (input, weight, bias, residual)
    for ours, expected in zip(
        torch.autograd.grad(pieces, leaves, grad_output), torch.autograd.grad(whole, leaves, grad_output), strict=True
    ):
        # Float64 of a dozen operations on numbers of the order of one to ten.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


# The backward operators themselves, without a mask's kink: their first derivatives.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [True, False])
def test_training_backward_operator(relu, layout, device):
    input, weight, bias, residual = _leaves(device, layout, True, True)
    with torch.no_grad():
        _, mean, _, invstd, mask = OPS.batch_norm_add_relu_train(input, weight, bias, residual, 1e-5, relu, True)
    grad_output = torch.randn_like(input).requires_grad_()
    mask = mask if relu else None

    def function(grad_output, input, weight, mean, invstd):
        return OPS.batch_norm_add_relu_train_backward(
            grad_output, input, weight, bias, mean, invstd, mask, relu, True, True, True, True
        )

    assert gradcheck(function, [grad_output, input, weight, mean.requires_grad_(), invstd.requires_grad_()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_backward_operator(layout, device):
    input, weight, bias, residual = _leaves(device, layout, True, True)
    mean, var = _running(device)
    with torch.no_grad():
        mask = OPS.batch_norm_add_relu_eval(input, weight, bias, residual, mean, var, 1e-5, True, True)[1]
    grad_output = torch.randn_like(input).requires_grad_()

    def function(grad_output, input, weight):
        return OPS.batch_norm_add_relu_eval_backward(
            grad_output, input, weight, bias, mean, var, mask, 1e-5, True, True, True, True, True
        )

    assert gradcheck(function, [grad_output, input, weight])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dual_backward_operators(training, device):
    input, weight, bias, input2, weight2, bias2 = _leaves(device, "contiguous", branches=2)
    mean, var = _running(device)
    first, second = (input, weight, bias), (input2, weight2, bias2)
    with torch.no_grad():
        if training:
            _, mean, _, invstd, mean2, _, invstd2, mask = OPS.dual_batch_norm_add_relu_train(
                *first, *second, 1e-5, 1e-5, True, True
            )
        else:
            mask = OPS.dual_batch_norm_add_relu_eval(*first, mean, var, *second, var, var, 1e-5, 1e-5, True, True)[1]
    grad_output = torch.randn_like(input).requires_grad_()

    def function(grad_output, input, weight, input2, weight2):
        if training:
            return OPS.dual_batch_norm_add_relu_train_backward(
                grad_output, input, weight, mean, invstd, input2, weight2, mean2, invstd2, mask, True, *[True] * 6
            )
        return OPS.dual_batch_norm_add_relu_eval_backward(
            grad_output, input, weight, mean, var, input2, weight2, var, var, mask, 1e-5, 1e-5, True, *[True] * 6
        )

    assert gradcheck(function, [grad_output, input, weight, input2, weight2])


def test_add_relu_backward_operator(device):
    mask = OPS.add_relu(torch.randn(3, 7, device=device), torch.randn(3, 7, device=device), True)[1]
    grad_output = torch.randn(3, 7, device=device, dtype=torch.float64, requires_grad=True)
    assert gradcheck(functools.partial(OPS.add_relu_backward, mask=mask), [grad_output])


@pytest.mark.parametrize("relu", [True, False])
def test_reduce_and_its_apply(relu, device):
    input, weight, bias, residual = _leaves(device, "contiguous", True, True)
    with torch.no_grad():
        _, mean, _, invstd, mask = OPS.batch_norm_add_relu_train(input, weight, bias, residual, 1e-5, relu, True)
    mask = mask if relu else None
    grad_output = torch.randn_like(input).requires_grad_()
    mean, invstd = mean.requires_grad_(), invstd.requires_grad_()

    def reduce(grad_output, input, mean):
        return OPS.batch_norm_add_relu_backward_reduce(grad_output, input, weight, bias, mean, invstd, mask, relu)

    assert gradcheck(reduce, [grad_output, input, mean])
    averages = [torch.randn_like(mean).requires_grad_() for _ in range(2)]

    def apply(grad_output, input, weight, mean, invstd, *averages):
        return OPS.batch_norm_add_relu_backward_apply(
            grad_output, input, weight, bias, mean, invstd, mask, *averages, relu, True, True
        )

    assert gradcheck(apply, [grad_output, input, weight, mean, invstd, *averages])


# Use of second derivatives.


@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_penalty(layout, training, form, device):
    """The gradient of a gradient's norm, as a penalty takes it, is that of the unfused operations."""
    case = oracle.away_from_the_kink(oracle.make_case((2, 5, 4, 3), torch.float64, device, form, training, layout))
    results = []
    for compute in (oracle.functional_output, oracle.unfused_result):
        branches = [
            dataclasses.replace(
                b,
                input=b.input.clone().requires_grad_(),
                weight=b.weight.clone().requires_grad_(),
                running_mean=b.running_mean.clone(),
                running_var=b.running_var.clone(),
            )
            for b in case.branches
        ]
        inputs, weights = [b.input for b in branches], [b.weight for b in branches]
        output = compute(dataclasses.replace(case, branches=branches))
        gradients = torch.autograd.grad(output, inputs, case.grad_output, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        # An evaluation's gradient is a constant of its input.
        results.append(torch.autograd.grad(penalty, inputs + weights, materialize_grads=True))
    for ours, theirs in zip(*results, strict=True):
        # Both in float64: products of two derivatives of at most a hundred each, a few hundred of them added.
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_third_derivative(device):
    """torch's own batch norm stops at the second; the formula in elementary operations does not."""
    input = torch.randn(2, 3, 4, device=device, dtype=torch.float64, requires_grad=True)

    def formula(x):
        var, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
        return ((x - mean) / (var + 1e-5).sqrt()).relu()

    orders = []
    for function in (lambda x: functional.batch_norm_add_relu(x, None, None, training=True), formula):
        value = function(input).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, input, create_graph=True)
            value = gradient.pow(2).sum()
        orders.append(gradient)
    # Derivatives of squares of derivatives grow: relative to the largest, float64 leaves ten digits.
    torch.testing.assert_close(*orders, rtol=1e-9, atol=1e-9 * float(orders[1].detach().abs().max()))
