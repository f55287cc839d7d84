"""Finds an nvcc that works, and says for which GPUs to compile.

Nothing here asks for a GPU: a machine without one builds the library for those that have.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping

# Every architecture that torch's CUDA 13 builds serve, and PTX for those to come.
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# What TORCH_CUDA_ARCH_LIST may say in words, as torch's own builder understands them.
NAMED = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
_ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")

_TRIAL = """#include <cuda_runtime.h>
#include <cub/version.cuh>
__global__ void trial(float* x) { x[threadIdx.x] = CUB_VERSION; }
"""


class Unusable(Exception):
    """No nvcc that works; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Code for one compute capability: machine code, and PTX that newer GPUs compile for themselves."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @property
    def code(self) -> str:
        """As nvcc numbers it: 90, 90a, 120."""
        return f"{self.major}{self.minor}{self.suffix}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}" + ("+PTX" if self.ptx else "")


@dataclasses.dataclass(frozen=True)
class Toolkit:
    """An nvcc and what belongs to it."""

    nvcc: pathlib.Path
    root: pathlib.Path
    version: tuple[int, int]
    codes: frozenset[str]
    libraries: tuple[pathlib.Path, ...]
    host_compiler: str

    @property
    def cudart(self) -> pathlib.Path | None:
        """The CUDA runtime to link with."""
        name = f"libcudart.so.{self.version[0]}"
        return next((directory / name for directory in self.libraries if (directory / name).exists()), None)

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]} of {self.root}"


def parse(text: str) -> tuple[Architecture, ...]:
    """Architectures from a list such as ``8.0;9.0+PTX``.

    Raises:
        ValueError: an entry is none.
    """
    for name, meaning in NAMED.items():
        text = re.sub(rf"\b{name}\b", meaning, text)
    found: dict[tuple, Architecture] = {}
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = _ARCHITECTURE.fullmatch(entry)
        if match is None:
            raise ValueError(
                f"{entry!r} in TORCH_CUDA_ARCH_LIST is no compute capability such as 8.6, 9.0a or 12.0+PTX"
            )
        key = int(match[1]), int(match[2]), match[3]
        ptx = bool(match[4]) or (key in found and found[key].ptx)
        found[key] = Architecture(*key, ptx)
    return tuple(found[key] for key in sorted(found))


def architectures(toolkit: Toolkit, environ: Mapping[str, str] = os.environ) -> tuple[Architecture, ...]:
    """For what to compile: TORCH_CUDA_ARCH_LIST, or the default as far as this nvcc knows it.

    Raises:
        Unusable: the nvcc does not know what was asked for.
    """
    asked = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        try:
            wanted = parse(asked)
        except ValueError as error:
            raise Unusable(str(error)) from None
        unknown = [str(a) for a in wanted if f"{a.major}{a.minor}" not in toolkit.codes]
        if unknown:
            raise Unusable(f"{toolkit} does not know {', '.join(unknown)} of TORCH_CUDA_ARCH_LIST")
        return wanted
    known = [a for a in parse(DEFAULT_ARCHITECTURES) if a.code in toolkit.codes]
    if not known:
        raise Unusable(f"{toolkit} knows none of {DEFAULT_ARCHITECTURES}")
    return *known[:-1], dataclasses.replace(known[-1], ptx=True)


def described(wanted: Iterable[Architecture]) -> str:
    """The list as the library gives it back: ``7.5;8.0;12.0+PTX``."""
    return ";".join(map(str, wanted))


def gencode(wanted: Iterable[Architecture]) -> list[str]:
    """nvcc's flags for these architectures."""
    flags = []
    for a in wanted:
        flags += ["-gencode", f"arch=compute_{a.code},code=sm_{a.code}"]
        if a.ptx:
            flags += ["-gencode", f"arch=compute_{a.code},code=compute_{a.code}"]
    return flags


@functools.cache
def find() -> Toolkit:
    """The first nvcc that compiles: of CUDA_HOME, on the PATH, or from NVIDIA's wheels.

    Raises:
        Unusable: there is none; the message says what is wrong with those that were tried.
    """
    reasons = []
    for nvcc in _candidates():
        try:
            return probe(nvcc)
        except Unusable as error:
            reasons.append(str(error))
    if reasons:
        raise Unusable("; ".join(reasons))
    raise Unusable(
        "no nvcc in CUDA_HOME, on the PATH or among NVIDIA's wheels (pip install 'nvidia-cuda-nvcc==13.0.*' "
        "'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-runtime==13.0.*')"
    )


def probe(nvcc: pathlib.Path) -> Toolkit:
    """The toolkit of this nvcc, which may be a script in front of the real one.

    Raises:
        Unusable: it does not run, or does not compile.
    """
    version = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if version is None:
        raise Unusable(f"{nvcc} does not tell its version")
    plan = _output(nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull)
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    root = pathlib.Path(top[1].strip() if top else nvcc.resolve().parent.parent).resolve()
    directories = [pathlib.Path(match).resolve() for match in re.findall(r'"-L([^"]+)"', plan)]
    directories += [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    toolkit = Toolkit(
        nvcc,
        root,
        (int(version[1]), int(version[2])),
        frozenset(re.findall(r"sm_(\w+)", _output(nvcc, "--list-gpu-code"))),
        tuple(directory for directory in dict.fromkeys(directories) if directory.is_dir()),
        host_compiler(),
    )
    _try(toolkit)
    return toolkit


def host_compiler(environ: Mapping[str, str] = os.environ) -> str:
    """The C++ compiler behind nvcc: that of CXX, without a ccache before it."""
    words = shlex.split(environ.get("CXX") or "c++")
    while len(words) > 1 and pathlib.Path(words[0]).name in ("ccache", "sccache", "distcc", "env"):
        words.pop(0)
    return words[0]


def _candidates() -> Iterator[pathlib.Path]:
    seen = set()
    for nvcc in _places():
        if nvcc.is_file() and nvcc not in seen:
            seen.add(nvcc)
            yield nvcc


def _places() -> Iterator[pathlib.Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield pathlib.Path(os.environ[variable], "bin", "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        yield pathlib.Path(on_path)
    for directory in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]):
        if directory:
            yield from sorted(pathlib.Path(directory).glob("nvidia/cu*/bin/nvcc"), reverse=True)


def _try(toolkit: Toolkit) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory, "trial.cu")
        source.write_text(_TRIAL, encoding="utf-8")
        flags = ["-std=c++20", "-ccbin", toolkit.host_compiler, "-c", str(source), "-o", f"{source}.o"]
        _output(toolkit.nvcc, *flags)


def _output(nvcc: pathlib.Path, *arguments: str) -> str:
    """What it prints; where it fails, its first line that says error is the reason."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unusable(f"{nvcc} does not run: {error.strerror}") from None
    printed = done.stdout + done.stderr
    if done.returncode:
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise Unusable(f"{nvcc} does not compile: {reason}")
    return printed
