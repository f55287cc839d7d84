"""How far the fused copy of a model is from the model itself, in float64: outputs, gradients and running statistics."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from model_list import Model
from torch import Tensor, nn

from resnet_fused import fuse, fusion_report
from resnet_fused.cli.model_names import build
from resnet_fused.cli.report import reasons
from resnet_fused.example_inputs import example_input


@dataclasses.dataclass(frozen=True)
class Errors:
    """Largest differences of one mode, each relative to the largest value of its kind.

    Attributes:
        output: over all tensors of the output.
        gradient: over the gradients of parameters and input, relative to the largest of them all.
        statistics: over all buffers, each relative to its own largest value.
    """

    output: float
    gradient: float
    statistics: float

    @property
    def largest(self) -> float:
        """The largest of the three; infinite where one is no number."""
        values = (self.output, self.gradient, self.statistics)
        return max(values) if all(math.isfinite(value) for value in values) else math.inf


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found out about one model."""

    title: str
    fused: int
    # Of the fused, those that neither add nor ReLU follows in the same operator.
    alone: int
    total: int
    # Why BatchNorms are not fused, and how many; the most frequent first.
    reasons: tuple[tuple[str, int], ...]
    eval: Errors
    train: Errors


@dataclasses.dataclass(frozen=True)
class _Step:
    outputs: list[Tensor]
    gradients: list[Tensor | None]
    buffers: list[Tensor]


def check(model: Model) -> Result:
    """Runs ``model`` and its fused copy forward and backward, in eval and in training mode.

    Raises:
        ModelError: it cannot be built.
    """
    torch.set_default_dtype(torch.float64)  # models make tensors of their own too
    torch.manual_seed(0)
    unfused = build(model.name, model.arguments, initialized=True).double()
    _randomize(unfused, example_input(unfused.eval(), model.size, model.batch))
    fused = fuse(copy.deepcopy(unfused))
    report = fusion_report(fused)
    errors = {}
    for training in (False, True):
        unfused.train(training)
        fused.train(training)
        inputs = example_input(unfused, model.size, model.batch)
        errors[training] = _compare(_step(fused, inputs), _step(unfused, inputs))
        for network in (fused, unfused):
            network.zero_grad()  # half of the memory
    digest = tuple((reason, len(names)) for reason, names in reasons(report))
    return Result(model.title, report.fused, report.alone, report.total, digest, errors[False], errors[True])


def _randomize(model: nn.Module, inputs: Any) -> None:
    """Gives every normalization a weight, a bias and statistics of its own, in place of ones and zeros.

    The statistics are near those of the input that it meets, as they are in a trained model: with others, values grow
    from block to block until all that follows is saturated.
    """

    def set_statistics(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(args[0], [0, *range(2, args[0].dim())], correction=0)
        # A channel that is constant here need not be in the next input.
        variance = variance + variance.mean() / 10
        module.running_mean.copy_(mean + variance.sqrt() * torch.randn_like(mean) / 10)
        module.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 1.5))

    hooks = []
    for module in model.modules():
        if "Norm" not in type(module).__name__:
            continue
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name in ("weight", "running_var"):
                nn.init.uniform_(tensor, 0.5, 1.5)
            elif name in ("bias", "running_mean"):
                nn.init.normal_(tensor, std=0.1)
        if getattr(module, "running_mean", None) is not None:
            hooks.append(module.register_forward_pre_hook(set_statistics))
    with torch.no_grad():
        _call(model, inputs)
    for hook in hooks:
        hook.remove()


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _step(model: nn.Module, inputs: Any) -> _Step:
    """Forward and backward with the same random numbers each time."""
    torch.manual_seed(1)
    leaves: list[Tensor] = []
    inputs = _leaves(inputs, leaves)
    outputs = list(_tensors(_call(model, inputs)))
    if not any(tensor.numel() for tensor in outputs):
        raise RuntimeError("the model returns nothing that could be compared")
    differentiable = [tensor for tensor in outputs if tensor.requires_grad]
    # A weight for each value, or what a normalization sums to zero would have no gradient.
    sum((tensor * torch.randn_like(tensor)).sum() for tensor in differentiable).backward()
    gradients = [tensor.grad for tensor in (*leaves, *model.parameters())]
    return _Step([t.detach() for t in outputs], gradients, [buffer.clone() for buffer in model.buffers()])


def _leaves(inputs: Any, leaves: list[Tensor]) -> Any:
    """A copy of the input whose images require a gradient; these are added to ``leaves``."""
    if isinstance(inputs, Tensor):
        leaves.append(inputs.clone().requires_grad_())
        return leaves[-1]
    if isinstance(inputs, dict):
        return {key: _leaves(value, leaves) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return (_leaves(inputs[0], leaves), *copy.deepcopy(inputs[1:]))
    return [_leaves(value, leaves) for value in inputs]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _compare(fused: _Step, unfused: _Step) -> Errors:
    statistics = [_relative([a], [b]) for a, b in zip(fused.buffers, unfused.buffers, strict=True)]
    return Errors(
        _relative(fused.outputs, unfused.outputs),
        _relative(fused.gradients, unfused.gradients),
        max(statistics, default=0.0),
    )


def _relative(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest difference over the largest expected value; infinite where shapes differ or a gradient is missing."""
    if [None if t is None else t.shape for t in actual] != [None if t is None else t.shape for t in expected]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(actual, expected, strict=True) if b is not None and b.numel()]
    difference = _largest(a - b for a, b in pairs)
    return difference / (_largest(b for _, b in pairs) or 1.0)


def _largest(tensors: Iterator[Tensor]) -> float:
    """The largest magnitude; not a number where one value is none."""
    maxima = [torch.linalg.vector_norm(tensor, ord=math.inf) for tensor in tensors]
    return torch.stack(maxima).max().item() if maxima else 0.0
