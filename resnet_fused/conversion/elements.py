"""Counts what each BatchNorm of a model normalizes."""

import copy

import torch
from torch import nn

from ..example_inputs import arguments_of
from .classes import is_fused


def normalized_elements(model: nn.Module, example_inputs) -> dict[str, int]:
    """By the name of each BatchNorm that an input reaches, how many values it normalizes.

    A copy runs in evaluation, on the meta device, where nothing is computed, or where that fails as it is.

    Args:
        model: stays as it is.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
    """
    try:
        return _counted(copy.deepcopy(model).to("meta"), _mapped(example_inputs, lambda tensor: tensor.to("meta")))
    except Exception:
        with torch.random.fork_rng():
            return _counted(copy.deepcopy(model), example_inputs)


def _counted(model: nn.Module, inputs) -> dict[str, int]:
    for module in model.modules():
        if is_fused(module):
            module.__class__ = type(module)._fusion_base
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if "BatchNorm" in type(module).__name__ or isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_counter(counts, name))
    arguments, named = arguments_of(inputs)
    model.eval()
    with torch.no_grad():
        model(*arguments, **named)
    return counts


def _counter(counts: dict[str, int], name: str):
    def count(_, inputs):
        counts[name] = counts.get(name, 0) + inputs[0].numel()

    return count


def _mapped(inputs, function):
    return torch.utils._pytree.tree_map_only(torch.Tensor, function, inputs)
