"""Inputs for a model of which nothing is known but its modules, in the form that its forward takes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

# Positional and keyword arguments of a call.
Arguments = tuple[tuple, dict]

_DETECTION = "torchvision.models.detection."
_BATCH_NORM_DIMENSIONS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
# What is quick comes first; the larger ones are for networks with many strides, or for one size alone.
_SIZES = (64, 32, 128, 224, 256, 299, 384, 512, 16)
_VOLUME_SIZES = (16, 32, 64, 96)


def arguments_of(example_inputs) -> Arguments:
    """The call that ``example_inputs`` stands for: a tensor, positional arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def example_input(model: nn.Module, size: int | None = None, batch: int = 2) -> Any:
    """Random images for ``model``, of its own device and dtype, in the form that its forward takes.

    Args:
        model: any.
        size: of each side in pixels; by default what the model says, or 224, or 64 for volumes.
        batch: how many images.

    Returns:
        A tensor ``(batch, channels, size, size)``, one more ``size`` for volumes; for a model of transformers a dict of
        keyword arguments with it as ``pixel_values``; for a detection model of torchvision a tuple of positional
        arguments: a list of images ``(channels, size, size)``, and in training mode the targets too.
    """
    channels, dimensions = _first_layer(model) or (3, 2)
    stated = _stated_size(model)
    size = size or stated or (64 if dimensions == 3 else 224)
    place = _place(model)
    images = torch.randn((batch, channels) + (size,) * dimensions, device=place.device, dtype=place.dtype)
    if _detects(model):
        return (list(images), _targets(images)) if model.training else (list(images),)
    return {model.main_input_name: images} if _is_of_transformers(model) else images


def made_up(model: nn.Module, batch: int = 4) -> Iterator[Arguments]:
    """Calls that may suit ``model``, the likeliest first; with the same values each time."""
    generator = torch.Generator().manual_seed(0)
    place = _place(model)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(place.device, place.dtype)

    if _detects(model):
        # Two images keep the proposals of a region network, which are many an image, few enough.
        images = randn(2, 3, 64, 64).sigmoid()
        yield (list(images), _targets(images)), {}
        return
    for shape in _shapes(model, batch):
        input = randn(*shape)
        yield ((), {model.main_input_name: input}) if _is_of_transformers(model) else ((input,), {})


def _shapes(model: nn.Module, batch: int) -> Iterator[tuple[int, ...]]:
    first = _first_layer(model)
    linear = next((module for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)), None)
    if isinstance(linear, nn.Linear):
        yield batch, linear.in_features
        yield batch, 16, linear.in_features
    elif first is not None:
        channels, dimensions = first
        stated = _stated_size(model)
        sizes = list(_VOLUME_SIZES if dimensions == 3 else _SIZES)
        sizes[1:1] = [] if stated is None else [stated]
        for size in dict.fromkeys(sizes):
            yield batch, channels, *[size] * dimensions


def _first_layer(model: nn.Module) -> tuple[int, int] | None:
    """Channels and spatial dimensions of the images, by the first convolution or BatchNorm."""
    for module in model.modules():
        if isinstance(module, _ConvNd):
            # timm's say it where the first convolution sees the images folded.
            return getattr(model, "in_chans", None) or module.in_channels, len(module.kernel_size)
        if isinstance(module, _BatchNorm) and type(module) in _BATCH_NORM_DIMENSIONS:
            return module.num_features, _BATCH_NORM_DIMENSIONS[type(module)]
    return None


def _place(model: nn.Module) -> Tensor:
    """A tensor of the device and dtype that images must have."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def _stated_size(model: nn.Module) -> int | None:
    """The side of the images that a model of transformers or timm is configured for."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    if size is None:
        stated = getattr(model, "pretrained_cfg", None)
        size = stated.get("input_size") if isinstance(stated, dict) else None
    if isinstance(size, list | tuple) and size:
        size = size[-1]
    return size if isinstance(size, int) else None


def _detects(model: nn.Module) -> bool:
    # What batches the images of a list, in all detection models and not in their backbones.
    return type(getattr(model, "transform", None)).__module__.startswith(_DETECTION)


def _is_of_transformers(model: nn.Module) -> bool:
    return isinstance(getattr(model, "main_input_name", None), str)


def _targets(images: Tensor) -> list[dict[str, Tensor]]:
    """One object an image, with the boxes, masks and keypoints that the several detection models train on."""
    size = images.shape[-1]
    low, high = size // 4, size * 3 // 4
    masks = images.new_zeros((1, size, size), dtype=torch.uint8)
    masks[:, low:high, low:high] = 1
    # torchvision takes them in float32 alone. All in the box, for what lies outside counts as invisible.
    places = torch.linspace(low + 1, high - 1, 17, device=images.device, dtype=torch.float32)
    keypoints = torch.stack([places, places.flip(0), torch.ones_like(places)], dim=-1)[None]
    boxes = images.new_tensor([[low, low, high, high]])
    labels = torch.ones(1, dtype=torch.int64, device=images.device)
    return [{"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints} for _ in images]
