"""How the CUDA library is built: which nvcc, for which GPUs, and what is said where there is none."""

import importlib
import os
import pathlib
import stat
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def toolkit(monkeypatch):
    """tools/cuda_toolkit.py, with nothing remembered."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("cuda_toolkit")
    module.find.cache_clear()
    yield module
    module.find.cache_clear()


@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("cuda_build")


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("8.0", "8.0"),
        ("8.6;8.0", "8.0;8.6"),
        ("8.0 9.0+PTX", "8.0;9.0+PTX"),
        ("8.0,12.0", "8.0;12.0"),
        ("9.0a", "9.0a"),
        ("8.0;8.0+PTX;8.0", "8.0+PTX"),
        ("Ampere", "8.0;8.6+PTX"),
        ("Hopper;7.5", "7.5;9.0+PTX"),
    ],
)
def test_architecture_lists(toolkit, text, described):
    assert toolkit.described(toolkit.parse(text)) == described


@pytest.mark.parametrize("text", ["8", "sm_90", "9.0+ptx", "Volta2", "8.0;x"])
def test_what_is_no_architecture_is_named(toolkit, text):
    with pytest.raises(ValueError, match="is no compute capability"):
        toolkit.parse(text)


def test_flags(toolkit):
    assert toolkit.gencode(toolkit.parse("8.0;12.0+PTX")) == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_120,code=sm_120"),
        *("-gencode", "arch=compute_120,code=compute_120"),
    ]


def _toolkit(toolkit, codes):
    return toolkit.Toolkit(pathlib.Path("nvcc"), pathlib.Path("/cuda"), (13, 0), frozenset(codes.split()), (), "c++")


@pytest.mark.parametrize(
    ("asked", "codes", "described"),
    [
        ("", "75 80 86 89 90 100 120", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        # An nvcc that is older builds what it knows, with PTX for the rest.
        ("", "70 75 80 86 89 90", "7.5;8.0;8.6;8.9;9.0+PTX"),
        ("9.0", "75 80 90", "9.0"),
        ("9.0a", "90", "9.0a"),
    ],
)
def test_what_is_compiled_for(toolkit, asked, codes, described):
    wanted = toolkit.architectures(_toolkit(toolkit, codes), {"TORCH_CUDA_ARCH_LIST": asked})
    assert toolkit.described(wanted) == described


@pytest.mark.parametrize(
    ("asked", "codes", "sentence"),
    [
        ("12.0", "80 90", "nvcc 13.0 of /cuda does not know 12.0 of TORCH_CUDA_ARCH_LIST"),
        ("new", "80 90", "'new' in TORCH_CUDA_ARCH_LIST is no compute capability"),
        ("", "50 60", "nvcc 13.0 of /cuda knows none of"),
    ],
)
def test_what_nvcc_cannot_compile_for_is_named(toolkit, asked, codes, sentence):
    with pytest.raises(toolkit.Unusable, match=sentence):
        toolkit.architectures(_toolkit(toolkit, codes), {"TORCH_CUDA_ARCH_LIST": asked})


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture
def nowhere(toolkit, monkeypatch, tmp_path):
    """No CUDA_HOME, no nvcc on the PATH, no wheels."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolkit.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(toolkit.sys, "path", [])
    return tmp_path


def test_no_nvcc_anywhere(toolkit, nowhere):
    with pytest.raises(toolkit.Unusable, match="no nvcc in CUDA_HOME, on the PATH or among NVIDIA's wheels"):
        toolkit.find()


def test_an_nvcc_that_fails_is_told_with_its_message(toolkit, nowhere, monkeypatch):
    nvcc = _program(nowhere / "cuda" / "bin" / "nvcc", "echo 'error: no host compiler'; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "cuda"))
    with pytest.raises(toolkit.Unusable, match=f"{nvcc} does not compile: error: no host compiler"):
        toolkit.find()


# What nvcc prints, of whatever it is asked.
NVCC = """
echo 'Cuda compilation tools, release 13.0, V13.0.88'
echo 'sm_80'
echo 'sm_90'
echo '#$ TOP={root}/bin/..'
"""


@pytest.mark.parametrize("place", ["CUDA_HOME", "PATH", "wheel"])
def test_nvcc_is_found(toolkit, nowhere, monkeypatch, place):
    """Behind a script on the PATH it is the toolkit of the real one that counts."""
    real = nowhere / "real"
    (real / "lib64").mkdir(parents=True)
    (real / "lib64" / "libcudart.so.13").write_bytes(b"")
    directory = {"CUDA_HOME": "home/bin", "PATH": ".", "wheel": "site/nvidia/cu13/bin"}[place]
    nvcc = _program(nowhere / directory / "nvcc", NVCC.format(root=real))
    if place == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(nowhere / "home"))
    found = toolkit.find()
    assert found.nvcc == nvcc
    assert found.root == real
    assert found.version == (13, 0)
    assert found.codes == {"80", "90"}
    assert found.cudart == real / "lib64" / "libcudart.so.13"


