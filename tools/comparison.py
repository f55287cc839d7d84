"""BN + add + ReLU in training, on paper: launches, counted bytes and registers of our CUDA kernels, our Triton kernels
and those that torch.compile writes for the eager block. Writes docs/comparison.md.

    make comparison         python tools/comparison.py --emulator RUNNER --inductor SCRIPT [--cuda LIBRARY]

RUNNER starts the emulator of CUDA, SCRIPT prints Inductor's source without a GPU. The three are counted by the same
emulator, at shapes of ResNet-50, bfloat16, channels_last; registers are ptxas's for compute capability 8.0.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
PAGE = ROOT / "docs" / "comparison.md"
TARGET = "8.0"
# The ends of ResNet-50's four stages.
SHAPES = ((16, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
_CASE = ("--operator", "bn_add_relu", "--dtype", "bfloat16", "--layout", "NHWC")

_TEXT = """# BN + add + ReLU: our kernels and torch.compile's

Forward and backward of relu(batch_norm(x) + residual) in training, bfloat16, channels_last, at the ends of the stages
of ResNet-50. E is one pass over the tensor: the different bytes that each launch reads and writes, added up over the
launches. Registers are the most that a kernel over the tensor needs of a thread, by ptxas for compute capability
{target}. `make comparison` counts it all again and writes this page; no GPU is needed, and no time is measured.

{table}

- CUDA, one launch: where the tensor fits on the chip a launch keeps what it has read. Registers of the CUDA kernels are
  those of [kernels.md](kernels.md), the worst of all dtypes.
- Triton: a third launch adds up the sums of programs where a channel has more than sixteen of them; its bytes are
  counted.
- torch.compile: the Triton source that Inductor of torch {torch} generates for an H100. It chooses sizes of blocks by
  timing; they are fixed here ({blocks}), which changes registers and not which bytes are touched.

Kernel by kernel, at {first}:

{kernels}
"""


def _lines(command: list, **environment: str) -> list[dict]:
    done = subprocess.run(
        list(map(str, command)), env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode and not done.stdout:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def of_cuda(shape, emulator: pathlib.Path, library: pathlib.Path, on_chip: str) -> list[dict]:
    """Our CUDA kernels: the tool that counts them, and the table of their machine code."""
    command = [emulator, sys.executable, TOOLS / "traffic.py", "--shape", ",".join(map(str, shape)), *_CASE]
    lines = _lines([*command, "--on-chip", on_chip], RESNET_FUSED_EMULATED=str(library), CUDA_ON_CPU_THREADS="1")
    registers = _table_of_registers()
    for line in lines:
        line["registers"] = {kernel: registers.get(_short(kernel)) for kernel in line["kernels"]}
    return lines


def _short(name: str) -> str:
    """A kernel's name without its template's arguments."""
    match = re.search(r"(batch_norm|add_relu)[a-z0-9_]*_kernel", name)
    return match[0] if match else name


def _table_of_registers() -> dict[str, int]:
    rows = re.findall(
        rf"^\| `(\w+)` \| 16 bytes \| {re.escape(TARGET)} \| \d+ \| (\d+) \|",
        (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {name: int(registers) for name, registers in rows}


def of_triton(shape) -> list[dict]:
    """Our Triton kernels."""
    text = ",".join(map(str, shape))
    lines = _lines([sys.executable, TOOLS / "triton_traffic.py", "--shape", text, *_CASE])
    compiled = _lines([sys.executable, TOOLS / "triton_checks.py", "--shape", text, *_CASE, "--target", TARGET])
    registers = {(c["direction"], c["kernel"]): c["registers"] for c in compiled}
    for line in lines:
        line["registers"] = {kernel: registers.get((line["direction"], kernel)) for kernel in line["kernels"]}
    return lines


def of_inductor(shape, script: pathlib.Path) -> list[dict]:
    """torch.compile's kernels."""
    import traffic_of_inductor
    import triton_checks

    source = subprocess.run(
        [sys.executable, str(script), "--shape", ",".join(map(str, shape))], capture_output=True, text=True, check=True
    ).stdout
    registers, run = {}, traffic_of_inductor.Kernel.run

    def run_and_examine(self, *arguments, stream=None):
        run(self, *arguments, stream=stream)
        registers[self.name] = triton_checks.examine(self._compiled, TARGET, triton_checks.static_checks.cuobjdump())

    traffic_of_inductor.Kernel.run = run_and_examine
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "inductor.py")
        path.write_text(source, encoding="utf-8")
        lines = traffic_of_inductor.count(source)
    traffic_of_inductor.Kernel.run = run
    for line in lines:
        line["registers"] = {kernel: registers[kernel]["registers"] for kernel in line["kernels"]}
    return lines


def row(who: str, shape, lines: list[dict]) -> str:
    """Forward and backward of one of the three."""
    by = {line["direction"]: line for line in lines}
    forward, backward = by["forward"], by["backward"]
    registers = [max((r for r in line["registers"].values() if r), default="?") for line in (forward, backward)]
    cells = (
        "x".join(map(str, shape)),
        who,
        f"{forward['launches']} + {backward['launches']}",
        f"{forward['E']:.2f}",
        f"{backward['E']:.2f}",
        f"{forward['E'] + backward['E']:.2f}",
        f"{registers[0]}, {registers[1]}",
    )
    return "| " + " | ".join(cells) + " |"


def kernel_rows(who: str, lines: list[dict]) -> list[str]:
    """Every kernel with its registers."""
    rows = []
    for line in lines:
        if line["direction"] == "eval":
            continue
        for kernel, count in collections.Counter(map(_short, line["kernels"])).items():
            registers = max((r for k, r in line["registers"].items() if _short(k) == kernel and r), default="?")
            times = f" ({count} times)" if count > 1 else ""
            rows.append(f"| {who} | {line['direction']} | `{kernel}`{times} | {registers} |")
    return rows


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--emulator", type=pathlib.Path, required=True)
    parser.add_argument("--inductor", type=pathlib.Path, required=True)
    parser.add_argument("--cuda", type=pathlib.Path, default=ROOT / "build" / "emulated" / "_cuda.abi3.so")
    options = parser.parse_args()
    import torch
    import traffic_of_inductor

    table = [
        "| shape | kernels | launches | forward, E | backward, E | together, E | registers, forward and backward |",
        "|---|---|---|---|---|---|---|",
    ]
    kernels = ["| whose | direction | kernel | registers |", "|---|---|---|---|"]
    for shape in SHAPES:
        found = {
            "CUDA, streaming": of_cuda(shape, options.emulator, options.cuda.resolve(), "0"),
            "CUDA, as it chooses": of_cuda(shape, options.emulator, options.cuda.resolve(), "auto"),
            "Triton": of_triton(shape),
            "torch.compile": of_inductor(shape, options.inductor),
        }
        for who, lines in found.items():
            table.append(row(who, shape, lines))
            print(table[-1], flush=True)
            if shape == SHAPES[0] and who != "CUDA, as it chooses":
                kernels += kernel_rows(who.partition(",")[0], lines)
    PAGE.write_text(
        _TEXT.format(
            target=TARGET,
            table="\n".join(table),
            kernels="\n".join(kernels),
            torch=torch.__version__.partition("+")[0],
            blocks=", ".join(f"{name} {sizes}" for name, sizes in traffic_of_inductor.BLOCKS.items()),
            first="x".join(map(str, SHAPES[0])),
        ),
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
