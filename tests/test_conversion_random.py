"""Blocks that nobody wrote: where the unfused one runs, the fused one runs and gives the same.

RESNET_FUSED_EXAMPLES sets how many are tried, new ones each time; without it they are the same each time.
"""

import collections
import copy
import importlib.util
import itertools
import os
import sys

import pytest
import torch
from random_blocks import block_source, simplest
from test_conversion_blocks import force
from torch.utils import _pytree as pytree

from resnet_fused import fuse, fusion_report

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("RESNET_FUSED_EXAMPLES", "0"))
SEEDS = st.integers(0, 2**32 - 1)
RANDOM = {
    # A seed cannot be shrunk: simplest() does, choice by choice.
    "phases": [Phase.generate],
    "deadline": None,
    "derandomize": not EXAMPLES,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
# Up to eight BatchNorms and convolutions in float64, each with an error of some eps = 2e-16, and BatchNorms that
# amplify by up to 300 (1 / sqrt(bn.eps)) where values hardly vary: 1e-13 to 1e-11, and a hundred times that.
TOLERANCE = 1e-9
NUMBERS = itertools.count()

# Mode, batch, gradients, keyword arguments. A batch of 3 and rectify=False take other branches.
CALLS = [
    ("train", 2, True, {}),
    ("train", 3, True, {"rectify": False}),
    ("train", 2, False, {}),
    ("eval", 2, True, {}),
    ("eval", 3, False, {}),
]


def block_of(source, directory):
    name = f"random_block_{next(NUMBERS)}"
    path = directory / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    block = module.Block().double()
    for child in block.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            for parameter, start in ((child.weight, 1.0), (child.bias, 0.0)):
                if parameter is not None:
                    parameter.data.normal_(start, 0.2)
            if child.running_mean is not None:
                child.running_mean.normal_(0, 0.2)
                child.running_var.uniform_(0.5, 1.5)
    return block


def step(block, mode, batch, gradients, named):
    """What a call gives, by name; and the phase in which it raised, with the error."""
    block.train(mode == "train")
    block.zero_grad()
    generator = torch.Generator().manual_seed(batch)
    leaf = torch.randn(batch, 4, 5, 5, dtype=torch.float64, generator=generator).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        # Not the leaf, which may not be written to.
        input = leaf.clone()
        try:
            output = block(input, **named)
        except Exception as error:
            return {}, ("forward", error)
        tensors = [value for value in pytree.tree_leaves(output) if isinstance(value, torch.Tensor)]
        results = {f"output {index}": tensor.detach().clone() for index, tensor in enumerate(tensors)}
        results["input"] = input.detach().clone()
        features = block.features
        results["features"] = features if features is None else features.detach().clone()
        results["calls"] = torch.tensor(block.calls)
        results |= {name: buffer.clone() for name, buffer in block.named_buffers()}
        tensors = [tensor for tensor in tensors if tensor.requires_grad]
        if not gradients or not tensors:
            results["requires grad"] = torch.tensor(len(tensors))
            return results, None
        weights = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in tensors]
        try:
            torch.autograd.backward(tensors, weights)
        except Exception as error:
            return results, ("backward", error)
    results["gradient of input"] = leaf.grad
    results |= {f"gradient of {name}": parameter.grad for name, parameter in block.named_parameters()}
    return results, None


def why_different(expected, actual):
    for name, value in expected.items():
        other = actual.get(name)
        if value is None and other is None:
            continue
        if value is None or other is None or value.shape != other.shape:
            return f"{name} is {other} and was {value}"
        value, other = value.double(), other.double()
        scale = max(1.0, value.nan_to_num().abs().max().item())
        if not torch.allclose(value, other, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
            return f"{name} differs by {(value - other).abs().max().item():.3g}, with values up to {scale:.3g}"
    return None if expected.keys() == actual.keys() else f"{expected.keys()} and {actual.keys()}"


def compare(source, directory, statistics=None):
    statistics = collections.Counter() if statistics is None else statistics
    block = block_of(source, directory)
    fused = copy.deepcopy(block)
    statistics["blocks"] += 1
    try:
        statistics["fused"] += fusion_report(fuse(fused)).fused > 0
    except Exception as error:
        raise AssertionError(f"fuse() or fusion_report() raises {error!r}, in\n{source}") from error
    force(fused)
    for mode, batch, gradients, named in CALLS:
        call = mode, batch, gradients, named if "rectify=" in source else {}
        expected, raised = step(block, *call)
        actual, fused_raised = step(fused, *call)
        phase = raised and raised[0]
        statistics[phase or "ran"] += 1
        if phase == "forward":
            assert fused_raised, f"{call}: fused runs where unfused raises {raised[1]!r}, in\n{source}"
            # What has been done until then is nobody's to rely on, and later calls start from it.
            return
        if fused_raised and not (phase and fused_raised[0] == "backward"):
            raise AssertionError(f"{call}: fused raises {fused_raised[1]!r}, in\n{source}") from fused_raised[1]
        if phase == "backward":
            actual = {name: value for name, value in actual.items() if name in expected}
        why = why_different(expected, actual)
        assert why is None, f"{call}: {why}, in\n{source}"


def differs(source, directory, statistics=None):
    try:
        compare(source, directory, statistics)
    except AssertionError:
        return True
    return False


def test_fused_blocks_give_what_unfused_ones_do(tmp_path):
    statistics = collections.Counter()

    @settings(max_examples=EXAMPLES or 400, **RANDOM)
    @given(SEEDS)
    def run(seed):
        source, _ = block_source(seed)
        if differs(source, tmp_path, statistics):
            compare(simplest(seed, lambda source: differs(source, tmp_path)), tmp_path)

    run()
    print(dict(statistics))
    calls = statistics["ran"] + statistics["forward"] + statistics["backward"]
    # Blocks that do not run say little.
    assert statistics["ran"] > 0.5 * calls, statistics


# Of how many of the blocks a BatchNorm is part of a fused operator, at least.
SHARE = 0.5


def test_a_share_of_the_blocks_is_fused(tmp_path):
    statistics = collections.Counter()

    @settings(max_examples=EXAMPLES or 200, **RANDOM)
    @given(SEEDS)
    def run(seed):
        statistics["blocks"] += 1
        statistics["fused"] += fusion_report(fuse(block_of(block_source(seed)[0], tmp_path))).fused > 0

    run()
    print(dict(statistics))
    assert statistics["fused"] > SHARE * statistics["blocks"], statistics
