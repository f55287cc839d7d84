"""What every test runs with: a backend, its device, a seed, and garbage in memory that nobody has written."""

import ctypes
import platform

import pytest
import torch

import resnet_fused  # noqa: F401  (loads the operators)

# The device whose tensors exercise a backend.
DEVICES = {"compiled": "cpu"}

_M_MMAP_THRESHOLD, _M_PERTURB = -3, -6


def pytest_addoption(parser):
    parser.addoption("--backend", default="compiled", choices=sorted(DEVICES), help="whose kernels the operators run")


@pytest.fixture(scope="session")
def backend_name(request) -> str:
    """The value of ``--backend``."""
    return request.config.getoption("--backend")


@pytest.fixture(scope="session")
def device(backend_name) -> torch.device:
    """The device of the tensors a test makes."""
    return torch.device(DEVICES[backend_name])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _unwritten_memory_is_garbage():
    """Has malloc fill what it gives with 0x7f: NaN in float16, 1e38 and more in the other dtypes.

    An element that a kernel leaves out, or a byte that it reads beyond its input, is then seen. Deterministic mode,
    whose fill torch.empty obeys, does not reach the kernels: aoti_torch_empty_strided of the C shim passes it by.
    Where the C library is not glibc, memory stays as it is.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_PERTURB, 0x80)  # the complement of what is written
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # fresh pages of the system are zero, and would not be filled
