"""Modules: BatchNorm with residual add and ReLU, and the two residual blocks made of it."""

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bypass, functional, tracing
from .ops import recomputation


def batch_norm_add_relu(bn: nn.BatchNorm2d, input: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(bn(input) + residual) in one operator, with the bookkeeping of :class:`torch.nn.BatchNorm2d`.

    ``bn`` gives parameters, statistics and mode; it is not called, so its hooks do not run. In training its running
    statistics and ``num_batches_tracked`` are updated once, after the operator succeeded, and not at all where
    activation checkpointing runs the forward again.

    Args:
        bn: any ``nn.BatchNorm2d``.
        input: (N, C, H, W) with the C of ``bn``.
        residual: None, or a tensor of the shape of ``input``.
        relu: whether to apply the ReLU.

    Raises:
        ValueError: ``input`` is not 4-dimensional, or has one value a channel in training.
        RuntimeError: shapes, dtypes or devices that do not fit; nothing has been written then.
    """
    bn._check_input_dim(input)
    weight, bias, mean, var, training, momentum, counter = _state(bn)
    output = functional.batch_norm_add_relu(input, mean, var, weight, bias, residual, training, momentum, bn.eps, relu)
    if counter is not None:
        counter.add_(1)
    return output


def dual_batch_norm_add_relu(
    bn: nn.BatchNorm2d, input: Tensor, bn2: nn.BatchNorm2d, input2: Tensor, relu: bool = True
) -> Tensor:
    """relu(bn(input) + bn2(input2)) in one operator: the end of a block with a projection shortcut.

    Each branch is as in :func:`batch_norm_add_relu`, which also serves in two steps where one operator cannot: one
    BatchNorm in training and the other in evaluation, parameters of different dtypes, or the same module twice.

    Raises:
        ValueError, RuntimeError: as :func:`batch_norm_add_relu`.
    """
    joined = can_join(bn, bn2)
    if not joined:
        for module, value in ((bn, input), (bn2, input2)):
            module._check_input_dim(value)
            if _uses_batch_statistics(module):
                F._verify_batch_size(value.size())
        functional.check_branches(_branch(bn, input), _branch(bn2, input2), relu)
    if bn is bn2:
        # Its running statistics see the main branch first, as they would unfused.
        return batch_norm_add_relu(bn2, input2, batch_norm_add_relu(bn, input, relu=False), relu)
    if not joined:
        return batch_norm_add_relu(bn, input, batch_norm_add_relu(bn2, input2, relu=False), relu)
    bn._check_input_dim(input)
    bn2._check_input_dim(input2)
    weight, bias, mean, var, training, momentum, counter = _state(bn)
    weight2, bias2, mean2, var2, _, momentum2, counter2 = _state(bn2)
    output = functional.dual_batch_norm_add_relu(
        *(input, mean, var, weight, bias, input2, mean2, var2, weight2, bias2),
        *(training, momentum, bn.eps, momentum2, bn2.eps, relu),
    )
    for of_branch in (counter, counter2):
        if of_branch is not None:
            of_branch.add_(1)
    return output


def can_join(bn: nn.BatchNorm2d, bn2: nn.BatchNorm2d) -> bool:
    """Whether one operator serves both: two modules in the same mode, with parameters of the same dtype."""
    return bn is not bn2 and _uses_batch_statistics(bn) == _uses_batch_statistics(bn2) and _dtype(bn) == _dtype(bn2)


def _branch(bn: nn.BatchNorm2d, input: Tensor) -> tuple:
    return input, bn.weight, bn.bias, bn.running_mean, bn.running_var


def _uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _tensors(bn: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean and running_var, past ``nn.Module.__getattr__``, which takes longer than an add."""
    if isinstance(bn, nn.Module):
        parameters, buffers = bn._parameters, bn._buffers
        if "weight" in parameters and "bias" in parameters and "running_mean" in buffers and "running_var" in buffers:
            return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def _state(bn: nn.BatchNorm2d) -> tuple:
    """What ``bn`` gives its operator now.

    weight, bias, the running statistics to normalize with or to update, whether those of the batch are used, the share
    of this batch in the running ones, and ``num_batches_tracked`` where it counts this batch.
    """
    weight, bias, mean, var = _tensors(bn)
    training, momentum, counter = bn.training, bn.momentum, None
    if not training:
        training = mean is None and var is None
    elif not bn.track_running_stats:
        mean = var = None
    elif functional.in_recomputation():
        # Copies take the second update where torch's own operation runs; None would change what it saves for its
        # backward.
        mean, var = None if mean is None else mean.clone(), None if var is None else var.clone()
    else:
        counter = bn.num_batches_tracked
    if momentum is None:
        # A cumulative average, which counts this batch already.
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    return weight, bias, mean, var, training, momentum, counter


def _dtype(bn: nn.BatchNorm2d) -> torch.dtype | None:
    for tensor in (bn.weight, bn.bias, bn.running_mean):
        if tensor is not None:
            return tensor.dtype
    return None


# What torch.jit.script compiles.


def _scripted_batch_norm_add_relu(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
    output = self._batch_norm(input)
    if residual is not None:
        output = output + residual
    return F.relu(output) if self.relu else output


def _scripted_block(self, x: Tensor) -> Tensor:
    return self._forward(x)


def _scripted_basic(self, x: Tensor) -> Tensor:
    out = self.conv1(x)
    out = self.bn1(out)
    if self.bn2_before_conv2:
        return F.relu(self.conv2(self.bn2(out)) + self.shortcut(x))
    return self.bn2(self.conv2(out), self.shortcut(x))


def _scripted_bottleneck(self, x: Tensor) -> Tensor:
    out = self.bn1(self.conv1(x))
    out = self.bn2(self.conv2(out))
    return self.bn3(self.conv3(out), self.shortcut(x))


class BatchNormAddReLU2d(tracing.Scriptable, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` followed by an optional residual add and an optional ReLU, as one operator.

    Parameters, buffers, state_dict keys and modes are those of ``nn.BatchNorm2d``; the other arguments too.

    Args:
        relu: whether the ReLU is part of the module.

    Shape:
        input (N, C, H, W), residual None or of the same shape, result of the shape and memory format of input. float64,
        float32, bfloat16 and float16; parameters of input's dtype, or float32 for the 16-bit types.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` puts a SyncBatchNorm in its place, which neither adds nor rectifies. The
    blocks here notice and do both themselves; other code that calls this module has to do the same.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        relu: bool = True,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.bias = None
        self.relu = relu

    # Under a name of its own, which torch.jit needs.
    _batch_norm = types.FunctionType(nn.BatchNorm2d.forward.__code__, nn.BatchNorm2d.forward.__globals__, "_batch_norm")

    @tracing.scripted_as(_scripted_batch_norm_add_relu)
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(batch_norm(input) + residual).

        Raises:
            ValueError: ``input`` is not 4-dimensional, or has one value a channel in training.
            RuntimeError: shapes, dtypes or devices that do not fit; nothing has been written then.
        """
        return batch_norm_add_relu(self, input, residual, self.relu)

    def extra_repr(self) -> str:
        """The arguments of the module."""
        return f"{super().extra_repr()}, relu={self.relu}"


def _normalize(bn: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """A block's BatchNorm, add and ReLU, also where another module was put in its place (SyncBatchNorm, Identity)."""
    if isinstance(bn, BatchNormAddReLU2d):
        return bn(input) if residual is None else bn(input, residual)
    output = bn(input)
    return F.relu(output if residual is None else output + residual)


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride=1, groups=1, dilation=1, **factory
) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
        **factory,
    )


class _Block(tracing.Scriptable, nn.Module):
    """What both blocks share: the shortcut, and the end of the block in the order of the paper."""

    recompute: bool | str = False

    @tracing.scripted_as(_scripted_block)
    def forward(self, x: Tensor) -> Tensor:
        """The block's result; raises what its convolutions and :func:`batch_norm_add_relu` raise."""
        if not self.recompute:
            return self._forward(x)
        with recomputation.recompute.as_asked(self.recompute):
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What is not as by default."""
        return f"recompute={self.recompute!r}" if self.recompute else ""

    def _make_shortcut(self, in_channels: int, out_channels: int, stride: int, **factory) -> nn.Sequential:
        if stride == 1 and in_channels == out_channels:
            return nn.Sequential()
        return nn.Sequential(
            _conv(in_channels, out_channels, 1, stride, **factory), nn.BatchNorm2d(out_channels, **factory)
        )

    def _end(self, bn: nn.Module, input: Tensor, x: Tensor) -> Tensor:
        """relu(bn(input) + shortcut(x)), in one operator with the BatchNorm of a projection shortcut."""
        apart = bypass.why_watched(input) or bypass.why_not(bn, BatchNormAddReLU2d)
        if apart is not None or bypass.why_not_projection(self.shortcut) is not None:
            return _normalize(bn, input, self.shortcut(x))
        return dual_batch_norm_add_relu(bn, input, self.shortcut[-1], bypass.before_last(self.shortcut, x), bn.relu)


class FusedResidualBlock(_Block):
    """The basic residual block of He et al. (2015) with fused BatchNorm, add and ReLU.

    relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), where conv1 and conv2 are 3x3, and the shortcut is a 1x1
    convolution with BatchNorm where shapes change (``shortcut.0``, ``shortcut.1``) and empty otherwise. It initializes
    as its parts do.

    Args:
        in_channels, out_channels: C of input and result.
        stride: of conv1 and of the projection shortcut.
        bn2_before_conv2: False for the order of the paper, above. True for relu(conv2(bn2(relu(bn1(conv1(x))))) +
            shortcut(x)): a widely read tutorial prints the block so, and models have been trained with it. Keys and
            shapes of the state_dict are the same in both orders, so choose the order that the weights were trained
            with.
        zero_init_residual: start with a bn2 of zero weight, so that the block starts as relu(shortcut(x)).
        recompute: whether activations are made again in backward (:class:`resnet_fused.recompute`), and with
            "convolutions" also the output of a 1x1 convolution that is larger than its input; an attribute that may be
            changed at any time.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)); memory format as the
        convolutions give it.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        bn2_before_conv2: bool = False,
        zero_init_residual: bool = False,
        recompute: bool | str = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.recompute = recomputation.checked(recompute)
        factory = {"device": device, "dtype": dtype}
        self.bn2_before_conv2 = bn2_before_conv2
        self.conv1 = _conv(in_channels, out_channels, 3, stride, **factory)
        self.bn1 = BatchNormAddReLU2d(out_channels, **factory)
        self.conv2 = _conv(out_channels, out_channels, 3, **factory)
        # In the tutorial's order neither add nor ReLU follows it.
        self.bn2 = BatchNormAddReLU2d(out_channels, relu=not bn2_before_conv2, **factory)
        self.shortcut = self._make_shortcut(in_channels, out_channels, stride, **factory)
        if zero_init_residual:
            nn.init.zeros_(self.bn2.weight)

    @tracing.scripted_as(_scripted_basic)
    def _forward(self, x: Tensor) -> Tensor:
        out = _normalize(self.bn1, self.conv1(x))
        if not self.bn2_before_conv2:
            return self._end(self.bn2, self.conv2(out), x)
        out = self.conv2(self.bn2(out))
        if bypass.why_watched(out) is not None or bypass.why_not_projection(self.shortcut) is not None:
            return functional.add_relu(out, self.shortcut(x))
        return batch_norm_add_relu(self.shortcut[-1], bypass.before_last(self.shortcut, x), out)

    def extra_repr(self) -> str:
        """The order, where it is not that of the paper, and recomputation."""
        order = "bn2_before_conv2=True" if self.bn2_before_conv2 else ""
        return ", ".join(filter(None, (order, super().extra_repr())))


