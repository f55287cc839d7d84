"""Input made to lose digits, overflow, or carry Inf and NaN."""

import dataclasses

import oracle
import pytest
import torch
from oracle import OPS

from resnet_fused import functional

LAYOUTS = ("contiguous", "channels_last")
SHAPE = (4, 9, 7, 7)


def _case(input, form="bn_add_relu", training=True, layout="contiguous", device="cpu", affine="both") -> oracle.Case:
    """A case whose branches all normalize ``input``."""
    dtype = input.dtype
    case = oracle.make_case(tuple(input.shape), dtype, device, form, training, layout, affine=affine)
    for branch in case.branches:
        branch.input = oracle.LAYOUTS[layout](input.to(device))
    return case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["bn", "bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=oracle.dtype_name)
@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1e-2), (-1e4, 1e-2), (3e2, 1e-3), (1e-4, 1e-8)])
def test_mean_far_from_zero(mean, deviation, dtype, form, layout, device):
    """E[x²] - E[x]² would lose every digit of the variance here."""
    values = mean + deviation * torch.randn(SHAPE, dtype=torch.float64)
    oracle.check(_case(values.to(dtype), form, True, layout, device), either_format=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", oracle.HALVES, ids=oracle.dtype_name)
def test_mean_far_from_zero_in_half_precision(dtype, layout, device):
    """Two neighbouring numbers of the dtype, 256 deviations and more from zero."""
    values = torch.where(torch.rand(SHAPE) < 0.5, 256.0, 256.0 * (1 + torch.finfo(dtype).eps)).to(dtype)
    oracle.check(_case(values, "bn_add_relu", True, layout, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 0.1, 1e4, 12345.678])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
def test_constant_channels(dtype, value, layout, device):
    """The variance is zero, or what is left of rounding the mean, and invstd at most 1/sqrt(eps)."""
    values = torch.full(SHAPE, value, dtype=torch.float64)
    values[:, 1::2] = torch.randn(SHAPE, dtype=torch.float64)[:, 1::2]
    _, mean, var, _, _ = OPS.batch_norm_add_relu_train(
        oracle.LAYOUTS[layout](values.to(device, dtype)), None, None, None, 1e-5, True, False
    )
    exact = float(values.to(dtype)[0, 0, 0, 0])
    assert mean[::2].tolist() == [exact] * len(mean[::2])
    assert not var[::2].any()
    oracle.check(_case(values.to(dtype), "bn_add_relu", True, layout, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("outlier", [1e4, 1e8, -1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=oracle.dtype_name)
def test_one_huge_outlier(dtype, outlier, place, layout, device):
    values = torch.randn(SHAPE, dtype=torch.float64)
    values[place, ::2, place, place] = outlier
    oracle.check(_case(values.to(dtype), "bn_add_relu", True, layout, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_huge_outlier_in_float16(layout, device):
    values = torch.randn(SHAPE, dtype=torch.float64)
    values[0, ::2, 0, 0] = 6e4
    oracle.check(_case(values.to(torch.float16), "bn_add_relu", True, layout, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("magnitude", [1e17, 1e-17, 1e-30])
def test_magnitudes(magnitude, layout, device):
    """Variances of 1e34, and of far less than eps."""
    oracle.check(_case((magnitude * torch.randn(SHAPE)).float(), "bn_add_relu", True, layout, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subnormal_input_of_float16(layout, device):
    values = (torch.randn(SHAPE, dtype=torch.float64) * torch.finfo(torch.float16).smallest_normal / 8).half()
    oracle.check(_case(values, "bn_add_relu", True, layout, device, affine="weight"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subnormal_input(layout, device):
    smallest = 2.0**-149
    values = (torch.randn(SHAPE, dtype=torch.float64) * 2.0**-129).float()
    case = _case(values, "bn_add_relu", True, layout, device, affine="weight")
    for names in ("output", "running", "grad_input", "grad_residual"):
        oracle.check(case, names=names)
    case = oracle.away_from_the_kink(case)
    ours, exact = oracle.fused(case)["grad_weight"], oracle.exact(case)["grad_weight"]
    # invstd times a sum of n products, each rounded by half of the smallest number, with differences from a mean that
    # is too.
    grad = case.grad_output.double().abs().sum((0, 2, 3)).max()
    roundings = (float(grad) + values.numel() / values.shape[1]) * smallest / 2
    assert abs(ours.double().cpu().numpy() - exact).max() <= roundings / 1e-5**0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=oracle.dtype_name)
def test_many_values_a_channel(dtype, layout, device):
    """Half a million values of mean 100: a running sum in float32 would be off by its own digits."""
    values = 100 + torch.randn(8, 1, 256, 256)
    values = torch.cat([values, torch.randn(8, 1, 256, 256) - 3], 1)
    oracle.check(_case(values.to(dtype), "bn_relu", True, layout, device), either_format=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eps(training, eps, layout, device):
    case = oracle.make_case(SHAPE, torch.float32, device, "dual_relu", training, layout)
    for branch in case.branches:
        branch.eps = eps
    oracle.check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["bn_relu", "bn_add_relu", "dual_relu"])
def test_running_variance_of_zero_below_zero_and_not_a_number(form, layout, device):
    """The square root of a negative number is NaN, of a zero with eps = 0 the inverse is infinite: as torch's."""
    case = oracle.make_case(SHAPE, torch.float32, device, form, False, layout)
    for branch in case.branches:
        branch.running_var[:4] = torch.tensor([0.0, -1.0, float("nan"), float("inf")])
        branch.running_mean[4:6] = torch.tensor([float("nan"), float("inf")])
    _check_with_infinities(case)


def _check_with_infinities(case: oracle.Case) -> None:
    """Inf and NaN stand where torch has them, and what is finite keeps the rule."""
    ours, theirs = oracle.fused(case), oracle.unfused(case)
    for name, value in ours.items():
        expected = theirs[name]
        assert torch.equal(value.isnan(), expected.isnan()), name
        assert torch.equal(value.isposinf(), expected.isposinf()), name
        assert torch.equal(value.isneginf(), expected.isneginf()), name
    near = oracle.away_from_the_kink(case)
    ours, theirs, reference = oracle.fused(near), oracle.unfused(near), oracle.exact(near)
    larger = oracle.scales(near)
    for name, value in ours.items():
        oracle.assert_as_accurate(value, theirs[name], reference[name], name, larger.get(name, 0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("form", ["bn_relu", "bn_add_relu", "dual_relu", "bn_add"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=oracle.dtype_name)
def test_infinities_in_the_input(dtype, training, form, value, layout, device):
    case = oracle.make_case(SHAPE, dtype, device, form, training, layout)
    case.branches[0].input[0, 0, 0, 0] = value
    case.branches[0].input[-1, 4, -1, -1] = value
    case.branches[-1].input[1, 5, 3, 3] = value
    _check_with_infinities(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("where", ["residual", "bias", "grad_output"])
def test_infinities_elsewhere(where, training, value, layout, device):
    case = oracle.make_case(SHAPE, torch.float32, device, "bn_add_relu", training, layout)
    if where == "bias":
        case.branches[0].bias[3] = value
    else:
        tensor = getattr(case, where)
        tensor[0, 0, 0, 0] = tensor[2, 5, 3, 4] = value
    _check_with_infinities(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("form", ["bn", "bn_relu", "bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, *oracle.HALVES], ids=oracle.dtype_name)
def test_infinities_in_the_gradient(dtype, training, form, value, layout, device):
    """The weight's gradient is infinite, with the sign of input - mean, wherever the mean lies."""
    case = oracle.make_case(SHAPE, dtype, device, form, training, layout)
    for branch in case.branches:
        branch.input += 5
        branch.running_mean += 5
        # Channels 1 and 2 pass the ReLU whole.
        branch.bias[1:3] = 20
        branch.input[0, 1, 2, 3], branch.input[1, 2, 2, 3] = 9, 1
    case.grad_output[0, 1, 2, 3] = case.grad_output[1, 2, 2, 3] = value
    _check_with_infinities(case)
    assert oracle.fused(case)["grad_weight"][1:3].tolist() == [value, -value]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_infinities_in_the_weight(training, value, layout, device):
    """The channel is lost, and no other. Whether Inf or NaN stands there hangs on the order of the multiplications."""
    case = oracle.make_case(SHAPE, torch.float32, device, "bn_add", training, layout)
    expected = oracle.fused(case)
    case.branches[0].weight[3] = value
    ours = oracle.fused(case)
    for name in ("output", "grad_input"):
        assert not ours[name][:, 3].isfinite().any(), name
    others = [c for c in range(SHAPE[1]) if c != 3]
    for name, result in ours.items():
        dim = 1 if result.dim() == 4 else 0
        index = torch.tensor(others, device=device)
        assert torch.equal(result.index_select(dim, index), expected[name].index_select(dim, index)), name


def test_gradient_passes_where_the_output_is_nan(device):
    """torch's ReLU gives gradient to NaN: its rule is "result <= 0 ? 0 : grad"."""
    input = torch.randn(2, 3, 4, 4, device=device)
    input[0, 1, 0, 0] = float("nan")
    residual = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    functional.batch_norm_add_relu(input, None, None, residual=residual, training=True).sum().backward()
    assert torch.equal(residual.grad[:, 1], torch.ones_like(residual.grad[:, 1]))

    operands = [torch.tensor([float("nan"), 1.0, -1.0, 0.0], device=device, requires_grad=True) for _ in range(2)]
    functional.add_relu(*operands).sum().backward()
    for operand in operands:
        assert operand.grad.tolist() == [1, 1, 0, 0]


def test_masked_infinities_in_the_gradient_do_not_spread(device):
    """Inf times a mask of zero is NaN; torch's ReLU selects, it does not multiply."""
    case = oracle.make_case(SHAPE, torch.float32, device, "bn_add_relu")
    case.residual.fill_(-1e3)
    case = dataclasses.replace(case, grad_output=torch.full_like(case.grad_output, float("inf")))
    for name, value in oracle.fused(case).items():
        if name.startswith("grad"):
            assert not value.any(), name


def test_overflow_of_a_narrow_output(device):
    case = oracle.make_case(SHAPE, torch.float16, device, "bn_add_relu", training=False)
    case.branches[0].weight.fill_(torch.finfo(torch.float16).max)
    ours, theirs = oracle.forward(case)["output"], oracle.unfused_forward(case)["output"]
    assert theirs.isinf().any()
    # Where torch's normalized value overflows and a residual brings it back, ours may be finite; ours is never Inf
    # alone.
    assert not (ours.isinf() & ~theirs.isinf()).any()
    assert not ours.isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_do_not_touch_each_other(layout, device):
    """A channel's results are the same whatever its neighbours hold."""
    case = oracle.make_case((2, 33, 5, 3), torch.float32, device, "bn_add_relu", layout=layout)
    before = oracle.fused(case)
    case.branches[0].input[:, 1::2] = float("nan")
    case.residual[:, 1::2] = float("inf")
    after = oracle.fused(case)
    for name, value in before.items():
        dim = 1 if value.dim() == 4 else 0
        even = torch.arange(0, 33, 2, device=device)
        assert torch.equal(value.index_select(dim, even), after[name].index_select(dim, even)), name
