"""The operators on the host: functions with the signatures of ``csrc/ops.cpp`` that check, allocate and launch.

Training is a pass for the statistics and one that normalizes, its backward a pass that reduces and one that applies.
The second pass adds up the sums of the first; where a channel has very many of them a small launch does that between
the two. Where no second pass follows, a small launch finishes the sums.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import checks, layout
from ..ops.reference import saved_bias
from . import configurations, kernels
from .configurations import Plan, Problem

# Sums that the programs of the next pass add up by themselves.
_FEW = 2 * kernels.MERGED.value
# Channels of a program that goes over vectors of them.
_CHANNELS = 64
_ADD_BYTES = 4096  # of a program's tile of add_relu: two accesses of 128 threads

_state = threading.local()


@contextlib.contextmanager
def traced():
    """A context in which launches become part of a graph."""
    before = getattr(_state, "traced", False)
    _state.traced = True
    try:
        yield
    finally:
        _state.traced = before


def _launch(kernel, grid: tuple[int, ...], warps: int, arguments: dict) -> None:
    if getattr(_state, "traced", False):
        torch.library.wrap_triton(kernel)[grid](num_warps=warps, **arguments)
    else:
        # In order: by name they take Triton twice as long.
        kernel[grid](*[arguments[name] for name in kernel.arg_names], num_warps=warps)


def _on(input: Tensor):
    """Triton launches on the current device: the tensor's becomes it."""
    if input.is_cuda and not getattr(_state, "traced", False):
        return torch.cuda.device(input.device)
    if input.is_xpu and not getattr(_state, "traced", False):
        return torch.xpu.device(input.device)
    return contextlib.nullcontext()


# Tensors. What follows is told whether the operator works in channels_last, and asks no tensor again.


def _works_in_channels_last(input: Tensor, asked: bool | None) -> bool:
    return layout.is_channels_last(input) if asked is None else asked


def _problem(input: Tensor, channels_last: bool) -> Problem:
    """An input without gaps, in that format."""
    batch, channels = input.shape[:2]
    positions = 1
    for size in input.shape[2:]:
        positions *= size
    if layout.channels_innermost(input, channels_last):
        return Problem(True, batch * positions, channels, 1, input.dtype.itemsize)
    return Problem(False, batch, channels, positions, input.dtype.itemsize)


def _like(input: Tensor, channels_last: bool) -> Tensor:
    """A new tensor without gaps, in that format. Not by empty_like, which Inductor takes for a tensor to be filled."""
    innermost_first = list(range(input.dim()))[::-1]
    if layout.format_of(input, channels_last) != torch.contiguous_format:
        innermost_first.insert(0, innermost_first.pop(-2))
    strides, step = [0] * input.dim(), 1
    for d in innermost_first:
        strides[d] = step
        step *= max(input.shape[d], 1)
    return input.new_empty_strided(input.shape, strides)


def _statistic(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=layout.statistics_dtype(input.dtype))