class FusedBottleneck(_Block):
    """The bottleneck residual block of He et al. (2015) with fused BatchNorm, add and ReLU; the stride is on the 3x3
    convolution.

    relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)), where conv1 and conv3 are 1x1 and conv2 is
    3x3. The shortcut is as in :class:`FusedResidualBlock`.

    Args:
        in_channels: C of the input.
        channels: of the inner convolutions at ``groups=1, base_width=64``; the result has ``expansion`` (4) times as
        many.
        stride: of conv2 and of the projection shortcut.
        groups: of conv2 (ResNeXt).
        base_width: channels of a group for every 64 of ``channels`` (ResNeXt, Wide ResNet).
        dilation: of conv2.
        zero_init_residual: start with a bn3 of zero weight, so that the block starts as relu(shortcut(x)).
        recompute: whether activations are made again in backward (:class:`resnet_fused.recompute`), and with
            "convolutions" also the output of a 1x1 convolution that is larger than its input; an attribute that may be
            changed at any time.

    Shape:
        (N, in_channels, H, W) to (N, 4 channels, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        *,
        zero_init_residual: bool = False,
        recompute: bool | str = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.recompute = recomputation.checked(recompute)
        factory = {"device": device, "dtype": dtype}
        width = int(channels * (base_width / 64.0)) * groups
        out_channels = channels * self.expansion
        self.conv1 = _conv(in_channels, width, 1, **factory)
        self.bn1 = BatchNormAddReLU2d(width, **factory)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation, **factory)
        self.bn2 = BatchNormAddReLU2d(width, **factory)
        self.conv3 = _conv(width, out_channels, 1, **factory)
        self.bn3 = BatchNormAddReLU2d(out_channels, **factory)
        self.shortcut = self._make_shortcut(in_channels, out_channels, stride, **factory)
        if zero_init_residual:
            nn.init.zeros_(self.bn3.weight)

    @tracing.scripted_as(_scripted_bottleneck)
    def _forward(self, x: Tensor) -> Tensor:
        out = _normalize(self.bn1, self.conv1(x))
        out = _normalize(self.bn2, self.conv2(out))
        return self._end(self.bn3, self.conv3(out), x)
