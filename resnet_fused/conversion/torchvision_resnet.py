"""torchvision's ResNet, ResNeXt and Wide ResNet: BasicBlock, Bottleneck and the stem of ResNet.

Their forwards are written out below, and the code of the installed torchvision must be that of these.
"""

import inspect
import operator
import sys
import types

import torch
from torch import Tensor, nn

from . import sites
from .classes import Fused, Refused
from .sites import Site
from .source import same_code


class FusedBasicBlock(Fused):
    """The forward of ``torchvision.models.resnet.BasicBlock``, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, planes, H / stride, W / stride)."""
        relu = self.relu
        out = sites.batch_norm_relu(self.bn1, relu, self.conv1(x))
        return sites.batch_norm_add_relu(self.bn2, relu, operator.iadd, self.conv2(out), x, self.downsample)

    @classmethod
    def _fusion_sites(cls, module: nn.Module, plan: None) -> tuple[Site, ...]:
        """bn1 with ReLU, bn2 with shortcut and ReLU."""
        return Site("bn1", "relu"), Site("bn2", "relu", adds=True, shortcut=_downsample(module))


class FusedBottleneck(Fused):
    """The forward of ``torchvision.models.resnet.Bottleneck``, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, 4 planes, H / stride, W / stride)."""
        relu = self.relu
        out = sites.batch_norm_relu(self.bn1, relu, self.conv1(x))
        out = sites.batch_norm_relu(self.bn2, relu, self.conv2(out))
        return sites.batch_norm_add_relu(self.bn3, relu, operator.iadd, self.conv3(out), x, self.downsample)

    @classmethod
    def _fusion_sites(cls, module: nn.Module, plan: None) -> tuple[Site, ...]:
        """bn1 and bn2 with ReLU, bn3 with shortcut and ReLU."""
        end = Site("bn3", "relu", adds=True, shortcut=_downsample(module))
        return Site("bn1", "relu"), Site("bn2", "relu"), end


class FusedResNet(Fused):
    """The forward of ``torchvision.models.resnet.ResNet`` with its stem fused; its blocks are fused on their own."""

    _fusion_methods = ("forward", "_forward_impl")

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = sites.batch_norm_relu(self.bn1, self.relu, self.conv1(x))
        x = sites.max_pool(self.maxpool, x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    @classmethod
    def _fusion_sites(cls, module: nn.Module, plan: None) -> tuple[Site, ...]:
        """The stem's bn1 with ReLU."""
        return (Site("bn1", "relu"),)


def _basic_block(self, x):
    identity = x

    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)

    out = self.conv2(out)
    out = self.bn2(out)

    if self.downsample is not None:
        identity = self.downsample(x)

    out += identity
    out = self.relu(out)

    return out


def _bottleneck(self, x):
    identity = x

    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)

    out = self.conv2(out)
    out = self.bn2(out)
    out = self.relu(out)

    out = self.conv3(out)
    out = self.bn3(out)

    if self.downsample is not None:
        identity = self.downsample(x)

    out += identity
    out = self.relu(out)

    return out


def _resnet(self, x):
    return self._forward_impl(x)


def _resnet_impl(self, x):
    x = self.conv1(x)
    x = self.bn1(x)
    x = self.relu(x)
    x = self.maxpool(x)

    x = self.layer1(x)
    x = self.layer2(x)
    x = self.layer3(x)
    x = self.layer4(x)

    x = self.avgpool(x)
    x = torch.flatten(x, 1)
    x = self.fc(x)

    return x


# Of each class the fused forward and, by name, the methods that it stands for.
_KNOWN = {
    "BasicBlock": (FusedBasicBlock, {"forward": _basic_block}),
    "Bottleneck": (FusedBottleneck, {"forward": _bottleneck}),
    "ResNet": (FusedResNet, {"forward": _resnet, "_forward_impl": _resnet_impl}),
}


def recognize(module: nn.Module) -> tuple[type[Fused], None] | None:
    """The fused forward for ``module``, or None for a class that is not torchvision's own (a subclass is not).

    Raises:
        Refused: this torchvision has another forward, or something was put in its place.
    """
    # A module of these classes cannot exist before torchvision has been imported.
    resnet = sys.modules.get("torchvision.models.resnet")
    cls = type(module)
    if resnet is None or cls.__name__ not in _KNOWN or cls is not getattr(resnet, cls.__name__, None):
        return None
    family, methods = _KNOWN[cls.__name__]
    for name, known in methods.items():
        if not _is(inspect.getattr_static(cls, name, None), known):
            raise Refused(f"the {name} of this {cls.__name__} is not the one known here")
    return family, None


def _is(method, known: types.FunctionType) -> bool:
    if not isinstance(method, types.FunctionType) or not same_code(method.__code__, known.__code__):
        return False
    return "torch" not in known.__code__.co_names or method.__globals__.get("torch") is torch


def _downsample(block: nn.Module) -> str | None:
    return None if block.downsample is None else "downsample"