def _nothing(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(0, dtype=dtype or input.dtype)


def _new_mask(wanted: bool, input: Tensor, channels_last: bool) -> Tensor:
    return input.new_empty(layout.mask_shape(input, channels_last) if wanted else 0, dtype=torch.uint8)


def _given(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@dataclasses.dataclass
class _Branch:
    """A normalized input and the vectors of its channels."""

    input: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    invstd: Tensor | None = None
    eps: float = 0.0
    # Training: the sums that statistics are made of, and the running statistics that they update.
    partials: Tensor | None = None
    shifts: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.0

    def __post_init__(self):
        for name in ("weight", "bias", "mean", "var", "invstd"):
            setattr(self, name, _given(getattr(self, name)))

    def vectors(self, suffix: str, *names: str) -> dict:
        """Those arguments of a kernel."""
        return {name + suffix: getattr(self, name) for name in names}


_ABSENT = _Branch()


def _tile(problem: Problem, plan: Plan) -> dict:
    """The arguments that every pass over a tensor has."""
    channel_unit, position_unit = map(configurations.unit_of, (problem.channels, problem.positions))
    if problem.positions >= 1 << 31:
        # As it is, it is a number of 64 bits, and what the kernel makes of it is too; units of it would not be.
        position_unit = 1
    return {
        "batch": problem.batch,
        "channel_units": problem.channels // channel_unit,
        "position_units": problem.positions // position_unit,
        "chunks": plan.chunks,
        "ROWS": problem.rows,
        "CHANNEL_UNIT": channel_unit,
        "POSITION_UNIT": position_unit,
        "CHANNELS": plan.channels,
        "OTHERS": plan.others,
    }


def _plan(kind: str, problem: Problem, input: Tensor, sums: int, attempt: Callable[[Plan], object]) -> Plan:
    if getattr(_state, "traced", False):
        return configurations.plan(kind, problem, configurations.device_of(input.device), sums)
    return configurations.choose(kind, problem, input.device, sums, attempt)


def _merged(partials: Tensor) -> Tensor:
    """(branches, splits, sums, C) with few splits."""
    branches, splits, sums, channels = partials.shape
    if splits <= _FEW:
        return partials
    merged = partials.new_empty(branches, 1, sums, channels)
    width = sums * channels
    arguments = {"partials": partials, "merged": merged, "splits": splits, "width": width}
    _launch(
        kernels.batch_norm_merge_kernel,
        (configurations.divided(width, 16), branches),
        4,
        arguments | {"COLUMNS": 16, "SPLITS": 64},
    )
    return merged


# Forward passes.


def _statistics_pass(problem: Problem, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x - shift and of its square, (branches, splits, 2, C), and the shifts, (branches, C)."""
    x = inputs[0]

    def run(plan: Plan) -> tuple[Tensor, Tensor]:
        partials = x.new_empty(len(inputs), plan.programs, 2, problem.channels, dtype=torch.float64)
        shifts = x.new_empty(len(inputs), problem.channels, dtype=torch.float64)
        arguments = {
            "x": x,
            "x2": inputs[1] if len(inputs) == 2 else None,
            "partials": partials,
            "shifts": shifts,
            "zero": 0.0,
            "splits": plan.programs,
            "terms": configurations.group_of(problem.itemsize),
            "UNROLL": configurations.UNROLL,
        }
        grid = (plan.groups, plan.programs, len(inputs))
        _launch(kernels.batch_norm_statistics_kernel, grid, plan.warps, arguments | _tile(problem, plan))
        return partials, shifts

    partials, shifts = run(_plan("statistics", problem, x, 2 * len(inputs), run))
    return _merged(partials), shifts


def _of_running(branch: _Branch, suffix: str) -> dict:
    mean, var = branch.running_mean, branch.running_var
    return {
        "running_mean" + suffix: mean,
        "mean_stride" + suffix: 0 if mean is None else mean.stride(0),
        "running_var" + suffix: var,
        "var_stride" + suffix: 0 if var is None else var.stride(0),
        "momentum" + suffix: float(branch.momentum),
    }


def _forward_pass(
    problem: Problem,
    first: _Branch,
    second: _Branch | None,
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """The output and its mask, from statistics or the sums that they are made of."""
    x = first.input
    other = second or _ABSENT
    if residual is not None:
        residual = layout.dense(residual, x, channels_last)
    output = _like(x, channels_last)
    mask = _new_mask(relu and save_mask and (residual is not None or second is not None), x, channels_last)
    arguments = {
        "residual": residual,
        "output": output,
        "mask": mask if mask.numel() else None,
        "count": problem.count,
        "splits": 1 if first.partials is None else first.partials.shape[0],
        "RELU": relu,
        "EPS": float(first.eps),
        "EPS2": float(other.eps),
    }
    for branch, suffix in ((first, ""), (other, "2")):
        arguments |= branch.vectors(suffix, "weight", "bias", "mean", "var", "invstd", "partials", "shifts")
        arguments["x" + suffix] = branch.input

    def run(plan: Plan, update: bool = False) -> None:
        running = {}
        for branch, suffix in ((first, ""), (other, "2")):
            running |= _of_running(branch if update else _ABSENT, suffix)
        arguments["programs"] = plan.programs
        grid = (plan.groups, plan.programs)
        _launch(kernels.batch_norm_forward_kernel, grid, plan.warps, arguments | running | _tile(problem, plan))

    if problem.channels and (problem.count or first.partials is not None):
        run(_plan("forward", problem, x, 0, run), update=True)
    return output, mask


def _train(
    branches: tuple[_Branch, ...],
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and mask; the branches get their statistics."""
    x = branches[0].input
    channels_last = _works_in_channels_last(x, channels_last)
    for branch in branches:
        branch.input = layout.dense(branch.input, x, channels_last)
    x = branches[0].input
    problem = _problem(x, channels_last)
    with _on(x):
        for branch in branches:
            branch.mean, branch.var, branch.invstd = (_statistic(x) for _ in range(3))
        if problem.channels:
            partials, shifts = _statistics_pass(problem, *(branch.input for branch in branches))
            for branch, of_branch, shift in zip(branches, partials.unbind(0), shifts.unbind(0), strict=True):
                branch.partials, branch.shifts = of_branch, shift
        second = branches[1] if len(branches) == 2 else None
        return _forward_pass(problem, branches[0], second, residual, relu, save_mask, channels_last)


def _apply(
    first: _Branch,
    second: _Branch | None,
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
    channels_last: bool | None,
) -> tuple[Tensor, Tensor]:
    """Output and mask with statistics that are given."""
    x = first.input
    channels_last = _works_in_channels_last(x, channels_last)
    first.input = layout.dense(x, x, channels_last)
    if second is not None:
        second.input = layout.dense(second.input, x, channels_last)
    with _on(x):
        problem = _problem(first.input, channels_last)
        return _forward_pass(problem, first, second, residual, relu, save_mask, channels_last)


# Checks that the forward operators share.


def _check_update(input, weight, bias, running_mean, running_var, suffix=""):
    checks.per_channel(running_mean, "running_mean" + suffix, input)
    checks.per_channel(running_var, "running_var" + suffix, input)
    checks.one_dtype(weight, bias, running_mean, running_var)


def _check_second(input, input2, weight2, bias2):
    checks.same_shape(input2, "input2", input)
    checks.per_channel(weight2, "weight2", input)
    checks.per_channel(bias2, "bias2", input)


def _check_vectors(input, **vectors):
    for name, vector in vectors.items():
        checks.per_channel(vector, name, input)


# Forward operators.


def batch_norm_add_relu_train(input, weight, bias, residual, eps, relu, save_mask, channels_last=None):
    checks.batch_norm(input, weight, bias, residual)
    branch = _Branch(input, weight, bias, eps=eps)
    output, mask = _train((branch,), residual, relu, save_mask, channels_last)
    return output, branch.mean, branch.var, branch.invstd, mask


def batch_norm_add_relu_train_with_update(
    input, weight, bias, residual, running_mean, running_var, momentum, eps, relu, save_mask
):
    checks.batch_norm(input, weight, bias, residual)
    _check_update(input, weight, bias, running_mean, running_var)
    checks.more_than_one_value(input)
    branch = _Branch(input, weight, bias, eps=eps, momentum=momentum)
    branch.running_mean, branch.running_var = running_mean, running_var
    output, mask = _train((branch,), residual, relu, save_mask)
    return output, branch.mean, branch.invstd, saved_bias(input, bias, residual, relu, save_mask), mask


def dual_batch_norm_add_relu_train(
    input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask, channels_last=None
):
    checks.batch_norm(input, weight, bias)
    _check_second(input, input2, weight2, bias2)
    first, second = _Branch(input, weight, bias, eps=eps), _Branch(input2, weight2, bias2, eps=eps2)
    output, mask = _train((first, second), None, relu, save_mask, channels_last)
    return output, first.mean, first.var, first.invstd, second.mean, second.var, second.invstd, mask


def dual_batch_norm_add_relu_train_with_update(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    input2,
    weight2,
    bias2,
    running_mean2,
    running_var2,
    momentum,
    momentum2,
    eps,
    eps2,
    relu,
    save_mask,
):
    checks.batch_norm(input, weight, bias)
    _check_update(input, weight, bias, running_mean, running_var)
    _check_second(input, input2, weight2, bias2)
    _check_update(input, weight2, bias2, running_mean2, running_var2, "2")
    checks.more_than_one_value(input)
    first = _Branch(input, weight, bias, eps=eps, momentum=momentum)
    second = _Branch(input2, weight2, bias2, eps=eps2, momentum=momentum2)
    first.running_mean, first.running_var = running_mean, running_var
    second.running_mean, second.running_var = running_mean2, running_var2
    output, mask = _train((first, second), None, relu, save_mask)
    return output, first.mean, first.invstd, second.mean, second.invstd, mask


def batch_norm_add_relu_eval(
    input, weight, bias, residual, running_mean, running_var, eps, relu, save_mask, channels_last=None
):
    checks.batch_norm(input, weight, bias, residual)
    _check_vectors(input, running_mean=running_mean, running_var=running_var)
    checks.one_dtype(weight, bias, running_mean, running_var)
    branch = _Branch(input, weight, bias, running_mean, running_var, eps=eps)
    return _apply(branch, None, residual, relu, save_mask, channels_last)


def dual_batch_norm_add_relu_eval(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    input2,
    weight2,
    bias2,
    running_mean2,
    running_var2,
    eps,
    eps2,
    relu,
    save_mask,
    channels_last=None,
):
    checks.batch_norm(input, weight, bias)
    _check_vectors(input, running_mean=running_mean, running_var=running_var)
    _check_second(input, input2, weight2, bias2)
    _check_vectors(input, running_mean2=running_mean2, running_var2=running_var2)
    checks.one_dtype(weight, bias, running_mean, running_var)
    checks.one_dtype(weight2, bias2, running_mean2, running_var2)
    first = _Branch(input, weight, bias, running_mean, running_var, eps=eps)
    second = _Branch(input2, weight2, bias2, running_mean2, running_var2, eps=eps2)
    return _apply(first, second, None, relu, save_mask, channels_last)


def batch_norm_add_relu_apply(input, weight, bias, residual, mean, invstd, relu, save_mask, channels_last=None):
    checks.batch_norm(input, weight, bias, residual)
    _check_vectors(input, mean=mean, invstd=invstd)
    branch = _Branch(input, weight, bias, mean, invstd=invstd)
    return _apply(branch, None, residual, relu, save_mask, channels_last)


def batch_norm_statistics(input):
    checks.input_tensor(input)
    channels_last = layout.is_channels_last(input)
    x = layout.dense(input, input, channels_last)
    problem = _problem(x, channels_last)
    mean, var = _statistic(x), _statistic(x)
    if problem.channels:
        with _on(x):
            partials, shifts = _statistics_pass(problem, x)
            arguments = {
                "partials": partials,
                "shifts": shifts,
                "mean": mean,
                "var": var,
                "splits": partials.shape[1],
                "channels": problem.channels,
                "count": problem.count,
                "DOUBLE": x.dtype == torch.float64,
                "CHANNELS": _CHANNELS,
            }
            grid = (configurations.divided(problem.channels, _CHANNELS),)
            _launch(kernels.batch_norm_finish_statistics_kernel, grid, 4, arguments)
    return mean, var


# Backward passes.


class _Backward:
    """The tensors of one call, and its passes."""

    def __init__(
        self,
        grad_output,
        first: _Branch,
        second: _Branch | None,
        mask: Tensor | None,
        relu: bool,
        grad_output2: Tensor | None = None,
        channels_last: bool | None = None,
    ):
        x = first.input
        channels_last = _works_in_channels_last(x, channels_last)
        first.input = layout.dense(x, x, channels_last)
        if second is not None:
            second.input = layout.dense(second.input, x, channels_last)
        self.gradient = layout.dense(grad_output, x, channels_last)
        self.gradient2 = None if grad_output2 is None else layout.dense(grad_output2, x, channels_last)
        self.channels_last = channels_last
        self.problem = _problem(first.input, channels_last)
        self.first, self.second = first, second
        self.mask = None
        if relu and mask is not None:
            checks.mask(mask, layout.mask_shape(first.input, channels_last))
            checks.same_device(mask, "mask", x)
            self.mask = mask.contiguous()
        elif relu:
            torch._check(second is None, lambda: "mask is needed for the ReLU's gradient")
        self.from_input = relu and mask is None
        self.grad_input = self.grad_input2 = self.grad_residual = None
        self.grad_weight = self.grad_bias = self.grad_weight2 = self.grad_bias2 = None

    def wanted(self, name: str, needed: bool) -> Tensor:
        """Allocates a gradient of the full shape, where it is asked for."""
        x = self.first.input
        if not needed:
            return _nothing(x)
        setattr(self, name, _like(x, self.channels_last))
        return getattr(self, name)

    def wanted_vector(self, name: str, needed: bool, like: Tensor | None) -> Tensor:
        """The same for one value a channel, of the dtype of ``like`` or of the statistics."""
        x = self.first.input
        dtype = layout.statistics_dtype(x.dtype)
        if not needed:
            return _nothing(x, dtype)
        setattr(self, name, x.new_empty(x.shape[1], dtype=dtype if like is None else like.dtype))
        return getattr(self, name)

    @property
    def _vectors(self) -> dict:
        return {name: getattr(self, name) for name in ("grad_weight", "grad_bias", "grad_weight2", "grad_bias2")}

    @property
    def _needs_sums(self) -> bool:
        return any(vector is not None for vector in self._vectors.values())

    def _common(self, constant: bool) -> dict:
        """Arguments of both passes."""
        first, second = self.first, self.second or _ABSENT
        arguments = {
            "gradient": self.gradient,
            "gradient2": self.gradient2,
            "mask": self.mask if self.mask is not None and self.mask.numel() else None,
            "TWO": self.second is not None,
            "FROM_INPUT": self.from_input,
            "EPS": float(first.eps),
            "EPS2": float(second.eps),
        }
        arguments |= first.vectors("", "weight", "bias", "mean", "var", "invstd")
        return arguments | second.vectors("2", "weight", "mean", "var", "invstd")

    def _gradients(self, written: bool) -> dict:
        names = ("grad_input", "grad_input2", "grad_residual")
        return {name: getattr(self, name) if written else None for name in names}

    def reduce(self, read_input: bool, read_input2: bool, write: bool = False) -> Tensor:
        """The sums, (1, splits, 2 or 3, C); with ``write`` the gradients too, of constant statistics."""
        problem, sums = self.problem, 3 if self.second is not None else 2
        arguments = self._common(write) | self._gradients(write)
        arguments |= {
            "x": self.first.input if read_input or self.from_input else None,
            "x2": self.second.input if self.second is not None and read_input2 else None,
            "zero": 0.0,
            "terms": configurations.group_of(problem.itemsize),
            "UNROLL": configurations.UNROLL,
        }

        def run(plan: Plan) -> Tensor:
            partials = self.gradient.new_empty(1, plan.programs, sums, problem.channels, dtype=torch.float64)
            arguments["partials"], arguments["splits"] = partials, plan.programs
            grid = (plan.groups, plan.programs)
            _launch(kernels.batch_norm_backward_reduce_kernel, grid, plan.warps, arguments | _tile(problem, plan))
            return partials

        return _merged(run(_plan("reduce", problem, self.gradient, sums, run)))

    def finish(self, partials: Tensor, sum_grad: Tensor | None = None, sum_grad_xmu: Tensor | None = None) -> None:
        """Sums that no other pass follows."""
        first, second = self.first, self.second or _ABSENT
        arguments = {
            "gradient": self.gradient,
            "partials": partials,
            "sum_grad": sum_grad,
            "sum_grad_xmu": sum_grad_xmu,
            "splits": partials.shape[1],
            "channels": self.problem.channels,
            "TWO": self.second is not None,
            "EPS": float(first.eps),
            "EPS2": float(second.eps),
            "CHANNELS": _CHANNELS,
        }
        arguments |= first.vectors("", "mean", "var", "invstd") | second.vectors("2", "mean", "var", "invstd")
        grid = (configurations.divided(self.problem.channels, _CHANNELS),)
        _launch(kernels.batch_norm_finish_sums_kernel, grid, 4, arguments | self._vectors)

    def apply(
        self,
        partials: Tensor | None = None,
        mean_grad: Tensor | None = None,
        mean_grad_xmu: Tensor | None = None,
        constant: bool = False,
    ) -> None:
        """The gradients of inputs and residual; from ``partials`` those of weights and biases, too."""
        problem = self.problem
        reads = not constant and self.grad_input is not None
        arguments = self._common(constant) | self._gradients(True) | self._vectors
        arguments |= {
            "x": self.first.input if reads or self.from_input else None,
            "x2": self.second.input if self.grad_input2 is not None and not constant else None,
            "mean_grad": _given(mean_grad),
            "mean_grad_xmu": _given(mean_grad_xmu),
            "partials": partials,
            "count": problem.count,
            "splits": 1 if partials is None else partials.shape[1],
            "CONSTANT": constant,
        }

        def run(plan: Plan) -> None:
            arguments["programs"] = plan.programs
            grid = (plan.groups, plan.programs)
            _launch(kernels.batch_norm_backward_kernel, grid, plan.warps, arguments | _tile(problem, plan))

        run(_plan("backward", problem, self.gradient, 0, run))

    def train(self) -> None:
        """Batch statistics."""
        if not self.problem.channels:
            return
        with _on(self.gradient):
            first, second = self.grad_input is not None, self.grad_input2 is not None
            partials = None
            if first or second or self._needs_sums:
                partials = self.reduce(first or self.grad_weight is not None, second or self.grad_weight2 is not None)
            if partials is not None and not ((first or second) and self.problem.count):
                self.finish(partials)
                partials = None
            if self.problem.count and (first or second or self.grad_residual is not None):
                # Where only the residual's gradient is left, no statistics are needed.
                self.apply(partials, constant=partials is None)

    def eval(self) -> None:
        """Constant statistics."""
        if not self.problem.channels:
            return
        with _on(self.gradient):
            if self._needs_sums:
                partials = self.reduce(self.grad_weight is not None, self.grad_weight2 is not None, write=True)
                self.finish(partials)
            elif self.problem.count:
                self.apply(constant=True)


def _check_backward(grad_output, input, weight, bias, mean, spread, grad_output2=None):
    checks.batch_norm(input, weight, bias)
    checks.same_shape(grad_output, "grad_output", input)
    checks.same_shape(grad_output2, "grad_output2", input)
    checks.per_channel(mean, "mean", input)
    checks.per_channel(spread, "invstd or running_var", input)


# Backward operators. What follows the last ``needs`` is ``grad_output2`` and ``channels_last``, where they are given.


def _backward_of_one(run, call, weight, bias, needs):
    needs_input_grad, needs_residual_grad, needs_weight_grad, needs_bias_grad = needs[:4]
    results = (
        call.wanted("grad_input", needs_input_grad),
        call.wanted("grad_residual", needs_residual_grad),
        call.wanted_vector("grad_weight", needs_weight_grad, weight),
        call.wanted_vector("grad_bias", needs_bias_grad, bias),
    )
    run(call)
    return results


def batch_norm_add_relu_train_backward(grad_output, input, weight, bias, mean, invstd, mask, relu, *needs):
    _check_backward(grad_output, input, weight, bias, mean, invstd, *needs[4:5])
    call = _Backward(grad_output, _Branch(input, weight, bias, mean, invstd=invstd), None, mask, relu, *needs[4:])
    return _backward_of_one(_Backward.train, call, weight, bias, needs)


def batch_norm_add_relu_eval_backward(
    grad_output, input, weight, bias, running_mean, running_var, mask, eps, relu, *needs
):
    _check_backward(grad_output, input, weight, bias, running_mean, running_var, *needs[4:5])
    branch = _Branch(input, weight, bias, running_mean, running_var, eps=eps)
    call = _Backward(grad_output, branch, None, mask, relu, *needs[4:])
    return _backward_of_one(_Backward.eval, call, weight, bias, needs)


def _backward_of_two(run, grad_output, first, second, mask, relu, needs):
    input = first.input
    checks.same_shape(second.input, "input2", input)
    checks.per_channel(second.weight, "weight2", input)
    call = _Backward(grad_output, first, second, mask, relu, *needs[6:])
    results = (
        call.wanted("grad_input", needs[0]),
        call.wanted_vector("grad_weight", needs[1], first.weight),
        call.wanted_vector("grad_bias", needs[2], first.weight),
        call.wanted("grad_input2", needs[3]),
        call.wanted_vector("grad_weight2", needs[4], second.weight),
        call.wanted_vector("grad_bias2", needs[5], second.weight),
    )
    run(call)
    return results


def dual_batch_norm_add_relu_train_backward(
    grad_output, input, weight, mean, invstd, input2, weight2, mean2, invstd2, mask, relu, *needs
):
    _check_backward(grad_output, input, weight, None, mean, invstd, *needs[6:7])
    _check_vectors(input, mean2=mean2, invstd2=invstd2)
    first = _Branch(input, weight, None, mean, invstd=invstd)
    second = _Branch(input2, weight2, None, mean2, invstd=invstd2)
    return _backward_of_two(_Backward.train, grad_output, first, second, mask, relu, needs)


def dual_batch_norm_add_relu_eval_backward(
    grad_output,
    input,
    weight,
    running_mean,
    running_var,
    input2,
    weight2,
    running_mean2,
    running_var2,
    mask,
    eps,
    eps2,
    relu,
    *needs,
):
    _check_backward(grad_output, input, weight, None, running_mean, running_var, *needs[6:7])
    _check_vectors(input, running_mean2=running_mean2, running_var2=running_var2)
    first = _Branch(input, weight, None, running_mean, running_var, eps=eps)
    second = _Branch(input2, weight2, None, running_mean2, running_var2, eps=eps2)
    return _backward_of_two(_Backward.eval, grad_output, first, second, mask, relu, needs)


def batch_norm_add_relu_backward_reduce(grad_output, input, weight, bias, mean, invstd, mask, relu, channels_last=None):
    _check_backward(grad_output, input, weight, bias, mean, invstd)
    branch = _Branch(input, weight, bias, mean, invstd=invstd)
    call = _Backward(grad_output, branch, None, mask, relu, None, channels_last)
    sum_grad, sum_grad_xmu = _statistic(input), _statistic(input)
    if call.problem.channels:
        with _on(input):
            call.finish(call.reduce(True, False), sum_grad, sum_grad_xmu)
    return sum_grad, sum_grad_xmu


def batch_norm_add_relu_backward_apply(
    grad_output,
    input,
    weight,
    bias,
    mean,
    invstd,
    mask,
    mean_grad,
    mean_grad_xmu,
    relu,
    needs_input_grad,
    needs_residual_grad,
    channels_last=None,
):
    _check_backward(grad_output, input, weight, bias, mean, invstd)
    _check_vectors(input, mean_grad=mean_grad, mean_grad_xmu=mean_grad_xmu)
    branch = _Branch(input, weight, bias, mean, invstd=invstd)
    call = _Backward(grad_output, branch, None, mask, relu, None, channels_last)
    results = call.wanted("grad_input", needs_input_grad), call.wanted("grad_residual", needs_residual_grad)
    if call.problem.count and call.problem.channels and (needs_input_grad or needs_residual_grad):
        with _on(input):
            call.apply(None, mean_grad, mean_grad_xmu)
    return results


# Addition and running statistics.


def _block(tensor: Tensor) -> tuple[dict, tuple[int]]:
    """Arguments and grid of a pass over elements in memory order."""
    numel, block = tensor.numel(), _ADD_BYTES // tensor.dtype.itemsize
    unit = configurations.unit_of(numel)
    return {"units": numel // unit, "UNIT": unit, "BLOCK": block}, (configurations.divided(numel, block),)


def add_relu(input, residual, save_mask, channels_last=None):
    checks.tensor(input, "input")
    checks.same_shape(residual, "residual", input)
    channels_last = _works_in_channels_last(input, channels_last)
    x, residual = (layout.dense(operand, input, channels_last) for operand in (input, residual))
    output = _like(x, channels_last)
    mask = x.new_empty((1, (x.numel() + 7) // 8) if save_mask else 0, dtype=torch.uint8)
    if x.numel():
        arguments, grid = _block(x)
        arguments |= {"x": x, "residual": residual, "output": output, "mask": mask if save_mask else None}
        with _on(x):
            _launch(kernels.add_relu_forward_kernel, grid, 4, arguments)
    return output, mask


def add_relu_backward(grad_output, mask, channels_last=None):
    checks.tensor(grad_output, "grad_output")
    checks.mask(mask, (1, (grad_output.numel() + 7) // 8))
    checks.same_device(mask, "mask", grad_output)
    channels_last = _works_in_channels_last(grad_output, channels_last)
    gradient = layout.dense(grad_output, grad_output, channels_last)
    grad_input = _like(gradient, channels_last)
    if gradient.numel():
        arguments, grid = _block(gradient)
        arguments |= {"gradient": gradient, "mask": mask.contiguous(), "grad_input": grad_input}
        with _on(gradient):
            _launch(kernels.add_relu_backward_kernel, grid, 4, arguments)
    return grad_input


def update_running_stats(running_mean, running_var, mean, var, momentum, count):
    checks.running_update(running_mean, running_var, mean, var)
    channels = mean.shape[0]
    # torch leaves the running statistics alone where the batch is empty.
    if not channels or not count:
        return
    branch = _Branch(running_mean=running_mean, running_var=running_var, momentum=momentum)
    arguments = _of_running(branch, "") | {
        "mean": mean.contiguous(),
        "var": var.contiguous(),
        "channels": channels,
        "count": count,
        "CHANNELS": _CHANNELS,
    }
    with _on(mean):
        _launch(kernels.running_stats_update_kernel, (configurations.divided(channels, _CHANNELS),), 1, arguments)
