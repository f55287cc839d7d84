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


def test_on_chip_not_beside_communication(monkeypatch, device):
    """All blocks of a launch on chip must be resident, and would wait for those of a collective."""
    import cuda_on_cpu

    def launches() -> list[str]:
        with cuda_on_cpu.trace() as traced:
            oracle.fused(oracle.make_case((4, 64, 16, 16), torch.bfloat16, device, "bn_add_relu"))
        return [launch.name for launch in traced]

    one = ["batch_norm_on_chip_forward_planes_kernel", "batch_norm_on_chip_backward_planes_kernel"]
    monkeypatch.delenv("RESNET_FUSED_ON_CHIP", raising=False)
    assert launches() == one
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert len(launches()) == 4
        monkeypatch.setenv("RESNET_FUSED_ON_CHIP", "1")
        assert launches() == one
    finally:
        torch.distributed.destroy_process_group()
    monkeypatch.setenv("RESNET_FUSED_ON_CHIP", "auto")
    assert launches() == one
    monkeypatch.setenv("RESNET_FUSED_ON_CHIP", "0")
    assert len(launches()) == 4
    monkeypatch.setenv("RESNET_FUSED_ON_CHIP", "yes")
    with pytest.raises(RuntimeError, match="RESNET_FUSED_ON_CHIP must be 0, 1 or auto, got yes"):
        launches()


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
