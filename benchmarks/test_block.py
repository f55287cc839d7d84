"""A training step of one residual block."""

import functools

import pytest
import torch

from .networks import BLOCKS, VARIANTS, Network, block
from .operator import LAYOUTS


@functools.lru_cache(maxsize=1)
def _network(name: str, layout: str, batch: int) -> Network:
    torch.manual_seed(0)
    module, shape = block(name)
    network = Network(module, (batch, *shape), layout)
    network.check(images=batch)
    return network


def pytest_generate_tests(metafunc):
    """The short profile has the identity blocks in one layout each, and leaves out what is slow."""
    if metafunc.config.getoption("full"):
        cases = [(name, layout, batch) for name in BLOCKS for layout in LAYOUTS for batch in (8, 32)]
        variants = VARIANTS
    else:
        cases = [("BasicBlock 64", "nchw", 8), ("Bottleneck 512, projection", "channels_last", 8)]
        variants = ("eager", "fused", "recompute")
    parameters = [pytest.param(case, variant) for case in cases for variant in variants]
    ids = [f"{name}-{layout}-{batch}-{variant}" for name, layout, batch in cases for variant in variants]
    metafunc.parametrize(("case", "variant"), parameters, ids=ids)


def test_block(case, variant, run):
    """zero_grad, forward, backward and SGD."""
    name, layout, batch = case
    run(_network(*case).call(variant), f"{name}, {layout}, batch {batch}, training step")
