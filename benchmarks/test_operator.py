"""The operator on the BatchNorm shapes of ResNet-18 and ResNet-50."""

import pytest
import torch

from . import apex_operator, device
from .operator import LAYOUTS, VARIANTS, Case, Operator
from .shapes import Site, sites

# One large, one at the head, one with small planes.
SHORT = [Site(256, 56, 56, "residual"), Site(64, 112, 112, "relu"), Site(2048, 7, 7, "dual")]


def _cases(full: bool) -> list[Case]:
    if device.chosen().type == "cuda":
        # The dtypes that GPUs train in; float16 channels_last is what apex has.
        dtypes, batches = (torch.bfloat16, torch.float16, torch.float32), (32, 256)
    else:
        dtypes, batches = (torch.float32, torch.bfloat16), (8, 32)
    if not full:
        return [Case(site, batches[0], layout, dtypes[0]) for site in SHORT for layout in LAYOUTS]
    found = sorted({*sites("resnet18"), *sites("resnet50")}, reverse=True)
    return [
        Case(site, batch, layout, dtype)
        for site in found
        for batch in batches
        for layout in LAYOUTS
        for dtype in dtypes
    ]


def _name(case: Case) -> str:
    return f"{case} {case.layout} {str(case.dtype).removeprefix('torch.')}"


def pytest_generate_tests(metafunc):
    """Cases and variants of the profile; the short one compiles only the first case."""
    full = metafunc.config.getoption("full")
    pairs = [
        (case, variant)
        for number, case in enumerate(_cases(full))
        for variant in VARIANTS
        if full or variant != "compile" or number == 0
    ]
    if device.has_apex():
        pairs += [(case, "apex") for case in _cases(full) if case.dtype == torch.float16]
    metafunc.parametrize(("case", "variant"), pairs, ids=[f"{_name(case)}-{variant}" for case, variant in pairs])


@pytest.fixture(scope="module")
def operator():
    """The case's tensors, checked once for all its variants."""
    made: dict[Case, Operator] = {}

    def get(case: Case) -> Operator:
        if case not in made:
            made.clear()
            candidate = Operator(case)
            candidate.check()
            made[case] = candidate
        return made[case]

    return get


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_operator(case, variant, backward, operator, run):
    """Forward, or forward and backward."""
    if variant == "apex" and not apex_operator.suits(case.site.kind, case.dtype, case.layout, case.training):
        pytest.skip("apex has float16 channels_last without a second batch norm only")
    group = f"{_name(case)}, {'forward+backward' if backward else 'forward'}"
    run(operator(case).call(variant, backward), group, case.bytes(variant, backward))
