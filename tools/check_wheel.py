"""Fails where a wheel is not cp310-abi3, lacks a library or a module, or carries what is not part of the package."""

import os
import pathlib
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resnet_fused"


def required() -> set[str]:
    """The libraries that a wheel must have, whatever the checkout has: RESNET_FUSED_CUDA=1 asks for that of CUDA."""
    names = ["_ops", "_cpu"] + (["_cuda"] if os.environ.get("RESNET_FUSED_CUDA") == "1" else [])
    return {f"resnet_fused/{name}.abi3.so" for name in names}


def faults(wheel: pathlib.Path) -> list[str]:
    """What is wrong with the wheel, in sentences."""
    found = []
    *_, python, abi, _ = wheel.stem.split("-")
    if (python, abi) != ("cp310", "abi3"):
        found.append(f"its tag is {python}-{abi}, not cp310-abi3")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    libraries = {str(path.relative_to(ROOT)) for path in PACKAGE.glob("*.abi3.so")} | required()
    found += [f"it lacks {name}" for name in sorted((modules | libraries) - inside)]
    found += [f"it carries {name}" for name in sorted(inside - modules - libraries)]
    return found


def main(wheels: list[str]) -> int:
    """Returns 1 and prints the faults where there are any."""
    if not wheels:
        print("no wheel given", file=sys.stderr)
        return 1
    status = 0
    for wheel in wheels:
        for fault in faults(pathlib.Path(wheel)):
            print(f"{wheel}: {fault}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
