"""What the modules that a fused forward meets compute, by their exact class, and whether they may give way to it.

Every class stands here with the forward that was read when this was written, and is asked at each call whether it still
has it: a subclass, a hook, a forward replaced on instance or class, and the module is called as it always was. The
files of the model families (:mod:`.timm_layers`, :mod:`.torchvision_ops`, :mod:`.transformers_layers`) tell
of the classes of their packages.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, jit, nn

from .. import bypass
from .remembered import recall

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)

# What a module computes.
NORM = "norm"  # a BatchNorm, and what may follow it in the same module
RELU = "relu"
FRESH = "fresh"  # a new tensor, which nobody else holds
SAME = "same"  # its input
CHAIN = "chain"  # what its children compute, one after another
POOL = "pool"


class Kind(NamedTuple):
    """What is known of a class.

    Attributes:
        role: one of the constants above.
        forward: the forward that the class must have.
        inactive: of a module that gives its input in some states, whether it is in one.
        norm: of a BatchNorm, gives for an input what stands for it, with the attributes of an ``nn.BatchNorm2d``; None
            where the operators do not compute what it does.
        tail: of a BatchNorm, the names of the children that its output goes through.
        why_not: of a BatchNorm, one more reason why it must be called; None where there is none.
    """

    role: str
    forward: Callable
    inactive: Callable[[nn.Module], bool] | None = None
    norm: Callable[[nn.Module, Tensor], object] | None = None
    tail: tuple[str, ...] = ()
    why_not: Callable[[nn.Module], str | None] | None = None


def synchronizes(bn: nn.SyncBatchNorm) -> str | None:
    """Why a SyncBatchNorm needs its own forward: in training it meets the other processes there."""
    distributed = torch.distributed
    if bn.training and distributed.is_available() and distributed.is_initialized():
        return "synchronizes its statistics with other processes in training"
    return None


def _no_dropout(dropout: nn.Module) -> bool:
    return dropout.p == 0.0 or (not dropout.training and 0.0 <= dropout.p <= 1.0)


OF_TORCH: dict[type[nn.Module], Kind] = {
    **{cls: Kind(NORM, cls.forward) for cls in _BATCH_NORMS},
    nn.SyncBatchNorm: Kind(NORM, nn.SyncBatchNorm.forward, why_not=synchronizes),
    nn.ReLU: Kind(RELU, nn.ReLU.forward),
    **{cls: Kind(FRESH, cls.forward) for cls in _CONVOLUTIONS},
    nn.Identity: Kind(SAME, nn.Identity.forward),
    **{cls: Kind(SAME, cls.forward, inactive=_no_dropout) for cls in _DROPOUTS},
    nn.Sequential: Kind(CHAIN, nn.Sequential.forward),
    nn.MaxPool2d: Kind(POOL, nn.MaxPool2d.forward),
}
# The attribute of any other class with what is known of it, or None.
MEMORY = "_resnet_fused_kind"


def is_known(cls: type[nn.Module]) -> bool:
    """Whether a class was looked at, whatever was found."""
    return cls in OF_TORCH or recall(cls, MEMORY, cls) is not None


def known(cls: type[nn.Module]) -> Kind | None:
    """What is known of a class; None where nothing is, or it was not looked at."""
    kind = OF_TORCH.get(cls)
    if kind is None:
        found = recall(cls, MEMORY, cls)
        return None if found is None else found.value
    return kind


def inherited(cls: type[nn.Module]) -> Kind | None:
    """What is known of a subclass that changes nothing of what its base computes: a Sequential, or a convolution.

    Packages make such subclasses of Sequential, and ``parametrize`` of convolutions.
    """
    if cls.__call__ is not nn.Module.__call__:
        return None
    if getattr(cls, "forward", None) is None or issubclass(cls, jit.ScriptModule):
        return None
    if issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward:
        return Kind(CHAIN, nn.Sequential.forward) if cls.__iter__ is nn.Sequential.__iter__ else None
    for base in _CONVOLUTIONS:
        same = getattr(cls, "_conv_forward", None) is getattr(base, "_conv_forward", None)
        if issubclass(cls, base) and cls.forward is base.forward and same:
            return Kind(FRESH, base.forward)
    return None


def why_not(module: nn.Module, kind: Kind) -> str | None:
    """Why ``module``, of that kind, must be called as it is; None where a fused forward may stand for the call."""
    reason = bypass.why_called(module)
    if reason is not None:
        return reason
    if type(module).forward is not kind.forward:
        return f"is of {type(module).__name__}, whose forward was replaced"
    function = _FUNCTIONS.get(kind.role)
    if function is not None and function[0]():
        return f"calls torch's {function[1]}, which was replaced"
    return None if kind.why_not is None else kind.why_not(module)


# What a module of a role calls, and whether that was replaced.
_FUNCTIONS = {
    NORM: (bypass.is_batch_norm_replaced, "batch_norm"),
    RELU: (bypass.is_relu_replaced, "relu"),
    SAME: (bypass.is_dropout_replaced, "dropout"),
    POOL: (bypass.is_max_pool_replaced, "max_pool2d"),
}


def makes_fresh(module: nn.Module, kind: Kind) -> bool:
    """Whether what ``module``, of the role FRESH, gives is its own: only a hook behind it could give something else.

    weight_norm and spectral_norm of old set the weight in a hook before it.
    """
    members = module.__dict__
    hooked = members["_forward_hooks"] or bypass.has_global_forward_hooks()
    return type(module).forward is kind.forward and "forward" not in members and not hooked


class Frozen:
    """A BatchNorm of fixed statistics and parameters with the attributes of an ``nn.BatchNorm2d`` in evaluation."""

    training = False
    track_running_stats = True
    num_batches_tracked = None
    momentum = 0.0

    def __init__(self, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float):
        self.weight = weight
        self.bias = bias
        self.running_mean = running_mean
        self.running_var = running_var
        self.eps = eps

    def _check_input_dim(self, input: Tensor) -> None:
        """The kernels take any input that the original does."""


def frozen(module: nn.Module, input: Tensor) -> Frozen | None:
    """The norm of a FrozenBatchNorm2d as torchvision and timm have it.

    It computes in the wider dtype of input and buffers, and broadcasts; the operators do where these are the same.
    """
    return frozen_with(module, input, module.eps)


def frozen_with(module: nn.Module, input: Tensor, eps: float) -> Frozen | None:
    """The same for one that keeps its eps elsewhere."""
    buffers = module.weight, module.bias, module.running_mean, module.running_var
    if input.dim() != 4 or any(buffer.dtype != input.dtype or buffer.requires_grad for buffer in buffers):
        return None
    if any(buffer.shape != input.shape[1:2] for buffer in buffers):
        return None
    return Frozen(*buffers, eps)
