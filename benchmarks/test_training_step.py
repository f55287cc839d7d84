"""A training step of a whole network."""

import functools

from .networks import VARIANTS, Network
from .operator import LAYOUTS


@functools.lru_cache(maxsize=1)
def _network(name: str, batch: int, image_size: int, layout: str) -> Network:
    network = Network.named(name, batch, image_size, layout=layout)
    network.check()
    return network


def pytest_generate_tests(metafunc):
    """The short profile is a ResNet-18 on small images, and compiles nothing."""
    if metafunc.config.getoption("full"):
        cases = [(name, 8, 224, layout) for name in ("resnet18", "resnet50") for layout in LAYOUTS]
        variants = VARIANTS
    else:
        cases, variants = [("resnet18", 8, 128, layout) for layout in LAYOUTS], ("eager", "fused", "recompute")
    pairs = [(case, variant) for case in cases for variant in variants]
    ids = ["-".join(map(str, (*case, variant))) for case, variant in pairs]
    metafunc.parametrize(("case", "variant"), pairs, ids=ids)


def test_training_step(case, variant, run):
    """zero_grad, forward, cross entropy, backward and SGD."""
    name, batch, image_size, layout = case
    run(_network(*case).call(variant), f"{name}, batch {batch}, {image_size} px, {layout}, training step")
