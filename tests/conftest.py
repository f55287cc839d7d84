"""What every test runs with: a backend, its device, a seed, and garbage in memory that nobody has written."""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import platform
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The device whose tensors exercise a backend: the CPU library, the CUDA library on a GPU, and the same library on a CPU
# under an emulator that checks every access to memory; the Triton kernels in Triton's interpreter, and what Triton
# compiles of them in the emulator.
DEVICES = {"compiled": "cpu", "cuda": "cuda", "emulated": "cpu", "triton": "cpu", "ptx": "cpu"}

_M_MMAP_THRESHOLD, _M_PERTURB = -3, -6


def pytest_addoption(parser):
    parser.addoption("--backend", default="compiled", choices=sorted(DEVICES), help="whose kernels the operators run")
    parser.addoption("--sample", default="1/1", metavar="K/N", help="run the Kth of every N tests only")


def pytest_configure(config):
    """Loads the operators, once it is known from which library, before any test module imports them."""
    backend_name = config.getoption("--backend")
    config.why_not = None
    if backend_name == "emulated":
        config.why_not = _why_not_emulated()
    if backend_name in ("triton", "ptx"):
        config.why_not = _why_not_triton(backend_name)
    from resnet_fused.ops import backend

    if backend_name == "cuda":
        config.why_not = backend.why_not_compiled(torch.device("cuda"))
        # Bits are compared across convolutions, and values with float64.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    required = os.environ.get("RESNET_FUSED_REQUIRE_EMULATION") == "1" and backend_name in ("emulated", "triton", "ptx")
    if config.why_not and required:
        pytest.exit(f"RESNET_FUSED_REQUIRE_EMULATION=1, but {config.why_not}", returncode=1)


def _why_not_triton(backend_name: str) -> str | None:
    """Why the Triton kernels cannot run here; where they can, has them serve CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    if backend_name == "ptx":
        if importlib.util.find_spec("cuda_on_cpu") is None:
            return "the emulator of CUDA is not there: `make test-triton` finds it"
        sys.path.insert(0, str(ROOT / "tools"))
        import triton_ptx

        triton_ptx.begin()
        return None
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_interpreter

    from resnet_fused.ops import triton_kernels
    from resnet_fused.triton import launchers

    triton_kernels.serve("cpu", True)
    triton_interpreter.mend()
    launchers._launch = triton_interpreter.guarded(launchers._launch)
    return None


def _why_not_emulated() -> str | None:
    """Why the emulated library cannot run here; where it can, has the package load it."""
    if os.environ.get("CUDA_ON_CPU") != "1":
        return "the emulator of CUDA is not there: `make test-emulated` runs the tests under it"
    library = ROOT / "build" / "emulated" / "_cuda.abi3.so"
    os.environ.setdefault("RESNET_FUSED_EMULATED", str(library))
    if not pathlib.Path(os.environ["RESNET_FUSED_EMULATED"]).is_file():
        del os.environ["RESNET_FUSED_EMULATED"]
        return "the emulated library is not built: `make emulated` does"
    return None


def pytest_collection_modifyitems(config, items):
    """Skips every test of a backend that cannot run here, with the reason; takes a sample where one is asked for."""
    place, every = map(int, config.getoption("--sample").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every != place % every])
    items[:] = items[place % every :: every]
    if config.why_not:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"--backend {config.getoption('--backend')}: {config.why_not}"))


@pytest.fixture(scope="session")
def backend_name(request) -> str:
    """The value of ``--backend``."""
    return request.config.getoption("--backend")


@pytest.fixture(scope="session")
def device(backend_name) -> torch.device:
    """The device of the tensors a test makes."""
    return torch.device(DEVICES[backend_name])


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    """Forgets what earlier tests compiled: Dynamo counts how often it compiled a function, over all models."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_finding_of_the_emulator(backend_name):
    """Fails a test whose kernels the emulator found fault with, also where the test expects some error."""
    if backend_name != "emulated":
        yield
        return
    import cuda_on_cpu

    before = cuda_on_cpu.failures()
    yield
    assert cuda_on_cpu.failures() == before, "the emulator reported a launch: see the captured stderr"


@pytest.fixture(scope="session", autouse=True)
def _unwritten_memory_is_garbage():
    """Has malloc fill what it gives with 0x7f: NaN in float16, 1e38 and more in the other dtypes.

    An element that a kernel leaves out, or a byte that it reads beyond its input, is then seen. Deterministic mode,
    whose fill torch.empty obeys, does not reach the kernels: aoti_torch_empty_strided of the C shim passes it by.
    Where the C library is not glibc, memory stays as it is.
    """
    _mallopt(_M_PERTURB, 0x80)  # the complement of what is written
    _mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # fresh pages of the system are zero, and would not be filled


def _mallopt(option: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(option, value)


@pytest.fixture(scope="session", autouse=True)
def _empty_tensors_are_nan(backend_name):
    """Of the Triton backends, whose launchers allocate in Python: torch.empty gives NaN, and no zero by chance."""
    if backend_name not in ("triton", "ptx"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def memory_as_it_comes():
    """A context in which malloc fills nothing, for tensors whose memory is not meant to be touched."""

    @contextlib.contextmanager
    def context():
        _mallopt(_M_PERTURB, 0)
        yield
        _mallopt(_M_PERTURB, 0x80)

    return context


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other over small tensors cost more than they bring, most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
