"""The bytes that the CUDA kernels move, counted by the emulator, against the passes that they promise."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "traffic.py"
KERNELS = ROOT / "csrc" / "cuda"
if not TOOL.is_file():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(TOOL.parent))
import ptx_parameters  # noqa: E402
import traffic  # noqa: E402

emulated = pytest.mark.skipif(
    "config.getoption('--backend') != 'emulated'", reason="traffic is counted by the emulator: `make test-emulated`"
)


@pytest.mark.parametrize(
    ("form", "direction", "streaming", "on_chip"),
    [
        ("bn_relu", "forward", 3, 2),
        ("bn_relu", "backward", 5, 3),
        ("bn_add_relu", "forward", 4.07, 3.07),
        ("bn_add_relu", "backward", 6.2, 4.2),
        ("dual_relu", "forward", 5.07, 3.07),
        ("dual_relu", "backward", 8.2, 5.2),
        ("bn_relu", "backward of two", 7, 4),
        ("bn_add_relu", "backward of two", 8.2, 5.2),
        ("dual_relu", "backward of two", 10.2, 6.2),
        ("bn_relu", "eval", 2, 2),
        ("bn_add_relu", "eval", 3, 3),
    ],
)
def test_the_formulas(form, direction, streaming, on_chip):
    """At 16 bit; the mask of one bit an element is a sixteenth of a pass."""
    for chip, most in ((False, streaming), (True, on_chip)):
        value = traffic.formula(form, direction, torch.bfloat16, chip)
        assert most - 0.15 < value <= most


def _counted(*arguments):
    """The lines of the tool, in a process of its own: it counts on a copy of the library."""
    command = [sys.executable, str(TOOL), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@emulated
@pytest.mark.parametrize("layout", traffic.LAYOUTS)
@pytest.mark.parametrize("dtype", traffic.DTYPES)
def test_operators_move_what_they_promise(dtype, layout):
    """The tool fails where a count is not at the formula for its number of launches, and says which."""
    lines = _counted("--quick", "--on-chip", "0", "--dtype", dtype, "--layout", layout)
    assert {(line["operator"], line["direction"]) for line in lines} == set(traffic.PASSES)
    for line in lines:
        assert not line["on_chip"]
        # All but the mask and the vectors of one value a channel.
        assert line["wide_stores"] > 0.9, line


@emulated
@pytest.mark.parametrize("layout", traffic.LAYOUTS)
def test_on_chip_a_tensor_is_read_once(layout):
    """Where its channels fit: statistics and normalization are one launch then."""
    if not any("RESNET_FUSED_ON_CHIP" in path.read_text() for path in KERNELS.iterdir()):
        pytest.skip("the library has no variant on chip")
    case = ("--shape", "16,256,28,28", "--operator", "bn_add_relu", "--dtype", "bfloat16", "--layout", layout)
    lines = {line["direction"]: line for line in _counted("--on-chip", "1", *case)}
    for direction, passes in (("forward", 3.07), ("backward", 4.2), ("backward of two", 5.2)):
        assert lines[direction]["on_chip"], lines[direction]
        assert lines[direction]["launches"] == 1
        assert lines[direction]["E"] <= 1.02 * passes + lines[direction]["vectors"]


def test_parameters_are_read_by_name():
    kernel = """.visible .entry k(
.param .align 8 .b8 k_param_0[64]
)
{
mov.b64 %rd1, k_param_0;
add.s64 %rd2, %rd1, 16;
mov.u64 %rd3, k_param_0;
@%p1 add.s64 %rd3, %rd3, 8;
ld.param.u64 %rd4, [%rd1+32];
ld.param.v2.u32 {%r1, %r2}, [%rd2+-8];
ld.param.u64 %rd5, [%rd3+8];
ld.param.u64 %rd6, [k_param_0+8];
ld.global.u64 %rd7, [%rd4+8];
}"""
    lines = ptx_parameters.named(kernel).splitlines()
    assert lines[8:] == [
        "ld.param.u64 %rd4, [k_param_0+32];",
        "ld.param.v2.u32 {%r1, %r2}, [k_param_0+8];",
        "ld.param.u64 %rd5, [%rd3+8];",  # written twice: where it points is not known
        "ld.param.u64 %rd6, [k_param_0+8];",
        "ld.global.u64 %rd7, [%rd4+8];",
        "}",
    ]
