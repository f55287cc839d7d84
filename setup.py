"""Builds the shared objects of the package: one for the schemas, one for each backend.

They use the LibTorch Stable ABI of torch 2.10 and no symbol of Python, so that one wheel (cp310-abi3) serves every
torch from 2.10 and every Python from 3.10. Everything else about the package stands in pyproject.toml.

RESNET_FUSED_CUDA=0 leaves the CUDA library out, 1 makes it an error where it cannot be built, and auto, the default,
builds it where there is an nvcc. TORCH_CUDA_ARCH_LIST says for which GPUs.

RESNET_FUSED_NO_EXTENSIONS=1 builds a package without shared objects, and needs neither compiler nor torch for it: GPUs
are then Triton's, and CPU tensors go to the reference.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_build  # noqa: E402
import cuda_toolkit  # noqa: E402
import schemas  # noqa: E402

CUDA = "resnet_fused._cuda"


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


def cuda_is_wanted() -> bool:
    """What RESNET_FUSED_CUDA asks for, or whether there is an nvcc; ends the build where it asks in vain."""
    asked = os.environ.get("RESNET_FUSED_CUDA") or "auto"
    if asked not in ("0", "1", "auto"):
        sys.exit(f"RESNET_FUSED_CUDA must be 0, 1 or auto, got {asked!r}.")
    if asked == "0" or not cuda_build.sources():
        return False
    try:
        cuda_toolkit.architectures(cuda_toolkit.find())
    except cuda_toolkit.Unusable as error:
        if asked == "1":
            sys.exit(f"RESNET_FUSED_CUDA=1 asks for the CUDA library, which cannot be built: {error}.")
        print(f"resnet_fused: built without the CUDA library: {error}.", file=sys.stderr)
        return False
    return True


def extension(name: str, sources: list[str]):
    """A shared object of the package."""
    from torch.utils.cpp_extension import CppExtension

    headers = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("*.h")])
    return CppExtension(
        f"resnet_fused.{name}",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in headers],
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
            f"-DTORCH_TARGET_VERSION={cuda_build.TORCH_TARGET_VERSION}",
        ],
        extra_link_args=["-Wl,-s"],
        py_limited_api=True,
    )


class WithSchemas(build_py):
    """Python files, and the schemas of csrc/ops.cpp as text, which stand in for the library that has them."""

    def run(self):
        """As setuptools wants it."""
        super().run()
        schemas.write(pathlib.Path(self.build_lib) / "resnet_fused" / "ops" / "schemas.txt")


def main() -> None:
    """Builds what setuptools is asked for."""
    if os.environ.get("RESNET_FUSED_NO_EXTENSIONS") == "1":
        setup(cmdclass={"build_py": WithSchemas})
        return
    require_compiler()
    # The ninja of an environment that is not activated; torch's builder looks on the PATH alone.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(pathlib.Path(sys.executable).parent)])
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """torch's builder, and nvcc for the CUDA library."""

        def build_extension(self, ext):
            if ext.name != CUDA:
                return super().build_extension(ext)
            output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
            try:
                # The objects stay where they are from build to build: whatever is unchanged is not compiled again.
                used = cuda_build.library(output, ROOT / "build" / "cuda")
            except subprocess.CalledProcessError:
                sys.exit("resnet_fused: the CUDA library does not compile; RESNET_FUSED_CUDA=0 builds without it.")
            print(f"resnet_fused: the CUDA library was built by {used}")

    cpu = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    extensions = [extension("_ops", ["csrc/ops.cpp"])]
    if cpu:
        extensions.append(extension("_cpu", cpu))
    if cuda_is_wanted():
        extensions.append(Extension(CUDA, [], py_limited_api=True))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
