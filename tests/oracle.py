"""What results are held against: the unfused torch operations, and the same in more digits.

The rule of every comparison (:func:`assert_as_accurate`): our error is at most torch's own on the same input plus one
unit in the last place. The error of a tensor is the largest of its elements' errors, and the unit that of the largest
element of the reference: two correct results that round a sum in another order differ by that much, and elements that
cancel to something small inherit the rounding of the terms they are made of. Where terms are larger than all elements,
the unit is theirs (:func:`scales`).
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.functional import batch_norm_add_relu, dual_batch_norm_add_relu

OPS = torch.ops.resnet_fused
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

# The forms of the operator: whether a residual (or a second branch) joins, and whether the ReLU follows.
FORMS = ("bn", "bn_relu", "bn_add", "bn_add_relu", "dual", "dual_relu")

# C around and off the vector widths, positions from one to a plane that threads share, 2-D to 5-D, empty.
SHAPES = (
    (8, 3),
    (2, 17),
    (2, 7, 33),
    (8, 16, 1),
    (2, 1, 1, 2),
    (2, 3, 5, 3),
    (8, 17, 1, 1),
    (2, 65, 7, 7),
    (1, 8, 14, 14),
    (2, 16, 33, 1),
    (2, 7, 2, 3, 3),
    (1, 8, 1, 1, 2),
    (2, 2048, 1, 2),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
)


def dtype_name(value) -> str:
    """Names of dtypes, and shapes, in test ids."""
    return str(value).removeprefix("torch.")


# Every shape in float32, and a choice of them in the other dtypes.
GRID = [(shape, dtype) for dtype in DTYPES for shape in (SHAPES if dtype == torch.float32 else SHAPES[1::2])]


# Layouts.


def _inside(shape, index, tensor, permutation=None):
    """``tensor`` copied into ``index`` of a NaN-filled buffer, which permutation puts into another memory order."""
    buffer = tensor.new_full(shape, float("nan"))
    if permutation is not None:
        inverse = sorted(range(len(shape)), key=permutation.__getitem__)
        buffer = buffer.permute(permutation).contiguous().permute(inverse)
    view = buffer[index]
    view.copy_(tensor)
    return view


def _channels_innermost(tensor):
    return tensor.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _sliced_positions(t):
    return _inside((*t.shape[:-1], 2 * t.shape[-1] + 1), (..., slice(1, None, 2)), t)


def _sliced_channels(t):
    n, c, *rest = t.shape
    return _inside((n, c + 3, *rest), (slice(None), slice(2, 2 + c)), t)


def _sliced_batch(t):
    n, *rest = t.shape
    return _inside((2 * n, *rest), (slice(None, None, 2),), t)


def _channels_last_sliced(t):
    n, c, *rest = t.shape
    order = [0, *range(2, t.dim()), 1]
    return _inside((n, c + 3, *rest), (slice(None), slice(1, 1 + c)), t, order)


def _transposed(t):
    dims = list(reversed(range(t.dim())))
    return t.permute(dims).clone(memory_format=torch.contiguous_format).permute(dims)


def _channel_outermost(t):
    return t.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": _channels_innermost,
    "sliced_positions": _sliced_positions,
    "sliced_channels": _sliced_channels,
    "sliced_batch": _sliced_batch,
    "channels_last_sliced": _channels_last_sliced,
    "transposed": _transposed,
    "channel_outermost": _channel_outermost,
    # Of these only some of the values are kept.
    "expanded_batch": lambda t: t[:1].clone().expand(t.shape) if len(t) else t.clone(),
    "expanded_channels": lambda t: t[:, :1].clone().expand(t.shape),
    "expanded_positions": lambda t: t[..., :1].clone().expand(t.shape) if t.numel() else t.clone(),
    "expanded_all": lambda t: t[(slice(1),) * t.dim()].clone().expand(t.shape) if t.numel() else t.clone(),
}


# Cases.


@dataclasses.dataclass
class Branch:
    """The arguments of one batch normalization."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float = 0.1
    eps: float = 1e-5


