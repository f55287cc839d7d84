"""Autocast: batch normalization runs in its input's dtype, and a residual of another dtype is added in the wider one.

That is what torch does with the operations apart: ``batch_norm`` stands on no autocast list and ``add`` promotes.
"""

import torch

from .torch_private import keys, without_keys

# The operators with two tensors of the full shape, and where those stand among the arguments.
PROMOTED = {
    "batch_norm_add_relu_train": (0, 3),
    "batch_norm_add_relu_eval": (0, 3),
    "batch_norm_add_relu_apply": (0, 3),
    "dual_batch_norm_add_relu_train": (0, 3),
    "dual_batch_norm_add_relu_eval": (0, 5),
    "add_relu": (0, 1),
}


def _kernel(name: str, positions: tuple[int, int], key: str):
    op = getattr(torch.ops.resnet_fused, name).default
    first, second = positions
    own = keys(key)

    def promote(*arguments):
        arguments = list(arguments)
        a, b = arguments[first], arguments[second]
        if b is not None and a.dtype != b.dtype:
            dtype = torch.promote_types(a.dtype, b.dtype)
            arguments[first], arguments[second] = a.to(dtype), b.to(dtype)
        with without_keys(own):
            return op(*arguments)

    return promote


def register(library: torch.library.Library) -> None:
    """Hands the kernels to torch.library."""
    for name, positions in PROMOTED.items():
        for key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
            library.impl(name, _kernel(name, positions, key), key)
