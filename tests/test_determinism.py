"""The same bits run after run, for any number of threads and for any instruction set."""

import concurrent.futures
import os
import subprocess
import sys

import oracle
import pytest
import torch

# Large enough to be shared among threads, by channels, by planes and by rows; C and H·W off the vector widths.
SHAPES = ((8, 3, 56, 56), (4, 65, 28, 28), (32, 129, 7, 7), (16, 1025, 1, 1), (1, 1, 301, 301))
FORMS = ("bn_relu", "bn_add_relu", "dual_relu")

of_the_cpu_library = pytest.mark.skipif(
    "config.getoption('--backend') != 'compiled'", reason="about threads and instruction sets of the CPU library"
)


def _same(results, others):
    for name, value in results.items():
        assert torch.equal(value, others[name]), name


@pytest.fixture
def threads():
    """torch.set_num_threads, put back in the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=oracle.dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs(shape, dtype, form, layout, device):
    case = oracle.make_case(shape, dtype, device, form, layout=layout)
    _same(oracle.fused(case), oracle.fused(case))


@of_the_cpu_library
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_of_threads(shape, form, layout, training, threads):
    case = oracle.make_case(shape, torch.float32, "cpu", form, training, layout)
    threads(1)
    expected = oracle.fused(case)
    for count in (2, 3, 7):
        threads(count)
        _same(oracle.fused(case), expected)


@of_the_cpu_library
def test_numbers_of_threads_for_add_relu(threads):
    from resnet_fused import functional

    input, residual = torch.randn(3, 7, 101, 101), torch.randn(3, 7, 101, 101)
    for count in (1, 2, 3, 7):
        threads(count)
        assert torch.equal(functional.add_relu(input, residual), (input + residual).relu())


def test_python_threads(device):
    """Calls from several threads at once share nothing."""
    cases = [
        oracle.make_case((2, 17, 13, 11), torch.float32, device, form, layout=layout, seed=seed)
        for seed in range(4)
        for form in FORMS
        for layout in ("contiguous", "channels_last")
    ]
    expected = [oracle.fused(case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for ours, results in zip(pool.map(oracle.fused, cases), expected, strict=True):
                _same(ours, results)


# Checks a few cases, then prints what instructions it ran and a digest of the results.
CASES = """
import ctypes, hashlib, oracle, torch
from resnet_fused.ops import library
digest = hashlib.sha256()
for dtype in oracle.DTYPES:
    for layout in ("contiguous", "channels_last"):
        for form, shape in (("bn_relu", (2, 67, 7, 7)), ("bn_add_relu", (3, 33)), ("dual_relu", (2, 5, 1, 33))):
            results = oracle.check(oracle.make_case(shape, dtype, "cpu", form, layout=layout))
            for name, value in sorted(results.items()):
                digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
capability = ctypes.CDLL(str(library.path("_cpu"))).resnet_fused_cpu_capability
capability.restype = ctypes.c_char_p
print(capability().decode(), digest.hexdigest())
"""


def _run(capability: str) -> tuple[str, str]:
    environment = os.environ | {"RESNET_FUSED_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", CASES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran, digest = done.stdout.split()
    return ran, digest


@of_the_cpu_library
def test_instruction_sets():
    """What runs on any CPU is as exact, and among vectors with fused multiply-add their width changes no bit."""
    ran, digest = _run("default")
    assert ran == "default"
    vectors = [_run(capability) for capability in ("avx2", "avx512")]
    assert vectors[0][1] == vectors[1][1]
    assert (digest == vectors[0][1]) == (vectors[0][0] == "default")
