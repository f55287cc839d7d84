"""The gradient of every operator, written once and used twice.

``torch.library.register_autograd`` gets the formulas, so that the operators differentiate on their own and under
torch.compile. Eager calls go through an ``autograd.Function`` with the same formulas: that costs a third less time on
the host than a registered formula, which is what counts for small tensors.

A formula runs the fused backward operator. Where a graph of the gradient is asked for (double backward), it runs the
reference instead, whose torch operations autograd follows; the statistics are then made again from the input, for
they depend on it.

In eager a formula may get the gradient of its output in two parts, and leave that of its residual with the node that
made the residual: handover.py.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import handover, layout, library, recomputation, reference
from .decompositions import DECOMPOSITIONS
from .torch_private import below_autograd, is_legacy_batchedtensor, peek_interpreter_stack

_LIBRARY = torch.ops.resnet_fused
_TRAIN_BACKWARD = _LIBRARY.batch_norm_add_relu_train_backward.default
_TRAIN_WITH_UPDATE = _LIBRARY.batch_norm_add_relu_train_with_update.default


class _Formula:
    """What one operator saves for its backward (``save``) and how its gradient follows from that (``backward``).

    ``save`` also notes how the output is made again, where it is to be: eager calls alone ask for that.

    ``backward`` gives the gradients of the leading arguments; those after them have none.

    The last argument of an operator is ``channels_last``. A graph gives it, and its backward works in the same format.
    In eager it is None, and the input is brought back into the strides that it had.
    """

    def __init__(self, name: str, save: Callable, backward: Callable):
        self.name = name
        self.op = getattr(_LIBRARY, name).default
        self._save = save
        self._backward = backward

    def setup_context(self, ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        self.save(ctx, inputs, output)

    def save(self, ctx, inputs, output, recomputed: bool = False) -> None:
        ctx.channels_last = inputs[-1]
        ctx.strides = inputs[0].stride() if ctx.channels_last is None else None
        self._save(ctx, inputs, output, recomputed)

    def backward(self, ctx, grad_output, *_):
        count = len(ctx.needs_input_grad)
        grad_output, grad_output2 = handover.both(ctx, grad_output)
        if grad_output is None:
            return _NOTHING[:count]
        gradients = self._backward(ctx, grad_output, grad_output2)
        return gradients + _NOTHING[len(gradients) : count]

    def function(self) -> type[torch.autograd.Function]:
        """The operator for eager calls, with the arguments of the operator and its first result."""

        def forward(ctx, *inputs):
            with below_autograd():
                output = self.op(*inputs)
            handover.begin(ctx, output[0])
            self.save(ctx, (*inputs, None), output, recomputation.is_on())
            return output[0]

        return self._function(forward, self.backward)

    def function_with_update(self, forward: Callable) -> type[torch.autograd.Function]:
        """The same through the operator that updates running statistics too.

        Its arguments are those of the functional operator that may have a gradient, and one tuple of the others, for
        each argument costs the host time.
        """

        def backward(ctx, grad_output):
            grad_output, grad_output2 = handover.both(ctx, grad_output)
            if grad_output is None:
                return _NOTHING[: len(ctx.needs_input_grad)]
            return *self._backward(ctx, grad_output, grad_output2), None

        return self._function(forward, backward)

    def _function(self, forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return handover.through(type(self.name, (torch.autograd.Function,), members))


_NOTHING = (None,) * 16


def _backward_op(name: str, *arguments):
    """The fused operator, or the reference where a graph of the gradient is asked for."""
    if torch.is_grad_enabled():
        return getattr(reference, name)(*arguments)
    op = getattr(_LIBRARY, name).default
    if torch.compiler.is_compiling():
        return op(*arguments)
    with below_autograd():
        return op(*arguments)


def _restored(ctx, saved: Tensor) -> Tensor:
    """A saved tensor in the strides that it had, where the operator goes by them."""
    return saved if ctx.strides is None else layout.restored(saved, ctx.strides)


def _sum(grad_output: Tensor, grad_output2: Tensor | None) -> Tensor:
    """Of an operator whose backward takes one gradient."""
    return grad_output if grad_output2 is None else grad_output + grad_output2


def _batch_statistics(input: Tensor, eps: float, mean: Tensor, invstd: Tensor):
    """The saved statistics, or, for double backward, the same as functions of the input."""
    if not torch.is_grad_enabled():
        return mean, invstd
    mean, var = reference.batch_norm_statistics(input)
    return mean, (var + eps).rsqrt()


def _residual_gradient(written: bool, needed: bool, grad_output: Tensor, grad_residual: Tensor):
    """Without a ReLU the gradient passes to the residual as it is, and no operator writes it again."""
    if not needed:
        return None
    return grad_residual if written else grad_output


# relu(batch_norm(input) + residual), batch statistics -------------------------------------------------------------


def _copied(vector: Tensor | None) -> Tensor | None:
    """A vector of channels as it is now, where torch's own batch_norm does not save the vector itself.

    Whoever steps a bias between two backwards, or trains on after an evaluation whose backward is still to come, is
    not refused, and has the gradient of the forward that ran.
    """
    return None if vector is None else vector.detach().clone()


# Written for speed on the host, forward and backward: small tensors wait for it.


def _save_train(ctx, inputs, output, recomputed, saved_bias=None):
    input, weight, bias, residual, eps, relu, _, channels_last = inputs
    result, mean, _, invstd, mask = output
    strides = input.stride() if channels_last is None else None
    ctx.settings = relu, eps, strides, channels_last, 1 + (weight is not None) + (bias is not None)
    masked = relu and residual is not None
    if saved_bias is not None and saved_bias.numel():
        bias = saved_bias
    elif recomputed or not masked:
        bias = _copied(bias)
    if masked:
        ctx.save_for_backward(input, weight, None, mean, invstd, mask)
    else:
        ctx.save_for_backward(input, weight, bias, mean, invstd, None)
    if recomputed:
        recomputation.note_train(result, input, weight, bias, residual, mean, invstd, relu)


def _backward_train(ctx, grad_output, grad_output2):
    input, weight, bias, mean, invstd, mask = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    relu, eps, strides, channels_last, residual_edge = ctx.settings
    if strides is not None and input.stride() != strides:
        input = layout.restored(input, strides)
    if mask is not None:
        bias = weight  # only its dtype counts
    # Without a ReLU the residual's gradient is the output's, as it is: no operator need write it again.
    writes_residual = needs_residual and (relu or grad_output2 is not None)
    needs = (needs_input, writes_residual, needs_weight, needs_bias)
    if torch.is_grad_enabled():
        mean, invstd = _batch_statistics(input, eps, mean, invstd)
        run = reference.batch_norm_add_relu_train_backward
        gradients = run(grad_output, input, weight, bias, mean, invstd, mask, relu, *needs, grad_output2, channels_last)
    else:
        with below_autograd():
            gradients = _TRAIN_BACKWARD(
                grad_output, input, weight, bias, mean, invstd, mask, relu, *needs, grad_output2, channels_last
            )
    grad_input, grad_residual, grad_weight, grad_bias = gradients
    if needs_residual:
        grad_residual = grad_residual if writes_residual else grad_output
        if needs_weight and handover.give(ctx, residual_edge, 1, grad_residual):
            needs_residual = False
    return (
        grad_input if needs_input else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_residual if needs_residual else None,
    )


# the same, running statistics -------------------------------------------------------------------------------------


def _save_eval(ctx, inputs, output, recomputed):
    input, weight, bias, residual, running_mean, running_var, eps, relu, *_ = inputs
    ctx.masked = relu and residual is not None
    ctx.relu, ctx.eps = relu, eps
    ctx.residual_edge = 1 + (weight is not None) + (bias is not None)
    if recomputed or not ctx.masked:
        bias = _copied(bias)
    mean, var = _copied(running_mean), _copied(running_var)
    ctx.save_for_backward(input, weight, None if ctx.masked else bias, mean, var, output[1] if ctx.masked else None)
    if recomputed:
        recomputation.note_eval(output[0], input, weight, bias, residual, mean, var, eps, relu)


def _backward_eval(ctx, grad_output, grad_output2):
    input, weight, bias, running_mean, running_var, mask = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    writes_residual = needs_residual and (ctx.relu or grad_output2 is not None)
    grad_input, grad_residual, grad_weight, grad_bias = _backward_op(
        "batch_norm_add_relu_eval_backward",
        grad_output,
        _restored(ctx, input),
        weight,
        bias if mask is None else weight,  # with a mask only its dtype counts
        running_mean,
        running_var,
        mask,
        ctx.eps,
        ctx.relu,
        needs_input,
        writes_residual,
        needs_weight,
        needs_bias,
        grad_output2,
        ctx.channels_last,
    )
    grad_residual = _residual_gradient(writes_residual, needs_residual, grad_output, grad_residual)
    if needs_residual and needs_weight and handover.give(ctx, ctx.residual_edge, 1, grad_residual):
        grad_residual = None
    return (
        grad_input if needs_input else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_residual,
    )


# the same, statistics given (SyncBatchNorm's apply) ---------------------------------------------------------------


def _save_apply(ctx, inputs, output, recomputed):
    input, weight, bias, residual, mean, invstd, relu, *_ = inputs
    ctx.masked = relu and residual is not None
    ctx.relu = relu
    ctx.save_for_backward(input, weight, bias, mean, invstd, output[1] if ctx.masked else None)


def _backward_apply(ctx, grad_output, grad_output2):
    """Statistics are inputs of their own here: SyncBatchNorm, which made them from its input, has a backward of its
    own.
    """
    input, weight, bias, mean, invstd, mask = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_residual, needs_mean, needs_invstd = ctx.needs_input_grad[:6]
    input = _restored(ctx, input)
    grad_output = _sum(grad_output, grad_output2)
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        zeros = torch.zeros_like(invstd)
        common = (grad_output, input, weight, bias, mean, invstd, mask)
        grad_input, grad_residual = _backward_op(
            "batch_norm_add_relu_backward_apply",
            *common,
            zeros,
            zeros,
            ctx.relu,
            needs_input,
            needs_residual and ctx.relu,
            ctx.channels_last,
        )
        sum_grad, sum_grad_xmu = _backward_op(
            "batch_norm_add_relu_backward_reduce", *common, ctx.relu, ctx.channels_last
        )
        scale = 1.0 if weight is None else weight
        return (
            grad_input if needs_input else None,
            sum_grad_xmu * invstd if needs_weight else None,
            sum_grad if needs_bias else None,
            _residual_gradient(ctx.relu, needs_residual, grad_output, grad_residual),
            -sum_grad * invstd * scale if needs_mean else None,
            sum_grad_xmu * scale if needs_invstd else None,
        )


# relu(batch_norm(input) + batch_norm(input2)) ---------------------------------------------------------------------


def _save_dual_train(ctx, inputs, output, recomputed):
    input, weight, bias, input2, weight2, bias2, eps, eps2, relu, *_ = inputs
    result, mean, _, invstd, mean2, _, invstd2, mask = output
    ctx.relu, ctx.eps, ctx.eps2 = relu, eps, eps2
    ctx.save_for_backward(input, weight, mean, invstd, input2, weight2, mean2, invstd2, mask if relu else None)
    if recomputed:
        branch, branch2 = (
            (input, weight, _copied(bias), mean, invstd),
            (input2, weight2, _copied(bias2), mean2, invstd2),
        )
        recomputation.note_dual_train(result, branch, branch2, relu)


def _backward_dual_train(ctx, grad_output, grad_output2):
    input, weight, mean, invstd, input2, weight2, mean2, invstd2, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    input, input2 = (_restored(ctx, saved) for saved in (input, input2))
    mean, invstd = _batch_statistics(input, ctx.eps, mean, invstd)
    mean2, invstd2 = _batch_statistics(input2, ctx.eps2, mean2, invstd2)
    gradients = _backward_op(
        "dual_batch_norm_add_relu_train_backward",
        grad_output,
        input,
        weight,
        mean,
        invstd,
        input2,
        weight2,
        mean2,
        invstd2,
        mask,
        ctx.relu,
        *needs,
        grad_output2,
        ctx.channels_last,
    )
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


def _save_dual_eval(ctx, inputs, output, recomputed):
    input, weight, bias, mean, var, input2, weight2, bias2, mean2, var2, eps, eps2, relu, *_ = inputs
    ctx.relu, ctx.eps, ctx.eps2 = relu, eps, eps2
    mean, var, mean2, var2 = map(_copied, (mean, var, mean2, var2))
    ctx.save_for_backward(input, weight, mean, var, input2, weight2, mean2, var2, output[1] if relu else None)
    if recomputed:
        branch, branch2 = (input, weight, _copied(bias), mean, var), (input2, weight2, _copied(bias2), mean2, var2)
        recomputation.note_dual_eval(output[0], branch, branch2, eps, eps2, relu)


def _backward_dual_eval(ctx, grad_output, grad_output2):
    input, weight, mean, var, input2, weight2, mean2, var2, mask = ctx.saved_tensors
    flags = ctx.needs_input_grad
    needs = (*flags[0:3], *flags[5:8])
    input, input2 = (_restored(ctx, saved) for saved in (input, input2))
    gradients = _backward_op(
        "dual_batch_norm_add_relu_eval_backward",
        grad_output,
        input,
        weight,
        mean,
        var,
        input2,
        weight2,
        mean2,
        var2,
        mask,
        ctx.eps,
        ctx.eps2,
        ctx.relu,
        *needs,
        grad_output2,
        ctx.channels_last,
    )
    gradients = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return *gradients[:3], None, None, *gradients[3:]


# relu(input + residual) -------------------------------------------------------------------------------------------


def _save_add_relu(ctx, inputs, output, recomputed):
    ctx.save_for_backward(output[1])


def _backward_add_relu(ctx, grad_output, grad_output2):
    (mask,) = ctx.saved_tensors
    grad_output = _sum(grad_output, grad_output2)
    if is_legacy_batchedtensor(grad_output):  # a batch of gradients, whose layout nobody may ask for
        like = torch.empty(grad_output.shape, device="meta")
        if ctx.strides is not None:
            like = torch.empty_strided(grad_output.shape, ctx.strides, device="meta")
        keep = layout.unflat(layout.unpack(mask, grad_output.numel()), like, ctx.channels_last)
        grad = torch.where(keep, grad_output, torch.zeros_like(grad_output))
    else:
        grad = _backward_op("add_relu_backward", _restored(ctx, grad_output), mask, ctx.channels_last)
    needs_input, needs_residual, *_ = ctx.needs_input_grad
    return grad if needs_input else None, grad if needs_residual else None


FORMULAS = [
    _Formula("batch_norm_add_relu_train", _save_train, _backward_train),
    _Formula("batch_norm_add_relu_eval", _save_eval, _backward_eval),
    _Formula("batch_norm_add_relu_apply", _save_apply, _backward_apply),
    _Formula("dual_batch_norm_add_relu_train", _save_dual_train, _backward_dual_train),
    _Formula("dual_batch_norm_add_relu_eval", _save_dual_eval, _backward_dual_eval),
    _Formula("add_relu", _save_add_relu, _backward_add_relu),
]

# The operators without a formula: their gradient, hardly ever asked for, is that of the reference.
THROUGH_REFERENCE = [
    "batch_norm_add_relu_train_backward",
    "batch_norm_add_relu_eval_backward",
    "dual_batch_norm_add_relu_train_backward",
    "dual_batch_norm_add_relu_eval_backward",
    "add_relu_backward",
    "batch_norm_statistics",
    "batch_norm_add_relu_backward_reduce",
    "batch_norm_add_relu_backward_apply",
]

FUNCTIONS = {formula.name: formula.function() for formula in FORMULAS}


def _train_with_update(ctx, input, weight, bias, residual, settings):
    eps, relu, save_mask, running_mean, running_var, momentum = settings
    library.note_distributed()
    output, mean, invstd, saved_bias, mask = _TRAIN_WITH_UPDATE(
        input, weight, bias, residual, running_mean, running_var, momentum, eps, relu, save_mask
    )
    if ctx is not None:
        handover.begin(ctx, output)
        inputs = (input, weight, bias, residual, eps, relu, save_mask, None)
        _save_train(ctx, inputs, (output, mean, None, invstd, mask), recomputation.is_on(), saved_bias)
    return output


def _dual_train_with_update(ctx, input, weight, bias, input2, weight2, bias2, settings):
    eps, eps2, relu, save_mask, running_mean, running_var, momentum, running_mean2, running_var2, momentum2 = settings
    output, mean, invstd, mean2, invstd2, mask = _LIBRARY.dual_batch_norm_add_relu_train_with_update.default(
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
    )
    if ctx is not None:
        handover.begin(ctx, output)
        ctx.strides, ctx.channels_last = input.stride(), None
        inputs = (input, weight, bias, input2, weight2, bias2, eps, eps2, relu, save_mask, None)
        _save_dual_train(ctx, inputs, (output, mean, None, invstd, mean2, None, invstd2, mask), recomputation.is_on())
    return output


# Running statistics change without a word to autograd, as in torch's own batch_norm: a BatchNorm that torch and the
# fused operator call in one step would otherwise refuse its backward. Our own evaluation saved copies.
#
# Training in eager: None or the context of an autograd.Function, the tensors that may have a gradient, then one tuple
# of the settings of the functional operator and of running mean, running variance and momentum of each branch.
WITH_UPDATE = {
    "batch_norm_add_relu_train": _train_with_update,
    "dual_batch_norm_add_relu_train": _dual_train_with_update,
}
FUNCTIONS_WITH_UPDATE = {
    formula.name: formula.function_with_update(WITH_UPDATE[formula.name])
    for formula in FORMULAS
    if formula.name in WITH_UPDATE
}


class MaxPool2d(torch.autograd.Function):
    """Max pooling that keeps its indices in 4 bytes an output, or none: torch keeps its input, and indices of 8 bytes.

    One byte, for a place in the window, would take as many passes over the indices as pooling takes altogether.
    """

    @staticmethod
    def forward(ctx, input: Tensor, arguments: tuple, keeps_input: bool) -> Tensor:
        """``arguments`` are those of :func:`torch.nn.functional.max_pool2d` after the input.

        With ``keeps_input`` the backward finds the maxima in it again: it may be an activation that is recomputed.
        """
        ctx.arguments = arguments
        if keeps_input:
            ctx.save_for_backward(input)
            return F.max_pool2d(input, *arguments)
        output, indices = F.max_pool2d(input, *arguments, return_indices=True)
        # An index is a place in a plane.
        is_small = input.shape[-1] * input.shape[-2] <= torch.iinfo(torch.int32).max
        ctx.save_for_backward(indices.to(torch.int32) if is_small else indices)
        ctx.input = torch.empty_like(input, device="meta")
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        """torch's own, with the same indices."""
        kernel_size, stride, padding, dilation, ceil_mode = ctx.arguments
        sizes = kernel_size, [] if stride is None else stride, padding, dilation
        arguments = *map(_pair, sizes), ceil_mode
        (saved,) = ctx.saved_tensors
        if hasattr(ctx, "input"):
            # Its values do not count, its sizes and memory format do.
            input, indices = torch.empty_like(ctx.input, device=grad_output.device), saved.long()
        else:
            input = saved.detach()  # it decides where a gradient goes, and has none of its own
            _, indices = torch.ops.aten.max_pool2d_with_indices.default(input, *arguments)
        backward = torch.ops.aten.max_pool2d_with_indices_backward.default
        return backward(grad_output, input, *arguments, indices), None, None