def test_a_broken_cuda_home_does_not_hide_a_good_nvcc(toolkit, nowhere, monkeypatch):
    _program(nowhere / "broken" / "bin" / "nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "broken"))
    good = _program(nowhere / "nvcc", NVCC.format(root=nowhere))
    assert toolkit.find().nvcc == good


@pytest.mark.parametrize(
    ("cxx", "compiler"), [(None, "c++"), ("g++-12", "g++-12"), ("ccache clang++", "clang++"), ("g++ -m64", "g++")]
)
def test_host_compiler(toolkit, cxx, compiler):
    assert toolkit.host_compiler({} if cxx is None else {"CXX": cxx}) == compiler


@pytest.mark.parametrize("emulated", [False, True])
def test_both_builds_have_one_set_of_flags(toolkit, build, tmp_path, emulated):
    """But for what the emulator cannot do without."""
    script = build._script(
        _toolkit(toolkit, "80"), "8.0", ["-gencode", "x"], tmp_path / "out.so", tmp_path, emulated=emulated
    )
    (flags,) = [line for line in script.splitlines() if line.startswith("flags = ")]
    for flag in build.FLAGS:
        assert flag in flags
    for flag in ("-Werror all-warnings", "-Xcompiler -Werror", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION="):
        assert flag in flags
    assert script.count(": compile ") == len(build.sources())


def test_a_variant_is_built_with_its_definitions(toolkit, build, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    ran = []
    monkeypatch.setattr(build.subprocess, "run", lambda command, **_: ran.append(command))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["cuda_build.py", "--variant", "unroll4", "-D", "UNROLL=4", "-D", "NAME=a b"])
    with monkeypatch.context() as patched:
        patched.setattr(build.cuda_toolkit, "find", lambda: _toolkit(toolkit, "80"))
        assert build.main() == 0
    (script,) = (tmp_path / "build" / "variants").glob("*/build.ninja")
    (flags,) = [line for line in script.read_text().splitlines() if line.startswith("flags = ")]
    assert " -DUNROLL=4 " in flags
    assert " '-DNAME=a b' " in flags
    assert f"build {tmp_path / 'build' / 'variants' / 'unroll4.so'}: link" in script.read_text()
    assert script in ran[0]


@pytest.mark.parametrize("arguments", [["out.so", "-D", "UNROLL=4"], ["out.so", "--variant", "a"], []])
def test_definitions_are_for_a_variant_with_a_name(build, monkeypatch, arguments):
    """The library of the package is the one of its sources."""
    monkeypatch.setattr(sys, "argv", ["cuda_build.py", *arguments])
    with pytest.raises(SystemExit):
        build.main()


def _setup(**environment):
    command = [sys.executable, "setup.py", "--name"]
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_cuda_can_be_insisted_on(tmp_path, build):
    if not build.sources():
        pytest.skip("there are no sources of CUDA kernels")
    done = _setup(RESNET_FUSED_CUDA="1", TORCH_CUDA_ARCH_LIST="1.0")
    assert done.returncode != 0
    assert "RESNET_FUSED_CUDA=1 asks for the CUDA library, which cannot be built: " in done.stderr
    assert "Traceback" not in done.stderr


def test_where_cuda_cannot_be_built_a_line_says_so(build):
    if not build.sources():
        pytest.skip("there are no sources of CUDA kernels")
    done = _setup(RESNET_FUSED_CUDA="auto", TORCH_CUDA_ARCH_LIST="1.0")
    assert done.returncode == 0
    assert "resnet_fused: built without the CUDA library: " in done.stderr


def test_cuda_can_be_left_out():
    done = _setup(RESNET_FUSED_CUDA="0", TORCH_CUDA_ARCH_LIST="1.0")
    assert done.returncode == 0
    assert "CUDA library" not in done.stdout + done.stderr


def test_a_wrong_switch_is_refused():
    done = _setup(RESNET_FUSED_CUDA="yes")
    assert done.returncode != 0
    assert "RESNET_FUSED_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr
