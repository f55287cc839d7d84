"""Takes the libraries that lie in the checkout; builds what is missing with the compilers at hand, or says why not.

Where nothing can be built, the schemas of the operators are written as text, so that Triton and the reference serve.
"""

import os
import subprocess
import sys

import cuda_toolkit
import schemas
import torch

from .step import ROOT, Step, begin

PACKAGE = ROOT / "resnet_fused"


def missing(names: tuple[str, ...]) -> list[str]:
    """Of these shared objects."""
    return [name for name in names if not (PACKAGE / f"{name}.abi3.so").is_file()]


def build(step: Step, command: list[str], names: list[str]) -> None:
    """Runs a build in the time there is; its output is told where it fails."""
    environment = dict(os.environ)
    if step.device.type == "cuda":
        environment.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    else:
        environment["RESNET_FUSED_CUDA"] = "0"
    print(f"building {', '.join(names)}", flush=True)
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            timeout=200,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print("the build took more than 200 s")
        return
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-15:]))


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 also where something is missing in the end: the steps go on with what serves."""
    step = begin("libraries", arguments)
    absent = missing(("_ops", "_cpu"))
    if absent:
        build(step, ["setup.py", "build_ext", "--inplace"], absent)
    absent = missing(("_cuda",)) if step.device.type == "cuda" else []
    if absent:
        try:
            print(f"nvcc: {cuda_toolkit.find()}")
            build(step, ["tools/cuda_build.py", str(PACKAGE / "_cuda.abi3.so")], absent)
        except cuda_toolkit.Unusable as error:
            print(f"no nvcc: {error}")
    if missing(("_ops",)):
        schemas.write(PACKAGE / "ops" / "schemas.txt")
        print("the schemas are written as text, for a package without libraries: Triton and the reference serve")
    for name in ("_ops", "_cpu", "_cuda"):
        path = PACKAGE / f"{name}.abi3.so"
        print(f"{path.name}: {f'{path.stat().st_size / 2**20:.1f} MiB' if path.is_file() else 'missing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
