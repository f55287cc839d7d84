"""NVIDIA apex's fused batch norm, where it is installed: float16 in (N, H, W, C), with a ReLU or an add and a ReLU."""

from collections.abc import Callable

import torch
from torch import Tensor

from .operator import Operator


def suits(operator: Operator) -> bool:
    """Whether apex has this case."""
    case = operator.case
    return case.dtype == torch.float16 and case.layout == "channels_last" and case.site.kind != "dual" and case.training


def forward(operator: Operator) -> Callable[[], Tensor]:
    """The forward on the operator's own tensors, seen as (N, H, W, C)."""
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    x, running_mean, running_var, weight, bias = operator.main
    module = BatchNorm2d_NHWC(operator.case.site.channels, fuse_relu=True).to(x.device)
    module.weight, module.bias = (torch.nn.Parameter(p.detach().clone()) for p in (weight, bias))
    module.running_mean.copy_(running_mean)
    module.running_var.copy_(running_var)

    def call() -> Tensor:
        residual = None if operator.residual is None else operator.residual.permute(0, 2, 3, 1)
        return module(x.permute(0, 2, 3, 1), residual).permute(0, 3, 1, 2)

    return call
