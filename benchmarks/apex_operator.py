"""NVIDIA apex's fused batch norm, where it is installed: float16 in (N, H, W, C), with a ReLU or an add and a ReLU."""

from collections.abc import Callable

import torch
from torch import Tensor


def suits(kind: str, dtype: torch.dtype, layout: str, training: bool) -> bool:
    """Whether apex has a case."""
    return dtype == torch.float16 and layout == "channels_last" and kind != "dual" and training


def forward(main: tuple[Tensor, ...], residual: Tensor | None) -> Callable[[], Tensor]:
    """The forward on an operator's own tensors, seen as (N, H, W, C)."""
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    x, running_mean, running_var, weight, bias = main
    module = BatchNorm2d_NHWC(x.shape[1], fuse_relu=True).to(x.device)
    module.weight, module.bias = (torch.nn.Parameter(p.detach().clone()) for p in (weight, bias))
    module.running_mean.copy_(running_mean)
    module.running_var.copy_(running_var)

    def call() -> Tensor:
        added = None if residual is None else residual.permute(0, 2, 3, 1)
        return module(x.permute(0, 2, 3, 1), added).permute(0, 3, 1, 2)

    return call
