"""Outputs, batch statistics and running statistics of every forward operator."""

import dataclasses
import sys

import numpy as np
import oracle
import pytest
import torch
from oracle import OPS

from resnet_fused import functional


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize(("shape", "dtype"), oracle.GRID[::2], ids=oracle.dtype_name)
def test_output_and_running_statistics(shape, dtype, form, training, layout, device):
    case = oracle.make_case(shape, dtype, device, form, training, layout)
    with torch.no_grad():
        ours = oracle.forward(case)
        theirs = oracle.unfused_forward(case)
    reference, larger = oracle.exact(case), oracle.scales(case)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        oracle.assert_as_accurate(value, theirs[name], reference[name], name, larger.get(name, 0.0))


@pytest.mark.parametrize("save_mask", [True, False])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results_do_not_hang_on_the_mask_being_saved(training, form, save_mask, device):
    case = oracle.make_case((2, 17, 5, 3), torch.float32, device, form, training)
    *results, mask = oracle.operator_results(case, save_mask)
    *others, _ = oracle.operator_results(case, not save_mask)
    for ours, other in zip(results, others, strict=True):
        assert torch.equal(ours, other)
    needed = save_mask and form in ("bn_add_relu", "dual_relu")
    assert mask.dtype == torch.uint8
    assert mask.shape == ((2 * 17, 2) if needed else (0,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_positions"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
@pytest.mark.parametrize("shape", [(8, 3), (2, 17, 7, 7), (1, 65, 14, 14), (2, 1, 33), (4, 8, 1, 1)], ids=str)
def test_batch_statistics(shape, dtype, layout, device):
    branch = oracle.make_branch(shape, dtype, device, layout)
    eps = 1e-5
    _, mean, var, invstd, _ = OPS.batch_norm_add_relu_train(branch.input, None, None, None, eps, False, False)
    piece_mean, piece_var = OPS.batch_norm_statistics(branch.input)
    # torch keeps its statistics in the dtype of the parameters: float32 beside narrow input.
    vector = branch.weight
    _, their_mean, their_invstd = torch.native_batch_norm(branch.input, vector, vector, None, None, True, 0.1, eps)
    axes = [d for d in range(len(shape)) if d != 1]
    their_var, _ = torch.var_mean(branch.input.to(vector.dtype), axes, correction=0)

    # Float64 sums: see oracle.scales.
    additions = branch.input.numel() // shape[1] if dtype == torch.float64 else 1
    wide = branch.input.cpu().double().numpy().astype(np.longdouble)
    exact_mean, exact_var = wide.mean(tuple(axes)), wide.var(tuple(axes))
    for name, ours, theirs, reference in (
        ("mean", mean, their_mean, exact_mean),
        ("var", var, their_var, exact_var),
        ("invstd", invstd, their_invstd, 1 / np.sqrt(exact_var + np.longdouble(eps))),
        ("batch_norm_statistics' mean", piece_mean, their_mean, exact_mean),
        ("batch_norm_statistics' var", piece_var, their_var, exact_var),
    ):
        scale = additions * float(np.abs(wide).mean(tuple(axes)).max() if "mean" in name else reference.max())
        oracle.assert_as_accurate(ours, theirs, reference, name, scale)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("parameters", ["of input", "float32"])
@pytest.mark.parametrize("dtype", oracle.HALVES, ids=oracle.dtype_name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", ["bn_relu", "bn_add_relu", "dual_relu"])
def test_parameters_of_either_dtype(form, training, dtype, parameters, affine, device):
    parameters = dtype if parameters == "of input" else torch.float32
    case = oracle.make_case((2, 17, 5, 3), dtype, device, form, training, affine=affine, parameters=parameters)
    oracle.check(case)


@pytest.mark.parametrize("affine", ["weight", "bias", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_some_parameters(layout, form, training, affine, device):
    oracle.check(oracle.make_case((2, 9, 5, 3), torch.float32, device, form, training, layout, affine=affine))


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0, 1])
def test_momentum(momentum, device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, "dual_relu")
    for branch in case.branches:
        branch.momentum = momentum
    before = [(b.running_mean.clone(), b.running_var.clone()) for b in case.branches]
    results = oracle.check(case, names="running")
    if momentum == 0:
        for suffix, (mean, var) in zip(("", "2"), before, strict=True):
            assert torch.equal(results["running_mean" + suffix], mean)
            assert torch.equal(results["running_var" + suffix], var)


@pytest.mark.parametrize("form", oracle.FORMS)
def test_without_running_statistics(form, device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, form)
    for branch in case.branches:
        branch.running_mean = branch.running_var = None
    oracle.check(case)


def test_running_statistics_that_are_slices(device):
    branch = oracle.make_branch((2, 9, 5, 3), torch.float32, device)
    apart = torch.zeros(9, 2, device=device)
    apart[:, 0], apart[:, 1] = branch.running_mean, branch.running_var
    arguments = (branch.input, branch.running_mean, branch.running_var, branch.weight, branch.bias)
    expected = functional.batch_norm_add_relu(*arguments, training=True)
    ours = functional.batch_norm_add_relu(
        branch.input, apart[:, 0], apart[:, 1], branch.weight, branch.bias, training=True
    )
    assert torch.equal(ours, expected)
    assert torch.equal(apart, torch.stack([branch.running_mean, branch.running_var], 1))


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_update_of_one_running_statistic(which, device):
    running = torch.tensor([1.0, 2.0, 3.0], device=device)
    mean, var = torch.tensor([4.0, 0.0, -4.0], device=device), torch.tensor([3.0, 6.0, 9.0], device=device)
    given = {"running_mean": None, "running_var": None, which: running}
    OPS.update_running_stats(given["running_mean"], given["running_var"], mean, var, 0.5, 4)
    # Powers of two and thirds of multiples of three: no rounding. The unbiased variance is 4/3 of the biased one.
    expected = [2.5, 1.0, -0.5] if which == "running_mean" else [2.5, 5.0, 7.5]
    assert running.tolist() == expected


@pytest.mark.parametrize("count", [0, 1])
def test_update_for_batches_without_a_variance(count, device):
    running_mean, running_var = torch.ones(2, device=device), torch.ones(2, device=device)
    batch = torch.zeros(2, device=device)
    OPS.update_running_stats(running_mean, running_var, batch, batch, 0.5, count)
    # torch skips an empty batch; the unbiased variance of a single value is 0/0.
    assert running_mean.tolist() == ([1.0, 1.0] if count == 0 else [0.5, 0.5])
    assert running_var.isnan().all() if count else running_var.tolist() == [1.0, 1.0]


def test_eval_leaves_running_statistics_alone(device):
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, "dual_relu", training=False)
    results = oracle.check(case)
    for suffix, branch in zip(("", "2"), case.branches, strict=True):
        assert torch.equal(results["running_mean" + suffix], branch.running_mean)
        assert torch.equal(results["running_var" + suffix], branch.running_var)


def test_no_channels(device):
    """Nothing to compute; of such a batch torch makes no statistics, and neither do we."""
    input, empty = torch.empty(2, 0, 3, 3, device=device), torch.empty(0, device=device)
    vectors = (empty, empty.clone(), empty, empty)
    assert functional.batch_norm_add_relu(input, *vectors, input).shape == input.shape
    for function in (functional.batch_norm_add_relu, torch.nn.functional.batch_norm):
        with pytest.raises(IndexError):
            function(input, *vectors, training=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
def test_apply_with_given_statistics(dtype, add, relu, layout, device):
    form = "bn" + "_add" * add + "_relu" * relu
    case = oracle.make_case((2, 17, 5, 3), dtype, device, form, training=False, layout=layout)
    branch = case.branches[0]
    # Statistics that the apply gets are those of an evaluation with eps = 0, which torch before 2.12 refuses: here with
    # one that the sum with a variance does not see.
    branch.eps = sys.float_info.min
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours, mask = OPS.batch_norm_add_relu_apply(
        branch.input,
        branch.weight,
        branch.bias,
        case.residual,
        branch.running_mean.to(wide),
        branch.running_var.to(wide).double().rsqrt().to(wide),
        relu,
        True,
    )
    assert mask.numel() == (2 * (17 * 2 if layout != "channels_last" else 15 * 3) if add and relu else 0)
    theirs = oracle.unfused_forward(case)["output"]
    oracle.assert_as_accurate(ours, theirs, oracle.exact(case)["output"], "output", oracle.scales(case)["output"])


ADD_SHAPES = ((), (7,), (3, 5), (2, 3, 4), (2, 17, 5, 3), (2, 3, 2, 3, 2), (0, 3), (2, 2, 2, 2, 2, 2))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
@pytest.mark.parametrize("shape", ADD_SHAPES, ids=str)
def test_add_relu(shape, dtype, device):
    input, residual = (torch.randn(shape, device=device, dtype=torch.float64).to(dtype) for _ in range(2))
    # One addition: correctly rounded, hence torch's to the bit.
    assert torch.equal(functional.add_relu(input, residual), (input + residual).relu())
    output, mask = OPS.add_relu(input, residual, False)
    assert torch.equal(output, (input + residual).relu())
    assert mask.shape == (0,)


@pytest.mark.parametrize("residual_layout", sorted(oracle.LAYOUTS))
@pytest.mark.parametrize("layout", sorted(oracle.LAYOUTS))
def test_add_relu_layouts(layout, residual_layout, device):
    input, residual = (torch.randn(2, 17, 5, 3, device=device) for _ in range(2))
    input, residual = oracle.LAYOUTS[layout](input), oracle.LAYOUTS[residual_layout](residual)
    assert torch.equal(functional.add_relu(input, residual), (input + residual).relu())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual_dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=oracle.dtype_name)
def test_residual_of_another_dtype_promotes(dtype, residual_dtype, training, device):
    case = oracle.make_case((2, 9, 5, 3), dtype, device, "bn_add_relu", training)
    case = dataclasses.replace(case, residual=(4 * case.residual).to(residual_dtype))
    b = case.branches[0]
    running = [b.running_mean.clone(), b.running_var.clone()]
    ours = functional.batch_norm_add_relu(b.input, *running, b.weight, b.bias, case.residual, training)
    theirs = oracle.unfused_forward(case)
    reference = oracle.unfused_forward(oracle.like(case, lambda tensor: tensor.double()))
    for name, value in zip(("output", "running_mean", "running_var"), (ours, *running), strict=True):
        # Whatever the sum's dtype, the normalized values have been rounded to that of the input.
        narrower = dtype if name == "output" else None
        oracle.assert_as_accurate(value, theirs[name], reference[name].numpy(), name, dtype=narrower)


def test_large_plane(device):
    """One plane of an early stage, in both layouts."""
    for layout in ("contiguous", "channels_last"):
        oracle.check(oracle.make_case((1, 16, 56, 56), torch.float32, device, layout=layout))
