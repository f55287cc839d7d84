"""The evaluation operators in operations of torch, for what leaves for a place without this package.

torch.onnx gets them below autograd (autograd.py), where it decomposes what it does not know.
``ExportedProgram.run_decompositions`` asks a table of torch's operators alone, and has to be given
:func:`decompositions`. They are not in ``torch._decomp.decomposition_table``: Inductor calls these operators, and where
``CI`` is set it refuses to call what is in that table.
"""

import torch

from . import layout

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def decompositions() -> dict:
    """``torch.export.default_decompositions()`` with the evaluation operators of this package.

    Example:
        >>> program = torch.export.export(fuse(model).eval(), (images,))
        >>> torch.export.save(program.run_decompositions(resnet_fused.decompositions()), "model.pt2")
    """
    table = torch.export.default_decompositions()
    for name, decomposition in DECOMPOSITIONS.items():
        table[getattr(torch.ops.resnet_fused, name).default] = decomposition
    return table


def _batch_norm(input, weight, bias, running_mean, running_var, eps):
    return _BATCH_NORM(input, weight, bias, running_mean, running_var, 0.0, eps)[0]


def _finished(output, input, relu, save_mask, channels_last):
    """The output behind its ReLU, in the layout that the operator gives, and the mask."""
    output = layout.dense(output.relu() if relu else output, input, channels_last)
    mask = layout.pack(~(layout.rows(output, channels_last) <= 0)) if relu and save_mask else None
    return output, input.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _eval(input, weight, bias, residual, running_mean, running_var, eps, relu, save_mask, channels_last=None):
    output = _batch_norm(input, weight, bias, running_mean, running_var, eps)
    if residual is None:
        return _finished(output, input, relu, False, channels_last)
    return _finished(output + residual, input, relu, save_mask, channels_last)


def _dual_eval(
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
    output = _batch_norm(input, weight, bias, running_mean, running_var, eps)
    shortcut = _batch_norm(input2, weight2, bias2, running_mean2, running_var2, eps2)
    return _finished(output + shortcut, input, relu, save_mask, channels_last)


def _add_relu(input, residual, save_mask, channels_last=None):
    output = layout.dense((input + residual).relu(), input, channels_last)
    if not save_mask:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, layout.pack(~(layout.flat(output, channels_last) <= 0))


DECOMPOSITIONS = {
    "batch_norm_add_relu_eval": _eval,
    "dual_batch_norm_add_relu_eval": _dual_eval,
    "add_relu": _add_relu,
}
