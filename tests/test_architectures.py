"""Which GPUs the CUDA library serves, told without one."""

import os
import subprocess
import sys

import pytest
import torch

from resnet_fused import fusion_report, ops
from resnet_fused.ops import architectures, backend, library, triton_kernels

DEFAULT = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        # Machine code runs on its own architecture, and on newer ones of the same major number.
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0;9.0", (9, 0), True),
        ("9.0", (8, 9), False),
        # PTX is compiled for what is newer.
        ("8.0+PTX", (8, 0), True),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (12, 1), True),
        ("8.6+PTX", (8, 0), False),
        ("8.0+PTX", (7, 5), False),
        # What the wheel has.
        (DEFAULT, (7, 0), False),
        (DEFAULT, (7, 5), True),
        (DEFAULT, (8, 7), True),
        (DEFAULT, (8, 9), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 3), True),
        (DEFAULT, (11, 0), False),
        (DEFAULT, (12, 1), True),
        (DEFAULT, (13, 0), True),
        # Code bound to one architecture, and to a family.
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("", (9, 0), False),
        ("nonsense", (9, 0), False),
    ],
)
def test_what_runs_where(built_for, capability, runs):
    assert architectures.runs_on(built_for, capability) is runs
    assert (architectures.why_not_on(built_for, capability) is None) is runs


def test_the_reason_tells_what_to_do():
    assert architectures.why_not_on("8.0;9.0", (7, 0)) == (
        "the CUDA library has no code for compute capability 7.0, only for 8.0, 9.0: "
        "build it with TORCH_CUDA_ARCH_LIST=7.0"
    )


@pytest.fixture
def machine(monkeypatch):
    """Pretends a machine: why the CUDA library is not loaded, whether there is a GPU, and of which capability."""

    def pretend(why_no_cuda=None, available=True, capability=(9, 0), built_for=DEFAULT):
        monkeypatch.setattr(library, "why_no_cuda", lambda: why_no_cuda)
        monkeypatch.setattr(library, "cuda_architectures", lambda: built_for)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        # Triton's part is in test_triton.py.
        monkeypatch.setattr(triton_kernels, "why_not", lambda device: "Triton is not installed")

    for cached in (backend._why_not_cuda, backend._serving):
        cached.cache_clear()
    yield pretend
    for cached in (backend._why_not_cuda, backend._serving):
        cached.cache_clear()


CUDA = torch.device("cuda", 0)


def test_a_gpu_that_the_library_has_code_for_is_served(machine):
    machine()
    assert backend.why_not_compiled(CUDA) is None


@pytest.mark.parametrize(
    ("pretended", "reason"),
    [
        ({"why_no_cuda": "torch is built without CUDA"}, "torch is built without CUDA"),
        ({"available": False}, "torch finds no GPU"),
        ({"capability": (6, 1)}, "no code for compute capability 6.1"),
        ({"built_for": "8.0", "capability": (9, 0)}, "no code for compute capability 9.0, only for 8.0"),
    ],
)
def test_a_gpu_that_is_not_served_has_the_reason(machine, pretended, reason):
    machine(**pretended)
    assert reason in backend.why_not_compiled(CUDA)
    # A report of a model on that device says so; nothing is tried there first.
    report = fusion_report(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), device=CUDA)
    assert reason in report.rows[0].reason
    assert report.rows[0].backend == "reference"


def test_a_library_that_cannot_be_loaded_is_no_failure_of_the_import(tmp_path, monkeypatch):
    broken = tmp_path / "_cuda.abi3.so"
    broken.write_bytes(b"no shared object")
    monkeypatch.setattr(library, "path", lambda name: broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert f"_cuda.abi3.so cannot be loaded beside torch {torch.__version__}" in library._load_cuda()
    broken.unlink()
    assert "built without its CUDA library" in library._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library._load_cuda() == "torch is built without CUDA"


@pytest.mark.parametrize(
    ("runner", "sentence"),
    [("0", "run under the emulator alone"), ("1", "is no file: `make emulated` builds it")],
)
def test_an_emulated_library_that_cannot_run_is_refused(runner, sentence):
    environment = os.environ | {"RESNET_FUSED_EMULATED": "nowhere.so", "CUDA_ON_CPU": runner}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", "import resnet_fused"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert sentence in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "is no file: `python tools/cuda_build.py` builds one"), (b"", "cannot be loaded beside torch")],
    ids=["missing", "broken"],
)
def test_another_build_of_the_cuda_library_is_loaded_by_name(tmp_path, text, sentence):
    file = tmp_path / "other.so"
    if text is not None:
        file.write_bytes(text)
    environment = os.environ | {"RESNET_FUSED_CUDA_LIBRARY": str(file), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from resnet_fused.ops import library; print(library.why_no_cuda())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (text is not None), done.stderr
    assert "other.so" in done.stdout + done.stderr
    assert sentence in done.stdout + done.stderr


@pytest.fixture
def _cuda_library():
    if library.why_no_cuda():
        pytest.skip(library.why_no_cuda())


@pytest.mark.usefixtures("_cuda_library")
def test_every_operator_has_a_cuda_kernel():
    """The dispatcher knows, with or without a GPU."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in ops.OPERATORS if not has_kernel(f"resnet_fused::{name}", "CUDA")] == []
    defined = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {name for name in defined if name.startswith("resnet_fused::")} == {
        f"resnet_fused::{n}" for n in ops.OPERATORS
    }


@pytest.mark.usefixtures("_cuda_library")
def test_the_library_tells_its_architectures():
    told = library.cuda_architectures()
    entries = told.split(";")
    assert entries
    assert all(architectures._ENTRY.fullmatch(entry) for entry in entries), told
