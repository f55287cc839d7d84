"""Gradients of every operator: values, which of them come back, what passes the ReLU."""

import dataclasses
import itertools

import oracle
import pytest
import torch
from oracle import OPS

from resnet_fused import functional
from resnet_fused.ops import layout as memory

DIRECT_SHAPES = ((2, 17), (2, 7, 33), (2, 65, 7, 7), (8, 17, 1, 1), (2, 7, 2, 3, 3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize(("shape", "dtype"), oracle.GRID, ids=oracle.dtype_name)
def test_gradients(shape, dtype, form, training, layout, device):
    oracle.check(oracle.make_case(shape, dtype, device, form, training, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("shape", DIRECT_SHAPES, ids=str)
def test_operators_differentiate_on_their_own(shape, form, training, layout, device):
    """torch.ops.resnet_fused gives what the functional form gives, to the bit."""
    case = oracle.make_case(shape, torch.float32, device, form, training, layout)
    direct, functional_results = oracle.fused(case, "operator"), oracle.fused(case)
    for name, value in functional_results.items():
        assert torch.equal(direct[name], value), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["bn", "bn_relu", "bn_add", "bn_add_relu"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
def test_pieces_of_a_synchronized_step(dtype, form, layout, device):
    """Statistics, apply, sums and the backward's apply, put together as one process of SyncBatchNorm does."""
    case = oracle.make_case((2, 17, 5, 3), dtype, device, form, layout=layout)
    case = oracle.away_from_the_kink(case)
    branch, relu = case.branches[0], case.relu
    mean, var = OPS.batch_norm_statistics(branch.input)
    invstd = (var + branch.eps).rsqrt()
    common = (branch.input, branch.weight, branch.bias)
    output, mask = OPS.batch_norm_add_relu_apply(*common, case.residual, mean, invstd, relu, True)
    mask = mask if relu and case.residual is not None else None
    sums = OPS.batch_norm_add_relu_backward_reduce(case.grad_output, *common, mean, invstd, mask, relu)
    sum_grad, sum_grad_xmu = sums
    count = output.numel() // output.shape[1]
    grad_input, grad_residual = OPS.batch_norm_add_relu_backward_apply(
        case.grad_output, *common, mean, invstd, mask, sum_grad / count, sum_grad_xmu / count, relu, True, True
    )
    theirs, reference = oracle.unfused(case), oracle.exact(case)
    ours = {
        "output": output,
        "grad_input": grad_input,
        "grad_bias": sum_grad.to(branch.bias.dtype),
        # The product is not the operator's: it is taken without a rounding of its own.
        "grad_weight": (sum_grad_xmu.double() * invstd.double()).to(branch.weight.dtype),
    }
    if case.residual is not None:
        ours["grad_residual"] = grad_residual
    larger = oracle.scales(case)
    for name, value in ours.items():
        oracle.assert_as_accurate(value, theirs[name], reference[name], name, larger.get(name, 0.0))


# What is asked for.


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_the_gradients_asked_for(training, relu, wanted, device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, "bn_add_relu", training)
    case = dataclasses.replace(case, relu=relu)
    every = oracle.fused(case)
    branch = case.branches[0]
    leaves = [branch.input, branch.weight, branch.bias, case.residual]
    leaves = [leaf.clone().requires_grad_(w) for leaf, w in zip(leaves, wanted, strict=True)]
    input, weight, bias, residual = leaves
    output = functional.batch_norm_add_relu(
        input, branch.running_mean, branch.running_var, weight, bias, residual, training, relu=relu
    )
    assert output.requires_grad == any(wanted)
    if not any(wanted):
        return
    output.backward(case.grad_output)
    for leaf, asked, name in zip(leaves, wanted, ("input", "weight", "bias", "residual"), strict=True):
        assert (leaf.grad is not None) == asked, name
        if asked:
            assert torch.equal(leaf.grad, every[f"grad_{name}"]), name


@pytest.mark.parametrize("wanted", range(6))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_the_gradient_asked_for_of_two_branches(training, wanted, device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, "dual_relu", training)
    every = oracle.fused(case)
    names = [name + suffix for suffix in ("", "2") for name in ("input", "weight", "bias")]
    leaves = [getattr(b, name).clone() for b in case.branches for name in ("input", "weight", "bias")]
    leaves[wanted].requires_grad_()
    branches = [
        dataclasses.replace(b, input=i, weight=w, bias=s)
        for b, i, w, s in zip(case.branches, leaves[0::3], leaves[1::3], leaves[2::3], strict=True)
    ]
    output = oracle.functional_output(dataclasses.replace(case, branches=branches))
    output.backward(case.grad_output)
    for position, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
        if position == wanted:
            assert torch.equal(leaf.grad, every[f"grad_{name}"]), name
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("asked", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_operators_leave_out_what_is_not_asked_for(training, asked, device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, "bn_add_relu", training)
    b = case.branches[0]
    _, *statistics, mask = oracle.operator_results(case)
    if training:
        common = (case.grad_output, b.input, b.weight, b.bias, statistics[0], statistics[2], mask, True)
        op = OPS.batch_norm_add_relu_train_backward
    else:
        common = (case.grad_output, b.input, b.weight, b.bias, b.running_mean, b.running_var, mask, b.eps, True)
        op = OPS.batch_norm_add_relu_eval_backward
    every = op(*common, True, True, True, True)
    some = op(*common, *asked)
    for value, full, wanted in zip(some, every, asked, strict=True):
        if wanted:
            assert torch.equal(value, full)
        else:
            assert value.shape == (0,)


# The ReLU's mask.


def _passes(output):
    """Where torch's ReLU lets a gradient pass: not "y > 0", for NaN passes it too."""
    return ~(output <= 0)


@pytest.mark.parametrize("layout", sorted(oracle.LAYOUTS))
@pytest.mark.parametrize("form", ["bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mask_has_a_bit_for_every_positive_output(training, form, layout, device):
    for shape in ((2, 17, 5, 3), (3, 9, 1, 1), (2, 8, 4, 8), (2, 5), (1, 1, 3, 3)):
        if layout.startswith("expanded") and training and form == "dual_relu":
            continue  # constant channels: every output is exactly the biases' sum
        case = oracle.make_case(shape, torch.float32, device, form, training, layout, residual_layout="contiguous")
        output, *_, mask = oracle.operator_results(case)
        assert mask.shape == memory.mask_shape(case.branches[0].input)
        inner = shape[1] if memory.channels_innermost(case.branches[0].input) else output[0, 0].numel()
        assert torch.equal(memory.unpack(mask, inner), _passes(memory.rows(output)))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 17, 7, 7), (64, 5)], ids=str)
def test_gradient_passes_exactly_where_the_output_is_positive(shape, layout, training, dtype, device):
    """With a residual its gradient is the mask; without, the bias's gradient of ones counts the elements that pass."""
    case = oracle.make_case(shape, dtype, device, "bn_add_relu", training, layout)
    ours = oracle.fused(case)
    assert torch.equal(ours["grad_residual"], case.grad_output.where(_passes(ours["output"]), 0))

    case = oracle.make_case(shape, dtype, device, "bn_relu", training, layout)
    case = dataclasses.replace(case, grad_output=torch.ones_like(case.grad_output))
    ours = oracle.fused(case)
    passed = _passes(ours["output"])
    counts = passed.sum([d for d in range(len(shape)) if d != 1])
    assert torch.equal(ours["grad_bias"], counts.to(ours["grad_bias"].dtype))
    if not training:
        assert torch.equal(ours["grad_input"] != 0, passed)


@pytest.mark.parametrize("form", ["bn_relu", "bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_gradient_passes_an_output_of_exactly_zero(layout, training, form, device):
    """A weight that starts at zero, as in a block's last normalization, leaves exactly the residual."""
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, form, training, layout)
    for branch in case.branches:
        branch.weight.zero_()
        branch.bias.zero_()
    if case.residual is not None:
        case.residual[:, ::2] = 0
    ours, theirs = oracle.fused(case), oracle.unfused(case)
    assert (ours["output"] == 0).any()
    for name in ("grad_bias", "grad_residual"):
        if name in ours:
            assert torch.equal(ours[name] == 0, theirs[name] == 0), name
    if form != "bn_add_relu":
        for name in ("output", "grad_input", "grad_weight", "grad_bias"):
            assert not ours[name].any(), name
    oracle.check(case)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
@pytest.mark.parametrize("shape", [(7,), (2, 17, 5, 3), (3, 8, 4), (0, 3), (2, 3, 2, 3, 2)], ids=str)
def test_add_relu_gradients(shape, dtype, device):
    input, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    grad_output = torch.randn(shape, device=device).to(dtype)
    output = functional.add_relu(input, residual)
    output.backward(grad_output)
    expected = grad_output.where(_passes(output), 0)
    assert torch.equal(input.grad, expected)
    assert torch.equal(residual.grad, expected)


def test_add_relu_gradient_of_one_operand(device):
    for position in range(2):
        operands = [torch.randn(2, 3, device=device) for _ in range(2)]
        operands[position].requires_grad_()
        output = functional.add_relu(*operands)
        output.sum().backward()
        assert torch.equal(operands[position].grad, (output > 0).float())
        assert operands[1 - position].grad is None


# Graphs.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_two_forwards_before_one_backward(training, device):
    """What a backward needs belongs to its own call, not to the module's buffers."""
    cases = [oracle.make_case((2, 9, 5, 3), torch.float32, device, training=training, seed=seed) for seed in (0, 5)]
    expected = [oracle.fused(case) for case in cases]
    inputs, outputs = [], []
    for case in cases:
        b = case.branches[0]
        inputs.append(b.input.clone().requires_grad_())
        # In evaluation the statistics must not change between a forward and its backward, as in torch.
        mean, var = b.running_mean.clone(), b.running_var.clone()
        outputs.append(functional.batch_norm_add_relu(inputs[-1], mean, var, b.weight, b.bias, case.residual, training))
    torch.autograd.backward(outputs, [case.grad_output for case in cases])
    for input, results in zip(inputs, expected, strict=True):
        assert torch.equal(input.grad, results["grad_input"])


def test_running_statistics_shared_by_two_forwards(device):
    """A module called twice before the backward: the second call's update must not reach the first call's gradient."""
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)
    b = case.branches[0]
    mean, var = b.running_mean.clone(), b.running_var.clone()
    expected = oracle.fused(case)["grad_input"]
    input = b.input.clone().requires_grad_()
    first = functional.batch_norm_add_relu(input, mean, var, b.weight, b.bias, case.residual, True)
    functional.batch_norm_add_relu(torch.randn_like(input) + 9, mean, var, b.weight, b.bias, case.residual, True)
    first.backward(case.grad_output)
    assert torch.equal(input.grad, expected)


def test_second_backward_of_a_retained_graph(device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)
    b = case.branches[0]
    input = b.input.clone().requires_grad_()
    output = functional.batch_norm_add_relu(input, None, None, b.weight, b.bias, case.residual, True)
    (first,) = torch.autograd.grad(output, input, case.grad_output, retain_graph=True)
    (second,) = torch.autograd.grad(output, input, case.grad_output)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, input, case.grad_output)


def test_tensors_that_are_no_leaves(device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)
    b = case.branches[0]
    expected = oracle.fused(case)
    leaves = [t.clone().requires_grad_() for t in (b.input, b.weight, b.bias, case.residual)]
    # Doubling and halving are exact.
    input, weight, bias, residual = ((leaf * 2) / 2 for leaf in leaves)
    output = functional.batch_norm_add_relu(input, None, None, weight, bias, residual, True)
    assert not output.is_leaf
    output.backward(case.grad_output)
    for leaf, name in zip(leaves, ("input", "weight", "bias", "residual"), strict=True):
        assert torch.equal(leaf.grad, expected[f"grad_{name}"]), name


def test_input_that_is_its_own_residual(device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)
    b = case.branches[0]
    shared = b.input.clone().requires_grad_()
    apart = [b.input.clone().requires_grad_() for _ in range(2)]
    outputs = [
        functional.batch_norm_add_relu(x, None, None, b.weight, b.bias, residual, True)
        for x, residual in ((shared, shared), apart)
    ]
    for output in outputs:
        output.backward(case.grad_output)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(shared.grad, apart[0].grad + apart[1].grad)


def test_writing_over_a_saved_input_is_an_error(device):
    input = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    middle = input * 2
    output = functional.batch_norm_add_relu(middle, None, None, training=True)
    middle.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_writing_over_the_output_is_allowed_as_after_a_batch_norm_alone(device):
    """Nothing of the output is saved: an in-place operation may follow."""
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)
    b = case.branches[0]
    gradients = []
    for in_place in (False, True):
        input = b.input.clone().requires_grad_()
        output = functional.batch_norm_add_relu(input, None, None, b.weight, b.bias, case.residual, True)
        output = output.mul_(2) if in_place else output * 2
        output.backward(case.grad_output)
        gradients.append(input.grad)
    assert torch.equal(*gradients)


def test_no_graph_without_grad_mode(device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)
    b = case.branches[0]
    input = b.input.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = functional.batch_norm_add_relu(input, None, None, b.weight, b.bias, case.residual, True)
        assert not output.requires_grad
        assert output.is_inference() == (mode is torch.inference_mode)


def test_gradient_of_an_output_that_nobody_uses(device):
    input = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    output = functional.batch_norm_add_relu(input, None, None, training=True)
    other = torch.ones((), device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(other * 2, input, allow_unused=True)
    assert grad is None
    assert output.grad_fn is not None


@pytest.mark.parametrize("dual", [False, True], ids=["one branch", "two branches"])
def test_running_statistics_changed_before_the_backward(dual, device):
    """Training between an evaluation and its backward leaves the gradient that of the evaluation, as it ran."""
    x, x2 = (torch.randn(2, 8, 3, 3, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(8, device=device, requires_grad=True)
    running = torch.zeros(8, device=device), torch.ones(8, device=device)

    def forward(training):
        if dual:
            return functional.dual_batch_norm_add_relu(x, *running, weight, None, x2, *running, weight, None, training)
        return functional.batch_norm_add_relu(x, *running, weight, None, None, training)

    undisturbed = torch.autograd.grad(forward(False).sum(), (x, weight))
    evaluated = forward(False)
    forward(True)
    assert float(running[0].abs().sum()) > 0
    for got, expected in zip(torch.autograd.grad(evaluated.sum(), (x, weight)), undisturbed, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("training", [False, True])
def test_bias_stepped_between_two_backwards(training, device):
    """torch saves no bias either: the mask of the ReLU stays that of the forward."""
    x = torch.randn(2, 8, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    running = (None, None) if training else (torch.zeros(8, device=device), torch.ones(8, device=device))
    output = functional.batch_norm_add_relu(x, *running, None, bias, None, training)
    before = torch.autograd.grad(output.square().sum(), (x, bias), retain_graph=True)
    with torch.no_grad():
        bias.add_(3)
    for got, expected in zip(torch.autograd.grad(output.square().sum(), (x, bias)), before, strict=True):
        assert torch.equal(got, expected)


def test_weight_stepped_between_two_backwards_is_refused(device):
    x = torch.randn(2, 8, 3, 3, device=device, requires_grad=True)
    weight = torch.rand(8, device=device, requires_grad=True)
    output = functional.batch_norm_add_relu(x, None, None, weight, None, None, True).sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("channels_last", [False, True])
def test_batched_gradients_of_add_relu(channels_last, device):
    """A ``vmap`` over gradients, as ``is_grads_batched`` makes."""
    x, r, *_ = (torch.randn(2, 3, 4, 5, device=device) for _ in range(2))
    if channels_last:
        x, r = x.to(memory_format=torch.channels_last), r.to(memory_format=torch.channels_last)
    x.requires_grad_()
    gradients = torch.randn(3, 2, 3, 4, 5, device=device)
    (got,) = torch.autograd.grad(functional.add_relu(x, r), x, gradients, is_grads_batched=True)
    assert torch.equal(got, torch.where(x + r > 0, gradients, 0))