@dataclasses.dataclass
class Case:
    """relu(sum of the branches' batch normalizations + residual), and the gradient that comes back."""

    branches: list[Branch]
    residual: Tensor | None
    grad_output: Tensor
    training: bool
    relu: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input."""
        return self.branches[0].input.dtype


def make_branch(shape, dtype, device, layout="contiguous", affine="both", parameters=None, seed=0) -> Branch:
    """A branch of normal input with means and deviations that differ from channel to channel.

    Every channel has the deviation it was drawn: among many channels of two or four values some would be all but
    constant, where rounding alone decides the result. Such input is test_adversarial's, and there are more values
    there.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    column = (1, channels, *[1] * (len(shape) - 2))
    values = normal(*shape)
    axes = [d for d in range(len(shape)) if d != 1]
    if values.numel() > channels:
        values = (values - values.mean(axes, keepdim=True)) / values.std(axes, correction=0, keepdim=True)
    values = values * (0.5 + normal(*column).abs()) + normal(*column)
    parameters = parameters or (torch.float32 if dtype in HALVES else dtype)

    def vector(wanted, values):
        return values.to(device, parameters) if wanted else None

    return Branch(
        LAYOUTS[layout](values.to(device, dtype)),
        vector(affine in ("both", "weight"), 1 + 0.5 * normal(channels)),
        vector(affine in ("both", "bias"), normal(channels)),
        vector(True, normal(channels)),
        vector(True, 0.5 + normal(channels).abs()),
    )


def make_case(
    shape, dtype, device, form="bn_add_relu", training=True, layout="contiguous", residual_layout=None, seed=0, **branch
) -> Case:
    """A case of one of :data:`FORMS`; the other arguments are those of :func:`make_branch`."""
    branches = [make_branch(shape, dtype, device, layout, seed=seed, **branch)]
    if "dual" in form:
        branches.append(make_branch(shape, dtype, device, residual_layout or layout, seed=seed + 1, **branch))
        branches[1].eps, branches[1].momentum = 1e-3, 0.3
    generator = torch.Generator().manual_seed(3)
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    residual = None
    if "add" in form:
        residual = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        residual = LAYOUTS[residual_layout or layout](residual)
    return Case(branches, residual, grad_output, training, relu="relu" in form)


def like(template: Case, convert, dims: int | None = None) -> Case:
    """The case with every tensor converted, or every one of so many dimensions."""

    def changed(value):
        return convert(value) if isinstance(value, Tensor) and dims in (None, value.dim()) else value

    branches = [
        Branch(**{field.name: changed(getattr(b, field.name)) for field in dataclasses.fields(Branch)})
        for b in template.branches
    ]
    return dataclasses.replace(
        template, branches=branches, residual=changed(template.residual), grad_output=changed(template.grad_output)
    )


# The three ways to compute a case.

_DIFFERENTIABLE = ("input", "weight", "bias")
_RUNNING = ("running_mean", "running_var")


def owned(case: Case) -> Case:
    """The case with leaves of its own, in the same layouts, and running statistics of its own."""

    def branch(b):
        leaves = {name: _leaf(getattr(b, name)) for name in _DIFFERENTIABLE}
        running = {name: None if getattr(b, name) is None else getattr(b, name).clone() for name in _RUNNING}
        return dataclasses.replace(b, **leaves, **running)

    return dataclasses.replace(case, branches=[branch(b) for b in case.branches], residual=_leaf(case.residual))


def _leaf(tensor):
    return None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())


def unfused_output(case: Case) -> Tensor:
    """What the torch operations make of the case, before the ReLU."""
    output = None
    for b in case.branches:
        normalized = F.batch_norm(
            b.input, b.running_mean, b.running_var, b.weight, b.bias, case.training, b.momentum, b.eps
        )
        output = normalized if output is None else output + normalized
    return output if case.residual is None else output + case.residual


def unfused_result(case: Case) -> Tensor:
    """The same behind the ReLU, where the case has one."""
    output = unfused_output(case)
    return F.relu(output) if case.relu else output


def functional_output(case: Case) -> Tensor:
    """What the functional form makes of the case."""
    a = case.branches[0]
    if len(case.branches) == 1:
        return batch_norm_add_relu(
            a.input,
            a.running_mean,
            a.running_var,
            a.weight,
            a.bias,
            case.residual,
            case.training,
            a.momentum,
            a.eps,
            case.relu,
        )
    b = case.branches[1]
    return dual_batch_norm_add_relu(
        a.input,
        a.running_mean,
        a.running_var,
        a.weight,
        a.bias,
        b.input,
        b.running_mean,
        b.running_var,
        b.weight,
        b.bias,
        case.training,
        a.momentum,
        a.eps,
        b.momentum,
        b.eps,
        case.relu,
    )


