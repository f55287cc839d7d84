"""Builds the shared objects of the package: one for the schemas, one for each backend.

They use the LibTorch Stable ABI of torch 2.10 and no symbol of Python, so that one wheel (cp310-abi3) serves every
torch from 2.10 and every Python from 3.10. Everything else about the package stands in pyproject.toml.
"""

import os
import pathlib
import shlex
import shutil
import sys

from setuptools import setup

TORCH_TARGET_VERSION = "0x020a000000000000"
ROOT = pathlib.Path(__file__).resolve().parent


def require_compiler() -> None:
    """Names a C++ compiler in CXX, where torch's builder looks, or ends the build with one sentence."""
    asked = os.environ.get("CXX")
    candidates = [asked] if asked else ["c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(shlex.split(candidate)[0]):
            os.environ["CXX"] = candidate
            return
    sys.exit(
        f"resnet_fused needs a C++20 compiler and found no {' or '.join(candidates)}: install one "
        "(Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; conda: `conda install cxx-compiler`) "
        "or name it in CXX."
    )


def extension(name: str, sources: list[str]):
    """A shared object of the package."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        f"resnet_fused.{name}",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            # A product and a sum are fused where the code says so, or the two directions would round differently.
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            # From torch's headers, and from GCC's own for AVX-512.
            "-Wno-unused-parameter",
            "-Wno-maybe-uninitialized",
            "-Wno-unknown-pragmas",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        ],
        extra_link_args=["-Wl,-s"],
        py_limited_api=True,
    )


def main() -> None:
    """Builds what setuptools is asked for."""
    require_compiler()
    from torch.utils.cpp_extension import BuildExtension

    cpu = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    extensions = [extension("_ops", ["csrc/ops.cpp"])]
    if cpu:
        extensions.append(extension("_cpu", cpu))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
