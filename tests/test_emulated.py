"""What the emulator shows beyond values: the same bits in any order of blocks and warps."""

import os
import pathlib
import shutil
import subprocess
import sys

import oracle
import pytest
import torch

from resnet_fused.ops import library

pytestmark = pytest.mark.skipif(
    "config.getoption('--backend') != 'emulated'", reason="about the emulated library: `make test-emulated`"
)

# Shapes that many blocks share, by channels, by planes and by rows; C and H·W on and off the vector widths.
SHAPES = ((8, 3, 56, 56), (4, 64, 28, 28), (2, 65, 27, 29), (32, 129, 7, 7), (16, 1025, 1, 1), (1, 1, 301, 301))


def test_the_emulated_library_serves_the_cpu():
    assert library.EMULATED
    assert library.cpu_capability() == "none"
    assert library.cuda_architectures() == "8.0+PTX"
    assert str(library.path("_cpu")) not in torch.ops.loaded_libraries


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_order_of_blocks_gives_the_same_bits(shape, form, layout, training, device):
    import cuda_on_cpu

    dtype = torch.bfloat16 if training else torch.float32
    case = oracle.make_case(shape, dtype, device, form, training, layout)
    expected = oracle.fused(case)
    for seed in (1, 2):
        with cuda_on_cpu.settings(seed=seed):
            for name, value in oracle.fused(case).items():
                assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=oracle.dtype_name)
def test_reductions_fill_the_device(dtype, form, layout, monkeypatch, device):
    """A kernel that was not allowed its shared memory before its occupancy was asked for ran on four blocks."""
    import cuda_on_cpu

    monkeypatch.setenv("RESNET_FUSED_ON_CHIP", "0")
    batch, channels, *positions = shape = (4, 256, 28, 28)
    count = batch * positions[0] * positions[1]
    case = oracle.make_case(shape, dtype, device, form, True, layout)
    with cuda_on_cpu.trace() as launches:
        oracle.fused(case)
    reductions = [launch for launch in launches if "statistics" in launch.name or "reduce" in launch.name]
    assert len(reductions) == 2
    for launch in reductions:
        # An H100 has 132 multiprocessors of 2048 threads and 228 KiB, of which a block takes one for itself.
        per_processor = min(
            2048 // launch.block[0], 228 * 1024 // (launch.static_shared + launch.dynamic_shared + 1024)
        )
        # A thread of rows reads 16 bytes of 4 or 8 rows at a time, and a block of planes has a channel.
        rows = {torch.float32: 4, torch.bfloat16: 8}[dtype]
        blocks = -(-count * channels * dtype.itemsize // 16 // (256 * rows)) if layout == "channels_last" else channels
        assert launch.grid[0] >= 0.9 * min(132 * per_processor // launch.grid[1], blocks), launch


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same_bits(threads, device):
    import cuda_on_cpu

    case = oracle.make_case((4, 64, 28, 28), torch.float32, device, "dual_relu", layout="channels_last")
    expected = oracle.fused(case)
    with cuda_on_cpu.settings(threads=threads):
        for name, value in oracle.fused(case).items():
            assert torch.equal(value, expected[name]), name


# In front of the emulator's: a device of which others hold a part, so that not all blocks are resident.
REFUSAL = """
int refused;
int cudaLaunchCooperativeKernel() { return ++refused, 720; }  /* cudaErrorCooperativeLaunchTooLarge */
"""
REFUSED = """
import ctypes, pathlib, sys
sys.path.insert(0, TESTS)
import oracle, torch
refused = ctypes.c_int.in_dll(ctypes.CDLL(SHIM), "refused")
for layout in ("contiguous", "channels_last"):
    case = oracle.make_case((4, 64, 16, 16), torch.float32, torch.device("cpu"), "bn_add_relu", layout=layout)
    oracle.check(case)
print(refused.value)
"""


def test_streaming_kernels_take_over_where_a_cooperative_launch_is_refused(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", shim], input=REFUSAL, text=True, check=True)
    program = REFUSED.replace("TESTS", repr(str(pathlib.Path(__file__).parent))).replace("SHIM", repr(str(shim)))
    environment = os.environ | {"LD_PRELOAD": f"{shim}:{os.environ['LD_PRELOAD']}", "RESNET_FUSED_ON_CHIP": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4, "nothing was to be launched so"