def operator_results(case: Case, save_mask: bool = True) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.resnet_fused``'s forward operator for the case."""
    a = case.branches[0]
    if len(case.branches) == 1:
        if case.training:
            arguments = (a.input, a.weight, a.bias, case.residual, a.eps, case.relu, save_mask)
            return OPS.batch_norm_add_relu_train(*arguments)
        arguments = (
            a.input,
            a.weight,
            a.bias,
            case.residual,
            a.running_mean,
            a.running_var,
            a.eps,
            case.relu,
            save_mask,
        )
        return OPS.batch_norm_add_relu_eval(*arguments)
    b = case.branches[1]
    if case.training:
        arguments = (a.input, a.weight, a.bias, b.input, b.weight, b.bias, a.eps, b.eps, case.relu, save_mask)
        return OPS.dual_batch_norm_add_relu_train(*arguments)
    arguments = (a.input, a.weight, a.bias, a.running_mean, a.running_var)
    arguments += (b.input, b.weight, b.bias, b.running_mean, b.running_var, a.eps, b.eps, case.relu, save_mask)
    return OPS.dual_batch_norm_add_relu_eval(*arguments)


def _operator_output(case: Case) -> Tensor:
    output, *rest = operator_results(case)
    if case.training:
        count = output.numel() // output.shape[1]
        for b, (mean, var) in zip(case.branches, (rest[0:2], rest[3:5]), strict=False):
            OPS.update_running_stats(b.running_mean, b.running_var, mean, var, b.momentum, count)
    return output


_ROUTES = {"functional": functional_output, "operator": _operator_output}


def _named(case: Case, names) -> dict[str, Tensor]:
    """The tensors of these names of all branches, the second's with a 2 behind."""
    pairs = [
        (name + suffix, getattr(b, name)) for suffix, b in zip(("", "2"), case.branches, strict=False) for name in names
    ]
    return {name: value for name, value in pairs if value is not None}


def _running(case: Case) -> dict[str, Tensor]:
    return _named(case, _RUNNING)