def _pair(value):
    return list(value) if isinstance(value, tuple | list) else [int(value)] * 2


def _save_inputs(ctx, inputs, output) -> None:
    tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.tensors, ctx.others = tensors, [None if i in tensors else value for i, value in enumerate(inputs)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*[inputs[i] for i in tensors])


def _backward_through(name: str):
    def backward(ctx, *grad_outputs):
        create_graph = torch.is_grad_enabled()
        inputs = list(ctx.others)
        for i, saved in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[i] = saved
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                # A view keeps the connection to the graph for yet higher orders; a leaf is all that a first order
                # needs.
                inputs[i] = inputs[i].view_as(inputs[i]) if create_graph else inputs[i].detach().requires_grad_()
            outputs = getattr(reference, name)(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [
                (output, grad)
                for output, grad in zip(outputs, grad_outputs, strict=True)
                if grad is not None and output.requires_grad
            ]
            gradients = torch.autograd.grad(
                [output for output, _ in pairs],
                [inputs[i] for i in wanted],
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        result = [None] * len(inputs)
        for i, grad in zip(wanted, gradients, strict=True):
            result[i] = grad
        return tuple(result)

    return backward


class _AutogradLibrary(torch.library.Library):
    """Stands before torch.library's kernels.

    It sends forward-mode AD and functorch's transforms to the reference: those kernels would drop tangents without a
    word, and refuse ``torch.func.grad``.

    In an ONNX export it calls the decomposition: torch.onnx knows no operator of this package.

    And it says which memory format an operator works in, where the caller leaves it open. Every graph of torch.compile
    with a backward is recorded below this, and so its operators have the format that they were traced with.
    """

    def impl(self, op_name, fn, dispatch_key="", **options):
        names = [argument.name for argument in getattr(_LIBRARY, op_name).default._schema.arguments]
        has_format = names[-1] == "channels_last"
        like = names.index("input") if "input" in names else 0

        def kernel(keyset, *args):
            if peek_interpreter_stack() is not None or (
                forward_ad._current_level >= 0 and any(map(_has_tangent, args))
            ):
                return getattr(reference, op_name)(*args)
            if op_name in DECOMPOSITIONS and _is_onnx_export():
                return DECOMPOSITIONS[op_name](*args)
            if has_format and (len(args) < len(names) or args[-1] is None):
                absent = (None,) * (len(names) - 1 - len(args))
                args = (*args[: len(names) - 1], *absent, layout.is_channels_last(args[like]))
            return fn(keyset, *args)

        return super().impl(op_name, kernel, dispatch_key, **options)


def _is_onnx_export() -> bool:
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def _has_tangent(value) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


_REGISTRATIONS = _AutogradLibrary("resnet_fused", "FRAGMENT")


def register(registrations: torch.library.Library) -> None:
    """Hands the formulas to torch.library."""
    for name in WITH_UPDATE:
        # Called below autograd alone: no guard need keep it out.
        registrations.impl(f"{name}_with_update", torch.library.fallthrough_kernel, "Autograd")
    formulas = [(f.name, f.backward, f.setup_context) for f in FORMULAS]
    formulas += [(name, _backward_through(name), _save_inputs) for name in THROUGH_REFERENCE]
    for name, backward, setup_context in formulas:
        torch.library.register_autograd(
            f"resnet_fused::{name}", backward, setup_context=setup_context, lib=_REGISTRATIONS
        )
