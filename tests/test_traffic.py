"""The bytes that the CUDA kernels move, counted by the emulator, against the passes that they promise."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "traffic.py"
if not TOOL.is_file():
    pytest.skip("needs the checkout", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("traffic", TOOL)
traffic = importlib.util.module_from_spec(_spec)
sys.modules["traffic"] = traffic
_spec.loader.exec_module(traffic)

emulated = pytest.mark.skipif(
    "config.getoption('--backend') != 'emulated'", reason="traffic is counted by the emulator: `make test-emulated`"
)
# C and H·W that 16-byte accesses divide, with planes that are large and small.
SHAPES = ((4, 64, 56, 56), (8, 1024, 8, 8))


@pytest.mark.parametrize(
    ("form", "direction", "streaming", "on_chip"),
    [
        ("bn_relu", "forward", 3, 2),
        ("bn_relu", "backward", 5, 3),
        ("bn_add_relu", "forward", 4.07, 3.07),
        ("bn_add_relu", "backward", 6.2, 4.2),
        ("dual_relu", "forward", 5.07, 3.07),
        ("dual_relu", "backward", 8.2, 5.2),
        ("bn_relu", "eval", 2, 2),
        ("bn_add_relu", "eval", 3, 3),
    ],
)
def test_the_formulas(form, direction, streaming, on_chip):
    """At 16 bit; the mask of one bit an element is a sixteenth of a pass."""
    for chip, most in ((False, streaming), (True, on_chip)):
        value = traffic.formula(form, direction, torch.bfloat16, chip)
        assert most - 0.15 < value <= most


@emulated
@pytest.mark.parametrize("layout", traffic.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("form", "direction"), traffic.PASSES, ids=lambda value: value)
def test_operators_move_what_they_promise(form, direction, shape, dtype, layout):
    counted = traffic.count(form, direction, shape, dtype, layout)
    assert counted.faults() == [], counted
    assert counted.wide > 0.85, counted


def _counted(on_chip, *arguments):
    """The lines of the tool in a process of its own, which reads RESNET_FUSED_ON_CHIP as it starts."""
    command = [sys.executable, str(TOOL), "--on-chip", on_chip, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@emulated
@pytest.mark.parametrize("on_chip", ["0", "1"])
def test_the_variant_on_chip_can_be_chosen(on_chip):
    """The tool fails where a count is not at the formula for its number of launches."""
    import json

    lines = [json.loads(line) for line in _counted(on_chip, "--quick", "--dtype", "bfloat16").splitlines()]
    normalizing = [line for line in lines if line["operator"] == "bn_add_relu" and line["direction"] != "eval"]
    assert normalizing
    assert {line["on_chip"] for line in normalizing} == {on_chip == "1"}
