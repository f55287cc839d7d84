"""Builds the CUDA library with nvcc and ninja: the one of the package, and the one that runs emulated on a CPU.

    python tools/cuda_build.py --emulated build/emulated/_cuda.abi3.so
    python tools/cuda_build.py resnet_fused/_cuda.abi3.so
    python tools/cuda_build.py --variant unroll4 -D UNROLL=4 -D BLOCKS_PER_SM=2    # build/variants/unroll4.so

A variant has further definitions, for ``tools/gpu_check.py --variants`` to time beside others. All have the same
sources and flags but for what the emulator needs. Only what changed is compiled again.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

import cuda_toolkit

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH_TARGET_VERSION = "0x020a000000000000"

FLAGS = (
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-Werror all-warnings",
    "-Xcompiler -fPIC",
    "-Xcompiler -fvisibility=hidden",
    # A product and a sum are fused where the code says so: by the compiler of the host, by that of the device, and by
    # ptxas, which the emulator of PTX does not see.
    "-Xcompiler -ffp-contract=off",
    "--fmad=false",
    "-Xcompiler -Wall",
    "-Xcompiler -Wextra",
    "-Xcompiler -Werror",
    "-DUSE_CUDA",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
)
# Read from its PTX, which must not be compressed; CPU tensors take the place of CUDA ones.
EMULATED_ARCHITECTURE = "8.0+PTX"
EMULATED_FLAGS = (
    "-lineinfo",
    "--compress-mode=none",
    "-DRESNET_FUSED_CUDA_DISPATCH_KEY=CPU",
    "-DRESNET_FUSED_EMULATED",
)

RULES = """
rule compile
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out
  description = nvcc $in
  depfile = $out.d
  deps = gcc

rule link
  command = $cxx -shared -o $out $in $libraries
  description = link $out

rule stub
  command = $cxx -shared -fPIC -x c /dev/null -o $out -Wl,-soname,$soname
"""


def sources() -> list[pathlib.Path]:
    """What the library is compiled from, the largest first: they take longest."""
    found = [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")]
    return sorted(found, key=lambda path: (path.suffix != ".cu", -path.stat().st_size, path.name))


def library(
    output: pathlib.Path, directory: pathlib.Path, emulated: bool = False, definitions: Sequence[str] = ()
) -> str:
    """Builds the library, its objects in ``directory``; returns what it was built with.

    Args:
        definitions: of the preprocessor, such as ``"UNROLL=4"``.

    Raises:
        cuda_toolkit.Unusable: there is no nvcc to build it.
        subprocess.CalledProcessError: it does not compile.
    """
    toolkit = cuda_toolkit.find()
    if emulated:
        wanted = cuda_toolkit.parse(EMULATED_ARCHITECTURE)
        code = wanted[0].code
        flags = [*EMULATED_FLAGS, "-gencode", f"arch=compute_{code},code=compute_{code}"]
    else:
        wanted = cuda_toolkit.architectures(toolkit)
        flags = [*_compression(toolkit), *cuda_toolkit.gencode(wanted)]
    flags += [shlex.quote(f"-D{definition}") for definition in definitions]
    directory.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    script = directory / "build.ninja"
    text = _script(toolkit, cuda_toolkit.described(wanted), flags, output, directory, emulated)
    if not script.is_file() or script.read_text(encoding="utf-8") != text:
        script.write_text(text, encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    subprocess.run([*ninja, "-f", script, "-j", jobs], cwd=ROOT, check=True)
    return f"{toolkit}, for {cuda_toolkit.described(wanted)}"


def _compression(toolkit: cuda_toolkit.Toolkit) -> list[str]:
    """Code for seven architectures is four times smaller so; drivers of CUDA 13 can all read it."""
    return ["--compress-mode=size"] if toolkit.version >= (13, 0) else ["-Xfatbin -compress-all"]


def _script(
    toolkit: cuda_toolkit.Toolkit,
    described: str,
    flags: list[str],
    output: pathlib.Path,
    directory: pathlib.Path,
    emulated: bool,
) -> str:
    torch = _torch()
    flags = [
        *FLAGS,
        *flags,
        f"-ccbin {shlex.quote(toolkit.host_compiler)}",
        f"-I{_quoted(CSRC)}",
        f"-isystem {_quoted(torch / 'include')}",
        f"""'-DRESNET_FUSED_CUDA_ARCHITECTURES="{described}"'""",
    ]
    lines = [
        f"builddir = {_path(directory)}",
        f"nvcc = {_quoted(toolkit.nvcc)}",
        f"cxx = {shlex.quote(toolkit.host_compiler)}",
        f"flags = {' '.join(flags)}",
        RULES,
    ]
    objects = []
    for source in sources():
        objects.append(directory / f"{source.name}.o")
        lines.append(f"build {_path(objects[-1])}: compile {_path(source)}")
    libraries = ["-Wl,--no-as-needed", f"-L{_quoted(torch / 'lib')}", "-ltorch_cpu", "-lc10"]
    stubs = []
    if not emulated:
        # The emulator brings these. What a CPU build of torch lacks is linked with by name alone.
        libraries.append("-Wl,-s")
        cuda = torch / "lib" / "libtorch_cuda.so"
        for path, soname in ((cuda, cuda.name), (toolkit.cudart, f"libcudart.so.{toolkit.version[0]}")):
            if path is None or not path.exists():
                path = directory / "stubs" / soname
                stubs.append(path)
                lines += [f"build {_path(path)}: stub", f"  soname = {soname}"]
            libraries.append(_quoted(path))
    dependencies = " | " + " ".join(map(_path, stubs)) if stubs else ""
    lines.append(f"build {_path(output)}: link {' '.join(map(_path, objects))}{dependencies}")
    lines.append(f"  libraries = {' '.join(libraries)}")
    return "\n".join([*lines, f"default {_path(output)}", ""])


def _torch() -> pathlib.Path:
    import torch

    return pathlib.Path(torch.__file__).resolve().parent


def _path(path: pathlib.Path) -> str:
    """As ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quoted(path: pathlib.Path) -> str:
    """As the shell wants it, in ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def main() -> int:
    """Returns 1 and says why where it cannot be built."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--emulated", action="store_true", help="for the emulator: PTX, under the CPU's dispatch key")
    parser.add_argument("--variant", metavar="NAME", help="build/variants/NAME.so, its objects beside it")
    parser.add_argument("-D", dest="definitions", action="append", default=[], metavar="NAME=VALUE", help="for nvcc")
    parser.add_argument("output", type=pathlib.Path, nargs="?")
    options = parser.parse_args()
    if (options.output is None) == (options.variant is None):
        parser.error("name an output, or a --variant")
    if options.definitions and options.variant is None:
        parser.error("-D makes another library: give it a name with --variant")
    directory = ROOT / "build" / ("emulated/objects" if options.emulated else "cuda")
    if options.variant:
        directory = ROOT / "build" / "variants" / options.variant
        options.output = directory.with_name(f"{options.variant}.so")
    try:
        made = library(options.output.resolve(), directory, options.emulated, options.definitions)
        print(f"{options.output}: built by {made}")
    except cuda_toolkit.Unusable as error:
        print(f"the CUDA library cannot be built: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
