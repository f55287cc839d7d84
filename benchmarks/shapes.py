"""The BatchNorms of torchvision's ResNets: shape, and what stands behind each."""

import dataclasses
import functools

import torch
from torch import nn

IMAGE_SIZE = 224
# What follows a BatchNorm: a ReLU; an add and a ReLU; an add of a second BatchNorm's output and a ReLU.
KINDS = ("relu", "residual", "dual")


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """One kind of place in a network: (C, H, W) and what follows the BatchNorm."""

    channels: int
    height: int
    width: int
    kind: str

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width} {self.kind}"


@functools.cache
def sites(model_name: str) -> dict[Site, int]:
    """How often each site occurs in a torchvision ResNet at 224x224, in the order of the first occurrence."""
    from torchvision.models import get_model

    with torch.device("meta"):
        model = get_model(model_name, weights=None)
        images = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    kinds = _kinds(model)
    found: dict[Site, int] = {}

    def count(module: nn.Module, _, output: torch.Tensor) -> None:
        site = Site(*output.shape[1:], kinds[module])
        found[site] = found.get(site, 0) + 1

    for module in kinds:
        module.register_forward_hook(count)
    model(images)
    return found


def as_residual(counts: dict[Site, int]) -> dict[Site, int]:
    """The distinct shapes, each with a residual: the operator at its largest."""
    shapes: dict[Site, int] = {}
    for site, count in counts.items():
        site = dataclasses.replace(site, kind="residual")
        shapes[site] = shapes.get(site, 0) + count
    return shapes


def _kinds(model: nn.Module) -> dict[nn.Module, str]:
    """Every BatchNorm but those of projection shortcuts, which belong to the site of the main branch's last."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    kinds: dict[nn.Module, str] = {model.bn1: "relu"}
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            *inner, last = [module for name, module in block.named_children() if name.startswith("bn")]
            kinds |= dict.fromkeys(inner, "relu")
            kinds[last] = "residual" if block.downsample is None else "dual"
    return kinds
