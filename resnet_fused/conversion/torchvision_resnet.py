"""torchvision's ResNet, ResNeXt and Wide ResNet: BasicBlock, Bottleneck and the stem of ResNet."""

import operator
import sys

import torch
from torch import Tensor, nn

from . import sites
from .classes import Fused
from .sites import Site


class FusedBasicBlock(Fused):
    """The forward of ``torchvision.models.resnet.BasicBlock``, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, planes, H / stride, W / stride)."""
        relu = self.relu
        out = sites.batch_norm_relu(self.bn1, relu, self.conv1(x))
        return sites.batch_norm_add_relu(self.bn2, relu, operator.iadd, self.conv2(out), x, self.downsample)

    @classmethod
    def _fusion_sites(cls, module: nn.Module) -> tuple[Site, ...]:
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
    def _fusion_sites(cls, module: nn.Module) -> tuple[Site, ...]:
        """bn1 and bn2 with ReLU, bn3 with shortcut and ReLU."""
        end = Site("bn3", "relu", adds=True, shortcut=_downsample(module))
        return Site("bn1", "relu"), Site("bn2", "relu"), end


class FusedResNet(Fused):
    """The forward of ``torchvision.models.resnet.ResNet`` with its stem fused; its blocks are fused on their own."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = sites.batch_norm_relu(self.bn1, self.relu, self.conv1(x))
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    @classmethod
    def _fusion_sites(cls, module: nn.Module) -> tuple[Site, ...]:
        """The stem's bn1 with ReLU."""
        return (Site("bn1", "relu"),)


def recognize(module: nn.Module) -> tuple[type[Fused], None] | None:
    """The fused forward for ``module``, or None for a class that is not torchvision's own (a subclass is not)."""
    # A module of these classes cannot exist before torchvision has been imported.
    resnet = sys.modules.get("torchvision.models.resnet")
    if resnet is None:
        return None
    families = {resnet.BasicBlock: FusedBasicBlock, resnet.Bottleneck: FusedBottleneck, resnet.ResNet: FusedResNet}
    family = families.get(type(module))
    return None if family is None else (family, None)


def _downsample(block: nn.Module) -> str | None:
    return None if block.downsample is None else "downsample"