def collect(case: Case, output: Tensor) -> dict[str, Tensor]:
    """The output of an owned case, its running statistics, and the gradients of its leaves."""
    leaves = _named(case, _DIFFERENTIABLE)
    if case.residual is not None:
        leaves["residual"] = case.residual
    gradients = torch.autograd.grad(output, list(leaves.values()), case.grad_output)
    gradients = {f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return {"output": output.detach()} | _running(case) | gradients


def fused(case: Case, route: str = "functional") -> dict[str, Tensor]:
    """Our results for the case: output, running statistics and every gradient."""
    case = owned(case)
    return collect(case, _ROUTES[route](case))


def unfused(case: Case) -> dict[str, Tensor]:
    """torch's results for the case."""
    case = owned(case)
    return collect(case, unfused_result(case))


def forward(case: Case, route: str = "functional") -> dict[str, Tensor]:
    """Our output and running statistics."""
    case = owned(case)
    return {"output": _ROUTES[route](case).detach()} | _running(case)


def unfused_forward(case: Case) -> dict[str, Tensor]:
    """torch's output and running statistics."""
    case = owned(case)
    return {"output": unfused_result(case).detach()} | _running(case)


def exact(case: Case) -> dict[str, np.ndarray]:
    """The case in float64 by the unfused torch operations; for float64 input in extended precision."""
    if case.dtype != torch.float64:
        results = unfused(like(case, lambda tensor: tensor.to("cpu", torch.float64)))
        return {name: value.numpy() for name, value in results.items()}
    return extended(case)


def extended(case: Case) -> dict[str, np.ndarray]:
    """The case in numpy's longdouble, after Ioffe and Szegedy, Batch Normalization (2015), section 3."""
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        import pytest  # tools/gpu has the cases without it

        pytest.skip("needs a longdouble that is wider than float64 to judge float64 results")

    def wide(tensor, default=0.0):
        return (
            np.longdouble(default)
            if tensor is None
            else tensor.detach().cpu().to(torch.float64).numpy().astype(np.longdouble)
        )

    x = wide(case.branches[0].input)
    axes = tuple(d for d in range(x.ndim) if d != 1)
    count = x.size // max(x.shape[1], 1)
    column = (1, -1, *[1] * (x.ndim - 2))

    def over(vector):
        return vector.reshape(column) if vector.ndim else vector

    results, state, pre = {}, [], wide(case.residual)
    for suffix, b in zip(("", "2"), case.branches, strict=False):
        x = wide(b.input)
        running_mean, running_var = wide(b.running_mean), wide(b.running_var, 1.0)
        mean, var = running_mean, running_var
        if case.training:
            mean = x.sum(axes) / max(count, 1)
            var = np.square(x - over(mean)).sum(axes) / max(count, 1)
            if count:
                momentum = np.longdouble(b.momentum)
                unbiased = var * count / (count - 1)
                running_mean = (1 - momentum) * running_mean + momentum * mean
                running_var = (1 - momentum) * running_var + momentum * unbiased
        if b.running_mean is not None:
            results |= {"running_mean" + suffix: running_mean, "running_var" + suffix: running_var}
        invstd = 1 / np.sqrt(var + np.longdouble(b.eps))
        normalized = (x - over(mean)) * over(invstd)
        state.append((suffix, b, invstd, normalized))
        pre = pre + normalized * over(wide(b.weight, 1.0)) + over(wide(b.bias))
    results["output"] = np.maximum(pre, 0) if case.relu else pre
    grad = wide(case.grad_output)
    if case.relu:
        grad = np.where(pre > 0, grad, 0)
    if case.residual is not None:
        results["grad_residual"] = grad
    for suffix, b, invstd, normalized in state:
        grad_bias, grad_weight = grad.sum(axes), (grad * normalized).sum(axes)
        grad_input = grad
        if case.training:
            grad_input = grad - over(grad_bias) / max(count, 1) - normalized * over(grad_weight) / max(count, 1)
        results["grad_input" + suffix] = grad_input * over(wide(b.weight, 1.0)) * over(invstd)
        if b.weight is not None:
            results["grad_weight" + suffix] = grad_weight
        if b.bias is not None:
            results["grad_bias" + suffix] = grad_bias
    return results


# Comparison.


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The unit in the last place of ``dtype`` at ``magnitude``."""
    info = torch.finfo(dtype)
    if magnitude == 0 or not math.isfinite(magnitude):
        return info.smallest_normal * info.eps
    return max(info.eps * 2.0 ** (math.frexp(magnitude)[1] - 1), info.smallest_normal * info.eps)


def _wide(value) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().to(torch.float64).numpy()
    return value.astype(np.longdouble)


def tolerance(theirs: Tensor, reference, scale: float = 0.0, dtype: torch.dtype | None = None) -> float:
    """torch's own error plus one unit in the last place of ``dtype``, at the reference or a ``scale`` beyond it."""
    theirs_wide, reference = _wide(theirs), _wide(reference)
    finite = np.isfinite(theirs_wide) & np.isfinite(reference)
    if not finite.any():
        return 0.0
    error = np.abs(theirs_wide[finite] - reference[finite]).max()
    return float(error) + ulp(dtype or theirs.dtype, max(scale, float(np.abs(reference[finite]).max())))


def assert_as_accurate(
    ours: Tensor, theirs: Tensor, reference, what: str, scale: float = 0.0, dtype: torch.dtype | None = None
) -> None:
    """``ours`` has the shape, dtype, infinities and NaN of ``theirs``, and an error within :func:`tolerance`."""
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, torch has {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, torch has {list(theirs.shape)}"
    finite = theirs.isfinite()
    torch.testing.assert_close(
        ours.where(~finite, 0),
        theirs.where(~finite, 0),
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=f"{what}: not torch's Inf and NaN",
    )
    assert bool((ours.isfinite() == finite).all()), f"{what}: Inf or NaN where torch has none"
    reference = _wide(reference)
    counted = finite.cpu().numpy() & np.isfinite(reference)
    if not counted.any():
        return
    errors = np.where(counted, np.abs(np.where(counted, _wide(ours), 0) - np.where(counted, reference, 0)), 0)
    bound = tolerance(theirs, reference, scale, dtype)
    worst = np.unravel_index(errors.argmax(), errors.shape)
    assert errors.max() <= bound, (
        f"{what}: error {float(errors.max()):.3e} at {tuple(map(int, worst))}, torch's plus one ulp is {bound:.3e} "
        f"(ours {float(_wide(ours)[worst])!r}, torch {float(_wide(theirs)[worst])!r}, "
        f"exact {float(reference[worst])!r})"
    )


def away_from_the_kink(case: Case) -> Case:
    """The case without the gradients of elements so near the ReLU's kink that rounding decides which side they are on.

    Whoever keeps the rule above is off by no more than its tolerance before the ReLU, so that beyond it all agree.
    """
    if not case.relu:
        return case
    linear = dataclasses.replace(case, relu=False)
    with torch.no_grad():
        theirs = unfused_output(owned(linear))
    reference = exact(linear)["output"]
    bound = tolerance(theirs, reference, scales(case).get("output", 0.0))
    near = torch.from_numpy(np.abs(reference.astype(np.float64)) <= bound).to(theirs.device)
    return dataclasses.replace(case, grad_output=case.grad_output.masked_fill(near, 0))


def scales(case: Case) -> dict[str, float]:
    """The largest terms that results are added up from, which may be larger than any element of the result.

    output = weight invstd x - weight invstd mean + bias + residual, and grad_weight = invstd (sum(grad x) - mean
    sum(grad)), where a batch's mean is rounded to be saved (a running mean is what it is, and the difference to it is
    the term). In training grad_input = weight invstd (grad - mean(grad) - ...), next to nothing for a batch of two,
    whatever the gradient. No arithmetic rounds a difference better than its terms.

    In float64 there is no wider type to add in: n additions, in whatever order, are off by at most n units of the sum
    of the absolute terms (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2), and so is what is
    made of them.
    """
    grad = case.grad_output.double().abs()
    if not grad.numel():
        return {}
    axes = [d for d in range(grad.dim()) if d != 1]
    column = (1, -1, *[1] * (grad.dim() - 2))
    additions = grad.numel() // grad.shape[1] if case.dtype == torch.float64 else 1
    terms = [] if case.residual is None else [case.residual.detach().double()]
    result = {}
    for suffix, b in zip(("", "2"), case.branches, strict=False):
        x = b.input.detach().double()
        if case.training:
            var, mean = torch.var_mean(x, axes, correction=0)
        else:
            mean, var = b.running_mean.double(), b.running_var.double()
        invstd = (var + b.eps).rsqrt()
        scale = invstd if b.weight is None else invstd * b.weight.detach().double()
        terms.append((x - mean.reshape(column)) * scale.reshape(column))
        if case.training:
            terms.append(mean * scale)
        if b.bias is not None:
            terms.append(b.bias.detach().double())
        result["grad_input" + suffix] = grad * scale.abs().reshape(column)
        result["grad_weight" + suffix] = (invstd * mean * case.grad_output.double().sum(axes)).abs()
        if additions > 1:
            result["grad_weight" + suffix] = ((grad * x.abs()).sum(axes) + mean.abs() * grad.sum(axes)) * invstd
            result["grad_bias" + suffix] = grad.sum(axes)
            result["running_mean" + suffix], result["running_var" + suffix] = x.abs().mean(axes), var
    result = {name: float(value.max()) for name, value in result.items()}
    result["output"] = max(float(term.abs().max()) for term in terms)
    return {name: additions * value for name, value in result.items() if math.isfinite(value)}


def check(case: Case, route: str = "functional", names: str = "", either_format: bool = False) -> dict[str, Tensor]:
    """Holds every result of ours whose name starts with ``names`` to the rule; gives them back.

    ``either_format`` takes the worse of torch's errors in both memory formats. Where the rounding of the mean decides
    the error, as with means of many deviations, each of its kernels is as good as the other, and which of them is
    lucky is chance.
    """
    case = away_from_the_kink(case)
    ours, theirs, reference = fused(case, route), unfused(case), exact(case)
    assert ours.keys() == theirs.keys()
    larger = scales(case)
    if either_format:
        others = unfused(like(case, LAYOUTS["contiguous" if is_channels_last(case) else "channels_last"], dims=4))
    for name, value in ours.items():
        if name.startswith(names):
            their = theirs[name]
            if either_format and tolerance(others[name], reference[name]) > tolerance(their, reference[name]):
                their = others[name]
            assert_as_accurate(value, their, reference[name], name, larger.get(name, 0.0))
    return ours


def is_channels_last(case: Case) -> bool:
    """Whether the case's input is channels_last."""
    input = case.branches[0].input
    return input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
